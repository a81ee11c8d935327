"""gae.py beside sb3-contrib's TRPO and Stable-Baselines3's PPO on CartPole-v1 and two of MuJoCo's environments.

    pip install -r experiments/requirements.txt
    python experiments/gae_vs_peers.py --only cartpole --output gae_vs_peers_cartpole.csv
    python experiments/gae_vs_peers.py --only mujoco --parallel 2 --output gae_vs_peers_mujoco.csv

About 15 minutes on two idle cores for "cartpole" and 40 for "mujoco"; without `--only` both parts run.
`--repeats 1 --speed-steps 20000 --budget 20000 --mujoco-steps 4096` is a trial of two minutes.

"cartpole": everyone has 8 environments. `gae.py` and TRPO run with their defaults, of which TRPO's are to gather 2,048
steps of each environment between two updates; it also runs with 128. PPO runs with its zoo's settings for CartPole-v1.

Speed: steps per second of the whole training, over the same number of steps for everyone but for whole batches, 5
repeats. Learning: seconds and steps from the start of training, imports not counted, until the last 50 training
episodes have a mean return of 475, 5 seeds. PPO has the 100,000 steps that its settings are for.

"mujoco": mean return of the greedy policy over 20 episodes after training on Hopper-v5 and HalfCheetah-v5, 3 seeds, all
evaluated by the same function and from the same initial states. SB3 runs with its defaults: one environment, with its
observations and rewards as they are. gae.py fits its value function as SB3's TRPO does, in 10 epochs of minibatches of
128 with a learning rate of 0.001, and has a bound on the KL divergence of 0.01 for each dimension of the actions, which
is TRPO's, too: SB3 takes the mean over the dimensions where the divergence is their sum.

Every run has a process of its own, and the contestants take turns. Runs on CartPole-v1 come one after the other; SB3
has one torch thread and, in the first repeat of the speed, torch's default number too, of which the faster goes on. For
MuJoCo, where no time is measured, all have one thread and `--parallel` runs go at once. Ratios are of runs with the
same seed. A run that fails is reported, and the exit code is 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import pandas as pd
import tools
import torch

import gae
from common.evaluation import evaluate

CARTPOLE = "CartPole-v1"
MUJOCO_FLAGS = "--vf-epochs 10 --minibatch-size 128 --learning-rate 1e-3"  # of gae.py, whose defaults are CartPole-v1's
MUJOCO = {"Hopper-v5": f"{MUJOCO_FLAGS} --max-kl 0.03", "HalfCheetah-v5": f"{MUJOCO_FLAGS} --max-kl 0.06"}
# rl-baselines3-zoo, hyperparams/ppo.yml, CartPole-v1
PPO_STEPS = 100_000
PPO_SETTINGS = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0}
PPO_SETTINGS |= {"learning_rate": lambda left: left * 1e-3, "clip_range": lambda left: left * 0.2}  # left: from 1 to 0

OURS, SMALL = "gae.py", "SB3 TRPO, batches of 1,024"
TRPOS = {"SB3 TRPO": 1, "SB3 TRPO, default threads": 0}  # torch's threads, 0: its default
PPOS = {"SB3 PPO": 1, "SB3 PPO, default threads": 0}
PEERS = {name: {"peer": "trpo", "threads": threads} for name, threads in TRPOS.items()}
PEERS |= {name: {"peer": "ppo", "threads": threads} for name, threads in PPOS.items()}
PEERS |= {SMALL: {"peer": "trpo", "threads": 1, "n_steps": 128}}


@dataclass
class Args:
    only: Literal["cartpole", "mujoco"] | None = None
    """run this part alone"""
    repeats: int | None = None
    """runs of each contestant, with seeds seed, seed + 1, ...; by default 5 on CartPole-v1 and 3 elsewhere"""
    seed: int = 1
    """seed of the first run"""
    speed_steps: int = 100_000
    """steps of each run that measures steps per second"""
    budget: int = 500_000
    """steps after which a run counts as not having reached the target (PPO, gae.py: no more than their own)"""
    target: float = 475.0
    """mean return over the last 50 training episodes that counts as learned"""
    mujoco_steps: int = 300_000
    """steps of each run on MuJoCo's environments"""
    parallel: int = 1
    """runs on MuJoCo's environments that go at once"""
    output: Path | None = None
    """write every run to this CSV file"""


def train_peer(
    peer: str,
    env_id: str,
    steps: int,
    threads: int,
    seed: int,
    folder: Path,
    n_steps: int | None = None,
    stop_at: float | None = None,
    eval_episodes: int = 0,
) -> None:
    """TRPO or PPO: with 8 environments on CartPole-v1, elsewhere with all that SB3 does by default."""
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    if threads:
        torch.set_num_threads(threads)
    on_cartpole = env_id == CARTPOLE
    env = make_vec_env(env_id, n_envs=8, seed=seed) if on_cartpole else env_id
    settings = PPO_SETTINGS if on_cartpole and peer == "ppo" else {}
    settings |= {"n_steps": n_steps} if n_steps else {}
    model = {"trpo": TRPO, "ppo": PPO}[peer]("MlpPolicy", env, seed=seed, device="cpu", **settings)
    tools.learn(model, steps, folder, stop_at)
    args = gae.Args(seed=seed, eval_episodes=eval_episodes)
    eval_env = gym.wrappers.RecordEpisodeStatistics(gym.make(env_id))
    evaluate(lambda observation: model.predict(observation, deterministic=True)[0], eval_env, args, folder)


def read_whole_speed(folder: Path) -> dict[str, float]:
    """Steps per second of the whole training, updates included, which some do once in 16,384 steps."""
    end = tools.read_table(folder, "metrics").iloc[-1]
    return {tools.SPEED: float(end["step"] / end["time"])}


def compare_on_cartpole(args: Args) -> pd.DataFrame:
    """Speed and learning on CartPole-v1. Prints tables and returns the runs."""

    def ours(steps: int) -> dict[str, tools.Command]:
        flags = f"--env-id={CARTPOLE} --num-envs=8 --total-timesteps={steps} --eval-episodes=0"
        return {OURS: tools.script("gae.py", flags)}

    def peer(name: str, steps: int, **options) -> dict[str, tools.Command]:
        return {name: tools.call(train_peer, env_id=CARTPOLE, steps=steps, **PEERS[name], **options)}

    seeds = range(args.seed, args.seed + (args.repeats or 5))
    contestants = ours(args.speed_steps)
    for name in PEERS:
        contestants |= peer(name, args.speed_steps)
    rivals = [list(TRPOS), list(PPOS)]
    speed, (trpo, ppo) = tools.play_with_rivals(contestants, seeds, rivals, tools.SPEED, read_whole_speed)

    contestants = ours(min(args.budget, gae.Args.total_timesteps))
    for name, budget in {trpo: args.budget, SMALL: args.budget, ppo: min(args.budget, PPO_STEPS)}.items():
        contestants |= peer(name, budget, stop_at=args.target)
    learning = tools.play(contestants, seeds, lambda folder: tools.read_time_to_target(folder, args.target))

    print(f"{CARTPOLE}, {len(seeds)} runs. Target: a mean return of {args.target:g} over 50 training episodes.\n")
    tools.print_table(tools.SPEED, tools.spread(speed, tools.SPEED))
    rivals = trpo, SMALL, ppo
    ratios = {f"{tools.SPEED}, gae.py / {rival}": tools.ratio(speed, tools.SPEED, OURS, rival) for rival in rivals}
    for title in (tools.SECONDS_TO_TARGET, tools.STEPS_TO_TARGET):
        tools.print_table(title, tools.spread(learning, title))
        ratios |= {f"{title}, {rival} / gae.py": tools.ratio(learning, title, rival, OURS) for rival in rivals}
    tools.print_table("ratio", pd.DataFrame(ratios).T)
    return pd.concat([speed, learning])


def compare_on_mujoco(args: Args) -> pd.DataFrame:
    """Greedy returns on MuJoCo's environments. Prints tables and returns the runs."""
    seeds, parts = range(args.seed, args.seed + (args.repeats or 3)), {}
    for env_id, flags in MUJOCO.items():
        ours = f"{flags} --env-id={env_id} --total-timesteps={args.mujoco_steps}"
        contestants = {OURS: tools.script("gae.py", ours)}
        options = {"env_id": env_id, "steps": args.mujoco_steps, "eval_episodes": gae.Args.eval_episodes}
        contestants |= {n: tools.call(train_peer, **options, **PEERS[n]) for n in ("SB3 TRPO", "SB3 PPO")}
        runs = parts[env_id] = tools.play(contestants, seeds, tools.read_return, args.parallel)
        table = runs.pivot(index="name", columns="seed", values=tools.RETURN).add_prefix("seed ")
        tools.print_table(f"{env_id}, {tools.RETURN}", table.assign(mean=table.mean(axis=1)))
    return pd.concat(parts, names=["env_id"]).reset_index("env_id")


def main(args: Args) -> int:
    parts = {"cartpole": compare_on_cartpole, "mujoco": compare_on_mujoco}
    runs = [compare(args) for part, compare in parts.items() if args.only in (None, part)]
    return tools.finish(pd.concat(runs), args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
