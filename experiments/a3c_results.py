"""What a3c.py learns: greedy returns over several seeds, and how long it takes to begin.

    python experiments/a3c_results.py --output a3c_results.json

About 8 minutes on two cores, most of them Pendulum; `--only cartpole` takes 3. Every run is the command in the table,
with its seeds one after the other; the return is the mean over the 20 greedy episodes of the run's evaluation.json. The
start is timed as a whole process that trains a single step with 8 workers, beside one that only imports what it needs.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
ACROBOT = "--env-id Acrobot-v1 --total-timesteps 500000"
PENDULUM = "--env-id Pendulum-v1 --total-timesteps 1500000 --t-max 16 --learning-rate 1e-3 --gamma 0.9 --ent-coef 0.1"
RUNS = {  # part: (arguments, seeds)
    "cartpole": [("--num-workers 8", 5), ("--num-workers 2", 5), ("--num-workers 16", 5)],
    "acrobot": [(ACROBOT, 3)],
    "pendulum": [(PENDULUM, 3)],
}


@dataclass
class Args:
    only: Literal["cartpole", "acrobot", "pendulum", "start"] | None = None
    """run this part alone"""
    seed: int = 1
    """the first seed of each command"""
    output: Path | None = None
    """write all results to this JSON file"""


def train(arguments: str, seed: int) -> dict:
    """One run of a3c.py: its greedy return, its steps and its seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "a3c.py", *arguments.split(), f"--seed={seed}", f"--log-dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (run,) = Path(folder).iterdir()
        step, seconds = (run / "metrics.csv").read_text().splitlines()[-1].split(",")[:2]
        mean = json.loads((run / "evaluation.json").read_text())["mean_return"]
        return {"return": mean, "steps": int(step), "seconds": float(seconds)}


def seconds_of(*command: object) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def time_start(repeats: int = 5) -> list[tuple[float, float]]:
    """Seconds of a whole run of one step with 8 workers, and of the imports alone, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        run = (ROOT / "a3c.py", "--num-workers=8", "--total-timesteps=1", "--eval-episodes=0", f"--log-dir={folder}")
        return [(seconds_of(*run), seconds_of("-c", "import torch, gymnasium")) for _ in range(repeats)]


def main(args: Args) -> None:
    results = {}
    print("| `python a3c.py` with | seeds | greedy return: median | worst | best | steps per second |")
    print("|---|---|---:|---:|---:|---:|")
    for part, runs in RUNS.items():
        for arguments, seeds in runs if args.only in (None, part) else ():
            seed_range = range(args.seed, args.seed + seeds)
            trained = results[arguments] = [train(arguments, seed) for seed in seed_range]
            returns = [run["return"] for run in trained]
            speed = median(run["steps"] / run["seconds"] for run in trained)
            summary = f"{median(returns):.1f} | {min(returns):.1f} | {max(returns):.1f} | {speed:,.0f}"
            print(f"| `{arguments}` | {seed_range[0]}–{seed_range[-1]} | {summary} |", flush=True)
    if args.only in (None, "start"):
        results["start"] = time_start()
        difference = median(run - imports for run, imports in results["start"])
        imports = median(imports for _, imports in results["start"])
        print(f"\nStart: {difference:.2f} s more than the {imports:.2f} s of `import torch, gymnasium`")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
