"""a3c.py beside Stable-Baselines3's A2C and PFRL's A3C on CartPole-v1.

    pip install -r experiments/requirements.txt
    python experiments/a3c_vs_peers.py --output a3c_vs_peers.json

About 10 minutes on two idle cores; `--repeats 1 --speed-steps 20000 --budget 50000` is a trial of two minutes.

Speed: steps per second of all workers or environments together, over the same number of steps for everyone, 5 repeats.
The first tenth of the steps is left out, because the workers are not all up at once: the rate is taken from the first
episode that ends after it to the last one that ends.

Learning: seconds and steps from the start of training until the last 50 training episodes have a mean return of 475,
5 seeds. Imports and, for `a3c.py`, the start of its workers come before that and are not counted. `a3c.py` runs with
its defaults and two workers, SB3's A2C with 8 environments and its defaults, which are also its zoo's settings for
CartPole.

Every run has a process of its own, one after the other, and each contestant has one run per repeat, so that a machine
that slows down slows down everybody. torch runs with one thread in every process; in the first repeat SB3 runs with
torch's default number of threads too, and the faster of the two goes on. PFRL has the networks and hyperparameters of
`a3c.py` (without annealing the learning rate, which costs nothing). A run that fails or exceeds `--time-limit` is left
out of the medians and reported, and the exit code is 1.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 50  # episodes whose mean return has to reach the target

OURS, OURS_1, OURS_16 = "a3c.py, 2 workers", "a3c.py, 1 worker", "a3c.py, 16 workers"
PFRL, SB3, SB3_THREADS = "PFRL A3C, 2 processes", "SB3 A2C, 8 environments", "SB3 A2C, 8 environments, default threads"
COMMANDS = {
    OURS: [ROOT / "a3c.py", "--eval-episodes=0", "--num-workers=2"],
    OURS_1: [ROOT / "a3c.py", "--eval-episodes=0", "--num-workers=1", "--backend=process"],
    OURS_16: [ROOT / "a3c.py", "--eval-episodes=0", "--num-workers=16"],
    PFRL: [__file__, "--only=pfrl"],
    SB3: [__file__, "--only=sb3"],
    SB3_THREADS: [__file__, "--only=sb3", "--threads=0"],
}


@dataclass
class Args:
    repeats: int = 5
    """runs of each contestant, with seeds seed, seed + 1, ..."""
    seed: int = 1
    """seed of the first run"""
    speed_steps: int = 100_000
    """steps of each run that measures steps per second"""
    budget: int = 500_000
    """steps after which SB3 counts as not having reached the target (a3c.py: its own --total-timesteps)"""
    target: float = 475.0
    """mean return over the last 50 training episodes that counts as learned"""
    time_limit: float = 900.0
    """seconds after which a run is killed and counted as failed"""
    output: Path | None = None
    """write every run and the summary to this JSON file"""
    only: Literal["sb3", "pfrl"] | None = None
    """(internal) no comparison: train this peer in this process"""
    total_timesteps: int = 20_000
    """(internal, with --only) steps to train"""
    stop_at: float = float("inf")
    """(internal, with --only sb3) mean return over the last 50 episodes that ends the training"""
    threads: int = 1
    """(internal, with --only) torch's threads; 0 leaves torch's default"""
    log_dir: Path = Path(".")
    """(internal, with --only) where episodes.csv goes"""


# ----------------------------------------------------------------------------------------------------------- the peers


class EpisodeLog:
    """episodes.csv of a peer. It appends a whole line at a time, so that forked processes can share it."""

    def __init__(self, folder: Path):
        self.path = folder / "episodes.csv"
        self.path.write_text("step,time,return\n")
        self.start = time.perf_counter()

    def write(self, step: int, episode_return: float) -> None:
        with self.path.open("a") as file:
            file.write(f"{step},{time.perf_counter() - self.start:.6f},{episode_return}\n")


def train_sb3(args: Args) -> None:
    """SB3's A2C in 8 environments with its defaults."""
    from stable_baselines3 import A2C
    from stable_baselines3.common.env_util import make_vec_env

    returns = []

    def log_episodes(variables: dict, _) -> bool:
        for info in variables["infos"]:
            if "episode" in info:  # put there by the Monitor that make_vec_env wraps around each environment
                returns.append(info["episode"]["r"])
                log.write(model.num_timesteps, returns[-1])
        return len(returns) < WINDOW or np.mean(returns[-WINDOW:]) < args.stop_at  # False ends the training

    model = A2C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=8, seed=args.seed), seed=args.seed, device="cpu")
    log = EpisodeLog(args.log_dir)
    model.learn(args.total_timesteps, callback=log_episodes)


class OldGymEnv:
    """CartPole with the interface that PFRL expects: `step` has four results, and a time limit sets `needs_reset`."""

    def __init__(self, seed: int):
        self.env, self.seed = gym.make("CartPole-v1"), seed

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


def train_pfrl(args: Args) -> None:
    """PFRL's A3C in two processes with the networks and hyperparameters of a3c.py."""
    import pfrl
    from torch import nn

    sys.path.insert(0, str(ROOT))
    import a3c

    ours = a3c.Args()
    torch.multiprocessing.set_start_method("fork")  # PFRL hands closures to its processes
    pfrl.utils.set_random_seed(args.seed)

    def mlp(outputs: int, *head: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs), *head)

    model = pfrl.nn.Branched(mlp(2, pfrl.policies.SoftmaxCategoricalHead()), mlp(1))
    optimizer = pfrl.optimizers.SharedRMSpropEpsInsideSqrt(
        model.parameters(), lr=ours.learning_rate, alpha=ours.rmsprop_alpha, eps=ours.rmsprop_eps
    )
    weights = {"beta": ours.ent_coef, "v_loss_coef": ours.vf_coef, "max_grad_norm": ours.max_grad_norm}
    agent = pfrl.agents.A3C(model, optimizer, t_max=ours.t_max, gamma=ours.gamma, **weights)
    seeds = [args.seed * 1000 + worker for worker in range(2)]
    log = EpisodeLog(args.log_dir)
    # A process that dies would leave the other one to finish alone, and PFRL would look slow: let that fail instead.
    warnings.simplefilter("error", pfrl.utils.async_.AbnormalExitWarning)
    pfrl.experiments.train_agent_async(
        outdir=str(args.log_dir),
        processes=2,
        make_env=lambda worker, test: OldGymEnv(seeds[worker]),
        steps=args.total_timesteps,
        eval_interval=None,
        agent=agent,
        random_seeds=seeds,
        global_step_hooks=[lambda env, _, step: log.write(step, env.episode_return) if env.episode_over else None],
    )


# ------------------------------------------------------------------------------------------------ one run, one process


def run(name: str, *flags: str, seed: int, time_limit: float) -> pd.DataFrame:
    """Run a contestant in a process of its own and return its episodes.csv. RuntimeError says why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *COMMANDS[name], *flags, f"--seed={seed}", f"--log-dir={folder}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, **pipes, start_new_session=True)  # a session: its workers die with it
        try:
            output, _ = process.communicate(timeout=time_limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"killed after {time_limit:g} seconds") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing of the session is left, as it should be
                os.killpg(process.pid, signal.SIGKILL)
        tables = list(Path(folder).rglob("episodes.csv"))
        if process.returncode or not tables:
            last_lines = " | ".join(line.strip() for line in output.splitlines()[-5:])
            raise RuntimeError(f"exit code {process.returncode}: {last_lines}")
        return pd.read_csv(tables[0]).sort_values("time", kind="stable")


def steps_per_second(episodes: pd.DataFrame, steps: int) -> float:
    """Rate from the first episode that ends after a tenth of the steps to the last one that ends."""
    late = episodes[episodes["step"] >= steps / 10]
    return np.ptp(late["step"]) / np.ptp(late["time"])


def time_to_target(episodes: pd.DataFrame, target: float) -> tuple[float, float]:
    """Seconds and steps at which the mean return of the last 50 episodes reaches the target; inf: it never does."""
    reached = episodes[episodes["return"].rolling(WINDOW).mean() >= target]
    return tuple(reached[["time", "step"]].iloc[0]) if len(reached) else (np.inf, np.inf)


# ---------------------------------------------------------------------------------------------------------- the tables


def ratio(numerator: pd.Series, denominator: pd.Series) -> pd.Series:
    """Ratio of the medians; minimum and maximum of the ratios within a repeat. No figure if the denominator is inf."""
    pairs = numerator / denominator
    with np.errstate(invalid="ignore"):  # inf / inf: neither of them has reached the target
        median = np.divide(numerator.median(), denominator.median())
    ratios = pd.Series({"median": median, "min": pairs.min(), "max": pairs.max()})
    return ratios.where(ratios > 0)


def markdown(title: str, rows: pd.DataFrame) -> str:
    def cell(value: float) -> str:
        words = "no figure" if np.isnan(value) else "not reached"
        return (f"{value:,.0f}" if value >= 100 else f"{value:.2f}") if np.isfinite(value) else words

    lines = [f"| {title} | {' | '.join(rows.columns)} |", "|---" + "|---:" * len(rows.columns) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(map(cell, row))} |" for name, row in rows.iterrows()])


def compare(args: Args) -> int:
    seeds = range(args.seed, args.seed + args.repeats)
    speed, seconds, steps = (pd.DataFrame(index=seeds, columns=list(COMMANDS), dtype=float) for _ in range(3))
    failures = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that takes the running contestant along

    def attempt(name: str, seed: int, measure: Callable, *flags: str) -> float | tuple[float, float]:
        try:
            result = measure(run(name, *flags, seed=seed, time_limit=args.time_limit))
        except (RuntimeError, ValueError, KeyError) as error:
            result = np.nan
            failures.append(f"{name}, seed {seed}: {error}")
            print(f"FAILED: {failures[-1]}", file=sys.stderr)
        else:
            print(f"{name}, seed {seed}: {np.round(result, 1)}", file=sys.stderr)
        return result

    rate, names = partial(steps_per_second, steps=args.speed_steps), list(COMMANDS)
    for seed in seeds:
        for name in names:
            speed.loc[seed, name] = attempt(name, seed, rate, f"--total-timesteps={args.speed_steps}")
        if seed == args.seed:  # after the first repeat only the faster SB3 goes on
            sb3 = speed.loc[seed, [SB3, SB3_THREADS]].fillna(0).astype(float).idxmax()
            names = [name for name in names if name not in (SB3, SB3_THREADS) or name == sb3]
    learning = {OURS: [], sb3: [f"--total-timesteps={args.budget}", f"--stop-at={args.target}"]}
    for seed in seeds:
        for name, flags in learning.items():
            result = attempt(name, seed, partial(time_to_target, target=args.target), *flags)
            seconds.loc[seed, name], steps.loc[seed, name] = np.broadcast_to(result, 2)

    ratios = {
        "steps per second, a3c.py / PFRL": ratio(speed[OURS], speed[PFRL]),
        "steps per second, a3c.py / SB3": ratio(speed[OURS], speed[sb3]),
        "steps per second, 2 workers / 1 worker": ratio(speed[OURS], speed[OURS_1]),
        "steps per second, 16 workers / 2 workers": ratio(speed[OURS_16], speed[OURS]),
        f"seconds to {args.target:g}, SB3 / a3c.py": ratio(seconds[sb3], seconds[OURS]),
    }
    summary = {
        "steps per second": speed.agg(["median", "min", "max"]).T,
        f"seconds to {args.target:g}": seconds[list(learning)].agg(["median", "min", "max"]).T,
        f"steps to {args.target:g}": steps[list(learning)].agg(["median", "min", "max"]).T,
        "ratio": pd.DataFrame(ratios).T,
    }
    print("\n\n".join(markdown(f"{title} ({args.repeats} runs)", rows) for title, rows in summary.items()))
    print("\n" + ("\n".join(f"FAILED: {line}" for line in failures) or "No run failed."))
    if args.output:
        packages = ("torch", "gymnasium", "numpy", "stable-baselines3", "pfrl")
        machine = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
        runs = {"steps per second": speed, "seconds": seconds[list(learning)], "steps": steps[list(learning)]}
        report = {
            "args": {name: getattr(args, name) for name in ("repeats", "seed", "speed_steps", "budget", "target")},
            "versions": machine | {package: version(package) for package in packages},
            # in both, null stands for "not reached", or for a failure if `failures` lists the run
            "summary": {title: json.loads(rows.to_json(orient="index")) for title, rows in summary.items()},
            "runs": {title: json.loads(rows.to_json()) for title, rows in runs.items()},
            "failures": failures,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.threads:
        torch.set_num_threads(args.threads)
    sys.exit({None: compare, "sb3": train_sb3, "pfrl": train_pfrl}[args.only](args))
