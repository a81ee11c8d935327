"""The lecture's "more workers, faster learning": 1 to 16 workers of A3C, one-step Q, SARSA and n-step Q.

    pip install -r experiments/requirements.txt
    python experiments/workers.py
    python experiments/workers.py --env-id MinAtar/Breakout-v1 --seeds 1 2 3

Seconds and steps of training until the greedy policy has a mean return of 400 over 20 episodes on CartPole-v1, with 10
seeds, or of 5 on Breakout, with 3. Every checkpoint, one per 5,000 steps (20,000 on Breakout), is kept during the
training and evaluated after it, in order, until one reaches the target. Seconds are these steps over the run's own
steps per second, from the first step of the first worker on, while others may still begin. An hour to three on two idle
cores for each environment; `--seeds 21 --workers 2 --steps 20000` is a trial.

The speed-up is the ratio of one worker's seconds to those of more, run by run. Beside it is the paper's, of time to a
reference score averaged over seven Atari games (Mnih et al. 2016, table 2). With the three kinds of Q-learning, more
workers have other epsilons, too: one ends at 0.1, two at 0.01 and 0.5, four at 0.01, 0.1, 0.1 and 0.5. The picture,
workers_CartPole-v1.png or workers_MinAtar-Breakout-v1.png, shows the seconds of every run.
"""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import numpy as np
import pandas as pd
import tools
from async_methods import METHODS
from greedy import read_learning
from matplotlib.ticker import LogLocator

PAPER = {  # speed-up by the number of workers
    "A3C": {1: 1.0, 2: 2.1, 4: 3.7, 8: 6.9, 16: 12.5},
    "one-step Q": {1: 1.0, 2: 3.0, 4: 6.3, 8: 13.3, 16: 24.1},
    "one-step SARSA": {1: 1.0, 2: 2.8, 4: 5.9, 8: 13.1, 16: 22.1},
    "n-step Q": {1: 1.0, 2: 2.7, 4: 5.9, 8: 10.7, 16: 17.2},
}
CARTPOLE = {  # the defaults, which are for CartPole-v1
    "A3C": ("a3c.py", ""),
    "one-step Q": ("async_qlearning.py", ""),
    "one-step SARSA": ("async_qlearning.py", "--target=sarsa"),
    "n-step Q": ("async_qlearning.py", "--n-step=32"),
}


@dataclass
class Args(tools.DrawingOptions):
    env_id: Literal["CartPole-v1", "MinAtar/Breakout-v1"] = "CartPole-v1"
    """environment"""
    workers: tuple[tools.PositiveInt, ...] = (1, 2, 4, 8, 16)
    """numbers of workers; the first is what the others are compared with"""
    steps: tools.PositiveInt | None = None
    """steps of each run, by default those of the script, or 500,000 on Breakout"""


def main(args: Args) -> int:
    on_cartpole, contestants = args.env_id == "CartPole-v1", {}
    target = 400.0 if on_cartpole else 5.0
    for workers, (method, (script, flags)) in product(args.workers, (CARTPOLE if on_cartpole else METHODS).items()):
        flags += f" --env-id={args.env_id} --num-workers={workers} --backend=process --eval-episodes=0"
        steps = args.steps or (None if on_cartpole else 500_000)
        flags += f" --total-timesteps={steps}" if steps else ""
        flags += "" if on_cartpole else " --log-interval=20000"
        contestants[method, workers] = tools.script(script, flags)
    read = partial(read_learning, target=target, env_id=args.env_id)
    runs = tools.play(contestants, read, args, "workers", keep_checkpoints=True)
    tools.succeeded(runs)  # at least one
    runs[tools.SECONDS_TO_TARGET] = runs[tools.STEPS_TO_TARGET] / runs[tools.SPEED]
    figure, panels = tools.new_figure(1, len(PAPER), width=12)
    for axes, (method, paper) in zip(panels[0], PAPER.items(), strict=True):
        mine = runs[[name[0] == method for name in runs["name"]]]
        mine = mine.assign(name=[workers for _, workers in mine["name"]])
        tools.show(mine, tools.SECONDS_TO_TARGET, tools.STEPS_TO_TARGET, of=f"{method} on {args.env_id}, workers:")
        speed_up = tools.ratios(mine, tools.SECONDS_TO_TARGET, [args.workers[0]], list(args.workers))
        tools.show_ratios(mine, tools.STEPS_TO_TARGET, list(args.workers), [args.workers[0]], of=method)
        paper = pd.Series(paper).reindex(args.workers)
        pairs = [f"{args.workers[0]} / {workers}" for workers in args.workers]
        speed_up["paper's"] = pd.Series((paper / paper.iloc[0]).tolist(), pairs)
        tools.print_table(f"{method}: speed-up", speed_up)
        axes.set(title=method, xlabel="workers", xscale="log", yscale="log")
        reached = mine.replace(np.inf, np.nan)  # infinity has no place in a picture
        axes.plot(reached["name"], reached[tools.SECONDS_TO_TARGET], "C0.", alpha=0.5, label="a run")
        seconds = mine.groupby("name")[tools.SECONDS_TO_TARGET].median().reindex(args.workers).replace(np.inf, np.nan)
        axes.plot(args.workers, seconds, "C0", label="median")
        axes.plot(args.workers, seconds.iloc[0] * paper.iloc[0] / paper, "C7:", label="with the paper's speed-up")
        axes.set_xticks(args.workers, args.workers)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    panels[0, 0].set(ylabel="seconds")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    tools.save_figure(figure, args.pictures / f"workers_{args.env_id.replace('/', '-')}.png")
    return tools.finish(runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
