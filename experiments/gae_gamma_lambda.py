"""The effect of gamma and lambda: what gae.py has learned after a fixed number of steps, over a grid of both.

    pip install -r experiments/requirements.txt
    python experiments/gae_gamma_lambda.py --parallel 2

One or two hours on two cores. It is figure 2, on the right, of Schulman et al. 2016, which shows the performance on a
cart-pole task after 20 iterations and has its best results where both are intermediate. Here a run is `gae.py` with
its defaults but gamma and lambda, on CartPole-v1, for 40,000 steps, which are 20 batches. It has two results: the mean
return of the training episodes that end in the last fifth of the steps, how good it has become, and of all its
episodes, how soon. For each there is a table and a heat map, gae_gamma_lambda.png, with the means over the seeds, and
a table with the interval and the runs of every field.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import tools

GAMMAS = (0.9, 0.96, 0.98, 0.99, 0.995, 1)
LAMBDAS = (0, 0.5, 0.8, 0.92, 0.96, 0.98, 0.99, 1)
LAST, ALL = "episodes that end in the last fifth of the steps", "all episodes"


@dataclass
class Args(tools.DrawingOptions, tools.ParallelOptions):
    env_id: str = "CartPole-v1"
    """environment"""
    total_timesteps: tools.PositiveInt = 40_000
    """steps of each run"""
    gammas: tuple[float, ...] = GAMMAS
    """rows of the grid"""
    lambdas: tuple[float, ...] = LAMBDAS
    """columns of the grid"""


def draw(tables: dict[str, pd.DataFrame], title: str, args: Args) -> None:
    """A heat map for each table, brighter where the return is higher, with every number in its field."""
    figure, panels = tools.new_figure(len(tables), 1, height=4 * len(tables))
    figure.suptitle(title)
    for axes, (name, table) in zip(panels.flat, tables.items(), strict=True):
        image = axes.imshow(table, cmap="viridis", origin="lower", aspect="auto")
        axes.set_xticks(range(len(table.columns)), table.columns)
        axes.set_yticks(range(len(table.index)), table.index)
        axes.set(xlabel="λ", ylabel="γ", title=name)
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                color = "black" if image.norm(value) > 0.5 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
        figure.colorbar(image, label="mean return")
    tools.save_figure(figure, args.pictures / "gae_gamma_lambda.png")


def main(args: Args) -> int:
    def read(folder: Path) -> dict[str, float]:
        episodes = tools.read_table(folder, "episodes")
        return {LAST: tools.last_fifth(episodes, args.total_timesteps), ALL: float(episodes["return"].mean())}

    common = f"--env-id={args.env_id} --total-timesteps={args.total_timesteps} --eval-episodes=0"
    contestants = {
        (f"{gamma:g}", f"{lambda_:g}"): tools.script("gae.py", f"{common} --gamma={gamma:g} --gae-lambda={lambda_:g}")
        for gamma, lambda_ in product(args.gammas, args.lambdas)
    }
    all_runs = tools.play(contestants, read, args, "gae_gamma_lambda", args.parallel)
    runs = tools.succeeded(all_runs).copy()
    runs[["gamma", "lambda"]] = runs["name"].tolist()
    tables = {name: runs.pivot_table(name, "gamma", "lambda", sort=False) for name in (LAST, ALL)}
    title = f"{args.env_id}, {args.total_timesteps:,} steps, mean return of {runs['seed'].nunique()} runs"
    print(f"{title}\n")
    for name, table in tables.items():
        print(f"{name}:\n")
        tools.print_table("gamma \\ lambda", table)
    for name in (LAST, ALL):
        tools.print_table(f"gamma, lambda: {name}", tools.spread(runs, name).sort_values("mean", ascending=False))
    pairs = [((f"{gamma:g}", "0.99"), (f"{gamma:g}", "1")) for gamma in args.gammas]
    if {0.99, 1} <= set(args.lambdas):
        tools.show_differences(all_runs, LAST, pairs, of="gamma, lambda:")
    draw(tables, title, args)
    return tools.finish(all_runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
