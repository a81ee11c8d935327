"""Threads and processes: steps per second of a3c.py with 1, 2, 4 and 8 workers of either kind, under this Python.

    python experiments/a3c_backends.py

About 2 minutes on two cores. Run it under a Python with a GIL and under a free-threaded one to see what the GIL costs.
The repeats of all combinations take turns, so that a machine that slows down slows all of them down.
"""

import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

SCRIPT = Path(__file__).resolve().parents[1] / "a3c.py"
COUNTS = (1, 2, 4, 8)


@dataclass
class Args:
    repeats: int = 3
    """runs of each combination; the table has the median"""
    total_timesteps: int = 60_000
    """steps of each run"""


def steps_per_second(backend: str, num_workers: int, steps: int, seed: int) -> float:
    """Steps of all workers together, from the moment when all of them are ready."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--backend={backend} --num-workers={num_workers} --total-timesteps={steps} --eval-episodes=0 --seed={seed}"
        )
        command = [sys.executable, SCRIPT, *flags.split(), f"--log-dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        last_row = next(Path(folder).glob("*/metrics.csv")).read_text().splitlines()[-1]
        step, seconds = last_row.split(",")[:2]
        return int(step) / float(seconds)


def main(args: Args) -> None:
    speeds = {(backend, count): [] for backend in ("thread", "process") for count in COUNTS}
    for repeat in range(args.repeats):
        for (backend, count), measured in speeds.items():
            measured.append(steps_per_second(backend, count, args.total_timesteps, seed=repeat + 1))
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"| Python {sys.version.split()[0]}, {'with' if gil else 'without'} a GIL | 1 worker | 2 | 4 | 8 |")
    print("|---|---:|---:|---:|---:|")
    for backend in ("thread", "process"):
        row = " | ".join(f"{statistics.median(speeds[backend, count]):,.0f}" for count in COUNTS)
        print(f"| `--backend {backend}` | {row} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
