"""When the greedy policy of a run reaches a target, from the copies of its networks that were kept during training.

The clock of training does not count the evaluation. All are evaluated by the same function and from the same initial
states.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import peers
import tools
import torch

import a3c
import async_qlearning
from common.evaluation import evaluate

THIRD_TIME = "seconds to three times in a row"


def policy_of(copy: dict, env) -> Callable:
    """The greedy policy of a checkpoint of an asynchronous script, or of a copy of SB3's network."""
    if "script" not in copy:
        return peers.dqn_policy(copy["model"])
    if copy["script"] == "a3c":
        network = a3c.ActorCritic(env.observation_space.shape, env.action_space)
    else:
        network = async_qlearning.QNetwork(env.observation_space.shape, int(env.action_space.n))
    network.load_state_dict(copy["model"])
    return network.act


def evaluate_copies(paths: list[Path], env_id: str) -> Iterator[tuple[float, int, float]]:
    """Seconds and steps of training, and the greedy return, of one copy of the network after the other."""
    for path in paths:
        copy, env = torch.load(path, weights_only=True), a3c.make_env(env_id)
        with torch.inference_mode():
            _, mean_return = evaluate(policy_of(copy, env), env, a3c.Args(env_id=env_id), path.parent)
        yield copy["seconds"], copy["step"], mean_return


def read_learning(folder: Path, target: float, times: int = 1, env_id: str = "CartPole-v1") -> dict[str, float]:
    """When the greedy policy reaches the target first, and when `times` times in a row (inf: never), and the end."""
    results = {tools.SECONDS_TO_TARGET: np.inf, tools.STEPS_TO_TARGET: np.inf}
    results |= {THIRD_TIME: np.inf} if times == 3 else {}
    paths, in_a_row = sorted(folder.glob("*.pt")), 0
    for seconds, steps, mean_return in evaluate_copies(paths, env_id):
        in_a_row = in_a_row + 1 if mean_return >= target else 0
        if in_a_row and np.isinf(results[tools.SECONDS_TO_TARGET]):
            results |= {tools.SECONDS_TO_TARGET: seconds, tools.STEPS_TO_TARGET: float(steps)}
        if in_a_row == times:
            results |= {THIRD_TIME: seconds} if times == 3 else {}
            break
    ((seconds, steps, mean_return),) = evaluate_copies(paths[-1:], env_id)
    return results | {tools.RETURN: mean_return, tools.SPEED: steps / seconds}
