"""gae.py beside sb3-contrib's TRPO and Stable-Baselines3's PPO on CartPole-v1 and two of MuJoCo's environments.

    pip install -r experiments/requirements.txt
    python experiments/gae_vs_peers.py --only cartpole
    python experiments/gae_vs_peers.py --only mujoco --seeds 1 2 3 4 5 --parallel 2
    python experiments/gae_vs_peers.py --only mujoco-speed --seeds 1 2 3 4 5

About half an hour on two idle cores for "cartpole", as long for "mujoco-speed", and two hours for "mujoco"; without
`--only` all parts run.
`--seeds 21 --speed-steps 20000 --budget 20000 --mujoco-steps 4096` is a trial of two minutes.

"cartpole": `gae.py` and TRPO run with their defaults and 8 environments; TRPO gathers 2,048 steps of each environment
between two updates. TRPO also runs with its zoo's settings for CartPole-v1, which have 2 environments, and PPO with its
own, which have 8.

Speed: steps per second of the whole training, over the same number of steps for everyone but for whole batches.
Learning: seconds and steps from the start of training, imports not counted, until the last 50 training episodes have a
mean return of 475. PPO has the 100,000 steps that its settings are for.

"mujoco": mean return of the greedy policy over 20 episodes after training on Hopper-v5 and HalfCheetah-v5, all
evaluated by the same function and from the same initial states. SB3 runs with its defaults (one environment, with its
observations and rewards as they are) and with its zoo's settings for these tasks, which are for a million steps.

gae.py fits its value function as SB3's TRPO does, in 10 epochs of minibatches of 128 with a learning rate of 0.001, and
has a bound on the KL divergence of 0.01 for each dimension of the actions, which is TRPO's, too: SB3 takes the mean
over the dimensions where the divergence is their sum. On HalfCheetah-v5 its Gaussian begins with a standard deviation
of 0.37 (the zoo's PPO with 0.14 on both), chosen on other seeds.

"mujoco-speed": steps per second of the same runs of gae.py and TRPO, after fewer steps.

Every run has a process of its own, and the contestants take turns. Where time is measured, they come one after the
other; SB3 has one torch thread and, with the first seed, torch's default number too, of which the faster goes on. For
"mujoco", all have one thread and `--parallel` runs go at once. Ratios are of runs with the same seed.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import peers
import tools

import gae

MUJOCO_FLAGS = "--vf-epochs 10 --minibatch-size 128 --learning-rate 1e-3"  # of gae.py, whose defaults are CartPole-v1's
MUJOCO = {
    "Hopper-v5": f"{MUJOCO_FLAGS} --max-kl 0.03",
    "HalfCheetah-v5": f"{MUJOCO_FLAGS} --max-kl 0.06 --initial-std 0.37",
}
TARGET = 475.0  # mean return over the last 50 training episodes that counts as learned
PPO_STEPS = 100_000  # of its zoo's settings for CartPole-v1
OURS = "gae.py"
TRPOS = {"SB3 TRPO": 1, "SB3 TRPO, default threads": 0}  # torch's threads, 0: its default
TUNED_TRPOS = {"SB3 TRPO, zoo": 1, "SB3 TRPO, zoo, default threads": 0}
PPOS = {"SB3 PPO": 1, "SB3 PPO, default threads": 0}
PEERS = {
    name: {"algorithm": "TRPO", "zoo": False, "num_envs": 8, "threads": threads} for name, threads in TRPOS.items()
}
PEERS |= {name: {"algorithm": "TRPO", "threads": threads} for name, threads in TUNED_TRPOS.items()}
PEERS |= {name: {"algorithm": "PPO", "threads": threads} for name, threads in PPOS.items()}


@dataclass
class Args(tools.ParallelOptions):
    only: Literal["cartpole", "mujoco", "mujoco-speed"] | None = None
    """run this part alone"""
    speed_steps: tools.PositiveInt = 100_000
    """steps of each run that measures steps per second"""
    budget: tools.PositiveInt = 500_000
    """steps after which a run counts as not having reached the target (PPO, gae.py: no more than their own)"""
    mujoco_steps: tools.PositiveInt = 300_000
    """steps of each run on MuJoCo's environments"""


def read_whole_speed(folder: Path) -> dict[str, float]:
    """Steps per second of the whole training, updates included, which some do once in 16,384 steps."""
    end = tools.read_table(folder, "metrics").iloc[-1]
    return {tools.SPEED: float(end["step"] / end["time"])}


def compare_on_cartpole(args: Args) -> list[pd.DataFrame]:
    """Speed and learning. Prints tables and returns the runs."""

    def ours(steps: int) -> tools.Command:
        return tools.script("gae.py", f"--num-envs=8 --total-timesteps={steps} --eval-episodes=0")

    peer = partial(tools.call, peers.train_sb3, env_id="CartPole-v1")
    contestants = {OURS: ours(args.speed_steps)}
    contestants |= {name: peer(steps=args.speed_steps, **own) for name, own in PEERS.items()}
    rivals = [list(TRPOS), list(TUNED_TRPOS), list(PPOS)]
    speed, (trpo, tuned, ppo) = tools.play_with_rivals(contestants, read_whole_speed, args, "gae_speed", rivals)
    tools.show(speed, tools.SPEED)
    tools.show_ratios(speed, tools.SPEED, [OURS], [trpo, tuned, ppo])

    contestants = {OURS: ours(min(args.budget, gae.Args.total_timesteps))}
    for name, budget in {trpo: args.budget, tuned: args.budget, ppo: min(args.budget, PPO_STEPS)}.items():
        contestants[name] = peer(steps=budget, stop_at=TARGET, **PEERS[name])
    read = partial(tools.read_time_to_target, target=TARGET)
    learning = tools.play(contestants, read, args, "gae_learning")
    for measure in (tools.SECONDS_TO_TARGET, tools.STEPS_TO_TARGET):
        tools.show(learning, measure)
        tools.show_ratios(learning, measure, [trpo, tuned, ppo], [OURS])
    return [speed, learning]


def compare_on_mujoco(args: Args) -> list[pd.DataFrame]:
    """Greedy returns. Prints tables and returns the runs."""
    parts = []
    for env_id, flags in MUJOCO.items():
        contestants = {OURS: tools.script("gae.py", f"{flags} --env-id={env_id} --total-timesteps={args.mujoco_steps}")}
        peer = partial(tools.call, peers.train_sb3, env_id=env_id, steps=args.mujoco_steps, eval_episodes=20)
        for algorithm in ("TRPO", "PPO"):
            contestants[f"SB3 {algorithm}"] = peer(algorithm=algorithm, zoo=False)
            contestants[f"SB3 {algorithm}, zoo"] = peer(algorithm=algorithm)
        parts.append(tools.play(contestants, tools.read_return, args, "gae_mujoco", args.parallel))
        tools.show(parts[-1], tools.RETURN, of=env_id)
        pairs = [(OURS, peer) for peer in contestants if peer != OURS]
        tools.show_differences(parts[-1], tools.RETURN, pairs, of=env_id)
    return parts


def compare_speed_on_mujoco(args: Args) -> list[pd.DataFrame]:
    """Steps per second. Prints tables and returns the runs."""
    parts, name = [], "gae_mujoco_speed"
    for env_id, flags in MUJOCO.items():
        flags += f" --env-id={env_id} --total-timesteps={args.speed_steps} --eval-episodes=0"
        contestants = {OURS: tools.script("gae.py", flags)}
        for peer in (*TRPOS, *TUNED_TRPOS):
            own = PEERS[peer] | ({"num_envs": 1} if peer in TRPOS else {})  # SB3's default
            contestants[peer] = tools.call(peers.train_sb3, env_id=env_id, steps=args.speed_steps, **own)
        rivals = [list(TRPOS), list(TUNED_TRPOS)]
        runs, chosen = tools.play_with_rivals(contestants, read_whole_speed, args, name, rivals)
        parts.append(runs)
        tools.show(runs, tools.SPEED, of=env_id)
        tools.show_ratios(runs, tools.SPEED, [OURS], chosen, of=env_id)
    return parts


def main(args: Args) -> int:
    parts = {"cartpole": compare_on_cartpole, "mujoco": compare_on_mujoco, "mujoco-speed": compare_speed_on_mujoco}
    runs = []
    for part, compare in parts.items():
        runs += compare(args) if args.only in (None, part) else []
    return tools.finish(*runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
