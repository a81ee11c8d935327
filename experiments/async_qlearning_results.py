"""What async_qlearning.py learns: greedy returns over several seeds, and how much faster it learns with more workers.

    python experiments/async_qlearning_results.py --output async_qlearning_results.csv

About 20 minutes on two cores, half of them the part "workers"; `--only cartpole` takes 4. Every run of the first table
is the command in it; its return is the mean over the 20 greedy episodes of its evaluation.json.

"workers": seconds and steps of training until the greedy policy has a mean return of 400 over 20 episodes, on
CartPole-v1, 5 seeds. Every checkpoint, one per 5,000 steps, is kept during the training and evaluated after it, in
order, until one reaches the target. The paper's column is the speed-up of asynchronous one-step Q-learning in time to a
reference score, averaged over seven Atari games (Mnih et al. 2016, table 2).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import tools
from async_qlearning_vs_peers import read_learning

PARTS = {  # flags of each command, and the number of seeds
    "cartpole": (["--num-workers 8", "--num-workers 2", "--num-workers 16"], 5),
    "sixteen": (["--num-workers 16"], 10),
    # The defaults are tuned for CartPole-v1.
    "acrobot": (["--env-id Acrobot-v1 --total-timesteps 1000000 --target-network-frequency 2000"], 3),
    "siblings": (["--num-workers 8 --target sarsa", "--num-workers 8 --n-step 32"], 3),
}
PAPER = {1: 1.0, 2: 3.0, 4: 6.3, 8: 13.3, 16: 24.1}  # workers: speed-up
TARGET, SEEDS = 400.0, 5  # of the part "workers"


@dataclass
class Args:
    only: Literal["cartpole", "sixteen", "acrobot", "siblings", "workers"] | None = None
    """run this part alone"""
    seed: int = 1
    """the first seed of each command"""
    total_timesteps: int | None = None
    """for a trial: steps of each run"""
    output: Path | None = None
    """write every run to this CSV file"""


def compare_workers(args: Args) -> pd.DataFrame:
    """Run the part "workers" and print its table."""

    flags = "--eval-episodes=0" + (f" --total-timesteps={args.total_timesteps}" if args.total_timesteps else "")
    contestants = {n: tools.script("async_qlearning.py", f"--num-workers={n} {flags}") for n in PAPER}
    read = partial(read_learning, target=TARGET, times=1)
    runs = tools.play(contestants, range(args.seed, args.seed + SEEDS), read, keep_checkpoints=True)
    seconds = tools.spread(runs, tools.SECONDS_TO_TARGET)
    table = seconds.add_prefix("seconds: ").join(tools.spread(runs, tools.STEPS_TO_TARGET).add_prefix("steps: "))
    speed_up = seconds["median"][1] / seconds["median"]
    tools.print_table("workers", table.assign(**{"speed-up in seconds": speed_up, "paper's": pd.Series(PAPER)}))
    return runs


def main(args: Args) -> int:
    runs = tools.compare_returns("async_qlearning.py", PARTS, args)
    if args.only in (None, "workers"):
        runs.append(compare_workers(args))
    return tools.finish(pd.concat(runs), args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
