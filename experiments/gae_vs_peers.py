"""gae.py beside sb3-contrib's TRPO and Stable-Baselines3's PPO on CartPole-v1 and two of MuJoCo's environments.

    pip install -r experiments/requirements.txt
    python experiments/gae_vs_peers.py --only cartpole --output gae_vs_peers_cartpole.json
    python experiments/gae_vs_peers.py --only mujoco --parallel 2 --output gae_vs_peers_mujoco.json

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

Every run has a process of its own, and each contestant has one run per repeat, so that a machine that slows down slows
down everybody. Runs on CartPole-v1 come one after the other; SB3 has one torch thread and, in the first repeat of the
speed, torch's default number too, of which the faster goes on. For MuJoCo, where no time is measured, all have one
thread and `--parallel` runs go at once. A run that fails or exceeds `--time-limit` is reported, and the exit code is 1.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gae
from common.evaluation import evaluate

CARTPOLE = "CartPole-v1"
MUJOCO_FLAGS = "--vf-epochs 10 --minibatch-size 128 --learning-rate 1e-3"  # of gae.py, whose defaults are CartPole-v1's
MUJOCO = {"Hopper-v5": f"{MUJOCO_FLAGS} --max-kl 0.03", "HalfCheetah-v5": f"{MUJOCO_FLAGS} --max-kl 0.06"}
WINDOW = 50  # episodes whose mean return has to reach the target
EPISODES = 20  # of an evaluation
POLL_SECONDS = 0.02  # between two looks at the runs under way
# rl-baselines3-zoo, hyperparams/ppo.yml, CartPole-v1
PPO_STEPS = 100_000
PPO_SETTINGS = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0}
PPO_SETTINGS |= {"learning_rate": lambda left: left * 1e-3, "clip_range": lambda left: left * 0.2}  # left: from 1 to 0

OURS = "gae.py"
THREADS = {"": 1, ", default threads": 0}
TRPOS = {f"SB3 TRPO{words}": [__file__, "--peer=trpo", f"--threads={n}"] for words, n in THREADS.items()}
PPOS = {f"SB3 PPO{words}": [__file__, "--peer=ppo", f"--threads={n}"] for words, n in THREADS.items()}
SMALL = "SB3 TRPO, batches of 1,024"
COMMANDS = {OURS: [gae.__file__], SMALL: [__file__, "--peer=trpo", "--n-steps=128"]} | TRPOS | PPOS

SPEED = "steps per second"
LEARNING = ("seconds to target", "steps to target")
RETURN = "greedy return"


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
    """steps after which TRPO counts as not having reached the target (PPO: 100,000 at most; gae.py: its own default)"""
    target: float = 475.0
    """mean return over the last 50 training episodes that counts as learned"""
    mujoco_steps: int = 300_000
    """steps of each run on MuJoCo's environments"""
    parallel: int = 1
    """runs on MuJoCo's environments that go at once"""
    time_limit: float = 3600.0
    """seconds after which a run is killed and counted as failed"""
    output: Path | None = None
    """write every run and the summary to this JSON file"""
    peer: Literal["trpo", "ppo"] | None = None
    """(internal) no comparison: train this peer in this process"""
    env_id: str = CARTPOLE
    """(internal, with --peer) environment"""
    total_timesteps: int = 20_000
    """(internal, with --peer) steps to train"""
    stop_at: float = float("inf")
    """(internal, with --peer) mean return over the last 50 episodes that ends the training"""
    eval_episodes: int = 0
    """(internal, with --peer) greedy episodes after training"""
    n_steps: int | None = None
    """(internal, with --peer trpo) steps of each environment between two updates; without: SB3's default"""
    threads: int = 1
    """(internal, with --peer) torch's threads; 0 leaves torch's default"""
    log_dir: Path = Path(".")
    """(internal, with --peer) where episodes.csv, metrics.csv and evaluation.json go"""


# ----------------------------------------------------------------------------------------------------------- the peers


def train_peer(args: Args) -> None:
    """TRPO or PPO: with 8 environments on CartPole-v1, elsewhere with all that SB3 does by default."""
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    def log_episodes(variables: dict, _) -> bool:
        for info in variables["infos"]:
            if "episode" in info:  # put there by the Monitor that SB3 wraps around each environment
                returns.append(info["episode"]["r"])
                episodes.append((model.num_timesteps, time.perf_counter() - start, returns[-1]))
                if len(returns) == WINDOW and np.mean(returns) >= args.stop_at:
                    return False  # which ends the training
        return True

    on_cartpole = args.env_id == CARTPOLE
    env = make_vec_env(args.env_id, n_envs=8, seed=args.seed) if on_cartpole else args.env_id
    settings = PPO_SETTINGS if on_cartpole and args.peer == "ppo" else {}
    settings |= {"n_steps": args.n_steps} if args.n_steps else {}
    model = {"trpo": TRPO, "ppo": PPO}[args.peer]("MlpPolicy", env, seed=args.seed, device="cpu", **settings)
    episodes, returns, start = [], deque(maxlen=WINDOW), time.perf_counter()
    model.learn(args.total_timesteps, callback=log_episodes)
    end = model.num_timesteps, time.perf_counter() - start
    pd.DataFrame(episodes, columns=["step", "time", "return"]).to_csv(args.log_dir / "episodes.csv", index=False)
    pd.DataFrame([end], columns=["step", "time"]).to_csv(args.log_dir / "metrics.csv", index=False)
    evaluation = gae.Args(env_id=args.env_id, seed=args.seed, eval_episodes=args.eval_episodes)
    evaluate(lambda observation: model.predict(observation, deterministic=True)[0], evaluation, args.log_dir)


# ------------------------------------------------------------------------------------------------ one run, one process


def measure(folder: Path, target: float) -> dict[str, float]:
    """Steps per second of the whole training, what LEARNING names, inf if it is not reached, and the greedy return."""
    (metrics,), (episodes,) = (list(map(pd.read_csv, folder.rglob(f"{name}.csv"))) for name in ("metrics", "episodes"))
    last, reached = metrics.iloc[-1], episodes[episodes["return"].rolling(WINDOW).mean() >= target]
    learned = map(float, reached[["time", "step"]].iloc[0] if len(reached) else (np.inf, np.inf))
    results = {SPEED: float(last["step"] / last["time"])} | dict(zip(LEARNING, learned, strict=True))
    for evaluation in folder.rglob("evaluation.json"):  # none or one
        results[RETURN] = json.loads(evaluation.read_text())["mean_return"]
    return results


def play(jobs: list[tuple], titles: tuple[str, ...], args: Args, failures: list[str], parallel: int = 1) -> Iterator:
    """Run the jobs, (contestant, seed, flags) each, in processes of their own, `parallel` at once.

    Yields contestant, seed and those results of `measure` that `titles` names, in the order in which the runs end. Of
    one that fails it yields nothing; `failures` then says why.
    """
    waiting, running, parallel = jobs[::-1], [], max(1, parallel)
    with tempfile.TemporaryDirectory() as root:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = name, seed, flags = waiting.pop()
                    folder = Path(tempfile.mkdtemp(dir=root))
                    command = [sys.executable, *COMMANDS[name], *flags, f"--seed={seed}", f"--log-dir={folder}"]
                    with open(folder / "output.txt", "w") as output:
                        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
                    running.append((process, folder, time.monotonic() + args.time_limit, job))
                time.sleep(POLL_SECONDS)
                for entry in running.copy():
                    process, folder, deadline, (name, seed, flags) = entry
                    late = time.monotonic() > deadline
                    if process.poll() is None and not late:
                        continue
                    process.kill()  # does nothing to one that has ended
                    running.remove(entry)
                    words = f"{name}, seed {seed}, {' '.join(flags)}"
                    try:
                        if process.wait():
                            lines = (folder / "output.txt").read_text().splitlines()[-5:]
                            cause = f"killed after {args.time_limit:g} s" if late else f"exit code {process.returncode}"
                            raise RuntimeError(f"{cause}: {' | '.join(line.strip() for line in lines)}")
                        measured = measure(folder, args.target)
                        results = {title: measured[title] for title in titles}
                    except (RuntimeError, ValueError, LookupError) as error:
                        failures.append(f"{words}: {error}")
                        print(f"FAILED: {failures[-1]}", file=sys.stderr)
                    else:
                        print(f"{words}:", *(f"{value:,.1f}" for value in results.values()), file=sys.stderr)
                        yield name, seed, results
        finally:
            for process, *_ in running:
                process.kill()
                process.wait()


# ---------------------------------------------------------------------------------------------------------- the tables


def ratio(numerator: pd.Series, denominator: pd.Series) -> pd.Series:
    """Ratio of the medians; minimum and maximum of the ratios within a repeat. No figure if the denominator is inf."""
    pairs = numerator / denominator
    with np.errstate(invalid="ignore"):  # inf / inf: neither of them has reached the target
        ratios = np.divide(numerator.median(), denominator.median()), pairs.min(), pairs.max()
    return pd.Series(ratios, index=["median", "min", "max"]).where(lambda values: values > 0)


def markdown(title: str, rows: pd.DataFrame) -> str:
    def cell(value: float) -> str:
        words = "no figure" if np.isnan(value) else "not reached"
        return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}") if np.isfinite(value) else words

    lines = [f"| {title} | {' | '.join(rows.columns)} |", "|---" + "|---:" * len(rows.columns) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(map(cell, row))} |" for name, row in rows.iterrows()])


def compare_on_cartpole(args: Args, failures: list[str]) -> tuple[dict, dict]:
    """Speed and learning on CartPole-v1. Returns the runs and their summary, tables by title."""
    seeds = range(args.seed, args.seed + (args.repeats or 5))
    runs = {title: pd.DataFrame(index=seeds, columns=list(COMMANDS), dtype=float) for title in (SPEED, *LEARNING)}

    def compete(titles: tuple[str, ...], seeds: range, flags: dict[str, list[str]]) -> None:
        common = [f"--env-id={CARTPOLE}", "--eval-episodes=0"]
        jobs = [(name, seed, common + own) for seed in seeds for name, own in flags.items()]
        for name, seed, results in play(jobs, titles, args, failures):
            for title, result in results.items():
                runs[title].loc[seed, name] = result

    ours, steps = ["--num-envs=8"], [f"--total-timesteps={args.speed_steps}"]
    compete((SPEED,), seeds[:1], dict.fromkeys(COMMANDS, steps) | {OURS: ours + steps})
    trpo, ppo = (runs[SPEED].loc[args.seed, list(rivals)].fillna(0).idxmax() for rivals in (TRPOS, PPOS))
    compete((SPEED,), seeds[1:], {OURS: ours + steps, SMALL: steps, trpo: steps, ppo: steps})
    budgets = {trpo: args.budget, SMALL: args.budget, ppo: min(args.budget, PPO_STEPS)}
    peers = {name: [f"--total-timesteps={budget}", f"--stop-at={args.target}"] for name, budget in budgets.items()}
    compete(LEARNING, seeds, {OURS: ours} | peers)

    runs |= {title: runs[title][[OURS, *peers]] for title in LEARNING}
    ratios = {f"{SPEED}, gae.py / {peer}": ratio(runs[SPEED][OURS], runs[SPEED][peer]) for peer in peers}
    for title in LEARNING:
        ratios |= {f"{title}, {peer} / gae.py": ratio(runs[title][peer], runs[title][OURS]) for peer in peers}
    summary = {title: table.agg(["median", "min", "max"]).T for title, table in runs.items()}
    print(f"{CARTPOLE}, {len(seeds)} runs. Target: a mean return of {args.target:g} over {WINDOW} training episodes.\n")
    return runs, summary | {"ratio": pd.DataFrame(ratios).T}


def compare_on_mujoco(args: Args, failures: list[str]) -> tuple[dict, dict]:
    """Greedy returns on MuJoCo's environments. Returns the runs and their summary, tables by title."""
    seeds = range(args.seed, args.seed + (args.repeats or 3))
    names = OURS, next(iter(TRPOS)), next(iter(PPOS))  # the peers with one torch thread
    runs = {f"{env_id}, {RETURN}": pd.DataFrame(index=seeds, columns=list(names), dtype=float) for env_id in MUJOCO}
    for (env_id, flags), table in zip(MUJOCO.items(), runs.values(), strict=True):
        common = [f"--env-id={env_id}", f"--total-timesteps={args.mujoco_steps}", f"--eval-episodes={EPISODES}"]
        jobs = [(name, seed, common + flags.split() * (name == OURS)) for seed in seeds for name in names]
        for name, seed, results in play(jobs, (RETURN,), args, failures, args.parallel):
            table.loc[seed, name] = results[RETURN]
    words = {seed: f"seed {seed}" for seed in seeds}
    return runs, {title: table.T.rename(columns=words).assign(mean=table.mean()) for title, table in runs.items()}


def compare(args: Args) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that takes the running contestants along
    runs, summary, failures = {}, {}, []
    for part, compare_part in {"cartpole": compare_on_cartpole, "mujoco": compare_on_mujoco}.items():
        if args.only in (None, part):
            part_runs, part_summary = compare_part(args, failures)
            print("\n\n".join(markdown(title, rows) for title, rows in part_summary.items()) + "\n", flush=True)
            runs, summary = runs | part_runs, summary | part_summary
    print("\n".join(f"FAILED: {line}" for line in failures) or "No run failed.")
    if args.output:
        machine = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
        packages = ("torch", "gymnasium", "numpy", "stable-baselines3", "sb3-contrib", "mujoco")
        arguments = ("only", "repeats", "seed", "speed_steps", "budget", "target", "mujoco_steps", "parallel")
        report = {
            "args": {name: getattr(args, name) for name in arguments} | {"MUJOCO": MUJOCO},
            "versions": machine | {package: version(package) for package in packages},
            # in both, null stands for "not reached", for a run not made, or for a failure if `failures` lists the run
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
    sys.exit(train_peer(args) if args.peer else compare(args))
