"""Steps per second on images: a3c.py beside Stable-Baselines3's A2C and PFRL's A3C on MinAtar Breakout and on Pong.

    pip install -r experiments/requirements.txt
    python experiments/image_speed.py

About 40 minutes on two cores; `--seeds 21 --steps 5000 --pong-steps 24000` is a trial. Everyone has the network of
a3c.py and the same environments, made by its `make_env`: `a3c.py` with two workers, PFRL's A3C with two processes and
the same hyperparameters, SB3's A2C with its zoo's settings for Atari, which have 16 environments. On Pong there is also
the emulator alone, with random actions and without a network, in two processes.

SB3's A2C has one torch thread. With the first seed it also runs with torch's default number of threads, and with a
process for each environment; the fastest of the three goes on.

The rate is that of the episodes of `tools.read_speed`; the emulator's is of all its steps. A segment of A3C ends where
an episode does, so that a policy which soon loses needs more updates for as many steps; that of A2C does not. Every run
has a process of its own, one after the other, and the contestants take turns. Ratios are of runs with the same seed.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import peers
import tools
from async_methods import A3C

import a3c

BREAKOUT, PONG = "MinAtar/Breakout-v1", "ale_py:PongNoFrameskip-v4"
OURS, PFRL, EMULATOR = "a3c.py, 2 workers", "PFRL A3C, 2 processes", "emulator alone"
SB3 = {
    "SB3 A2C, 16 environments": {},
    "SB3 A2C, 16 environments, default threads": {"threads": 0},
    "SB3 A2C, 16 environments in processes": {"processes": True},
}


@dataclass
class Args(tools.Options):
    seeds: tuple[tools.NonNegativeInt, ...] = (1, 2, 3)
    """one run of each for every seed"""
    only: Literal["breakout", "pong"] | None = None
    """measure this game alone"""
    steps: tools.PositiveInt = 200_000
    """steps of each run on Breakout"""
    pong_steps: tools.PositiveInt = 20_000
    """steps of each run on Pong"""


def play_at_random(env_id: str, steps: int, seed: int) -> float:
    """Steps per second with random actions."""
    env, rng = a3c.make_env(env_id), np.random.default_rng(seed)
    env.reset(seed=seed)
    start = time.monotonic()
    for _ in range(steps):
        *_, terminated, truncated, _ = env.step(rng.integers(env.action_space.n))
        if terminated or truncated:
            env.reset()
    return steps / (time.monotonic() - start)


def emulate(env_id: str, steps: int, seed: int, folder: Path) -> None:
    """Two processes that play at random. Writes speed.csv: the sum of their rates."""
    with ProcessPoolExecutor(2) as pool:
        rate = sum(pool.map(play_at_random, [env_id] * 2, [steps // 2] * 2, [seed, seed + 1000]))
    pd.DataFrame({tools.SPEED: [rate]}).to_csv(folder / "speed.csv", index=False)


def read(folder: Path) -> dict[str, float]:
    if (folder / "speed.csv").exists():
        return pd.read_csv(folder / "speed.csv").iloc[0].to_dict()
    return tools.read_speed(folder)


def main(args: Args) -> int:
    parts = []
    for game, env_id, steps in (("breakout", BREAKOUT, args.steps), ("pong", PONG, args.pong_steps)):
        if args.only not in (None, game):
            continue
        ours = f"--env-id={env_id} --num-workers=2 --eval-episodes=0 --total-timesteps={steps} {tools.flags(**A3C)}"
        contestants = {
            OURS: tools.script("a3c.py", ours),
            PFRL: tools.call(peers.train_pfrl, env_id=env_id, steps=steps, **A3C),
        }
        if game == "pong":
            contestants[EMULATOR] = tools.call(emulate, env_id=env_id, steps=steps)
        others = [*contestants][1:]
        sb3 = partial(tools.call, peers.train_sb3, algorithm="A2C", env_id=env_id, steps=steps, num_envs=16)
        contestants |= {name: sb3(**own) for name, own in SB3.items()}
        runs, fastest = tools.play_with_rivals(contestants, read, args, "image_speed", [list(SB3)])
        tools.show(runs, tools.SPEED, of=env_id)
        tools.show_ratios(runs, tools.SPEED, [OURS], [*fastest, *others], of=env_id)
        parts.append(runs)
    return tools.finish(*parts)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
