"""ddpg.py beside Stable-Baselines3's DDPG: returns on Pendulum-v1 and HalfCheetah-v5, and steps per second.

    pip install -r experiments/requirements.txt
    python experiments/ddpg_vs_peers.py --only pendulum --parallel 2 --output ddpg_vs_peers_pendulum.json
    python experiments/ddpg_vs_peers.py --only speed --output ddpg_vs_peers_speed.json
    python experiments/ddpg_vs_peers.py --only halfcheetah --parallel 2 --output ddpg_vs_peers_halfcheetah.json
    python experiments/ddpg_vs_peers.py --only inverted --parallel 2 --output ddpg_vs_peers_inverted.json
    python experiments/ddpg_vs_peers.py --only cartpole --parallel 2 --output ddpg_vs_peers_cartpole.json

On two idle cores these take about 5, 3, 16, 3 and 5 minutes; without `--only` all parts run, one after the other.
`--repeats 1 --steps 600 --speed-steps 300` is a trial of two minutes.

"pendulum", "halfcheetah": mean return of the greedy policy over 20 episodes after 10,000 steps of Pendulum-v1, 5 seeds,
and after 100,000 of HalfCheetah-v5, 3 seeds; both contestants are evaluated by the same function and from the same
initial states. SB3 takes its settings out of the flags that ddpg.py is called with, and its networks have the same
layers and first weights as those of ddpg.py with `--action-layer 1 --no-small-last-layer`: the action enters its critic
at the first layer. On Pendulum-v1 ddpg.py runs with all of its defaults, too, where the action enters at the second.

"speed": environment steps per second on HalfCheetah-v5 while there is an update at each of them, with minibatches of
256 and of 64, 3 repeats, in which the contestants take turns. The 1,000 random steps at the beginning do not count;
what a run of ddpg.py writes while it trains does. ddpg.py runs with `--num-threads 2`; SB3 has one torch thread and, in
the first repeat, torch's default number too, of which the faster goes on and is compared.

"inverted", "cartpole": the same return of ddpg.py alone after 50,000 steps of InvertedPendulum-v5, and of CartPole-v1,
whose Discrete actions it takes by Gumbel-Softmax and which SB3's DDPG does not take; 3 seeds.

Every run has a process of its own. `--parallel` of them go at once, each with one torch thread, but where speed is
measured, which is one after the other. A run that fails or exceeds `--time-limit` is reported, and the exit code is 1.
"""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
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

import ddpg
from common.evaluation import evaluate
from common.inputs import make_env

# flags of ddpg.py; what is not said is its default
SB3_NETWORKS = "--action-layer 1 --no-small-last-layer"
PENDULUM_FLAGS = SB3_NETWORKS
HALFCHEETAH_FLAGS = f"{SB3_NETWORKS} --learning-starts 10000 --learning-rate 3e-4 --actor-learning-rate 3e-4"
INVERTED_FLAGS = "--actor-learning-rate 1e-4"
CARTPOLE_FLAGS = "--actor-learning-rate 3e-4 --tau 0.01 --batch-size 128"

OURS, DEFAULTS = "ddpg.py", "ddpg.py, all defaults"
PEERS = {"SB3 DDPG": 1, "SB3 DDPG, default threads": 0}  # contestant: torch's threads, 0 for the default
PEER = next(iter(PEERS))

LEARNING = {  # part: environment, steps, seeds, flags of each contestant
    "pendulum": ("Pendulum-v1", 10_000, 5, {OURS: PENDULUM_FLAGS, DEFAULTS: "", PEER: PENDULUM_FLAGS}),
    "halfcheetah": ("HalfCheetah-v5", 100_000, 3, {OURS: HALFCHEETAH_FLAGS, PEER: HALFCHEETAH_FLAGS}),
    "inverted": ("InvertedPendulum-v5", 50_000, 3, {OURS: INVERTED_FLAGS}),
    "cartpole": ("CartPole-v1", 50_000, 3, {OURS: CARTPOLE_FLAGS}),
}
BATCH_SIZES = (256, 64)  # minibatches of "speed"
RANDOM_STEPS = 1_000  # of "speed", before those that count
SPEED_REPEATS = 3
EPISODES = 20  # of an evaluation
POLL_SECONDS = 0.02  # between two looks at the runs under way

SPEED, RETURN = "steps per second", "greedy return"


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
    time_limit: float = 7200.0
    """seconds after which a run is killed and counted as failed"""
    output: Path | None = None
    """write every run and the summary to this JSON file"""
    peer: str | None = None
    """(internal) no comparison: train SB3's DDPG in this process as these flags of ddpg.py say"""
    threads: int = 1
    """(internal, with --peer) torch's threads; 0 leaves torch's default"""


# ------------------------------------------------------------------------------------------------------------ the peer


def parse(flags: str | list[str]) -> ddpg.Args:
    return tyro.cli(ddpg.Args, args=shlex.split(flags) if isinstance(flags, str) else flags)


def peer_settings(settings: ddpg.Args) -> dict:
    """The same settings by the names that SB3 has for them. AssertionError: it has none."""
    assert settings.learning_rate == settings.actor_learning_rate, "SB3 has one learning rate for both networks"
    assert settings.action_layer == 1, "the action enters SB3's critic at the first layer"
    assert not settings.small_last_layer, "SB3's networks begin as torch makes them"
    assert settings.target_network, "SB3's DDPG has target networks"
    assert not settings.batch_norm, "SB3's DDPG has no batch normalisation"
    assert settings.noise == "gaussian", "SB3 is to have Gaussian noise"
    assert settings.final_noise_std is None, "the scale of SB3's noise is constant"
    names = ("seed", "buffer_size", "learning_starts", "batch_size", "learning_rate", "gamma", "tau")
    common = {name: getattr(settings, name) for name in names}
    networks = {"net_arch": [256, 256]}
    return common | {"train_freq": (1, "step"), "gradient_steps": 1, "policy_kwargs": networks, "device": "cpu"}


def train_peer(settings: ddpg.Args) -> None:
    """SB3's DDPG. Writes metrics.csv, with the first and the last of the steps that count, and evaluation.json."""
    from stable_baselines3 import DDPG
    from stable_baselines3.common.noise import NormalActionNoise

    def look_at_clock(*_) -> bool:  # after each step, before the update that follows
        if model.num_timesteps in ends:
            rows.append((model.num_timesteps, time.perf_counter() - start))
        return True

    folder, env = Path(settings.log_dir), make_env(settings.env_id)
    size = env.action_space.shape
    noise = NormalActionNoise(np.zeros(size), np.full(size, settings.noise_std))  # as ours, for bounds at -1 and 1
    model = DDPG("MlpPolicy", env, action_noise=noise, **peer_settings(settings))
    # The first update of SB3 follows the step after the random ones.
    ends, rows, start = (settings.learning_starts + 1, settings.total_timesteps), [], time.perf_counter()
    model.learn(settings.total_timesteps, callback=look_at_clock)
    pd.DataFrame(rows, columns=["step", "time"]).to_csv(folder / "metrics.csv", index=False)
    evaluate(lambda observation: model.predict(observation, deterministic=True)[0], settings, folder)


# ------------------------------------------------------------------------------------------------ one run, one process


def command(name: str, flags: list[str]) -> list[str]:
    """The command of a contestant, whose settings are these flags of ddpg.py."""
    if name not in PEERS:
        return [sys.executable, ddpg.__file__, *flags]
    return [sys.executable, __file__, f"--threads={PEERS[name]}", f"--peer={shlex.join(flags)}"]


def measure(folder: Path, title: str) -> float:
    """A run's greedy return, or its steps per second between the first and the last row of metrics.csv that count."""
    if title == RETURN:
        (evaluation,) = folder.rglob("evaluation.json")
        return json.loads(evaluation.read_text())["mean_return"]
    (metrics,) = folder.rglob("metrics.csv")
    rows = pd.read_csv(metrics)[["step", "time"]]
    rows = rows[rows["step"] >= RANDOM_STEPS]
    if len(rows) < 2:
        raise ValueError("metrics.csv has too few rows to measure a speed")
    steps, seconds = rows.iloc[-1] - rows.iloc[0]
    return float(steps / seconds)


def play(jobs: list[tuple], title: str, args: Args, failures: list[str], parallel: int = 1) -> Iterator[tuple]:
    """Run the jobs, (contestant, seed, flags of ddpg.py) each, in processes of their own, `parallel` at once.

    Yields contestant, seed and what `measure` says of `title`, in the order in which the runs end. Of one that fails it
    yields nothing; `failures` then says why.
    """
    waiting, running, parallel = jobs[::-1], [], max(1, parallel)
    with tempfile.TemporaryDirectory() as root:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = name, seed, flags = waiting.pop()
                    folder = Path(tempfile.mkdtemp(dir=root))
                    arguments = command(name, [*shlex.split(flags), f"--seed={seed}", f"--log-dir={folder}"])
                    with open(folder / "output.txt", "w") as output:
                        process = subprocess.Popen(arguments, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
                    running.append((process, folder, time.monotonic() + args.time_limit, job))
                time.sleep(POLL_SECONDS)
                for entry in running.copy():
                    process, folder, deadline, (name, seed, flags) = entry
                    late = time.monotonic() > deadline
                    if process.poll() is None and not late:
                        continue
                    process.kill()  # does nothing to one that has ended
                    running.remove(entry)
                    words = f"{name}, seed {seed}, {flags.strip()}"
                    try:
                        if process.wait():
                            lines = (folder / "output.txt").read_text().splitlines()[-5:]
                            cause = f"killed after {args.time_limit:g} s" if late else f"exit code {process.returncode}"
                            raise RuntimeError(f"{cause}: {' | '.join(line.strip() for line in lines)}")
                        result = measure(folder, title)
                    except (RuntimeError, ValueError, LookupError) as error:
                        failures.append(f"{words}: {error}")
                        print(f"FAILED: {failures[-1]}", file=sys.stderr)
                    else:
                        print(f"{words}: {title} {result:,.1f}", file=sys.stderr, flush=True)
                        yield name, seed, result
        finally:
            for process, *_ in running:
                process.kill()
                process.wait()


# ---------------------------------------------------------------------------------------------------------- the tables


def ratio(numerator: pd.Series, denominator: pd.Series) -> pd.Series:
    """Ratio of the medians; minimum and maximum of the ratios within a repeat."""
    pairs = numerator / denominator
    return pd.Series((numerator.median() / denominator.median(), pairs.min(), pairs.max()), ["median", "min", "max"])


def markdown(title: str, rows: pd.DataFrame) -> str:
    def cell(value: float) -> str:
        if not np.isfinite(value):
            return "no figure"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"

    lines = [f"| {title} | {' | '.join(rows.columns)} |", "|---" + "|---:" * len(rows.columns) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(map(cell, row))} |" for name, row in rows.iterrows()])


def seeds_of(args: Args, repeats: int) -> range:
    return range(args.seed, args.seed + (args.repeats or repeats))


def compare_learning(part: str, args: Args, failures: list[str]) -> tuple[dict, dict]:
    """Greedy returns on a part's environment. Returns the runs and their summary, a table by its title each."""
    env_id, steps, repeats, contestants = LEARNING[part]
    common = f"--env-id={env_id} --total-timesteps={args.steps or steps} --eval-episodes={EPISODES}"
    common += f" --learning-starts={args.steps // 2}" if args.steps else ""
    seeds = seeds_of(args, repeats)
    table = pd.DataFrame(index=seeds, columns=list(contestants), dtype=float)
    jobs = [(name, seed, f"{flags} {common}") for seed in seeds for name, flags in contestants.items()]
    for name, seed, result in play(jobs, RETURN, args, failures, args.parallel):
        table.loc[seed, name] = result
    title = f"{env_id}, {args.steps or steps:,} steps, {RETURN}"
    summary = table.T.rename(columns={seed: f"seed {seed}" for seed in seeds})
    return {title: table}, {title: summary.assign(median=table.median(), mean=table.mean())}


def compare_speed(args: Args, failures: list[str]) -> tuple[dict, dict]:
    """Steps per second on HalfCheetah-v5. Returns the runs and their summary, a table by its title each."""
    seeds, steps = seeds_of(args, SPEED_REPEATS), RANDOM_STEPS + args.speed_steps
    common = f"{HALFCHEETAH_FLAGS} --env-id=HalfCheetah-v5 --total-timesteps={steps} --learning-starts={RANDOM_STEPS}"
    common += f" --log-interval={min(RANDOM_STEPS, args.speed_steps)} --eval-episodes=0"
    titles = {batch_size: f"{SPEED}, minibatches of {batch_size}" for batch_size in BATCH_SIZES}
    runs = {title: pd.DataFrame(index=seeds, columns=[OURS, *PEERS], dtype=float) for title in titles.values()}
    rivals, ratios = dict.fromkeys(runs, tuple(PEERS)), {}
    for seed in seeds:
        for batch_size, title in titles.items():
            flags = f"{common} --batch-size={batch_size} --num-threads=2"
            jobs = [(name, seed, flags) for name in (OURS, *rivals[title])]
            for name, _, result in play(jobs, SPEED, args, failures):
                runs[title].loc[seed, name] = result
            if seed == args.seed:  # the faster number of threads goes on
                rivals[title] = (runs[title].loc[seed, list(PEERS)].fillna(0).idxmax(),)
    for title, table in runs.items():
        (peer,) = rivals[title]
        ratios[f"{title}, {OURS} / {peer}"] = ratio(table[OURS], table[peer])
    summary = {title: table.agg(["median", "min", "max"]).T for title, table in runs.items()}
    return runs, summary | {"ratio": pd.DataFrame(ratios).T}


def compare(args: Args) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that takes the running contestants along
    for *_, contestants in LEARNING.values():  # what SB3 has no setting for is to be told before any run begins
        for name, flags in contestants.items():
            if name in PEERS:
                peer_settings(parse(flags))
    runs, summary, failures = {}, {}, []
    for part in ("pendulum", "speed", "halfcheetah", "inverted", "cartpole"):
        if args.only in (None, part):
            compared = compare_speed(args, failures) if part == "speed" else compare_learning(part, args, failures)
            print("\n\n".join(markdown(title, rows) for title, rows in compared[1].items()) + "\n", flush=True)
            runs, summary = runs | compared[0], summary | compared[1]
    print("\n".join(f"FAILED: {line}" for line in failures) or "No run failed.")
    if args.output:
        machine = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
        packages = ("torch", "gymnasium", "numpy", "stable-baselines3", "mujoco")
        arguments = ("only", "repeats", "seed", "steps", "speed_steps", "parallel")
        flags = ("PENDULUM_FLAGS", "HALFCHEETAH_FLAGS", "INVERTED_FLAGS", "CARTPOLE_FLAGS")
        report = {
            "args": {name: getattr(args, name) for name in arguments} | {name: globals()[name] for name in flags},
            "versions": machine | {package: version(package) for package in packages},
            # in both, null stands for a run not made, or for a failure if `failures` lists the run
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
    sys.exit(compare(args) if args.peer is None else train_peer(parse(args.peer)))
