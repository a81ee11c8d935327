"""a3c.py beside Stable-Baselines3's A2C and PFRL's A3C on CartPole-v1.

    pip install -r experiments/requirements.txt
    python experiments/a3c_vs_peers.py

20 to 35 minutes on two idle cores; `--seeds 21 --speed-steps 20000 --budget 50000` is a trial of two minutes.

Speed: steps per second of all workers or environments together, over the same number of steps for everyone. Workers
begin one after the other, as they are ready: the rate is taken from the moment when a tenth of the steps is over and
every worker of a3c.py has ended an episode, to the last episode that ends.

Learning: seconds and steps from the start of training until the last 50 training episodes have a mean return of 475.
The clock starts just before the first step: imports come before that, and for `a3c.py` the start of its first worker.
`a3c.py` runs with its defaults and two workers, SB3's A2C with 8 environments and its defaults, which are also its
zoo's settings for CartPole.

Every run has a process of its own, one after the other, and the contestants take turns. torch runs with one thread in
every process; with the first seed SB3 runs with torch's default number of threads too, and the faster of the two goes
on. PFRL has the networks and hyperparameters of `a3c.py`. Ratios are of runs with the same seed.
"""

import sys
from dataclasses import dataclass
from functools import partial

import peers
import tools

import a3c

TARGET = 475.0  # mean return over the last 50 training episodes that counts as learned
CARTPOLE = {"env_id": "CartPole-v1"}
OURS, OURS_1, OURS_16 = "a3c.py, 2 workers", "a3c.py, 1 worker", "a3c.py, 16 workers"
FLAGS = {OURS: "--num-workers=2", OURS_1: "--num-workers=1 --backend=process", OURS_16: "--num-workers=16"}
PFRL = "PFRL A3C, 2 processes"
SB3 = {"SB3 A2C, 8 environments": 1, "SB3 A2C, 8 environments, default threads": 0}  # torch's threads, 0: its default


@dataclass
class Args(tools.Options):
    speed_steps: tools.PositiveInt = 100_000
    """steps of each run that measures steps per second"""
    budget: tools.PositiveInt = 500_000
    """steps after which a run counts as not having reached the target (a3c.py: no more than its default)"""


def main(args: Args) -> int:
    a2c = partial(tools.call, peers.train_sb3, algorithm="A2C", num_envs=8, **CARTPOLE)
    steps = args.speed_steps
    contestants = {
        name: tools.script("a3c.py", f"{flags} --total-timesteps={steps} --eval-episodes=0")
        for name, flags in FLAGS.items()
    }
    contestants[PFRL] = tools.call(peers.train_pfrl, steps=steps, **CARTPOLE)
    contestants |= {name: a2c(steps=steps, threads=threads) for name, threads in SB3.items()}
    speed, (sb3,) = tools.play_with_rivals(contestants, tools.read_speed, args, "a3c_speed", [list(SB3)])
    tools.show(speed, tools.SPEED)
    tools.show_ratios(speed, tools.SPEED, [OURS], [PFRL, sb3, OURS_1, OURS_16])
    tools.show_ratios(speed, tools.SPEED, [OURS_1], [sb3])

    budget = min(args.budget, a3c.Args.total_timesteps)
    contestants = {
        OURS: tools.script("a3c.py", f"{FLAGS[OURS]} --total-timesteps={budget} --eval-episodes=0"),
        sb3: a2c(steps=args.budget, threads=SB3[sb3], stop_at=TARGET),
    }
    learning = tools.play(contestants, partial(tools.read_time_to_target, target=TARGET), args, "a3c_learning")
    tools.show(learning, tools.SECONDS_TO_TARGET, tools.STEPS_TO_TARGET)
    tools.show_ratios(learning, tools.SECONDS_TO_TARGET, [sb3], [OURS])
    return tools.finish(speed, learning)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
