"""What async_qlearning.py learns: greedy returns over several seeds, and how much faster it learns with more workers.

    python experiments/async_qlearning_results.py --output async_qlearning_results.json

About 20 minutes on two cores, half of them the part "workers"; `--only cartpole` takes 4. Every run of the first table
is the command in it, with its seeds one after the other; the return is the mean over the 20 greedy episodes of the
run's evaluation.json. A run is stable if it ends with exit code 0 and everything in its metrics.csv is finite. One that
is not is reported and left out of the medians, and the exit code is 1.

"workers": seconds and steps of training until the greedy policy has a mean return of 400 over 20 episodes, on
CartPole-v1, 5 seeds, each with all numbers of workers in turn. Every checkpoint, one per 5,000 steps, is kept during
the training and evaluated after it, in order, until one reaches the target. The paper's column is the speed-up of
asynchronous one-step Q-learning in time to a reference score, averaged over seven Atari games (Mnih et al. 2016,
table 2).
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro
from gymnasium import spaces

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import async_qlearning
from common.evaluation import evaluate

ACROBOT_FLAGS = (
    "--target-network-frequency 2000"  # what the defaults, which are tuned for CartPole-v1, need to be there
)
RUNS = {  # part: (arguments, seeds)
    "cartpole": [("--num-workers 8", 5), ("--num-workers 2", 5), ("--num-workers 16", 5)],
    "sixteen": [("--num-workers 16", 10)],
    "acrobot": [(f"--env-id Acrobot-v1 --total-timesteps 1000000 {ACROBOT_FLAGS}".strip(), 3)],
    "siblings": [("--num-workers 8 --target sarsa", 3), ("--num-workers 8 --n-step 32", 3)],
}
PAPER = {1: 1.0, 2: 3.0, 4: 6.3, 8: 13.3, 16: 24.1}  # workers: speed-up
TARGET, EPISODES, SEEDS = 400.0, 20, 5  # of the part "workers"
POLL_SECONDS = 0.02  # between two looks for a new checkpoint


@dataclass
class Args:
    only: Literal["cartpole", "sixteen", "acrobot", "siblings", "workers"] | None = None
    """run this part alone"""
    seed: int = 1
    """the first seed of each command"""
    output: Path | None = None
    """write all results to this JSON file"""


def run(arguments: str, seed: int, folder: Path) -> int:
    """One run of async_qlearning.py, whose checkpoints become 00000.pt, 00001.pt, ... in `folder`. The exit code."""

    def link_checkpoint() -> None:
        links = sorted(folder.glob("*.pt"))
        for checkpoint in folder.glob("*/checkpoint.pt"):  # one at most
            if not links or not links[-1].samefile(checkpoint):
                os.link(checkpoint, folder / f"{len(links):05}.pt")  # a name that stays when it is renewed

    command = [sys.executable, async_qlearning.__file__, *arguments.split(), f"--seed={seed}", f"--log-dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            link_checkpoint()
            time.sleep(POLL_SECONDS)
    finally:
        process.terminate()  # does nothing to one that has ended
        process.wait()
    link_checkpoint()
    return process.returncode


@cache  # two parts may have a run in common
def train(arguments: str, seed: int) -> dict:
    """A run's greedy return, its steps and its seconds of training, and whether it is stable."""
    with tempfile.TemporaryDirectory() as folder:
        if exit_code := run(arguments, seed, Path(folder)):
            return {"stable": False, "exit_code": exit_code}
        (metrics,), (evaluation,) = (Path(folder).glob(f"*/{name}") for name in ("metrics.csv", "evaluation.json"))
        rows = np.loadtxt(metrics, delimiter=",", skiprows=1, ndmin=2)
        mean = json.loads(evaluation.read_text())["mean_return"]
        stable = bool(np.isfinite(rows).all() and math.isfinite(mean))
        return {"stable": stable, "exit_code": 0, "return": mean, "steps": int(rows[-1, 0]), "seconds": rows[-1, 1]}


def time_to_target(workers: int, seed: int) -> dict:
    """Seconds and steps of training until the greedy policy reaches the target, inf if it never does."""
    evaluation = async_qlearning.Args(env_id="CartPole-v1", seed=seed, eval_episodes=EPISODES)
    network = async_qlearning.QNetwork(4, spaces.Discrete(2))
    with tempfile.TemporaryDirectory() as folder:
        if exit_code := run(f"--num-workers={workers} --log-interval=5000 --eval-episodes=0", seed, Path(folder)):
            return {"stable": False, "exit_code": exit_code}
        for path in sorted(Path(folder).glob("*.pt")):
            checkpoint = torch.load(path, weights_only=True)
            network.load_state_dict(checkpoint["model"])
            _, mean = evaluate(lambda observation: network.to_env(network.act(observation)), evaluation, Path(folder))
            if mean >= TARGET:
                return {"stable": True, "exit_code": 0, "seconds": checkpoint["seconds"], "steps": checkpoint["step"]}
        return {"stable": True, "exit_code": 0, "seconds": math.inf, "steps": math.inf}


def returns_table(args: Args) -> dict[str, list[dict]]:
    """Run the parts that compare returns and print their table. Returns the runs of each command."""
    results = {}
    print("| `python async_qlearning.py` with | seeds | greedy return: median | worst | best | steps per second |")
    print("|---|---|---:|---:|---:|---:|")
    for part, runs in RUNS.items():
        for arguments, seeds in runs if args.only in (None, part) else ():
            seed_range = range(args.seed, args.seed + seeds)
            results[arguments] = [train(arguments, seed) for seed in seed_range]
            stable = [run for run in results[arguments] if run["stable"]]
            returns = [run["return"] for run in stable] or [math.nan]
            speed = median([run["steps"] / run["seconds"] for run in stable] or [math.nan])
            summary = f"{median(returns):.1f} | {min(returns):.1f} | {max(returns):.1f} | {speed:,.0f}"
            print(f"| `{arguments}` | {seed_range[0]}–{seed_range[-1]} | {summary} |", flush=True)
    return results


def workers_table(args: Args) -> dict[str, list[dict]]:
    """Run the part "workers" and print its table. Returns the runs of each number of workers."""
    results = {workers: [] for workers in PAPER}
    for seed in range(args.seed, args.seed + SEEDS):
        for workers, runs in results.items():
            runs.append(time_to_target(workers, seed))
            print(f"{workers} workers, seed {seed}: {runs[-1]}", file=sys.stderr)

    def values(name: str, workers: int) -> list[float]:
        return [run[name] for run in results[workers] if run["stable"]] or [math.nan]

    def number(value: float, digits: int) -> str:
        words = "no figure" if math.isnan(value) else "not reached"
        return f"{value:,.{digits}f}" if math.isfinite(value) else words

    def summary(values: list[float], digits: int) -> str:
        return f"{number(median(values), digits)} | {number(min(values), digits)}–{number(max(values), digits)}"

    print(
        f"\n| workers | seconds to {TARGET:g} | range | steps to {TARGET:g} | range | speed-up in seconds | paper's |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for workers, paper in PAPER.items():
        seconds, steps = values("seconds", workers), values("steps", workers)
        ratio = median(values("seconds", 1)) / median(seconds)
        speed_up = f"{ratio:.1f}" if 0 < ratio < math.inf else "no figure"
        print(f"| {workers} | {summary(seconds, 1)} | {summary(steps, 0)} | {speed_up} | {paper} |")
    return {f"workers: {workers}": runs for workers, runs in results.items()}


def main(args: Args) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that takes the run along
    results = returns_table(args) if args.only != "workers" else {}
    if args.only in (None, "workers"):
        results |= workers_table(args)
    runs = [(command, run) for command, trained in results.items() for run in trained]
    unstable = [f"{command}: {run}" for command, run in runs if not run["stable"]]
    print("\n" + ("\n".join(f"NOT STABLE: {line}" for line in unstable) or f"All {len(runs)} runs are stable."))
    if args.output:  # null stands for "not reached"
        for _, run in runs:
            run.update({key: None for key, value in run.items() if not math.isfinite(value)})
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return int(bool(unstable))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
