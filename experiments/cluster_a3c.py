"""A3C, or asynchronous Q-learning, with its workers on all machines of a Ray cluster.

    pip install -r requirements.txt -r experiments/requirements-ray.txt
    python experiments/cluster_a3c.py --num-workers 64 --env-id MinAtar/Breakout-v1

The worker is the script's own, unchanged. Only what they share is another object: theta (and theta-), the optimiser's
statistics and T live in a parameter server, an actor of Ray. A worker calls it once for each segment; it sends d theta,
its steps and its episode and gets theta and T, and theta- when it is new. Between the calls it works on its copy.

Without --address and RAY_ADDRESS, Ray is started on this machine alone. A worker that is lost, or whose machine is, is
started again where there is room. Without room, the run goes on without it. The run's folder is that of the script,
which evaluates it (`python a3c.py --evaluate RUN`), and either program goes on with it by --resume.
"""

import argparse
import contextlib
import importlib
import os
import queue
import shlex
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Literal, get_args

import gymnasium as gym
import numpy as np
import ray
import tools
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from threadpoolctl import threadpool_limits

from common.arguments import fail, failing, load_checkpoint, parse_args
from common.evaluation import check_film, evaluate
from common.ranges import NonNegativeInt, PositiveFloat, check_args
from common.run import Run, seed_everything

Script = Literal["a3c.py", "async_qlearning.py"]
STATE = ("theta", "g", "theta_target")  # what a run goes on with; a3c.py has no theta_target
# How long workers may be without progress once the run is ending. T moves only when a segment ends, and Ray takes a
# minute to notice that a machine has vanished.
PATIENCE_SECONDS = 120.0
MAX_LOSSES = 100  # of each worker; those that Ray's memory monitor kills do not count, it starts them again for ever


def args_class(name: str) -> type:
    """The arguments of a script and of its cluster."""

    @dataclass
    class Args(importlib.import_module(name).Args):
        script: Script = f"{name}.py"
        """whose worker to run"""
        address: str | None = None
        """of the cluster, or `auto`; by default RAY_ADDRESS, and without it Ray starts on this machine"""
        cpus_per_worker: PositiveFloat = 1.0
        """share of the cluster's CPUs that a worker claims; what finds no room waits for it"""
        lag: NonNegativeInt = 0
        """segments that a worker is ahead of the server's answers: 0 waits for each answer, 1 works meanwhile"""

    return Args


def state_of(shared) -> dict[str, np.ndarray]:
    """What a run goes on with: views of `shared`, by their names in STATE."""
    return {key: getattr(shared, key).numpy() for key in STATE if hasattr(shared, key)}


class Server:
    """The parameter server. What it keeps and how it learns is the script's own `Shared`.

    Args:
        name: of the script, without .py.
        args: the script's.
        state: arrays by their names in STATE.
        step: T.
    """

    def __init__(self, name: str, args, state: dict, step: int):
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # as in a worker
        self.shared = importlib.import_module(name).Shared(torch.tensor(state["theta"]), args, queue.SimpleQueue)
        for key, value in state.items():
            getattr(self.shared, key).copy_(torch.tensor(value))
        self.shared.steps[0] = step
        if "theta_target" in state:
            self.shared.target_updates.value = step // args.target_network_frequency
        self.learned, self.begun = {}, [0] * args.num_workers

    def join(self, worker: int) -> tuple:
        """A worker begins, again if it was lost. Returns how often it has begun, and what `read` does."""
        self.begun[worker] += 1
        return self.begun[worker], *self.read(known_target=-1)

    def exchange(self, worker: int, begun: int, number: int, segment: dict, known_target: int) -> tuple:
        """Learn from a segment and return what `read` does.

        Args:
            worker: its index.
            begun: how often it had begun.
            number: counts its segments since. One that has been learned is not learned again, whoever repeats the call.
            segment: d_theta and learning_rate, steps, episode (of the last step), metrics.
            known_target: which theta- the worker has.
        """
        if number > self.learned.get((worker, begun), 0):
            self.learned[worker, begun] = number
            self.shared.steps[worker] += segment["steps"] - 1
            self.shared.count_step(worker, segment["episode"])
            if hasattr(self.shared, "update_target"):
                self.shared.update_target()
            self.shared.update(torch.tensor(segment["d_theta"]), segment["learning_rate"])
            self.shared.log(worker, segment["metrics"])
        return self.read(known_target)

    def read(self, known_target: int) -> tuple:
        """T, whether to stop, theta, and which theta- there is, with its parameters if the worker has another one."""
        target = self.shared.target_updates.value if hasattr(self.shared, "target_updates") else -1
        theta_target = None if target == known_target else self.shared.theta_target.numpy()
        return self.shared.T, self.shared.stop.value, self.shared.theta.numpy(), target, theta_target

    def report(self, stop: bool, with_state: bool) -> tuple:
        """T, the episodes since the last call, how often each worker has begun; the metrics' means and the state.

        `stop` is passed on to the workers.
        """
        self.shared.stop.value |= stop
        episodes = sorted(self.shared.reported())
        means = self.shared.means() if with_state else {}
        return self.shared.T, episodes, self.begun, means, state_of(self.shared) if with_state else {}


def ask(method, *call):
    """Call a method of the server. Where the answer is lost, ask again, until the server answers or is lost, too.

    The server may then hear the call twice. `exchange` learns once all the same. `report` would lose the episodes of
    its first answer. But that call comes from the server's own machine, where answers are not lost.

    Raises:
        ActorDiedError: the server is lost.
    """
    while True:
        try:
            return ray.get(method.remote(*call))
        except ActorUnavailableError:  # for a while
            time.sleep(1.0)


class RemoteShared:
    """What `Shared` is to a worker, by way of the server.

    Args:
        server: the actor.
        worker: index.
        lag: segments that it may be ahead of the answers.
    """

    def __init__(self, server, worker: int, lag: int):
        self.server, self.worker, self.lag = server, worker, lag
        self.stop, self.done = SimpleNamespace(value=False), {}
        self.number, self.steps, self.episode, self.under_way = 0, 0, None, deque()
        self.begun, T, stop, theta, target, theta_target = ask(server.join, worker)
        self.theta = torch.tensor(theta)
        self.theta_target = None if theta_target is None else torch.tensor(theta_target)
        self.receive(T, stop, theta, target, theta_target)

    def receive(self, T: int, stop: bool, theta: np.ndarray, target: int, theta_target: np.ndarray | None) -> None:
        """Take over what `Server.read` returns."""
        self.T, self.stop.value, self.known_target = T, stop, target  # T is the server's, without the steps since
        self.theta.numpy()[:] = theta
        if theta_target is not None:
            self.theta_target.numpy()[:] = theta_target

    def count_step(self, worker: int, episode: dict | None = None) -> None:
        """t <- t + 1; only the last step of a segment can end an episode."""
        self.steps, self.episode = self.steps + 1, episode

    def update_target(self) -> None:
        """The server does that."""

    def update(self, d_theta: torch.Tensor, learning_rate: float) -> None:
        """Keep what there is to learn until `log`, which follows."""
        self.segment = {"d_theta": d_theta.numpy(), "learning_rate": learning_rate}

    def log(self, worker: int, metrics: dict[str, float]) -> None:
        """Send the segment, and take theta and T from the answer to it or, with a lag, to an earlier one.

        Raises:
            ActorDiedError: the server is lost.
        """
        self.number += 1
        segment = self.segment | {"metrics": metrics, "steps": self.steps, "episode": self.episode}
        call = self.worker, self.begun, self.number, segment, self.known_target
        self.steps = 0
        self.under_way.append(self.server.exchange.remote(*call))
        if len(self.under_way) > self.lag:
            try:
                self.receive(*ray.get(self.under_way.popleft()))
            except ActorUnavailableError:  # whether the call has arrived is not known; repeating it does no harm
                self.receive(*ask(self.server.exchange, *call))


def work(name: str, index: int, args, server) -> None:
    """One worker, a task of Ray.

    Raises:
        RuntimeError: it has exited. Ray would take it for lost, and start it again.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))  # its machine may be about to end: Ray takes it for lost
    shared = RemoteShared(server, index, args.lag)
    if shared.T > args.total_timesteps or shared.stop.value:
        return  # it has found room too late
    try:
        importlib.import_module(name).worker(index, args, shared, shared.T)
    except SystemExit as end:
        raise RuntimeError(f"worker {index} has exited with code {end.code}") from None
    with contextlib.suppress(ActorUnavailableError):
        ray.get([*shared.under_way])


def new_model(script: ModuleType, env: gym.Env) -> torch.nn.Module:
    """The network of a script."""
    if script.SCRIPT == "a3c":
        return script.ActorCritic(env.observation_space.shape, env.action_space)
    return script.QNetwork(env.observation_space.shape, int(env.action_space.n))


def room_for_workers(cpus: float) -> int:
    """How many tasks with so many CPUs the cluster's machines have room for."""
    return sum(int(node["Resources"].get("CPU", 0) / cpus) for node in ray.nodes() if node["Alive"])


def main(script: ModuleType, args) -> int:
    """Train or go on training, as `args` says. Returns the exit code."""
    name, address = script.SCRIPT, args.address or os.environ.get("RAY_ADDRESS", "local")
    check_args(args)
    if args.evaluate is not None:
        fail(f"evaluate with: python {name}.py --evaluate {args.evaluate}")
    checkpoint = load_checkpoint(args, name)
    if args.backend != (checkpoint["args"]["backend"] if checkpoint else "auto"):
        fail(f"--backend is for {name}.py: here, workers are tasks of Ray")
    if address.startswith("ray://"):
        fail(f"--address {address}: start the program on a machine of the cluster, with --address auto")
    facts = {"backend_used": "ray"}
    if name == "async_qlearning":
        facts["epsilons"] = script.final_epsilons(args).tolist()
    with failing(f"{args.env_id} cannot be used"):
        eval_env = script.make_env(args.env_id, "rgb_array" if args.capture_video else None, args.screen_size)
    if args.capture_video:
        check_film(eval_env)
    threadpool_limits(1)
    seed_everything(args.seed, 0)
    model = new_model(script, eval_env)
    state = state_of(script.Shared(model.theta, args, queue.SimpleQueue))
    if checkpoint:
        with failing(f"the checkpoint does not fit {args.env_id} (as installed here; --screen-size?)"):
            model.load_state_dict(checkpoint["model"])
            state |= {key: checkpoint[key].view_as(model.theta).numpy() for key in state.keys() - {"theta"}}
        if checkpoint["step"] > args.total_timesteps:
            fail(f"{args.resume} has done {checkpoint['step']:,} steps already: give more with --total-timesteps")
    with failing("no cluster"):
        tools.start_ray(address)
    args.address = None  # it may be another one when the run is resumed
    with failing("--cpus-per-worker"):
        options = {"num_cpus": args.cpus_per_worker, "max_retries": MAX_LOSSES, "scheduling_strategy": "SPREAD"}
        new_worker = ray.remote(work).options(**options)
    room = first_room = room_for_workers(args.cpus_per_worker)
    if room == 0:
        fail(f"no machine of the cluster has --cpus-per-worker {args.cpus_per_worker:g} CPUs")
    if room < args.num_workers:
        order = "" if name == "a3c" else " (the first explore least)"
        print(f"{name}: there is room for {room} of {args.num_workers} workers{order}; the others wait")
        print("A smaller --cpus-per-worker makes room for all.")

    run = Run(name, args, script.METRICS, facts, checkpoint)
    print(f"{name}: {args.env_id}, {args.num_workers} workers on a Ray cluster, {run.folder}", flush=True)
    T = run.first_step
    begun = [0] * args.num_workers
    last_progress = time.monotonic()

    def write(with_checkpoint: bool) -> int:
        """Returns T."""
        T, episodes, now_begun, means, state = ask(server.report, run.stopped, with_checkpoint)
        for index, (now, before) in enumerate(zip(now_begun, begun, strict=True)):
            if now > max(before, 1):
                print(f"{name}: worker {index} was lost and has been started again", file=sys.stderr, flush=True)
        begun[:] = now_begun
        for episode in episodes:
            run.log_episode(*episode)
        if means and T > run.last_step:
            run.log_metrics(T, means)
        if with_checkpoint:
            model.theta.numpy()[:] = state.pop("theta")
            run.save(T, model=model.state_dict(), **{key: torch.tensor(array) for key, array in state.items()})
        return T

    next_log = (T // args.log_interval + 1) * args.log_interval
    with run, contextlib.suppress(ActorDiedError):  # the server is lost: the last `write` says so
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        new_server = ray.remote(Server).options(num_cpus=0, scheduling_strategy=here)
        server = new_server.remote(name, args, state, T)
        workers = {new_worker.remote(name, index, args, server): index for index in range(args.num_workers)}
        while workers:
            if (now_room := room_for_workers(args.cpus_per_worker)) != room:
                room = now_room
                print(f"{name}: now there is room for {room} workers", file=sys.stderr, flush=True)
            now_T = write(with_checkpoint=next_log <= T <= args.total_timesteps)
            next_log = (T // args.log_interval + 1) * args.log_interval
            if now_T == run.first_step:
                run.start()
            at_work = [index for index in workers.values() if begun[index]]  # or lost, and waiting for room again
            if now_T > T or not (run.stopped or now_T > args.total_timesteps):  # progress, or not ending yet
                last_progress = time.monotonic()
            elif not at_work:
                break  # a worker that finds room from now on returns by itself
            elif time.monotonic() - last_progress > PATIENCE_SECONDS:
                message = f"{len(at_work)} workers do not end and are given up"
                if room >= min(first_room, args.num_workers):
                    run.fail(message)
                else:  # they were on a machine that is lost
                    print(f"{name}: {message}", file=sys.stderr, flush=True)
                break
            T = now_T
            run.progress(T)
            for each in ray.wait([*workers], num_returns=len(workers), timeout=0.1)[0]:
                del workers[each]
                try:
                    ray.get(each)
                except ActorDiedError:
                    raise
                except RayError as error:  # what a worker has raised ends the run, as in the script
                    run.fail(str(error))
    with run:
        try:
            T = write(with_checkpoint=True)
        except ActorDiedError as error:
            flags = ["--script", f"{name}.py", "--resume", str(run.folder.absolute()), "--address", address]
            there_is = (run.folder / "checkpoint.pt").exists()
            resume = shlex.join([sys.executable, __file__, *flags]) if there_is else "There is no checkpoint yet."
            run.fail(f"the parameter server is lost: {error}\n{resume}")
    run.close(T)
    if run.exit_code == 0:
        with run:
            run.finish(*evaluate(model.act, eval_env, args, run.folder))
    return run.exit_code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--script", choices=get_args(Script), default="a3c.py")
    script = importlib.import_module(parser.parse_known_args()[0].script.removesuffix(".py"))
    sys.exit(main(script, parse_args(args_class(script.SCRIPT), script.SCRIPT)))
