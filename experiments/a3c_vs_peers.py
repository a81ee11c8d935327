"""a3c.py beside Stable-Baselines3's A2C and PFRL's A3C on CartPole-v1.

    pip install -r experiments/requirements.txt
    python experiments/a3c_vs_peers.py --output a3c_vs_peers.csv

About 10 minutes on two idle cores; `--repeats 1 --speed-steps 20000 --budget 50000` is a trial of two minutes.

Speed: steps per second of all workers or environments together, over the same number of steps for everyone, 5 repeats.
Workers begin one after the other, as they are ready: the rate is taken from the moment when a tenth of the steps is
over and every worker has ended an episode, to the last episode that ends.

Learning: seconds and steps from the start of training until the last 50 training episodes have a mean return of 475,
5 seeds. The clock starts just before the first step: imports come before that, and for `a3c.py` the start of its first
worker. `a3c.py` runs with its defaults and two workers, SB3's A2C with 8 environments and its defaults, which are also
its zoo's settings for CartPole.

Every run has a process of its own, one after the other, and the contestants take turns. torch runs with one thread in
every process; in the first repeat SB3 runs with torch's default number of threads too, and the faster of the two goes
on. PFRL has the networks and hyperparameters of `a3c.py` (without annealing the learning rate, which costs nothing).
Ratios are of runs with the same seed. A run that fails is left out and reported, and the exit code is 1.
"""

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import tools
import torch
from torch import nn

import a3c

OURS, OURS_1, OURS_16 = "a3c.py, 2 workers", "a3c.py, 1 worker", "a3c.py, 16 workers"
FLAGS = {OURS: "--num-workers=2", OURS_1: "--num-workers=1 --backend=process", OURS_16: "--num-workers=16"}
PFRL, SB3, SB3_THREADS = "PFRL A3C, 2 processes", "SB3 A2C, 8 environments", "SB3 A2C, 8 environments, default threads"


@dataclass
class Args:
    repeats: int = 5
    """runs of each contestant, with seeds seed, seed + 1, ..."""
    seed: int = 1
    """seed of the first run"""
    speed_steps: int = 100_000
    """steps of each run that measures steps per second"""
    budget: int = 500_000
    """steps after which a run counts as not having reached the target (a3c.py: no more than its default)"""
    target: float = 475.0
    """mean return over the last 50 training episodes that counts as learned"""
    output: Path | None = None
    """write every run to this CSV file"""


def train_a2c(steps: int, threads: int, seed: int, folder: Path, stop_at: float | None = None) -> None:
    """SB3's A2C in 8 environments with its defaults. 0 threads stands for torch's default."""
    from stable_baselines3 import A2C
    from stable_baselines3.common.env_util import make_vec_env

    if threads:
        torch.set_num_threads(threads)
    env = make_vec_env("CartPole-v1", n_envs=8, seed=seed)
    tools.learn(A2C("MlpPolicy", env, seed=seed, device="cpu"), steps, folder, stop_at)


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


def run_pfrl(new_model: Callable[[], nn.Module], args: a3c.Args, steps: int, seed: int, folder: Path) -> None:
    """PFRL's A3C in two processes with this model and the environment and hyperparameters of `args`."""
    import pfrl

    def log_episode(env: OldGymEnv, _, step: int) -> None:
        if env.episode_over:
            with open(folder / "episodes.csv", "a") as file:  # a whole line at a time, so that processes can share it
                file.write(f"{step},{time.perf_counter() - start:.6f},{env.episode_return}\n")

    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method("fork")  # PFRL hands closures to its processes
    pfrl.utils.set_random_seed(seed)
    model = new_model()
    optimizer = pfrl.optimizers.SharedRMSpropEpsInsideSqrt(
        model.parameters(), lr=args.learning_rate, alpha=args.rmsprop_alpha, eps=args.rmsprop_eps
    )
    weights = {"beta": args.ent_coef, "v_loss_coef": args.vf_coef, "max_grad_norm": args.max_grad_norm}
    agent = pfrl.agents.A3C(model, optimizer, t_max=args.t_max, gamma=args.gamma, **weights)
    seeds = [seed * 1000 + worker for worker in range(2)]
    # A process that dies would leave the other one to finish alone, and PFRL would look slow: let that fail instead.
    warnings.simplefilter("error", pfrl.utils.async_.AbnormalExitWarning)
    (folder / "episodes.csv").write_text("step,time,return\n")
    start = time.perf_counter()
    pfrl.experiments.train_agent_async(
        outdir=str(folder),
        processes=2,
        make_env=lambda worker, test: OldGymEnv(a3c.make_env(args.env_id), seeds[worker]),
        steps=steps,
        eval_interval=None,
        agent=agent,
        random_seeds=seeds,
        global_step_hooks=[log_episode],
    )


def train_pfrl(steps: int, seed: int, folder: Path) -> None:
    """PFRL's A3C with the networks and hyperparameters of a3c.py."""

    def mlp(outputs: int, *head: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs), *head)

    def new_model() -> nn.Module:
        import pfrl

        return pfrl.nn.Branched(mlp(2, pfrl.policies.SoftmaxCategoricalHead()), mlp(1))

    run_pfrl(new_model, a3c.Args(), steps, seed, folder)


def main(args: Args) -> int:
    seeds, steps = range(args.seed, args.seed + args.repeats), args.speed_steps
    contestants = {
        name: tools.script("a3c.py", f"{flags} --total-timesteps={steps} --eval-episodes=0")
        for name, flags in FLAGS.items()
    }
    contestants |= {
        PFRL: tools.call(train_pfrl, steps=steps),
        SB3: tools.call(train_a2c, steps=steps, threads=1),
        SB3_THREADS: tools.call(train_a2c, steps=steps, threads=0),
    }
    speed, (sb3,) = tools.play_with_rivals(contestants, seeds, [[SB3, SB3_THREADS]], tools.SPEED, tools.read_speed)
    budget = min(args.budget, a3c.Args.total_timesteps)
    contestants = {
        OURS: tools.script("a3c.py", f"{FLAGS[OURS]} --total-timesteps={budget} --eval-episodes=0"),
        sb3: tools.call(train_a2c, steps=args.budget, threads=int(sb3 == SB3), stop_at=args.target),
    }
    learning = tools.play(contestants, seeds, lambda folder: tools.read_time_to_target(folder, args.target))

    tools.print_table(tools.SPEED, tools.spread(speed, tools.SPEED))
    for title in (tools.SECONDS_TO_TARGET, tools.STEPS_TO_TARGET):
        tools.print_table(title, tools.spread(learning, title))
    ratios = {
        "steps per second, a3c.py / PFRL": tools.ratio(speed, tools.SPEED, OURS, PFRL),
        "steps per second, a3c.py / SB3": tools.ratio(speed, tools.SPEED, OURS, sb3),
        "steps per second, 2 workers / 1 worker": tools.ratio(speed, tools.SPEED, OURS, OURS_1),
        "steps per second, 16 workers / 2 workers": tools.ratio(speed, tools.SPEED, OURS_16, OURS),
        "seconds to target, SB3 / a3c.py": tools.ratio(learning, tools.SECONDS_TO_TARGET, sb3, OURS),
    }
    tools.print_table("ratio", pd.DataFrame(ratios).T)
    return tools.finish(pd.concat([speed, learning]), args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
