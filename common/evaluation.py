"""Greedy episodes after training."""

import json
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np

from common.arguments import failing


def check_film(env: gym.Env) -> None:
    """`fail` if `env`, made with `render_mode="rgb_array"`, cannot be filmed here."""
    with failing('--capture-video does not work here (pip install moviepy "gymnasium[classic-control]" may help)'):
        import moviepy  # noqa: F401

        env.reset(seed=0)
        assert isinstance(env.render(), np.ndarray), f"{env.spec.id} renders no rgb_array"


def evaluate(policy: Callable, env: gym.Env, args, folder: Path) -> tuple[str, float | None]:
    """Play `args.eval_episodes` episodes and write evaluation.json into `folder`.

    Args:
        policy: maps an observation, a float32 vector or an image as it is, to an action of `env`.
        env: not stepped before; its `RecordEpisodeStatistics` wrapper counts the score.
        args: `seed`, `eval_episodes`, and `capture_video`, which films the first three episodes.
        folder: the run's.

    Returns:
        The result in one line, and the mean return, None without episodes.
    """
    if args.eval_episodes == 0:
        return "no evaluation", None
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(folder / "videos"), episode_trigger=lambda i: i < 3)
    returns, dtype = [], np.float32 if len(env.observation_space.shape) == 1 else None
    for episode in range(args.eval_episodes):
        # the first episode is seeded, the others go on from it; seeds of workers are below 2^31
        observation, _ = env.reset(seed=2**31 + args.seed % 2**31 if episode == 0 else None)
        for _ in range(env.spec.max_episode_steps or 30_000):  # or a policy may walk in circles for ever
            observation, _, terminated, truncated, _ = env.step(policy(np.asarray(observation, dtype)))
            if terminated or truncated:
                break
        returns.append(float(env.get_wrapper_attr("episode_returns")))
    env.close()
    mean, std = float(np.mean(returns)), float(np.std(returns))
    result = {"episodes": args.eval_episodes, "mean_return": mean, "std_return": std, "returns": returns}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return f"greedy return {mean:.1f} ± {std:.1f} over {args.eval_episodes} episodes", mean
