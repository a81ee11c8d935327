"""ddpg.py beside Stable-Baselines3's DDPG: returns on Pendulum-v1 and HalfCheetah-v5, and steps per second.

    pip install -r experiments/requirements.txt
    python experiments/ddpg_vs_peers.py --only pendulum --parallel 2 --output ddpg_vs_peers_pendulum.csv
    python experiments/ddpg_vs_peers.py --only speed --output ddpg_vs_peers_speed.csv

On two idle cores "pendulum" takes about 5 minutes, "speed" 3, "halfcheetah" 16, "inverted" 3 and "cartpole" 5; without
`--only` all parts run, one after the other. `--repeats 1 --steps 600 --speed-steps 300` is a trial of two minutes.

"pendulum", "halfcheetah": mean return of the greedy policy over 20 episodes after 10,000 steps of Pendulum-v1, 5 seeds,
and after 100,000 of HalfCheetah-v5, 3 seeds; both contestants are evaluated by the same function and from the same
initial states. SB3 takes its settings out of the flags that ddpg.py is called with. ddpg.py gets SB3's networks: the
action enters its critic at the first layer, and all first weights are as torch makes them. On Pendulum-v1 ddpg.py runs
as it is, too.

"speed": environment steps per second on HalfCheetah-v5 while there is an update at each of them, with minibatches of
256 and of 64, 3 repeats, in which the contestants take turns. The 1,000 random steps at the beginning do not count;
what a run of ddpg.py writes while it trains does. ddpg.py runs with `--num-threads 2`; SB3 has one torch thread and, in
the first repeat, torch's default number too, of which the faster goes on and is compared.

"inverted", "cartpole": the same return of ddpg.py alone after 50,000 steps of InvertedPendulum-v5, and of CartPole-v1,
whose Discrete actions it takes by Gumbel-Softmax and which SB3's DDPG does not take; 3 seeds.

Every run has a process of its own. `--parallel` of them go at once, each with one torch thread, but where speed is
measured, which is one after the other. A run that fails is reported, and the exit code is 1.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tools
import torch
import tyro
from torch import nn

import ddpg
from common.evaluation import evaluate

# flags of ddpg.py; what is not said is its default
HALFCHEETAH_FLAGS = "--learning-starts 10000 --learning-rate 3e-4 --actor-learning-rate 3e-4"
INVERTED_FLAGS = "--actor-learning-rate 1e-4"
CARTPOLE_FLAGS = "--actor-learning-rate 3e-4 --tau 0.01 --batch-size 128"

OURS, AS_IT_IS, PEER, PEER_THREADS = "ddpg.py", "ddpg.py, as it is", "SB3 DDPG", "SB3 DDPG, default threads"
LEARNING = {  # part: environment, steps, seeds, contestants, flags
    "pendulum": ("Pendulum-v1", 10_000, 5, (OURS, AS_IT_IS, PEER), ""),
    "halfcheetah": ("HalfCheetah-v5", 100_000, 3, (OURS, PEER), HALFCHEETAH_FLAGS),
    "inverted": ("InvertedPendulum-v5", 50_000, 3, (AS_IT_IS,), INVERTED_FLAGS),
    "cartpole": ("CartPole-v1", 50_000, 3, (AS_IT_IS,), CARTPOLE_FLAGS),
}
BATCH_SIZES = (256, 64)  # minibatches of "speed"
RANDOM_STEPS = 1_000  # of "speed", before those that count
SPEED_REPEATS = 3


@dataclass
class Args:
    only: Literal["pendulum", "speed", "halfcheetah", "inverted", "cartpole"] | None = None
    """run this part alone"""
    repeats: int | None = None
    """runs of each contestant, with seeds seed, seed + 1, ...; by default 5 on Pendulum-v1 and 3 elsewhere"""
    seed: int = 1
    """seed of the first run"""
    steps: int | None = None
    """for a trial: steps of each run but those of "speed", half of them random"""
    speed_steps: int = 4_000
    """steps of each run of "speed" that count"""
    parallel: int = 1
    """runs that go at once, where no speed is measured"""
    output: Path | None = None
    """write every run to this CSV file"""


class PeerCritic(nn.Module):
    """Q(s, a) as SB3 has it: the action enters at the first layer."""

    def __init__(self, shape: tuple[int, ...], action_space, args: ddpg.Args):
        super().__init__()
        first = ddpg.layer(shape[0] + action_space.shape[0], ddpg.HIDDEN, args.batch_norm)
        second = ddpg.layer(ddpg.HIDDEN, ddpg.HIDDEN, args.batch_norm)
        self.q = nn.Sequential(*first, *second, ddpg.last_layer(ddpg.HIDDEN, 1, shape))

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.q(torch.cat([observations, actions], dim=1)).squeeze(-1)


def parse(flags: str, seed: int, folder: Path) -> ddpg.Args:
    return tyro.cli(ddpg.Args, args=[*flags.split(), f"--seed={seed}", f"--log-dir={folder}"])


def train_ours(flags: str, seed: int, folder: Path) -> None:
    """ddpg.py with SB3's networks."""
    ddpg.Critic = PeerCritic
    ddpg.last_layer = lambda inputs, outputs, shape: nn.Linear(inputs, outputs)  # with torch's first weights
    sys.exit(ddpg.main(parse(flags, seed, folder)))


def train_peer(flags: str, threads: int, seed: int, folder: Path) -> None:
    """SB3's DDPG. Writes metrics.csv, with the first and the last of the steps that count, and evaluation.json.

    `flags` are those of ddpg.py; 0 threads stands for torch's default. AssertionError: SB3 has no such setting.
    """
    from stable_baselines3 import DDPG
    from stable_baselines3.common.noise import NormalActionNoise

    def look_at_clock(*_) -> bool:  # after each step, before the update that follows
        if model.num_timesteps in ends:
            rows.append((model.num_timesteps, time.perf_counter() - start))
        return True

    if threads:
        torch.set_num_threads(threads)
    args = parse(flags, seed, folder)
    assert args.learning_rate == args.actor_learning_rate, "SB3 has one learning rate for both networks"
    assert args.target_network, "SB3's DDPG has target networks"
    assert not args.batch_norm, "SB3's DDPG has no batch normalisation"
    assert args.noise == "gaussian", "SB3 is to have Gaussian noise"
    assert args.final_noise_std is None, "the scale of SB3's noise is constant"
    names = ("seed", "buffer_size", "learning_starts", "batch_size", "learning_rate", "gamma", "tau")
    settings = {name: getattr(args, name) for name in names} | {"policy_kwargs": {"net_arch": [ddpg.HIDDEN] * 2}}
    settings |= {"train_freq": (1, "step"), "gradient_steps": 1, "device": "cpu"}
    env = ddpg.make_env(args.env_id)
    size = env.action_space.shape
    noise = NormalActionNoise(np.zeros(size), np.full(size, args.noise_std))  # as ours, for bounds at -1 and 1
    model = DDPG("MlpPolicy", env, action_noise=noise, **settings)
    # The first update of SB3 follows the step after the random ones.
    ends, rows, start = (args.learning_starts + 1, args.total_timesteps), [], time.perf_counter()
    model.learn(args.total_timesteps, callback=look_at_clock)
    pd.DataFrame(rows, columns=["step", "time"]).to_csv(folder / "metrics.csv", index=False)
    policy = lambda observation: model.predict(observation, deterministic=True)[0]  # noqa: E731
    evaluate(policy, ddpg.make_env(args.env_id), args, folder)


def new_contestants(names: tuple[str, ...], flags: str) -> dict[str, tools.Command]:
    contestants = {
        OURS: tools.call(train_ours, flags=flags),
        AS_IT_IS: tools.script("ddpg.py", flags),
        PEER: tools.call(train_peer, flags=flags, threads=1),
        PEER_THREADS: tools.call(train_peer, flags=flags, threads=0),
    }
    return {name: contestants[name] for name in names}


def read_speed(folder: Path) -> dict[str, float]:
    """Steps per second between the first and the last row of metrics.csv that count."""
    rows = tools.read_table(folder, "metrics")
    rows = rows[rows["step"] >= RANDOM_STEPS]
    if len(rows) < 2:
        raise ValueError("metrics.csv has too few rows to measure a speed")
    return {tools.SPEED: float(np.ptp(rows["step"]) / np.ptp(rows["time"]))}


def compare_learning(part: str, args: Args) -> pd.DataFrame:
    """Greedy returns on a part's environment. Prints a table and returns the runs."""
    env_id, steps, repeats, names, flags = LEARNING[part]
    flags += f" --env-id={env_id} --total-timesteps={args.steps or steps}"
    flags += f" --learning-starts={args.steps // 2}" if args.steps else ""
    seeds = range(args.seed, args.seed + (args.repeats or repeats))
    runs = tools.play(new_contestants(names, flags), seeds, tools.read_return, args.parallel)
    table = runs.pivot(index="name", columns="seed", values=tools.RETURN).add_prefix("seed ")
    table = table.assign(median=table.median(axis=1), mean=table.mean(axis=1))
    tools.print_table(f"{env_id}, {args.steps or steps:,} steps, {tools.RETURN}", table)
    return runs


def compare_speed(args: Args) -> pd.DataFrame:
    """Steps per second on HalfCheetah-v5. Prints tables and returns the runs."""
    seeds, parts, ratios = range(args.seed, args.seed + (args.repeats or SPEED_REPEATS)), [], {}
    flags = f"{HALFCHEETAH_FLAGS} --env-id=HalfCheetah-v5 --total-timesteps={RANDOM_STEPS + args.speed_steps}"
    flags += f" --learning-starts={RANDOM_STEPS} --log-interval={min(RANDOM_STEPS, args.speed_steps)}"
    for batch_size in BATCH_SIZES:
        all_flags = f"{flags} --num-threads=2 --eval-episodes=0 --batch-size={batch_size}"
        contestants = new_contestants((OURS, PEER, PEER_THREADS), all_flags)
        runs, (peer,) = tools.play_with_rivals(contestants, seeds, [[PEER, PEER_THREADS]], tools.SPEED, read_speed)
        title = f"{tools.SPEED}, minibatches of {batch_size}"
        tools.print_table(title, tools.spread(runs, tools.SPEED))
        ratios[f"{title}, {OURS} / {peer}"] = tools.ratio(runs, tools.SPEED, OURS, peer)
        parts.append(runs.assign(batch_size=batch_size))
    tools.print_table("ratio", pd.DataFrame(ratios).T)
    return pd.concat(parts)


def main(args: Args) -> int:
    parts = {}
    for part in ("pendulum", "speed", "halfcheetah", "inverted", "cartpole"):
        if args.only in (None, part):
            parts[part] = compare_speed(args) if part == "speed" else compare_learning(part, args)
    return tools.finish(pd.concat(parts, names=["part"]).reset_index("part"), args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
