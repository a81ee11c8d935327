"""The branches of ddpg.py: the original DPG, target networks, and target networks with batch normalisation.

    pip install -r experiments/requirements.txt
    python experiments/ddpg_branches.py --parallel 2 --output-dir ddpg_branches

About 12 minutes on two cores; `--repeats 1 --total-timesteps 1500` is a trial of two. It is the figure of Lillicrap et
al. 2016 that shows learning curves with and without target networks and batch normalisation, but for learning from
pixels, on two environments: Pendulum-v1 for 10,000 steps and InvertedPendulum-v5 for 30,000, 3 seeds. Within an
environment the branches differ by one flag alone.

The table has the greedy return, a mean over 20 episodes after training, and the return of training, the mean of the
episodes that end in the last fifth of the steps; mean, worst and best are over the seeds. Into the folder
`--output-dir` go ddpg_branches.csv with a row for each run, and ddpg_branches.png, the learning curves: the mean return
of the last 10 training episodes (at the beginning fewer), its mean over the seeds, and a band from the worst to the
best. A run that fails or exceeds `--time-limit` is left out and reported, and the exit code is 1.
"""

import json
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

SCRIPT = Path(__file__).resolve().parents[1] / "ddpg.py"
# flags of ddpg.py for all branches; what is not said is its default
PENDULUM_FLAGS = ""
INVERTED_FLAGS = "--actor-learning-rate 1e-4"
ENVIRONMENTS = {"Pendulum-v1": (10_000, PENDULUM_FLAGS), "InvertedPendulum-v5": (30_000, INVERTED_FLAGS)}
BRANCHES = {
    "original DPG": "--no-target-network",
    "target networks": "",
    "target networks, batch normalisation": "--batch-norm",
}
EPISODES = 20  # of an evaluation
WINDOW = 10  # training episodes whose mean return is a point of a learning curve
POINTS = 200  # of a learning curve
POLL_SECONDS = 0.05  # between two looks at the runs under way


@dataclass
class Args:
    repeats: int = 3
    """runs of each branch on each environment, with seeds seed, seed + 1, ..."""
    seed: int = 1
    """seed of the first run"""
    total_timesteps: int | None = None
    """for a trial: steps of each run, in place of those of its environment"""
    parallel: int = 1
    """runs that go at once; their results do not depend on it"""
    time_limit: float = 3600.0
    """seconds after which a run is killed and counted as failed"""
    output_dir: Path = Path("ddpg_branches")
    """folder for ddpg_branches.csv and ddpg_branches.png"""


def steps_of(env_id: str, args: Args) -> int:
    return args.total_timesteps or ENVIRONMENTS[env_id][0]


def read(folder: Path, steps: int) -> tuple[float, float, pd.DataFrame]:
    """A run's greedy return, its mean training return of the last fifth of the steps, and all of its episodes.

    ValueError: no episode has ended in the last fifth.
    """
    (evaluation,), (table,) = folder.glob("*/evaluation.json"), folder.glob("*/episodes.csv")
    episodes = pd.read_csv(table)
    last = episodes[episodes["step"] > 0.8 * steps]
    if last.empty:
        raise ValueError("no episode has ended in the last fifth of the steps")
    return json.loads(evaluation.read_text())["mean_return"], last["return"].mean(), episodes


def play(jobs: list[tuple[int, str, str]], args: Args, failures: list[str]) -> Iterator[tuple]:
    """Run ddpg.py for each (seed, environment, branch), `args.parallel` at once.

    Yields these and what `read` returns as runs end. Of one that fails it yields nothing; `failures` then says why.
    """
    waiting, running = jobs[::-1], {}
    with tempfile.TemporaryDirectory() as root:
        try:
            while waiting or running:
                while waiting and len(running) < max(1, args.parallel):
                    seed, env_id, branch = job = waiting.pop()
                    folder = Path(tempfile.mkdtemp(dir=root))
                    flags = f"{ENVIRONMENTS[env_id][1]} {BRANCHES[branch]} --env-id={env_id} --seed={seed}"
                    flags += f" --total-timesteps={steps_of(env_id, args)} --eval-episodes={EPISODES}"
                    command = [sys.executable, SCRIPT, *flags.split(), f"--log-dir={folder}"]
                    with open(folder / "output.txt", "w") as output:
                        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
                    running[job] = process, folder, time.monotonic() + args.time_limit
                time.sleep(POLL_SECONDS)
                for job, (process, folder, deadline) in list(running.items()):
                    late = time.monotonic() > deadline
                    if process.poll() is None and not late:
                        continue
                    process.kill()  # does nothing to one that has ended
                    del running[job]
                    try:
                        if process.wait():
                            lines = (folder / "output.txt").read_text().splitlines()[-5:]
                            cause = f"killed after {args.time_limit:g} s" if late else f"exit code {process.returncode}"
                            raise ValueError(f"{cause}: {' | '.join(line.strip() for line in lines)}")
                        results = read(folder, steps_of(job[1], args))
                    except ValueError as error:
                        failures.append("seed {}, {}, {}".format(*job) + f": {error}")
                        print(f"FAILED: {failures[-1]}", file=sys.stderr)
                    else:
                        yield *job, *results
        finally:
            for process, *_ in running.values():
                process.kill()
                process.wait()


def markdown(runs: pd.DataFrame, env_id: str) -> str:
    """The table of an environment: a row for each branch."""

    def cell(value: float) -> str:
        return "no figure" if np.isnan(value) else f"{value:,.1f}"

    lines = [f"| {env_id} | greedy return: mean | worst | best | training return, last fifth: mean |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for branch in BRANCHES:
        rows = runs[(runs["env_id"] == env_id) & (runs["branch"] == branch)]
        greedy = rows["greedy_return"]
        values = greedy.mean(), greedy.min(), greedy.max(), rows["training_return"].mean()
        lines.append(f"| {branch} | {' | '.join(map(cell, values))} |")
    return "\n".join(lines)


def curve(episodes: pd.DataFrame, grid: np.ndarray) -> np.ndarray:
    """Mean return of the last WINDOW episodes at the steps of `grid`, NaN before the end of the first."""
    means = episodes["return"].rolling(WINDOW, min_periods=1).mean().to_numpy()
    ended = np.searchsorted(episodes["step"], grid, side="right")
    return np.concatenate(([np.nan], means))[ended]


def draw(curves: dict[tuple[str, str], list[pd.DataFrame]], args: Args, path: Path) -> None:
    """A panel for each environment with the learning curve of each branch."""
    figure, panels = plt.subplots(1, len(ENVIRONMENTS), figsize=(11, 4.5), layout="constrained")
    for env_id, axes in zip(ENVIRONMENTS, panels, strict=True):
        grid = np.linspace(0, steps_of(env_id, args), POINTS + 1)
        for number, branch in enumerate(BRANCHES):
            if episodes := curves.get((env_id, branch)):
                values, color = np.array([curve(table, grid) for table in episodes]), f"C{number}"
                axes.plot(grid, values.mean(0), color=color, label=branch)
                axes.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="environment steps", ylabel=f"training return, mean of {WINDOW} episodes", title=env_id)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(BRANCHES))
    figure.savefig(path, dpi=120)


def main(args: Args) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that takes the runs along
    args.output_dir.mkdir(parents=True, exist_ok=True)
    seeds, results, curves, failures = range(args.seed, args.seed + args.repeats), [], {}, []
    for *result, episodes in play(list(product(seeds, ENVIRONMENTS, BRANCHES)), args, failures):
        seed, env_id, branch, *returns = result
        results.append((env_id, branch, seed, *returns))
        curves.setdefault((env_id, branch), []).append(episodes)
        print("seed {}, {}, {}: greedy {:.1f}, last fifth {:.1f}".format(*result), file=sys.stderr, flush=True)
    runs = pd.DataFrame(results, columns=["env_id", "branch", "seed", "greedy_return", "training_return"])
    runs.round(3).sort_values(["env_id", "branch", "seed"]).to_csv(args.output_dir / "ddpg_branches.csv", index=False)
    for env_id in ENVIRONMENTS:
        print(f"{env_id}, {steps_of(env_id, args):,} steps, {args.repeats} runs\n\n{markdown(runs, env_id)}\n")
    draw(curves, args, args.output_dir / "ddpg_branches.png")
    print("\n".join(f"FAILED: {line}" for line in failures) or "No run failed.")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
