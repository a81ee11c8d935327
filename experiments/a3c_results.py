"""What a3c.py learns: greedy returns over several seeds, and how long it takes to begin.

    python experiments/a3c_results.py --output a3c_results.csv

About 8 minutes on two cores, most of them Pendulum; `--only cartpole` takes 3. Every run is the command in the table;
its return is the mean over the 20 greedy episodes of its evaluation.json. The start is timed as a whole process that
trains a single step with 8 workers, beside one that only imports what it needs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import tools

ACROBOT = "--env-id Acrobot-v1 --total-timesteps 500000"
PENDULUM = "--env-id Pendulum-v1 --total-timesteps 1500000 --t-max 16 --learning-rate 1e-3 --gamma 0.9 --ent-coef 0.1"
PARTS = {  # flags of each command, and the number of seeds
    "cartpole": (["--num-workers 8", "--num-workers 2", "--num-workers 16"], 5),
    "acrobot": ([ACROBOT], 3),
    "pendulum": ([PENDULUM], 3),
}
START = {
    "a run of one step": tools.script("a3c.py", "--num-workers=8 --total-timesteps=1 --eval-episodes=0"),
    "the imports alone": tools.Command(["-c", "import torch, gymnasium"], tools.ROOT),
}


@dataclass
class Args:
    only: Literal["cartpole", "acrobot", "pendulum", "start"] | None = None
    """run this part alone"""
    seed: int = 1
    """the first seed of each command"""
    total_timesteps: int | None = None
    """for a trial: steps of each run"""
    output: Path | None = None
    """write every run to this CSV file"""


def main(args: Args) -> int:
    runs = tools.compare_returns("a3c.py", PARTS, args)
    if args.only in (None, "start"):
        runs.append(tools.play(START, range(args.seed, args.seed + 5), lambda folder: {}))
        tools.print_table("seconds of", tools.spread(runs[-1], "wall_seconds"))
    return tools.finish(pd.concat(runs), args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
