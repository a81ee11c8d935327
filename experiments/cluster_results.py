"""What cluster_a3c.py and sweep.py do: speed, what one parameter server bears, how old theta may be, lost workers.

    pip install -r experiments/requirements.txt -r experiments/requirements-ray.txt
    python experiments/cluster_results.py --only calls

Every part can be run alone; `--scale 0.1` makes a trial of it. The nodes of a cluster are simulated on this one
machine. On two cores they take:

- `calls`, 5 minutes: calls per second that one server answers to one and to two workers that do nothing else. They
  share the two cores with it, so it can do more.
- `speed`, half an hour: steps per second of two workers, beside the script's own processes.
- `cartpole`, 3 minutes: greedy returns with two workers on two nodes.
- `kills`, 15 minutes: three workers, and the same with one of them killed every 20 seconds: greedy returns, steps to a
  mean of 475 over 50 training episodes, seconds.
- `sweep`, 10 minutes: seconds for 20 runs, beside the same by `xargs -P 2`. Both include everything from the start of
  the command on; that of Ray takes some seconds.
- `staleness`, two hours, or with `--env-id MinAtar/Breakout-v1` many: greedy returns with --lag, and steps to a mean of
  475 over 50 training episodes, of 5 on Breakout. A gradient is then of a theta that has been updated
  workers (lag + 1) - 1 times since, as soon as all workers have begun: the table says when.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import psutil
import ray
import tools
from async_methods import A3C
from cluster_a3c import Server
from image_speed import BREAKOUT, PONG

import a3c

SIZES = (5_000, 130_000, 1_000_000)
CALLS = "calls per second"
KILLS, AT_WORK, ALL_AT_WORK = "workers killed", "workers at work", "step when all have begun"
PROCESSES, CLUSTER, LAG = "a3c.py", "cluster_a3c.py", "cluster_a3c.py --lag 1"


@dataclass
class Args(tools.Options):
    seeds: tuple[tools.NonNegativeInt, ...] = (1, 2, 3)
    """one run of each for every seed"""
    only: Literal["calls", "speed", "cartpole", "kills", "sweep", "staleness"] | None = None
    """run this part alone"""
    env_id: Literal["CartPole-v1", "MinAtar/Breakout-v1"] = "CartPole-v1"
    """environment of the part `staleness`"""
    workers: tuple[tools.PositiveInt, ...] = (2, 4, 8, 16)
    """numbers of workers in the part `staleness`"""
    scale: float = 1.0
    """factor of the steps of all runs; less than 1 is a trial"""


def breakout_flags(steps: float) -> str:
    return f"--env-id={BREAKOUT} --total-timesteps={steps:.0f} {tools.flags(**A3C)}"


@ray.remote(num_cpus=0)
def call(server, worker: int, size: int, seconds: float) -> float:
    """Calls per second of a worker that does nothing else."""
    segment = {"d_theta": np.ones(size, np.float32), "learning_rate": 1e-9, "steps": 1, "episode": None}
    segment["metrics"] = dict.fromkeys(a3c.METRICS, 0.0)
    begun, number = time.monotonic(), 0
    while time.monotonic() < begun + seconds:
        number += 1
        ray.get(server.exchange.remote(worker, begun, number, segment, -1))  # begun: it has learned none of these yet
    return number / (time.monotonic() - begun)


def count_calls(size: int, workers: int, seconds: float, seed: int, folder: Path) -> None:
    """How many calls per second a server with so many numbers in theta answers to all of these workers together."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # from where Ray's processes import Server
    tools.start_ray(None)
    server = ray.remote(Server).options(num_cpus=0).remote("a3c", a3c.Args(), {"theta": np.zeros(size, np.float32)}, 0)
    ray.get(server.join.remote(0))
    for duration in (0.1, seconds):  # first they have to start and to import torch
        rates = ray.get([call.remote(server, index, size, duration) for index in range(workers)])
    pd.DataFrame({CALLS: [sum(rates)]}).to_csv(folder / "calls.csv", index=False)


def measure_calls(args: Args) -> pd.DataFrame:
    contestants = {
        (size, workers): tools.call(count_calls, size=size, workers=workers, seconds=10.0 * args.scale)
        for size, workers in itertools.product(SIZES, (1, 2))
    }
    runs = tools.play(contestants, lambda folder: pd.read_csv(folder / "calls.csv").iloc[0].to_dict(), args, "cluster")
    names = [f"{size:,} numbers, {workers}" for size, workers in runs["name"]]
    tools.show(runs.assign(name=names), CALLS, of="theta, workers:")
    return runs


def compare_speed(args: Args) -> pd.DataFrame:
    parts = []
    for env_id, flags in (
        (BREAKOUT, breakout_flags(150_000 * args.scale)),
        (PONG, f"--env-id={PONG} --t-max=20 --total-timesteps={15_000 * args.scale:.0f}"),
    ):
        flags += " --num-workers=2 --eval-episodes=0"
        contestants = {PROCESSES: tools.script("a3c.py", flags)}
        contestants[CLUSTER] = tools.script("experiments/cluster_a3c.py", flags)
        contestants[LAG] = tools.script("experiments/cluster_a3c.py", f"{flags} --lag=1")
        runs = tools.play(contestants, tools.read_speed, args, "cluster")
        tools.show(runs, tools.SPEED, of=env_id)
        tools.show_ratios(runs, tools.SPEED, [CLUSTER, LAG], [PROCESSES], of=env_id)
        parts.append(runs)
    return pd.concat(parts)


def train_on_nodes(nodes: int, steps: int, kill_every: float | None, seed: int, folder: Path) -> None:
    """cluster_a3c.py on CartPole-v1, with a worker on each of so many nodes; one is killed every `kill_every` s."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, object_store_memory=10**8)
    flags = [f"--address={cluster.address}", f"--num-workers={nodes}", f"--seed={seed}", f"--log-dir={folder}"]
    command = [sys.executable, str(tools.ROOT / "experiments" / "cluster_a3c.py"), *flags]
    process = subprocess.Popen([*command, f"--total-timesteps={steps}"])
    killed, last = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if kill_every and time.monotonic() > last + kill_every:
            last = time.monotonic()
            workers = []
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    workers += [child] if "ray::work" in " ".join(child.cmdline()) else []
            if workers:
                workers[killed % len(workers)].kill()
                killed += 1
    cluster.shutdown()
    pd.DataFrame({KILLS: [float(killed)]}).to_csv(folder / "kills.csv", index=False)
    sys.exit(process.returncode)


def learn_on_nodes(args: Args, nodes: int, steps: int, kill_every: float | None) -> pd.DataFrame:
    options = {"nodes": nodes, "steps": int(steps * args.scale)}
    contestants = {f"{nodes} workers": tools.call(train_on_nodes, kill_every=None, **options)}
    if kill_every:
        contestants["one killed every 20 s"] = tools.call(train_on_nodes, kill_every=kill_every, **options)

    def read(folder: Path) -> dict[str, float]:
        kills = pd.read_csv(folder / "kills.csv").iloc[0].to_dict()
        return tools.read_return(folder) | tools.read_time_to_target(folder, 475.0) | kills

    runs = tools.play(contestants, read, args, "cluster")
    tools.show(runs, tools.RETURN, tools.STEPS_TO_TARGET, "wall_seconds", KILLS)
    return runs


def compare_sweep(args: Args) -> pd.DataFrame:
    settings = {"num_workers": 1, "total_timesteps": int(50_000 * args.scale), "eval_episodes": 1}
    script = ["a3c.py", *tools.flags(**settings).split(), "--seed={}", "--log-dir={folder}"]
    with_xargs = "import subprocess, sys; seeds = '\\n'.join(map(str, range(1, 21)))\n"
    with_xargs += f"command = ['xargs', '-P2', '-I{{}}', sys.executable, *{script}]\n"
    with_xargs += "sys.exit(subprocess.run(command, input=seeds, text=True).returncode)"
    sweep = ["experiments/sweep.py", "a3c.py", "--seeds", "1-20", "--log-dir", "{folder}", "--grid"]
    sweep += [f"{name}={value}" for name, value in settings.items()]
    contestants = {
        "xargs -P 2": tools.Command(["-c", with_xargs], tools.ROOT),
        "sweep.py": tools.Command(sweep, tools.ROOT),
    }

    def read(folder: Path) -> dict:
        if (number := len([*folder.rglob("evaluation.json")])) != 20:
            raise ValueError(f"{number} of 20 runs have ended")
        return {}

    runs = tools.play(contestants, read, args, "cluster")
    tools.show(runs, "wall_seconds", of="20 runs:")
    tools.show_ratios(runs, "wall_seconds", ["sweep.py"], ["xargs -P 2"], of="20 runs:")
    return runs


def compare_staleness(args: Args) -> pd.DataFrame:
    flags, target = f"--total-timesteps={500_000 * args.scale:.0f}", 475.0
    if args.env_id == BREAKOUT:
        flags, target = breakout_flags(1_000_000 * args.scale), 5.0
    contestants = {}
    for workers in args.workers:
        for lag in (0, 1, 4):
            options = f"--num-workers={workers} --cpus-per-worker={2 / workers} --lag={lag} {flags}"
            contestants[workers, lag] = tools.script("experiments/cluster_a3c.py", options)

    def read(folder: Path) -> dict[str, float]:
        first = tools.read_table(folder, "episodes").groupby("worker")["step"].min()
        begun = {ALL_AT_WORK: float(first.max()), AT_WORK: float(len(first))}
        return tools.read_return(folder) | tools.read_time_to_target(folder, target) | begun

    runs = tools.play(contestants, read, args, "cluster")
    table = tools.spread(runs, tools.RETURN)[["median", "min", "max"]]
    table.insert(0, "updates in between", [workers * (lag + 1) - 1 for workers, lag in table.index])
    for measure in (tools.STEPS_TO_TARGET, AT_WORK, ALL_AT_WORK):
        table[measure] = tools.spread(runs, measure)["median"]
    tools.print_table(f"{args.env_id}, {tools.RETURN}: workers, lag", table)
    return runs


def main(args: Args) -> int:
    parts = {
        "calls": measure_calls,
        "speed": compare_speed,
        "cartpole": lambda args: learn_on_nodes(args, 2, 200_000, None),
        "kills": lambda args: learn_on_nodes(args, 3, 600_000, 20.0),
        "sweep": compare_sweep,
        "staleness": compare_staleness,
    }
    return tools.finish(*(play(args) for part, play in parts.items() if args.only in (None, part)))


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
