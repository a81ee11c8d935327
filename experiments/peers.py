"""The peers that the scripts are compared with: Stable-Baselines3, sb3-contrib, SBX and PFRL, a function for each kind.

`tools.call` runs a function in a process of its own. It writes into `folder` what experiments read of a script, too:
episodes.csv with step, time and return. SB3's also write metrics.csv with the last step and its time, and
evaluation.json if they are to be evaluated.
"""

import importlib
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import tools
import torch
from torch import nn

import a3c
import ddpg
from common.evaluation import evaluate

MODULES = dict.fromkeys(("A2C", "DQN", "DDPG", "PPO"), "stable_baselines3") | {"TRPO": "sb3_contrib", "SBX DDPG": "sbx"}
TRPO = {"num_envs": 2, "learning_rate": 1e-3, "n_critic_updates": 20}
MUJOCO_TRPO = TRPO | {"normalize": True, "n_steps": 1024, "cg_max_steps": 25}
MUJOCO_NETWORK = {"log_std_init": -2, "ortho_init": False, "activation_fn": nn.ReLU, "net_arch": [256, 256]}
MUJOCO_PPO = {"normalize": True, "n_steps": 512, "policy_kwargs": MUJOCO_NETWORK}
# rl-baselines3-zoo, hyperparams/*.yml; an algorithm that is not here has SB3's defaults
ZOO = {
    "DQN on CartPole-v1": {
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "gamma": 0.99,
        "policy_kwargs": {"net_arch": [256, 256]},
        "buffer_size": 100_000,
        "learning_starts": 1000,
        "target_update_interval": 10,
        "train_freq": 256,
        "gradient_steps": 128,
        "exploration_fraction": 0.16,
        "exploration_final_eps": 0.04,
    },
    "PPO on CartPole-v1": {
        "num_envs": 8,
        "n_steps": 32,
        "batch_size": 256,
        "n_epochs": 20,
        "gamma": 0.98,
        "gae_lambda": 0.8,
        "ent_coef": 0.0,
        "learning_rate": lambda left: left * 1e-3,  # left goes from 1 to 0
        "clip_range": lambda left: left * 0.2,
    },
    "TRPO on CartPole-v1": TRPO | {"n_steps": 512, "batch_size": 512, "cg_damping": 1e-3, "gae_lambda": 0.98},
    "TRPO on Hopper-v5": MUJOCO_TRPO,
    "TRPO on HalfCheetah-v5": MUJOCO_TRPO | {"target_kl": 0.04},
    "PPO on Hopper-v5": MUJOCO_PPO
    | {
        "batch_size": 32,
        "gamma": 0.999,
        "learning_rate": 9.80828e-5,
        "ent_coef": 0.00229519,
        "n_epochs": 5,
        "gae_lambda": 0.99,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
    },
    "PPO on HalfCheetah-v5": MUJOCO_PPO
    | {
        "gamma": 0.98,
        "learning_rate": 2.0633e-5,
        "ent_coef": 0.000401762,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.92,
        "max_grad_norm": 0.8,
        "vf_coef": 0.58096,
    },
    "A2C on images": {"ent_coef": 0.01, "vf_coef": 0.25},
    "DQN on images": {
        "buffer_size": 100_000,
        "learning_rate": 1e-4,
        "batch_size": 32,
        "learning_starts": 100_000,
        "target_update_interval": 1000,
        "train_freq": 4,
        "gradient_steps": 1,
        "exploration_fraction": 0.1,
        "exploration_final_eps": 0.01,
    },
}


def train_sb3(
    algorithm: str,
    env_id: str,
    steps: int,
    seed: int,
    folder: Path,
    threads: int = 1,
    zoo: bool = True,
    stop_at: float | None = None,
    copy_every: int | None = None,
    eval_episodes: int = 0,
    processes: bool = False,
    **settings,
) -> None:
    """An algorithm of Stable-Baselines3, sb3-contrib or SBX (SB3 in JAX), with the settings of ZOO or its defaults.

    Args:
        threads: torch's, or JAX's; 0 stands for the default.
        zoo: whether to take the settings of ZOO where it has some, or SB3's defaults.
        stop_at: mean return of the last 50 training episodes that ends the training.
        copy_every: steps between two copies of the network, 00000.pt, 00001.pt, ...
        eval_episodes: greedy episodes after training.
        processes: whether each environment has a process of its own.
        settings: what takes the place of these; num_envs is the number of environments, normalize says whether
            observations and rewards are, by running statistics; noise_std is the scale of DDPG's Gaussian noise.
    """
    if threads:  # SBX's; JAX reads it when it is imported
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads={threads}"
        torch.set_num_threads(threads)
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

    new_env = partial(make_env, algorithm, env_id)
    is_image = a3c.is_image(new_env().observation_space)
    settings = (ZOO.get(f"{algorithm} on {'images' if is_image else env_id}", {}) if zoo else {}) | settings
    normalize = settings.pop("normalize", False)
    vec_env_cls = SubprocVecEnv if processes else None
    env = make_vec_env(new_env, n_envs=settings.pop("num_envs", 1), seed=seed, vec_env_cls=vec_env_cls)
    env = VecNormalize(env, gamma=settings.get("gamma", 0.99)) if normalize else env
    if is_image:
        settings |= as_a3c(algorithm)
    if "noise_std" in settings:
        size = env.action_space.shape
        settings["action_noise"] = NormalActionNoise(np.zeros(size), np.full(size, settings.pop("noise_std")))
    sb3_class = getattr(importlib.import_module(MODULES[algorithm]), algorithm.split()[-1])
    model = sb3_class("MlpPolicy", env, seed=seed, device="cpu", **settings)
    learn(model, steps, folder, stop_at, copy_every)
    args = a3c.Args(env_id=env_id, seed=seed, eval_episodes=eval_episodes)
    normalized = env.normalize_obs if normalize else lambda observation: observation
    evaluate(lambda observation: model.predict(normalized(observation), deterministic=True)[0], new_env(), args, folder)


def make_env(algorithm: str, env_id: str) -> gym.Env:
    """Of images and for DDPG that of our script, otherwise as Gymnasium makes it, with the score of episodes."""
    if env_id.startswith(("MinAtar/", "ale_py:")):
        return a3c.make_env(env_id)
    return (
        ddpg.make_env(env_id) if algorithm.endswith("DDPG") else gym.wrappers.RecordEpisodeStatistics(gym.make(env_id))
    )


def as_a3c(algorithm: str) -> dict:
    """Settings that make SB3's network for images that of a3c.py, and A2C's RMSProp the one of its zoo."""
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class Body(BaseFeaturesExtractor):
        def __init__(self, space: gym.Space):
            body = a3c.image_layers(space.shape)
            super().__init__(space, body[-2].out_features)
            self.body = body

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.body(images)

    settings = {"features_extractor_class": Body, "net_arch": []}
    if algorithm == "A2C":
        settings |= {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
    return {"policy_kwargs": settings}


def learn(model, steps: int, folder: Path, stop_at: float | None, copy_every: int | None) -> None:
    """Train a model of SB3. Writes episodes.csv, metrics.csv with a single row, the end, and the copies."""

    def after_step(variables: dict, _) -> bool:
        # put there by the Monitor that SB3 wraps around each environment
        ended = [info["episode"]["r"] for info in variables["infos"] if "episode" in info]
        for score in ended:
            episodes.append((model.num_timesteps, time.perf_counter() - start, score))
        if copy_every and model.num_timesteps % copy_every == 1:  # the first step after a training phase
            keep_copy()
        if stop_at is None or not ended or len(episodes) < tools.WINDOW:
            return True
        return np.mean([score for *_, score in episodes[-tools.WINDOW :]]) < stop_at  # False ends the training

    def keep_copy() -> None:
        state = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
        copies.append({"step": model.num_timesteps, "seconds": time.perf_counter() - start, "model": state})

    episodes, copies, start = [], [], time.perf_counter()
    model.learn(steps, callback=after_step)
    end = model.num_timesteps, time.perf_counter() - start
    if copy_every:
        keep_copy()
    pd.DataFrame(episodes, columns=["step", "time", "return"]).to_csv(folder / "episodes.csv", index=False)
    pd.DataFrame([end], columns=["step", "time"]).to_csv(folder / "metrics.csv", index=False)
    for number, copy in enumerate(copies):
        torch.save(copy, folder / f"{number:05}.pt")


class OldGymEnv:
    """An environment as PFRL expects it: `step` has four results, and a time limit sets `needs_reset`."""

    def __init__(self, env: gym.Env, seed: int):
        self.env, self.seed = env, seed

    def reset(self) -> np.ndarray:
        self.episode_return, self.episode_over = 0.0, False
        seed, self.seed = self.seed, None  # only the first reset seeds
        return self.env.reset(seed=seed)[0]

    def step(self, action):
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.episode_return += reward
        self.episode_over = terminated or truncated
        return observation, reward, terminated, {"needs_reset": truncated}

    def close(self) -> None:
        self.env.close()


def pfrl_network(space: gym.spaces.Box, actions: int) -> nn.Module:
    """The networks of a3c.py as PFRL has them."""
    import pfrl

    head = pfrl.policies.SoftmaxCategoricalHead()
    if a3c.is_image(space):
        body = a3c.image_layers(space.shape)
        units = body[-2].out_features
        policy, value = nn.Sequential(nn.Linear(units, actions), head), nn.Linear(units, 1)
        return nn.Sequential(body, pfrl.nn.Branched(policy, value))
    policy, value = a3c.mlp(space.shape[0], actions, gain=0.01), a3c.mlp(space.shape[0], 1, gain=1.0)
    return pfrl.nn.Branched(nn.Sequential(policy, head), value)


def train_pfrl(env_id: str, steps: int, seed: int, folder: Path, **settings) -> None:
    """PFRL's A3C in two processes, with the networks, the environment and the hyperparameters of a3c.py.

    `settings` are arguments of a3c.py. The learning rate is not annealed, which costs nothing.
    """
    import pfrl

    def log_episode(env: OldGymEnv, _, step: int) -> None:
        if env.episode_over:
            with open(folder / "episodes.csv", "a") as file:  # a whole line at a time, so that processes can share it
                file.write(f"{step},{time.perf_counter() - start:.6f},{env.episode_return}\n")

    args = a3c.Args(**settings)
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method("fork")  # PFRL hands closures to its processes
    pfrl.utils.set_random_seed(seed)
    env = a3c.make_env(env_id)
    model = pfrl_network(env.observation_space, int(env.action_space.n))
    optimizer = pfrl.optimizers.SharedRMSpropEpsInsideSqrt(
        model.parameters(), lr=args.learning_rate, alpha=args.rmsprop_alpha, eps=args.rmsprop_eps
    )
    # PFRL's value loss is half of the squares
    weights = {"beta": args.ent_coef, "v_loss_coef": 2 * args.vf_coef, "max_grad_norm": args.max_grad_norm}
    agent = pfrl.agents.A3C(model, optimizer, t_max=args.t_max, gamma=args.gamma, **weights)
    seeds = [seed * 1000 + worker for worker in range(2)]
    # A process that dies would leave the other one to finish alone, and PFRL would look slow: let that fail instead.
    warnings.simplefilter("error", pfrl.utils.async_.AbnormalExitWarning)
    (folder / "episodes.csv").write_text("step,time,return\n")
    start = time.perf_counter()
    pfrl.experiments.train_agent_async(
        outdir=str(folder),
        processes=2,
        make_env=lambda worker, test: OldGymEnv(a3c.make_env(env_id), seeds[worker]),
        steps=steps,
        eval_interval=None,
        agent=agent,
        random_seeds=seeds,
        global_step_hooks=[log_episode],
    )


def dqn_policy(state: dict) -> Callable:
    """The greedy policy of a copy of DQN's network for CartPole-v1."""
    network = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    prefix = "q_net.q_net."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return lambda observation: int(network(torch.from_numpy(observation)).argmax())
