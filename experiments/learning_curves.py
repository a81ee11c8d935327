"""Learning curves: what the four scripts learn with their defaults, over several seeds.

    pip install -r experiments/requirements.txt
    python experiments/learning_curves.py --parallel 2

10 to 20 minutes on two cores; `--seeds 21` is a trial of two. The table has the mean return over 20 greedy episodes
after training, and how many runs reach 475 on CartPole-v1 or -200 on Pendulum-v1. The picture,
learning_curves.png, shows the return of training episodes, exploration included, over the environment steps of all
workers: a thin line for each seed, and their mean thick with its interval.

Workers are processes, so runs of a3c.py and async_qlearning.py go one after the other; of gae.py and ddpg.py
`--parallel` go at once.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tools

PANELS = {  # environment, goal, and runs with their flags, by script
    "a3c.py": ("CartPole-v1", 475.0, {"8 workers": "--num-workers=8", "16 workers": "--num-workers=16"}),
    "async_qlearning.py": ("CartPole-v1", 475.0, {"8 workers": "--num-workers=8"}),
    "gae.py": ("CartPole-v1", 475.0, {"8 environments": ""}),
    "ddpg.py": ("Pendulum-v1", -200.0, {"1 environment": ""}),
}


@dataclass
class Args(tools.DrawingOptions, tools.ParallelOptions):
    pass


def main(args: Args) -> int:
    figure, panels = tools.new_figure(2, 2, height=6)
    parts, tables = [], []
    for axes, (script, (env_id, goal, runs)) in zip(panels.flat, PANELS.items(), strict=True):
        steps = importlib.import_module(Path(script).stem).Args.total_timesteps

        def read(folder: Path, steps: int = steps) -> dict:
            return tools.read_return(folder) | {"curve": tools.curve(tools.read_table(folder, "episodes"), steps)}

        contestants = {f"{script}, {label}": tools.script(script, flags) for label, flags in runs.items()}
        parallel = args.parallel if script in ("gae.py", "ddpg.py") else 1
        parts.append(tools.play(contestants, read, args, "learning_curves", parallel))
        axes.axhline(goal, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=f"{script}, {env_id}", xlabel="environment steps", ylabel="training return")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params("x", nbins=5)
        learned = parts[-1][parts[-1]["failed"] == ""]
        if learned.empty:
            continue
        tables.append(tools.spread(learned, tools.RETURN))
        reached = (learned[tools.RETURN] >= goal).groupby(learned["name"], sort=False).sum()
        tables[-1]["runs that reach 475 or -200"] = reached
        for number, (name, group) in enumerate(learned.groupby("name", sort=False)):
            tools.draw_curves(axes, group["curve"].tolist(), f"C{number}", name.split(", ")[1])
        if len(runs) > 1:
            axes.legend(loc="lower right")
    tools.succeeded(pd.concat(parts))
    tools.save_figure(figure, args.pictures / "learning_curves.png")
    tools.print_table(f"defaults of: {tools.RETURN}", pd.concat(tables))
    return tools.finish(*parts)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
