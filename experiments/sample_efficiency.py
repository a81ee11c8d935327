"""Sample efficiency: how many environment steps ddpg.py and a3c.py need on Pendulum-v1.

    pip install -r experiments/requirements.txt
    python experiments/sample_efficiency.py --output-dir sample_efficiency

About 5 minutes on two idle cores; `--repeats 1 --ddpg-steps 5000 --a3c-steps 50000` is a trial of one. ddpg.py, which
is off-policy and learns from each transition many times, has its defaults and 10,000 steps. a3c.py, which is on-policy
and throws each away after one update, has the settings that the main README gives for Pendulum-v1, with 8 workers, and
1,500,000 steps.

The measure is the mean return of the last 20 training episodes, exploration included: the steps of all workers and the
seconds of training until it is at least -300 and -200, and what it is at the end. Beside that stands the greedy return,
a mean over 20 episodes after training. Runs go one after the other, so that seconds can be compared; with `--parallel`
so many of ddpg.py go at once, each on a single core, while one of a3c.py, which keeps both cores busy, is always alone.

Into the folder `--output-dir` go sample_efficiency.csv with a row for each run, where inf stands for "not reached", and
sample_efficiency.png: the measure over the steps, on a logarithmic scale, its mean over the seeds, and a band from the
worst to the best. A run that fails or exceeds `--time-limit` is left out and reported, and the exit code is 1.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import tyro

matplotlib.use("agg")  # no display is needed
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = "Pendulum-v1"
FLAGS = {
    "ddpg.py": "",
    "a3c.py": "--num-workers 8 --t-max 16 --learning-rate 1e-3 --gamma 0.9 --ent-coef 0.1",
}
TARGETS = (-300, -200)  # mean returns
WINDOW = 20  # training episodes that they are means of
EPISODES = 20  # of an evaluation
POINTS = 400  # of a curve
POLL_SECONDS = 0.05  # between two looks at the runs under way


@dataclass
class Args:
    repeats: int = 3
    """runs of each algorithm, with seeds seed, seed + 1, ..."""
    seed: int = 1
    """seed of the first run"""
    ddpg_steps: int = 10_000
    """steps of each run of ddpg.py"""
    a3c_steps: int = 1_500_000
    """steps of each run of a3c.py, its workers together"""
    parallel: int = 1
    """runs of ddpg.py that go at once; more than 1 makes seconds incomparable, and changes nothing else"""
    time_limit: float = 3600.0
    """seconds after which a run is killed and counted as failed"""
    output_dir: Path = Path("sample_efficiency")
    """folder for sample_efficiency.csv and sample_efficiency.png"""


def read(folder: Path) -> tuple[dict[str, float], pd.DataFrame]:
    """What a run has reached, by column of the table of runs, and its episodes with the mean of the last WINDOW."""
    (evaluation,), (table,) = folder.glob("*/evaluation.json"), folder.glob("*/episodes.csv")
    episodes = pd.read_csv(table).sort_values("step", kind="stable", ignore_index=True)
    if len(episodes) < WINDOW:
        raise ValueError(f"fewer than {WINDOW} episodes have ended")
    episodes["mean"] = episodes["return"].rolling(WINDOW).mean()
    results = {}
    for target in TARGETS:
        reached = episodes[episodes["mean"] >= target]
        steps, seconds = reached[["step", "time"]].iloc[0] if len(reached) else (np.inf, np.inf)
        results |= {f"steps_to_{target}": steps, f"seconds_to_{target}": seconds}
    greedy = json.loads(evaluation.read_text())["mean_return"]
    return results | {"training_return": episodes["mean"].iloc[-1], "greedy_return": greedy}, episodes


def play(jobs: list[tuple[str, int]], steps: int, parallel: int, args: Args, failures: list[str]) -> Iterator[tuple]:
    """Run each (script, seed) for `steps` steps in a process of its own, `parallel` at once.

    Yields script, seed and what `read` returns as runs end. Of one that fails it yields nothing; `failures` then says
    why.
    """
    waiting, running = jobs[::-1], {}
    with tempfile.TemporaryDirectory() as root:
        try:
            while waiting or running:
                while waiting and len(running) < max(1, parallel):
                    script, seed = job = waiting.pop()
                    folder = Path(tempfile.mkdtemp(dir=root))
                    flags = f"{FLAGS[script]} --env-id={ENVIRONMENT} --seed={seed} --total-timesteps={steps}"
                    flags += f" --eval-episodes={EPISODES}"
                    command = [sys.executable, ROOT / script, *flags.split(), f"--log-dir={folder}"]
                    with open(folder / "output.txt", "w") as output:
                        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
                    running[job] = process, folder, time.monotonic() + args.time_limit
                time.sleep(POLL_SECONDS)
                for job, (process, folder, deadline) in list(running.items()):
                    late = time.monotonic() > deadline
                    if process.poll() is None and not late:
                        continue
                    process.kill()  # does nothing to one that has ended; the workers of a3c.py end with it
                    del running[job]
                    try:
                        if process.wait():
                            lines = (folder / "output.txt").read_text().splitlines()[-5:]
                            cause = f"killed after {args.time_limit:g} s" if late else f"exit code {process.returncode}"
                            raise ValueError(f"{cause}: {' | '.join(line.strip() for line in lines)}")
                        results = read(folder)
                    except ValueError as error:
                        failures.append("{}, seed {}".format(*job) + f": {error}")
                        print(f"FAILED: {failures[-1]}", file=sys.stderr)
                    else:
                        yield *job, *results
        finally:
            for process, *_ in running.values():
                process.kill()
                process.wait()


def cell(value: float) -> str:
    if not np.isfinite(value):
        return "no figure" if np.isnan(value) else "not reached"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def markdown(runs: pd.DataFrame) -> str:
    """Two tables: steps and seconds to the targets, and the returns at the end."""
    lines = [f"| mean of {WINDOW} training episodes | steps: median | min | max | seconds: median | min | max |"]
    lines += ["|---" + "|---:" * 6 + "|"]
    for target in TARGETS:
        for script in FLAGS:
            columns = [f"{unit}_to_{target}" for unit in ("steps", "seconds")]
            numbers = runs.loc[runs["script"] == script, columns].agg(["median", "min", "max"]).T.to_numpy().ravel()
            lines.append(f"| {target}, {script} | {' | '.join(map(cell, numbers))} |")
    lines += ["", "| at the end | training return: mean | worst | best | greedy return: mean | worst | best |"]
    lines += ["|---" + "|---:" * 6 + "|"]
    for script in FLAGS:
        columns = ["training_return", "greedy_return"]
        numbers = runs.loc[runs["script"] == script, columns].agg(["mean", "min", "max"]).T.to_numpy().ravel()
        lines.append(f"| {script} | {' | '.join(map(cell, numbers))} |")
    return "\n".join(lines)


def step_ratio(runs: pd.DataFrame, target: int) -> str:
    """How many times the steps of ddpg.py a3c.py needs, by the medians; in words if one has not reached the target."""
    ours, theirs = (runs.loc[runs["script"] == script, f"steps_to_{target}"].median() for script in FLAGS)
    words = f"{theirs / ours:,.0f}" if np.isfinite(ours) and np.isfinite(theirs) else "no figure"
    return f"Steps to {target}, a3c.py / ddpg.py, ratio of medians: {words}"


def curve(episodes: pd.DataFrame, grid: np.ndarray) -> np.ndarray:
    """Mean return of the last WINDOW episodes at the steps of `grid`, NaN before there are as many."""
    ended = np.searchsorted(episodes["step"], grid, side="right")
    return np.concatenate(([np.nan], episodes["mean"]))[ended]


def draw(curves: dict[str, list[pd.DataFrame]], steps: dict[str, int], path: Path) -> None:
    """The mean over the seeds, and a band from the worst to the best, over the steps."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for target in TARGETS:
        axes.axhline(target, color="grey", linewidth=0.8, linestyle=":")
    for number, (script, episodes) in enumerate(curves.items()):
        if episodes:
            grid = np.geomspace(1_000, max(steps[script], 1_001), POINTS)
            values, color = np.array([curve(table, grid) for table in episodes]), f"C{number}"
            axes.plot(grid, values.mean(0), color=color, label=f"{script}, {steps[script]:,} steps")
            axes.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="environment steps", ylabel=f"training return, mean of {WINDOW} episodes")
    axes.set_title(f"{ENVIRONMENT}, mean of {max(map(len, curves.values()))} runs")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main(args: Args) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that takes the runs along
    args.output_dir.mkdir(parents=True, exist_ok=True)
    seeds, steps = range(args.seed, args.seed + args.repeats), {"ddpg.py": args.ddpg_steps, "a3c.py": args.a3c_steps}
    parallel, results, curves, failures = {"ddpg.py": args.parallel, "a3c.py": 1}, [], {name: [] for name in FLAGS}, []
    for name in FLAGS:
        jobs = [(name, seed) for seed in seeds]
        for script, seed, values, episodes in play(jobs, steps[name], parallel[name], args, failures):
            results.append({"script": script, "seed": seed} | values)
            curves[script].append(episodes)
            words = ", ".join(f"{column} {value:,.1f}" for column, value in values.items())
            print(f"{script}, seed {seed}: {words}", file=sys.stderr, flush=True)
    units = [f"{unit}_to_{target}" for target in TARGETS for unit in ("steps", "seconds")]
    runs = pd.DataFrame(results, columns=["script", "seed", *units, "training_return", "greedy_return"])
    runs.round(3).to_csv(args.output_dir / "sample_efficiency.csv", index=False)
    print(f"{ENVIRONMENT}, {args.repeats} runs\n\n{markdown(runs)}\n")
    print("\n".join(step_ratio(runs, target) for target in TARGETS))
    draw(curves, steps, args.output_dir / "sample_efficiency.png")
    print("\n" + ("\n".join(f"FAILED: {line}" for line in failures) or "No run failed."))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
