"""The lecture's "more workers, faster learning": 1 to 16 workers of A3C, one-step Q, SARSA and n-step Q.

    pip install -r experiments/requirements.txt
    python experiments/workers.py
    python experiments/workers.py --env-id MinAtar/Breakout-v1 --seeds 1 2 3

Seconds and steps of training until the greedy policy has a mean return of 400 over 20 episodes on CartPole-v1, with 10
seeds, or of 5 on Breakout, with 3. Every checkpoint is kept during the training and evaluated after it, in order, until
one reaches the target; the clock does not count that. It begins with the first step of the first worker, while others
may still be starting. An hour on two cores for CartPole-v1, some hours for Breakout; `--seeds 21 --workers 2 --steps
20000` is a trial.

The speed-up is the ratio of the median seconds of one worker to those of more. Beside it is the paper's, of time to a
reference score averaged over seven Atari games (Mnih et al. 2016, table 2).
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import pandas as pd
import tools
from async_methods import METHODS
from greedy import read_learning

PAPER = {  # speed-up with 1, 2, 4, 8 and 16 workers
    "A3C": (1.0, 2.1, 3.7, 6.9, 12.5),
    "one-step Q": (1.0, 3.0, 6.3, 13.3, 24.1),
    "one-step SARSA": (1.0, 2.8, 5.9, 13.1, 22.1),
    "n-step Q": (1.0, 2.7, 5.9, 10.7, 17.2),
}
CARTPOLE = {  # the defaults, which are for CartPole-v1
    "A3C": ("a3c.py", ""),
    "one-step Q": ("async_qlearning.py", ""),
    "one-step SARSA": ("async_qlearning.py", "--target=sarsa"),
    "n-step Q": ("async_qlearning.py", "--n-step=32"),
}


@dataclass
class Args(tools.Options):
    env_id: Literal["CartPole-v1", "MinAtar/Breakout-v1"] = "CartPole-v1"
    """environment"""
    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    """numbers of workers; the first is what the others are compared with"""
    steps: int | None = None
    """steps of each run, by default those of the script, or 1 million on Breakout"""


def main(args: Args) -> int:
    on_cartpole, contestants = args.env_id == "CartPole-v1", {}
    target = 400.0 if on_cartpole else 5.0
    for workers, (method, (script, flags)) in product(args.workers, (CARTPOLE if on_cartpole else METHODS).items()):
        flags += f" --env-id={args.env_id} --num-workers={workers} --backend=process --eval-episodes=0"
        steps = args.steps or (None if on_cartpole else 1_000_000)
        flags += f" --total-timesteps={steps}" if steps else ""
        flags += "" if on_cartpole else " --log-interval=20000"
        contestants[method, workers] = tools.script(script, flags)
    read = partial(read_learning, target=target, env_id=args.env_id)
    runs = tools.play(contestants, read, args, "workers", keep_checkpoints=True)
    for method in PAPER:
        mine = runs[[name[0] == method for name in runs["name"]]]
        mine = mine.assign(name=[workers for _, workers in mine["name"]])
        seconds, steps = (tools.spread(mine, kind) for kind in (tools.SECONDS_TO_TARGET, tools.STEPS_TO_TARGET))
        table = pd.DataFrame({"runs": seconds["runs"], "seconds": seconds["median"], "steps": steps["median"]})
        ranges = zip(seconds["min"], seconds["max"], strict=True)
        table["seconds: range"] = [f"{tools.cell(low)} to {tools.cell(high)}" for low, high in ranges]
        paper = pd.Series(dict(zip((1, 2, 4, 8, 16), PAPER[method], strict=True)))
        table["speed-up"] = seconds["median"].get(args.workers[0], math.nan) / seconds["median"]
        table["paper's"] = paper / paper.get(args.workers[0], math.nan)
        tools.print_table(f"{method}, {args.env_id}, workers", table)
    return tools.finish(runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
