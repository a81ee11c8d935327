"""async_qlearning.py beside Stable-Baselines3's A2C (steps per second) and DQN (learning) on CartPole-v1.

    pip install -r experiments/requirements.txt
    python experiments/async_qlearning_vs_peers.py --output async_qlearning_vs_peers.csv

About 15 minutes on two idle cores; `--repeats 1 --speed-steps 20000 --learning-steps 20000` is a trial of two minutes.

Speed: steps per second of all workers or environments together, over the same number of steps for everyone, 5 repeats.
Workers begin one after the other, as they are ready: the rate is taken from the moment when a tenth of the steps is
over and every worker has ended an episode, to the last episode that ends. A single worker is a process here, as two
are. SB3's A2C has 8 environments and its defaults.

Learning: seconds and steps of training until the greedy policy has a mean return of 475 over 20 episodes, and seconds
until it has for the third time in a row, because a policy may hit on 475 and lose it again; 5 seeds. The clock starts
just before the first step and does not count evaluation: copies of the networks are kept during the training and
evaluated after it, in order, all by the same function and from the same initial states. `async_qlearning.py` runs with
its defaults; the copies are its checkpoints, one per 5,000 steps. SB3's DQN runs with its zoo's settings for CartPole
and keeps a copy after each of its training phases, one per 256 steps. By the length of the training that is more often,
which favours DQN.

Every run has a process of its own, one after the other, and the contestants take turns. SB3 runs with one torch thread;
in the first repeat it runs with torch's default number of threads too, and the faster goes on. Ratios are of runs with
the same seed. A run that fails is left out and reported, and the exit code is 1.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tools
import torch
from a3c_vs_peers import train_a2c
from torch import nn

import async_qlearning
from common.evaluation import evaluate

# rl-baselines3-zoo, hyperparams/dqn.yml, CartPole-v1
DQN_STEPS = 50_000
DQN_SETTINGS = {"learning_rate": 2.3e-3, "batch_size": 64, "gamma": 0.99, "policy_kwargs": {"net_arch": [256, 256]}}
DQN_SETTINGS |= {"buffer_size": 100_000, "learning_starts": 1000, "target_update_interval": 10}
DQN_SETTINGS |= {"train_freq": 256, "gradient_steps": 128}
DQN_SETTINGS |= {"exploration_fraction": 0.16, "exploration_final_eps": 0.04}

OURS, OURS_1, OURS_8, OURS_16 = (f"async_qlearning.py, {n} worker{'s' * (n > 1)}" for n in (2, 1, 8, 16))
FLAGS = {OURS: "--num-workers=2", OURS_1: "--num-workers=1 --backend=process"}
FLAGS |= {OURS_8: "--num-workers=8", OURS_16: "--num-workers=16"}
A2CS = {"SB3 A2C, 8 environments": 1, "SB3 A2C, 8 environments, default threads": 0}  # torch's threads, 0: its default
DQNS = {"SB3 DQN": 1, "SB3 DQN, default threads": 0}
THIRD_TIME, SPEED_LEARNING = "seconds to three times in a row", "steps per second, learning"


@dataclass
class Args:
    only: Literal["speed", "learning"] | None = None
    """make this part of the comparison alone"""
    repeats: int = 5
    """runs of each contestant, with seeds seed, seed + 1, ..."""
    seed: int = 1
    """seed of the first run"""
    speed_steps: int = 100_000
    """steps of each run that measures steps per second"""
    learning_steps: int | None = None
    """for a trial: steps of each run that learns, instead of DQN's 50,000 and the default of async_qlearning.py"""
    target: float = 475.0
    """mean return of the greedy policy over 20 episodes that counts as learned"""
    output: Path | None = None
    """write every run to this CSV file"""


def train_dqn(steps: int, threads: int, seed: int, folder: Path) -> None:
    """SB3's DQN with its zoo's settings. Writes copies of its network, 00000.pt, 00001.pt, ..., when it has trained."""
    from stable_baselines3 import DQN

    def keep_copy() -> bool:
        state = {name: tensor.clone() for name, tensor in model.q_net.q_net.state_dict().items()}
        copies.append({"step": model.num_timesteps, "seconds": time.perf_counter() - start, "model": state})
        return True

    def after_step(*_) -> bool:  # the first step of 256 follows a training phase
        return model.num_timesteps % DQN_SETTINGS["train_freq"] != 1 or keep_copy()

    if threads:
        torch.set_num_threads(threads)
    model = DQN("MlpPolicy", "CartPole-v1", seed=seed, device="cpu", **DQN_SETTINGS)
    copies, start = [], time.perf_counter()
    model.learn(steps, callback=after_step)
    keep_copy()
    for number, copy in enumerate(copies):
        torch.save(copy, folder / f"{number:05}.pt")


def greedy_policy(copy: dict) -> Callable:
    """The policy of a checkpoint of ours, or of a copy of SB3's network."""
    if "script" in copy:
        network = async_qlearning.QNetwork((4,), 2)
        network.load_state_dict(copy["model"])
        return network.act
    network = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    network.load_state_dict(copy["model"])
    return lambda observation: int(network(torch.from_numpy(observation)).argmax())


def evaluate_copies(paths: list[Path]) -> Iterator[tuple[float, int, float]]:
    """Seconds and steps of training, and the greedy return, of one copy of the network after the other."""
    for path in paths:
        copy, env = torch.load(path, weights_only=True), async_qlearning.make_env("CartPole-v1")
        with torch.inference_mode():
            _, mean_return = evaluate(greedy_policy(copy), env, async_qlearning.Args(), path.parent)
        yield copy["seconds"], copy["step"], mean_return


def read_learning(folder: Path, target: float, times: int = 3) -> dict[str, float]:
    """When the greedy policy reaches the target first, and when `times` times in a row (inf: never), and the end."""
    results = {tools.SECONDS_TO_TARGET: np.inf, tools.STEPS_TO_TARGET: np.inf, THIRD_TIME: np.inf}
    paths, in_a_row = sorted(folder.glob("*.pt")), 0
    for seconds, steps, mean_return in evaluate_copies(paths):
        in_a_row = in_a_row + 1 if mean_return >= target else 0
        if in_a_row and np.isinf(results[tools.SECONDS_TO_TARGET]):
            results |= {tools.SECONDS_TO_TARGET: seconds, tools.STEPS_TO_TARGET: float(steps)}
        if in_a_row == times:
            results[THIRD_TIME] = seconds
            break
    ((seconds, steps, mean_return),) = evaluate_copies(paths[-1:])
    return results | {tools.RETURN: mean_return, SPEED_LEARNING: steps / seconds}


def main(args: Args) -> int:
    seeds, parts, ratios = range(args.seed, args.seed + args.repeats), [], {}
    if args.only != "learning":
        flags = f"--total-timesteps={args.speed_steps} --eval-episodes=0"
        contestants = {name: tools.script("async_qlearning.py", f"{own} {flags}") for name, own in FLAGS.items()}
        contestants |= {
            n: tools.call(train_a2c, steps=args.speed_steps, threads=threads) for n, threads in A2CS.items()
        }
        speed, (a2c,) = tools.play_with_rivals(contestants, seeds, [list(A2CS)], tools.SPEED, tools.read_speed)
        parts.append(speed)
        tools.print_table(tools.SPEED, tools.spread(speed, tools.SPEED))
        ratios |= {
            "steps per second, async_qlearning.py / SB3 A2C": tools.ratio(speed, tools.SPEED, OURS, a2c),
            "steps per second, 2 workers / 1 worker": tools.ratio(speed, tools.SPEED, OURS, OURS_1),
            "steps per second, 16 workers / 2 workers": tools.ratio(speed, tools.SPEED, OURS_16, OURS),
        }
    if args.only != "speed":
        flags = "--eval-episodes=0" + (f" --total-timesteps={args.learning_steps}" if args.learning_steps else "")
        contestants = {name: tools.script("async_qlearning.py", f"{FLAGS[name]} {flags}") for name in (OURS, OURS_8)}
        steps = args.learning_steps or DQN_STEPS
        contestants |= {name: tools.call(train_dqn, steps=steps, threads=threads) for name, threads in DQNS.items()}
        read = partial(read_learning, target=args.target)
        learning, (dqn,) = tools.play_with_rivals(
            contestants, seeds, [list(DQNS)], SPEED_LEARNING, read, keep_checkpoints=True
        )
        parts.append(learning)
        for title in (tools.SECONDS_TO_TARGET, tools.STEPS_TO_TARGET, THIRD_TIME, tools.RETURN, SPEED_LEARNING):
            tools.print_table(title, tools.spread(learning, title))
        for title in (tools.SECONDS_TO_TARGET, THIRD_TIME):
            for ours in (OURS, OURS_8):
                ratios[f"{title}, SB3 DQN / {ours}"] = tools.ratio(learning, title, dqn, ours)
    tools.print_table("ratio", pd.DataFrame(ratios).T)
    return tools.finish(pd.concat(parts), args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
