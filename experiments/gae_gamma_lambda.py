"""The effect of gamma and lambda: what gae.py has learned after a fixed number of steps, over a grid of both.

    pip install -r experiments/requirements.txt
    python experiments/gae_gamma_lambda.py --parallel 2 --output-dir gae_gamma_lambda

About 7 minutes on two cores. It is figure 2, on the right, of Schulman et al. 2016, which shows the performance on a
cart-pole task after 20 iterations and has its best results where both are intermediate. Here a run is `gae.py` with
its defaults but gamma and lambda, on CartPole-v1, for 40,000 steps, which are 20 batches. It has two results: the mean
return of the training episodes that end in the last fifth of the steps, how good it has become, and of all its
episodes, how soon. The tables have the means over the seeds.

Into the folder `--output-dir` go gamma_lambda.csv, with a row for each run and the results as `return` and
`return_all`, and gamma_lambda.png, the heat maps. A run that fails is left out and reported, and the exit code is 1.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import tyro

matplotlib.use("agg")  # no display is needed
import matplotlib.pyplot as plt

SCRIPT = Path(__file__).resolve().parents[1] / "gae.py"
GAMMAS = (0.9, 0.96, 0.98, 0.99, 0.995, 1)
LAMBDAS = (0, 0.5, 0.8, 0.92, 0.96, 0.98, 0.99, 1)
POLL_SECONDS = 0.05  # between two looks at the runs under way


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """environment"""
    total_timesteps: int = 40_000
    """steps of each run"""
    repeats: int = 3
    """runs of each pair of gamma and lambda, with seeds seed, seed + 1, ..."""
    seed: int = 1
    """seed of the first run"""
    parallel: int = 1
    """runs that go at once; their results do not depend on it"""
    output_dir: Path = Path("gae_gamma_lambda")
    """folder for gamma_lambda.csv and gamma_lambda.png"""


def mean_returns(folder: Path, steps: int) -> tuple[float, float]:
    """Mean return of a run's episodes in the last fifth of the steps, and of all. ValueError: there is none."""
    (table,) = folder.glob("*/episodes.csv")
    episodes = pd.read_csv(table)
    last = episodes[episodes["step"] > 0.8 * steps]
    if last.empty:
        raise ValueError("no episode has ended in the last fifth of the steps")
    return last["return"].mean(), episodes["return"].mean()


def play(jobs: list[tuple[int, float, float]], args: Args, failures: list[str]) -> Iterator[tuple]:
    """Run gae.py for each (seed, gamma, lambda), `args.parallel` at once. Yields these and its results as runs end."""
    waiting, running = jobs[::-1], {}
    with tempfile.TemporaryDirectory() as root:
        try:
            while waiting or running:
                while waiting and len(running) < max(1, args.parallel):
                    seed, gamma, lambda_ = job = waiting.pop()
                    folder = Path(tempfile.mkdtemp(dir=root))
                    flags = f"--env-id={args.env_id} --total-timesteps={args.total_timesteps} --eval-episodes=0"
                    flags += f" --seed={seed} --gamma={gamma} --gae-lambda={lambda_} --log-dir={folder}"
                    with open(folder / "output.txt", "w") as output:
                        command = [sys.executable, SCRIPT, *flags.split()]
                        running[job] = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT), folder
                time.sleep(POLL_SECONDS)
                for job in [job for job, (process, _) in running.items() if process.poll() is not None]:
                    process, folder = running.pop(job)
                    try:
                        if process.returncode:
                            lines = (folder / "output.txt").read_text().splitlines()[-5:]
                            raise ValueError(f"exit code {process.returncode}: {' | '.join(lines)}")
                        yield *job, *mean_returns(folder, args.total_timesteps)
                    except ValueError as error:
                        failures.append("seed {}, gamma {}, lambda {}".format(*job) + f": {error}")
                        print(f"FAILED: {failures[-1]}", file=sys.stderr)
        finally:
            for process, _ in running.values():
                process.kill()
                process.wait()


def markdown(table: pd.DataFrame) -> str:
    def cell(value: float) -> str:
        return "no figure" if np.isnan(value) else f"{value:.1f}"

    lines = [f"| gamma \\ lambda | {' | '.join(f'{name:g}' for name in table.columns)} |"]
    lines += ["|---:" * (len(table.columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name:g} | {' | '.join(map(cell, row))} |" for name, row in table.iterrows()])


def draw(tables: dict[str, pd.DataFrame], title: str, path: Path) -> None:
    """A heat map for each table, brighter where the return is higher, with every number in its field."""
    figure, panels = plt.subplots(len(tables), figsize=(8, 4 * len(tables)), layout="constrained")
    figure.suptitle(title)
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        image = axes.imshow(table, cmap="viridis", origin="lower", aspect="auto")
        axes.set_xticks(range(len(table.columns)), [f"{value:g}" for value in table.columns])
        axes.set_yticks(range(len(table.index)), [f"{value:g}" for value in table.index])
        axes.set(xlabel="λ", ylabel="γ", title=name)
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                color = "black" if image.norm(value) > 0.5 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
        figure.colorbar(image, label="mean return")
    figure.savefig(path, dpi=100)


def report(runs: pd.DataFrame, args: Args) -> None:
    """Write and print what the runs, a row each, amount to."""
    runs.to_csv(args.output_dir / "gamma_lambda.csv", index=False)
    names = {"return": "episodes that end in the last fifth of the steps", "return_all": "all episodes"}
    tables = {
        name: runs.pivot_table(index="gamma", columns="lambda", values=column).reindex(index=GAMMAS, columns=LAMBDAS)
        for column, name in names.items()
    }
    title = f"{args.env_id}, {args.total_timesteps:,} steps, mean return of {args.repeats} runs"
    print(title, *(f"{name}:\n\n{markdown(table)}" for name, table in tables.items()), sep="\n\n")
    draw(tables, title, args.output_dir / "gamma_lambda.png")


def main(args: Args) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that takes the runs along
    args.output_dir.mkdir(parents=True, exist_ok=True)
    seeds, results, failures = range(args.seed, args.seed + args.repeats), [], []
    for result in play(list(product(seeds, GAMMAS, LAMBDAS)), args, failures):
        results.append(result)
        print("seed {}, gamma {}, lambda {}: {:.1f}, all episodes {:.1f}".format(*result), file=sys.stderr)
    runs = pd.DataFrame(results, columns=["seed", "gamma", "lambda", "return", "return_all"])
    report(runs.sort_values(["seed", "gamma", "lambda"]), args)
    print("\n" + ("\n".join(f"FAILED: {line}" for line in failures) or "No run failed."))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
