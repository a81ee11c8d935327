"""Steps per second on images: a3c.py beside Stable-Baselines3's A2C and PFRL's A3C on MinAtar Breakout and on Pong.

    pip install -r experiments/requirements.txt
    python experiments/image_speed.py --output image_speed.csv

About 40 minutes on two cores; `--repeats 1 --steps 5000 --pong-steps 2000` is a trial. Everyone has the network of
a3c.py and the same environments, made by its `make_env`: `a3c.py` with two workers, PFRL's A3C with two processes and
the same hyperparameters, SB3's A2C with 8 environments, its settings for Atari and one torch thread. On Pong there is
also the emulator alone, with random actions and without a network, in two processes.

The rate is that of the episodes of `tools.read_speed`; the emulator's is of all its steps. A segment of A3C ends where
an episode does, so that a policy which soon loses needs more updates for as many steps; that of A2C does not. Every run
has a process of its own, one after the other, and the contestants take turns. Ratios are of runs with the same seed. A
run that fails is left out and reported, and the exit code is 1.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import pandas as pd
import tools
import torch
from a3c_vs_peers import run_pfrl
from torch import nn

import a3c
from common.evaluation import evaluate

BREAKOUT, PONG = "MinAtar/Breakout-v1", "ale_py:PongNoFrameskip-v4"
OURS, SB3, PFRL, EMULATOR = "a3c.py, 2 workers", "SB3 A2C, 8 environments", "PFRL A3C, 2 processes", "emulator alone"
SETTINGS = {"t_max": 20, "learning_rate": 1e-3, "rmsprop_eps": 1e-3, "ent_coef": 0.02, "max_grad_norm": 40.0}


@dataclass
class Args:
    only: Literal["breakout", "pong"] | None = None
    """measure this game alone"""
    repeats: int = 3
    """runs of each contestant, with seeds seed, seed + 1, ..."""
    seed: int = 1
    """seed of the first run"""
    steps: int = 200_000
    """steps of each run on Breakout"""
    pong_steps: int = 20_000
    """steps of each run on Pong"""
    output: Path | None = None
    """write every run to this CSV file"""


def sb3_network() -> dict:
    """The network of a3c.py as `policy_kwargs` of Stable-Baselines3."""
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class Body(BaseFeaturesExtractor):
        def __init__(self, space: gym.Space):
            body = a3c.image_layers(space.shape)
            super().__init__(space, body[-2].out_features)
            self.body = body

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.body(images)

    return {"features_extractor_class": Body, "net_arch": []}


def train_a2c(env_id: str, steps: int, seed: int, folder: Path) -> None:
    """SB3's A2C with the zoo's settings for Atari (hyperparams/a2c.yml), on a3c.py's environment."""
    from stable_baselines3 import A2C
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    torch.set_num_threads(1)
    env = make_vec_env(lambda: a3c.make_env(env_id), n_envs=8, seed=seed)
    kwargs = sb3_network() | {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
    settings = {"ent_coef": 0.01, "vf_coef": 0.25, "policy_kwargs": kwargs}
    model = A2C("MlpPolicy", env, seed=seed, device="cpu", **settings)
    tools.learn(model, steps, folder)
    evaluate_sb3(model, env_id, seed, folder)


def train_dqn(env_id: str, steps: int, seed: int, folder: Path) -> None:
    """SB3's DQN with the zoo's settings for Atari (hyperparams/dqn.yml), on a3c.py's environment."""
    from stable_baselines3 import DQN

    torch.set_num_threads(1)
    settings = {"buffer_size": 100_000, "learning_rate": 1e-4, "batch_size": 32, "learning_starts": 100_000}
    settings |= {"target_update_interval": 1000, "train_freq": 4, "gradient_steps": 1}
    settings |= {"exploration_fraction": 0.1, "exploration_final_eps": 0.01, "policy_kwargs": sb3_network()}
    model = DQN("MlpPolicy", a3c.make_env(env_id), seed=seed, device="cpu", **settings)
    tools.learn(model, steps, folder)
    evaluate_sb3(model, env_id, seed, folder)


def evaluate_sb3(model, env_id: str, seed: int, folder: Path) -> None:
    """Greedy episodes as those of a3c.py."""
    args = a3c.Args(env_id=env_id, seed=seed)
    evaluate(lambda image: int(model.predict(image, deterministic=True)[0]), a3c.make_env(env_id), args, folder)


def train_pfrl(env_id: str, steps: int, seed: int, folder: Path) -> None:
    """PFRL's A3C with the network and the hyperparameters of a3c.py."""
    env = a3c.make_env(env_id)
    shape, actions = env.observation_space.shape, int(env.action_space.n)

    def new_model() -> nn.Module:
        import pfrl

        body = a3c.image_layers(shape)
        units = body[-2].out_features
        policy = nn.Sequential(nn.Linear(units, actions), pfrl.policies.SoftmaxCategoricalHead())
        return nn.Sequential(body, pfrl.nn.Branched(policy, nn.Linear(units, 1)))

    run_pfrl(new_model, a3c.Args(env_id=env_id, **SETTINGS), steps, seed, folder)


def play_at_random(env_id: str, steps: int, seed: int) -> tuple[float, float]:
    """When so many steps with random actions begin and end."""
    env, rng = a3c.make_env(env_id), np.random.default_rng(seed)
    env.reset(seed=seed)
    start = time.monotonic()
    for _ in range(steps):
        *_, terminated, truncated, _ = env.step(rng.integers(env.action_space.n))
        if terminated or truncated:
            env.reset()
    return start, time.monotonic()


def emulate(env_id: str, steps: int, seed: int, folder: Path) -> None:
    """Two processes that play at random. Writes speed.csv: the rate while both do."""
    with ProcessPoolExecutor(2) as pool:
        times = list(pool.map(play_at_random, [env_id] * 2, [steps // 2] * 2, [seed, seed + 1000]))
    rate = sum(steps // 2 / (end - start) for start, end in times)
    pd.DataFrame({tools.SPEED: [rate]}).to_csv(folder / "speed.csv", index=False)


def read(folder: Path) -> dict[str, float]:
    if (folder / "speed.csv").exists():
        return pd.read_csv(folder / "speed.csv").iloc[0].to_dict()
    return tools.read_speed(folder)


def main(args: Args) -> int:
    seeds, parts = range(args.seed, args.seed + args.repeats), []
    flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items())
    for game, env_id, steps in (("breakout", BREAKOUT, args.steps), ("pong", PONG, args.pong_steps)):
        if args.only not in (None, game):
            continue
        ours = f"--env-id={env_id} --num-workers=2 --eval-episodes=0 --total-timesteps={steps} {flags}"
        contestants = {OURS: tools.script("a3c.py", ours)}
        contestants[PFRL] = tools.call(train_pfrl, env_id=env_id, steps=steps)
        contestants[SB3] = tools.call(train_a2c, env_id=env_id, steps=steps)
        if game == "pong":
            contestants[EMULATOR] = tools.call(emulate, env_id=env_id, steps=steps)
        runs = tools.play(contestants, seeds, read)
        tools.print_table(f"{env_id}: {tools.SPEED}", tools.spread(runs, tools.SPEED))
        ratios = {f"{OURS} / {other}": tools.ratio(runs, tools.SPEED, OURS, other) for other in [*contestants][1:]}
        tools.print_table(f"{env_id}: ratio", pd.DataFrame(ratios).T)
        parts.append(runs.assign(env_id=env_id))
    return tools.finish(pd.concat(parts), args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
