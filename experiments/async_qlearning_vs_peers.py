"""async_qlearning.py beside Stable-Baselines3's A2C (steps per second) and DQN (learning) on CartPole-v1.

    pip install -r experiments/requirements.txt
    python experiments/async_qlearning_vs_peers.py --output async_qlearning_vs_peers.json

About 15 minutes on two idle cores; `--repeats 1 --speed-steps 20000 --learning-steps 20000` is a trial of two minutes.

Speed: steps per second of all workers or environments together, over the same number of steps for everyone, 5 repeats.
The first tenth of the steps is left out, because the workers are not all up at once: the rate is taken from the first
episode that ends after it to the last one that ends. A single worker is a process here, as two are. SB3's A2C has 8
environments and its defaults.

Learning: seconds and steps of training until the greedy policy has a mean return of 475 over 20 episodes, and seconds
until it has for the third time in a row, because a policy may hit on 475 and lose it again; 5 seeds. Imports and the
start of workers come before that and are not counted, nor is evaluation: copies of the networks are kept during the
training and evaluated after it, in order, all by the same function and from the same initial states.
`async_qlearning.py` runs with its defaults; the copies are its checkpoints, one per 5,000 steps. SB3's DQN runs with
its zoo's settings for CartPole and keeps a copy after each of its training phases, one per 256 steps. By the length of
the training that is more often, which favours DQN.

Every run has a process of its own, one after the other, and each contestant has one run per repeat, so that a machine
that slows down slows down everybody. SB3 runs with one torch thread; in the first repeat it runs with torch's default
number of threads too, and the one with more steps per second goes on. A run that fails or exceeds `--time-limit` is
left out of the medians and reported, and the exit code is 1.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import tyro
from gymnasium import spaces
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import async_qlearning
from common.evaluation import evaluate

POLL_SECONDS = 0.02  # between two looks for a new checkpoint
EPISODES = 20  # of an evaluation
# rl-baselines3-zoo, hyperparams/dqn.yml, CartPole-v1
DQN_SETTINGS = {"learning_rate": 2.3e-3, "batch_size": 64, "gamma": 0.99, "policy_kwargs": {"net_arch": [256, 256]}}
DQN_SETTINGS |= {"buffer_size": 100_000, "learning_starts": 1000, "target_update_interval": 10}
DQN_SETTINGS |= {"train_freq": 256, "gradient_steps": 128}
DQN_SETTINGS |= {"exploration_fraction": 0.16, "exploration_final_eps": 0.04}

OURS, OURS_1, OURS_8, OURS_16 = (f"async_qlearning.py, {n} worker{'s' * (n > 1)}" for n in (2, 1, 8, 16))
FLAGS = {OURS: ["--num-workers=2"], OURS_1: ["--num-workers=1", "--backend=process"]}
FLAGS |= {OURS_8: ["--num-workers=8"], OURS_16: ["--num-workers=16"]}
WORKERS = {n: [async_qlearning.__file__, "--eval-episodes=0", "--log-interval=5000", *f] for n, f in FLAGS.items()}
THREADS = {"": 1, ", default threads": 0}
A2CS = {f"SB3 A2C, 8 environments{words}": [__file__, "--only=a2c", f"--threads={n}"] for words, n in THREADS.items()}
DQNS = {f"SB3 DQN{words}": [__file__, "--only=dqn", f"--threads={n}"] for words, n in THREADS.items()}
COMMANDS = WORKERS | A2CS | DQNS

SPEED = "steps per second"
LEARNING = ("seconds to target", "steps to target", "seconds to three times in a row")
LEARNING += ("greedy return after training", "steps per second, learning")


@dataclass
class Args:
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
    time_limit: float = 900.0
    """seconds after which a run is killed and counted as failed"""
    output: Path | None = None
    """write every run and the summary to this JSON file"""
    part: Literal["speed", "learning"] | None = None
    """make this part of the comparison alone"""
    only: Literal["a2c", "dqn"] | None = None
    """(internal) no comparison: train this peer in this process"""
    total_timesteps: int = 50_000
    """(internal, with --only) steps to train; DQN's zoo has the default"""
    threads: int = 1
    """(internal, with --only) torch's threads; 0 leaves torch's default"""
    log_dir: Path = Path(".")
    """(internal, with --only) where episodes.csv or the copies of the network go"""


# ----------------------------------------------------------------------------------------------------------- the peers


def train_a2c(args: Args) -> None:
    """SB3's A2C in 8 environments with its defaults. Writes episodes.csv."""
    from stable_baselines3 import A2C
    from stable_baselines3.common.env_util import make_vec_env

    def log_episodes(variables: dict, _) -> bool:
        for info in variables["infos"]:
            if "episode" in info:  # put there by the Monitor that make_vec_env wraps around each environment
                episodes.append((model.num_timesteps, time.perf_counter() - start))
        return True

    model = A2C("MlpPolicy", make_vec_env("CartPole-v1", n_envs=8, seed=args.seed), seed=args.seed, device="cpu")
    episodes, start = [], time.perf_counter()
    model.learn(args.total_timesteps, callback=log_episodes)
    pd.DataFrame(episodes, columns=["step", "time"]).to_csv(args.log_dir / "episodes.csv", index=False)


def train_dqn(args: Args) -> None:
    """SB3's DQN with its zoo's settings. Writes copies of its network, 00000.pt, 00001.pt, ..., when it has trained."""
    from stable_baselines3 import DQN

    def keep_copy() -> bool:
        state = {name: tensor.clone() for name, tensor in model.q_net.q_net.state_dict().items()}
        copies.append({"step": model.num_timesteps, "seconds": time.perf_counter() - start, "model": state})
        return True

    def after_step(*_) -> bool:  # the first step of 256 follows a training phase
        return model.num_timesteps % DQN_SETTINGS["train_freq"] != 1 or keep_copy()

    model = DQN("MlpPolicy", "CartPole-v1", seed=args.seed, device="cpu", **DQN_SETTINGS)
    copies, start = [], time.perf_counter()
    model.learn(args.total_timesteps, callback=after_step)
    keep_copy()
    for number, copy in enumerate(copies):
        torch.save(copy, args.log_dir / f"{number:05}.pt")


# ------------------------------------------------------------------------------------------------ one run, one process


def link_checkpoint(folder: Path) -> None:
    """Give checkpoint.pt of the run in `folder` a name that stays, 00000.pt, 00001.pt, ..., if it has been renewed."""
    links = sorted(folder.glob("*.pt"))
    for checkpoint in folder.glob("*/checkpoint.pt"):  # one at most
        if not links or not links[-1].samefile(checkpoint):
            os.link(checkpoint, folder / f"{len(links):05}.pt")


@contextlib.contextmanager
def run(name: str, *flags: str, seed: int, args: Args) -> Iterator[Path]:
    """Run a contestant in a process of its own. Yields its folder. RuntimeError says why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *COMMANDS[name], *flags, f"--seed={seed}", f"--log-dir={folder}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, **pipes, start_new_session=True)  # a session: its workers die with it
        deadline, output = time.monotonic() + args.time_limit, None
        try:
            while output is None:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"killed after {args.time_limit:g} seconds")
                link_checkpoint(Path(folder))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=POLL_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing of the session is left, as it should be
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            last_lines = " | ".join(line.strip() for line in output.splitlines()[-5:])
            raise RuntimeError(f"exit code {process.returncode}: {last_lines}")
        link_checkpoint(Path(folder))
        yield Path(folder)


def measure_speed(folder: Path, name: str, seed: int, args: Args) -> dict[str, float]:
    """Steps per second, from the first episode that ends after a tenth of the steps to the last one that ends."""
    (table,) = folder.rglob("episodes.csv")
    episodes = pd.read_csv(table)
    late = episodes[episodes["step"] >= args.speed_steps / 10]
    return {SPEED: np.ptp(late["step"]) / np.ptp(late["time"])}


def measure_learning(folder: Path, name: str, seed: int, args: Args) -> dict[str, float]:
    """What LEARNING names, by the copies of the network in `folder`; inf: none of them reaches the target."""
    network = async_qlearning.QNetwork(4, spaces.Discrete(2))
    if name in DQNS:
        network = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    network.requires_grad_(False)
    evaluation = async_qlearning.Args(env_id="CartPole-v1", seed=seed, eval_episodes=EPISODES)

    def evaluate_copy(path: Path) -> tuple[float, int, float]:
        copy = torch.load(path, weights_only=True)
        network.load_state_dict(copy["model"])
        _, mean_return = evaluate(lambda s: int(network(torch.from_numpy(s)).argmax()), evaluation, folder)
        return copy["seconds"], copy["step"], mean_return

    paths = sorted(folder.glob("*.pt"))
    first, third, in_a_row = None, (np.inf, np.inf), 0
    for path in paths:
        seconds, steps, mean_return = evaluate_copy(path)
        in_a_row = in_a_row + 1 if mean_return >= args.target else 0
        first = first or ((seconds, steps) if in_a_row else None)
        if in_a_row == 3:
            third = seconds, steps
            break
    all_seconds, all_steps, last_return = evaluate_copy(paths[-1])
    results = *(first or (np.inf, np.inf)), third[0], last_return, all_steps / all_seconds
    return dict(zip(LEARNING, results, strict=True))


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
        return (f"{value:,.0f}" if value >= 1000 else f"{value:.2f}") if np.isfinite(value) else words

    lines = [f"| {title} | {' | '.join(rows.columns)} |", "|---" + "|---:" * len(rows.columns) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(map(cell, row))} |" for name, row in rows.iterrows()])


def compare(args: Args) -> int:
    seeds = range(args.seed, args.seed + args.repeats)
    speed_columns = {SPEED: [*WORKERS, *A2CS]} if args.part != "learning" else {}
    learning_columns = {title: [OURS, OURS_8, *DQNS] for title in LEARNING} if args.part != "speed" else {}
    columns = speed_columns | learning_columns
    runs = {title: pd.DataFrame(index=seeds, columns=names, dtype=float) for title, names in columns.items()}
    failures = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that takes the running contestant along

    def compete(measure: Callable, title: str, rivals: dict, *flags: str) -> str:
        """All runs of one part. Returns the rival that goes on: in the first repeat, it has the highest `title`."""
        names = list(runs[title])
        for seed in seeds:
            for name in names:
                try:
                    with run(name, *flags, seed=seed, args=args) as folder:
                        results = measure(folder, name, seed, args)
                except (RuntimeError, ValueError, LookupError) as error:
                    failures.append(f"{name}, seed {seed}: {error}")
                    print(f"FAILED: {failures[-1]}", file=sys.stderr)
                else:
                    print(f"{name}, seed {seed}:", *(f"{result:,.1f}" for result in results.values()), file=sys.stderr)
                    for key, result in results.items():
                        runs[key].loc[seed, name] = result
            if seed == args.seed:
                chosen = runs[title].loc[seed, list(rivals)].fillna(0).idxmax()
                names = [name for name in names if name not in rivals or name == chosen]
        return chosen

    ratios, chosen = {}, []
    if args.part != "learning":
        chosen.append(compete(measure_speed, SPEED, A2CS, f"--total-timesteps={args.speed_steps}"))
        speed = runs[SPEED]
        ratios |= {
            "steps per second, async_qlearning.py / SB3 A2C": ratio(speed[OURS], speed[chosen[-1]]),
            "steps per second, 2 workers / 1 worker": ratio(speed[OURS], speed[OURS_1]),
            "steps per second, 16 workers / 2 workers": ratio(speed[OURS_16], speed[OURS]),
        }
    if args.part != "speed":
        trial = [] if args.learning_steps is None else [f"--total-timesteps={args.learning_steps}"]
        chosen.append(compete(measure_learning, LEARNING[-1], DQNS, *trial))
        for title in (LEARNING[0], LEARNING[2]):
            for ours in (OURS, OURS_8):
                ratios[f"{title}, SB3 DQN / {ours}"] = ratio(runs[title][chosen[-1]], runs[title][ours])
    summary = {title: table.agg(["median", "min", "max"]).T for title, table in runs.items()}
    summary["ratio"] = pd.DataFrame(ratios).T
    print(f"Target: a mean return of {args.target:g} over {EPISODES} greedy episodes.")
    print(f"SB3 goes on as: {'; '.join(chosen)}.\n")
    print("\n\n".join(markdown(f"{title} ({args.repeats} runs)", rows) for title, rows in summary.items()))
    print("\n" + ("\n".join(f"FAILED: {line}" for line in failures) or "No run failed."))
    if args.output:
        machine = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
        packages = {name: version(name) for name in ("torch", "gymnasium", "numpy", "stable-baselines3")}
        report = {
            "args": {key: getattr(args, key) for key in ("repeats", "seed", "speed_steps", "target")},
            "versions": machine | packages,
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
    sys.exit({None: compare, "a2c": train_a2c, "dqn": train_dqn}[args.only](args))
