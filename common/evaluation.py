"""Greedy episodes after training."""

import json
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np

from common.inputs import make_env

FILMED_EPISODES = 3


def evaluate(env_id: str, policy: Callable, episodes: int, seed: int, folder: Path, film: bool = False) -> str:
    """Play `episodes` on a fresh environment and write evaluation.json into `folder`.

    Args:
        env_id: for `make_env`.
        policy: maps an observation, a float32 vector, to an action of the environment.
        episodes: how many, at least 1.
        seed: of the environment.
        folder: of the run.
        film: whether the first three episodes are filmed into `folder`/videos.

    Returns:
        The result in one line.
    """
    env = make_env(env_id, render_mode="rgb_array" if film else None)
    if film:
        env = gym.wrappers.RecordVideo(env, str(folder / "videos"), episode_trigger=lambda i: i < FILMED_EPISODES)
    returns = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed if episode == 0 else None)
        episode_return, terminated, truncated = 0.0, False, False
        while not (terminated or truncated):
            action = policy(np.asarray(observation, np.float32))
            observation, reward, terminated, truncated, _ = env.step(action)
            episode_return += float(reward)
        returns.append(episode_return)
    threshold = env.spec.reward_threshold
    env.close()
    mean, std = float(np.mean(returns)), float(np.std(returns))
    result = {"episodes": episodes, "mean_return": mean, "std_return": std, "returns": returns}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    verdict = (
        "" if threshold is None else f", {'solved' if mean >= threshold else 'not solved'} (threshold {threshold:g})"
    )
    return f"greedy return {mean:.1f} ± {std:.1f} over {episodes} episodes{verdict}"
