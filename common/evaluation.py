"""Greedy episodes after training."""

import json
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np

from common.inputs import make_env

FILMED_EPISODES = 3
LONGEST_EPISODE = 10_000  # steps, where the environment sets no limit itself: a greedy policy may walk in circles


def evaluate(policy: Callable, args, folder: Path) -> tuple[str, float | None]:
    """Play `args.eval_episodes` episodes on a fresh environment and write evaluation.json into `folder`.

    An environment without a time limit is cut off after LONGEST_EPISODE steps.

    Args:
        policy: maps an observation, a float32 vector, to an action of the environment.
        args: `env_id`, `seed`, `eval_episodes`, and `capture_video`, which films the first three episodes.
        folder: the run's.

    Returns:
        The result in one line, and the mean return, None without episodes.
    """
    if not args.eval_episodes:
        return "no evaluation", None
    env = make_env(args.env_id, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(folder / "videos"), episode_trigger=lambda i: i < FILMED_EPISODES)
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, LONGEST_EPISODE)
    returns = []
    for episode in range(args.eval_episodes):
        # one seed for all episodes that follow, and none of the workers', which draw theirs below 2^31
        observation, _ = env.reset(seed=2**31 + args.seed if episode == 0 else None)
        episode_return, terminated, truncated = 0.0, False, False
        while not (terminated or truncated):
            observation, reward, terminated, truncated, _ = env.step(policy(np.asarray(observation, np.float32)))
            episode_return += float(reward)
        returns.append(episode_return)
    threshold = env.spec.reward_threshold
    env.close()
    mean, std = float(np.mean(returns)), float(np.std(returns))
    result = {"episodes": args.eval_episodes, "mean_return": mean, "std_return": std, "returns": returns}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    verdict = ""
    if threshold is not None:
        verdict = f", {'solved' if mean >= threshold else 'not solved'} (threshold {threshold:g})"
    return f"greedy return {mean:.1f} ± {std:.1f} over {args.eval_episodes} episodes{verdict}", mean
