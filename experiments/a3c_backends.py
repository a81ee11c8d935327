"""Threads and processes: steps per second of a3c.py with 1, 2, 4 and 8 workers of either kind, under this Python.

    python experiments/a3c_backends.py
    python experiments/a3c_backends.py --env-id MinAtar/Breakout-v1

About 2 minutes on two cores. Run it under a Python with a GIL and under a free-threaded one to see what the GIL costs.
Beside what a3c.py needs it needs pandas alone.
"""

import platform
import sys
from dataclasses import dataclass
from itertools import product

import tools

from common.run import has_gil

PYTHON = f"Python {platform.python_version()} {'with' if has_gil() else 'without'} a GIL"


@dataclass
class Args(tools.Options):
    seeds: tuple[tools.NonNegativeInt, ...] = (1, 2, 3)
    """one run of each for every seed"""
    env_id: str = "CartPole-v1"
    """environment"""
    total_timesteps: tools.PositiveInt = 60_000
    """steps of each run"""


def main(args: Args) -> int:
    flags = f"--env-id={args.env_id} --total-timesteps={args.total_timesteps} --eval-episodes=0"
    contestants = {
        (PYTHON, backend, workers): tools.script("a3c.py", f"--backend={backend} --num-workers={workers} {flags}")
        for backend, workers in product(("thread", "process"), (1, 2, 4, 8))
    }
    runs = tools.play(contestants, tools.read_speed, args, "a3c_backends")
    measured = tools.succeeded(runs).copy()
    measured[["python", "backend", "workers"]] = measured["name"].tolist()
    table = measured.pivot_table(tools.SPEED, "backend", "workers", aggfunc="median", sort=False).round()
    tools.print_table(f"{PYTHON}, workers:", table)
    return tools.finish(runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
