"""async_qlearning.py beside Stable-Baselines3's A2C (steps per second) and DQN (learning) on CartPole-v1.

    pip install -r experiments/requirements.txt
    python experiments/async_qlearning_vs_peers.py

About half an hour on two idle cores; `--seeds 21 --speed-steps 20000 --learning-steps 20000` is a trial of two minutes.

Speed: steps per second of all workers or environments together, over the same number of steps for everyone. Workers
begin one after the other, as they are ready: the rate is taken from the moment when a tenth of the steps is over and
every worker has ended an episode, to the last episode that ends. A single worker is a process here, as two are. SB3's
A2C has 8 environments and its defaults.

Learning: seconds and steps of training until the greedy policy has a mean return of 475 over 20 episodes, and seconds
until it has for the third time in a row, because a policy may hit on 475 and lose it again. The clock starts just
before the first step and does not count evaluation: copies of the networks are kept during the training and evaluated
after it, in order, all by the same function and from the same initial states. `async_qlearning.py` runs with its
defaults; the copies are its checkpoints, one per 5,000 steps. SB3's DQN runs with its zoo's settings for CartPole and
keeps a copy after each of its training phases, one per 256 steps. By the length of the training that is more often,
which favours DQN.

Every run has a process of its own, one after the other, and the contestants take turns. SB3 runs with one torch thread;
with the first seed it runs with torch's default number of threads too, and the faster goes on. Ratios are of runs with
the same seed.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd
import peers
import tools
from greedy import THIRD_TIME, read_learning

TARGET = 475.0  # mean return of the greedy policy over 20 episodes that counts as learned
DQN_STEPS = 50_000  # of its zoo's settings for CartPole-v1
OURS, OURS_1, OURS_8, OURS_16 = (f"async_qlearning.py, {n} worker{'s' * (n > 1)}" for n in (2, 1, 8, 16))
FLAGS = {OURS: "--num-workers=2", OURS_1: "--num-workers=1 --backend=process"}
FLAGS |= {OURS_8: "--num-workers=8", OURS_16: "--num-workers=16"}
A2CS = {"SB3 A2C, 8 environments": 1, "SB3 A2C, 8 environments, default threads": 0}  # torch's threads, 0: its default
DQNS = {"SB3 DQN": 1, "SB3 DQN, default threads": 0}


@dataclass
class Args(tools.Options):
    only: Literal["speed", "learning"] | None = None
    """make this part of the comparison alone"""
    speed_steps: tools.PositiveInt = 100_000
    """steps of each run that measures steps per second"""
    learning_steps: tools.PositiveInt | None = None
    """for a trial: steps of each run that learns, instead of DQN's 50,000 and the default of async_qlearning.py"""


def compare_speed(args: Args, sb3: partial) -> pd.DataFrame:
    flags = f"--total-timesteps={args.speed_steps} --eval-episodes=0"
    contestants = {name: tools.script("async_qlearning.py", f"{own} {flags}") for name, own in FLAGS.items()}
    a2c = partial(sb3, algorithm="A2C", num_envs=8, steps=args.speed_steps)
    contestants |= {name: a2c(threads=threads) for name, threads in A2CS.items()}
    name = "async_qlearning_speed"
    runs, (peer,) = tools.play_with_rivals(contestants, tools.read_speed, args, name, [list(A2CS)])
    tools.show(runs, tools.SPEED)
    tools.show_ratios(runs, tools.SPEED, [OURS], [peer, OURS_1, OURS_16])
    tools.show_ratios(runs, tools.SPEED, [OURS_1], [peer])
    return runs


def compare_learning(args: Args, sb3: partial) -> pd.DataFrame:
    flags = "--eval-episodes=0" + (f" --total-timesteps={args.learning_steps}" if args.learning_steps else "")
    contestants = {name: tools.script("async_qlearning.py", f"{FLAGS[name]} {flags}") for name in (OURS, OURS_8)}
    dqn = partial(sb3, algorithm="DQN", steps=args.learning_steps or DQN_STEPS, copy_every=256)
    contestants |= {name: dqn(threads=threads) for name, threads in DQNS.items()}
    read = partial(read_learning, target=TARGET, times=3)
    name, options = "async_qlearning_learning", {"keep_checkpoints": True}
    runs, (peer,) = tools.play_with_rivals(contestants, read, args, name, [list(DQNS)], **options)
    tools.show(runs, tools.SECONDS_TO_TARGET, tools.STEPS_TO_TARGET, THIRD_TIME, tools.RETURN, tools.SPEED)
    for measure in (tools.SECONDS_TO_TARGET, THIRD_TIME):
        tools.show_ratios(runs, measure, [peer], [OURS, OURS_8])
    return runs


def main(args: Args) -> int:
    parts = {"speed": compare_speed, "learning": compare_learning}
    sb3 = partial(tools.call, peers.train_sb3, env_id="CartPole-v1")
    return tools.finish(*[compare(args, sb3) for part, compare in parts.items() if args.only in (None, part)])


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
