"""The scripts on a Ray cluster: their workers by way of a parameter server, and sweeps. The nodes are simulated."""

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT, SHORT, as_options, load, tables, wait_until

pytest.importorskip("ray")
pytest.importorskip("scipy")
import cluster_a3c
import sweep
from ray.cluster_utils import Cluster
from ray.exceptions import ActorUnavailableError

import a3c
import async_qlearning
from common.run import seed_everything

FOR_EVER = {"total_timesteps": 10**9, "log_interval": 500, "eval_episodes": 1}
SMALL = {"object_store_memory": 10**8}


def on_a_cluster(test):
    return pytest.mark.xdist_group("cluster")(pytest.mark.timeout(300)(test))


# Without a cluster: the server is an object of this process


class Method:
    """A method as Ray calls it: what goes in and out is copied."""

    def __init__(self, method):
        self.method, self.calls, self.answers = method, [], []

    def remote(self, *args):
        self.calls.append(args)
        self.answers.append(pickle.loads(pickle.dumps(self.method(*pickle.loads(pickle.dumps(args))))))
        return self.answers[-1]


class LocalServer(cluster_a3c.Server):
    def __init__(self, script, args):
        super().__init__(script.SCRIPT, args, {"theta": first_theta(script, args).numpy()}, step=0)
        self.join, self.exchange = Method(self.join), Method(self.exchange)


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(cluster_a3c, "ray", SimpleNamespace(get=lambda answer: answer))


def new_args(script, **arguments):
    return script.Args(**(SHORT[script] | {"env_id": "CartPole-v1", "total_timesteps": 300} | arguments))


def first_theta(script, args) -> torch.Tensor:
    seed_everything(args.seed, 0)
    return cluster_a3c.new_model(script, script.make_env(args.env_id)).theta


def learn(script, args) -> LocalServer:
    """Everything that one worker does, by way of a server."""
    server = LocalServer(script, args)
    shared = cluster_a3c.RemoteShared(server, 0, lag=0)
    script.worker(0, args, shared, seed_everything(args.seed, 0))
    return server


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("script", "arguments"),
    [(a3c, {}), (async_qlearning, {}), (async_qlearning, {"target": "sarsa", "n_step": 3})],
)
def test_a_worker_learns_the_same_by_way_of_the_server(script, arguments):
    """What differs for a worker is when it gets T and theta-: here with the answer to a segment."""
    if script is async_qlearning:
        arguments |= {"exploration_fraction": 0.0, "final_epsilons": (0.3,), "final_epsilon_probs": (1.0,)}
    args = new_args(script, anneal_lr=False, **arguments)
    server = learn(script, args)
    T, episodes, begun, means, state = server.report(stop=False, with_state=True)
    assert args.total_timesteps < T <= args.total_timesteps + 5
    shared = script.Shared(first_theta(script, args), args, queue.SimpleQueue)
    args.total_timesteps = T - 1  # the script ends with the same step
    script.worker(0, args, shared, seed_everything(args.seed, 0))
    assert T == shared.T
    assert set(state) == {name for name in cluster_a3c.STATE if hasattr(shared, name)}
    for name, array in state.items():
        assert torch.equal(torch.tensor(array), getattr(shared, name)), name
    assert begun == [1]
    assert [episode[:3] for episode in episodes] == [episode[:3] for episode in shared.reported()]
    assert len(episodes) > 5
    assert means == shared.means()


@pytest.mark.usefixtures("no_ray")
def test_theta_minus_is_sent_only_when_it_has_changed():
    args = new_args(async_qlearning, target_network_frequency=100)
    server = learn(async_qlearning, args)
    answers = [*server.join.answers, *server.exchange.answers]
    changed = [index for index, (*_, theta_target) in enumerate(answers) if theta_target is not None]
    assert [answers[index][0] // 100 for index in changed] == [0, 1, 2, 3][: len(changed)]
    assert len(changed) >= 3
    for index in changed[1:]:  # it is theta as it was before this segment
        assert torch.equal(torch.tensor(answers[index][-1]), torch.tensor(answers[index - 1][2]))


def send(shared: cluster_a3c.RemoteShared, steps: int = 3) -> None:
    """One segment, of a gradient of ones."""
    for _ in range(steps):
        shared.count_step(0, None)
    shared.update(torch.ones_like(shared.theta), 0.1)
    shared.log(0, dict.fromkeys(a3c.METRICS, 0.0))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_theta_and_T_are_so_many_segments_old(lag):
    server = LocalServer(a3c, new_args(a3c))
    shared = cluster_a3c.RemoteShared(server, 0, lag)
    thetas = [server.shared.theta.clone()]
    for segment in range(1, 6):
        send(shared)
        thetas.append(server.shared.theta.clone())
        assert not torch.equal(thetas[-1], thetas[-2])
        assert torch.equal(shared.theta, thetas[max(0, segment - lag)])
        assert (shared.T, server.shared.T) == (3 * max(0, segment - lag), 3 * segment)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("arrives", [False, True])
def test_an_answer_that_is_lost_is_asked_for_again(monkeypatch, lag, arrives):
    """Whether the server has learned from the segment or not: it does so once, or with a lag perhaps not at all."""

    def get(answer):
        if answer is lost:
            raise ActorUnavailableError("for a while", None)
        return answer

    lost = object()
    monkeypatch.setattr(cluster_a3c, "ray", SimpleNamespace(get=get))
    monkeypatch.setattr(cluster_a3c.time, "sleep", lambda seconds: None)
    server = LocalServer(a3c, new_args(a3c))
    exchange = server.exchange
    shared = cluster_a3c.RemoteShared(server, 0, lag)
    for segment in range(4):
        server.exchange = exchange if segment != 1 else SimpleNamespace(remote=lambda *call: lose(call))

        def lose(call):
            server.exchange = exchange  # the next call is heard
            if arrives:
                exchange.remote(*call)
            return lost

        send(shared)
    assert server.shared.T == 3 * (4 if arrives or not lag else 3)
    assert torch.equal(shared.theta, torch.tensor(exchange.answers[-1 - lag][2]))


# On a cluster of three nodes with a CPU each


@pytest.fixture(scope="module")
def one_cluster():
    """A head without CPUs; the nodes come later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))  # Ray's processes inherit it
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | SMALL)
        cluster.nodes = []
        yield cluster
        cluster.shutdown()


@pytest.fixture
def cluster(one_cluster):
    """Three nodes with a CPU each."""
    while len(one_cluster.nodes) < 3:
        one_cluster.nodes.append(one_cluster.add_node(num_cpus=1, **SMALL))
    one_cluster.wait_for_nodes()
    return one_cluster


class Program:
    """An experiment as a child process."""

    def __init__(self, tmp_path: Path, name: str, *arguments, **options):
        self.runs, self.output = tmp_path / "runs", tmp_path / "output.txt"
        command = [sys.executable, str(ROOT / "experiments" / name), *arguments]
        with open(self.output, "w") as output:
            streams = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": tmp_path}
            streams["env"] = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
            self.process = subprocess.Popen([*command, *as_options(log_dir="runs", **options)], **streams)

    def finish(self) -> tuple[int, str]:
        """Exit code and output."""
        return self.process.wait(timeout=180), self.output.read_text()

    def stop(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        return self.finish()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output.read_text() or self.process.poll() is not None)
        assert text in self.output.read_text()

    def files(self, name: str, number: int = 1, lines: int = 0) -> list[Path]:
        """So many files of this name with so many lines, as soon as they are there."""

        def find() -> list[Path]:
            assert self.process.poll() is None, self.finish()
            found = [path for path in self.runs.rglob(name) if path.read_bytes().count(b"\n") >= lines]
            return found if len(found) >= number else []

        return wait_until(find)


@pytest.fixture
def run(tmp_path):
    """Start an experiment; what is left of it is killed afterwards."""
    programs = []

    def start(name: str, *arguments, **options) -> Program:
        programs.append(Program(tmp_path, name, *arguments, **options))
        return programs[-1]

    yield start
    for program in programs:
        program.process.kill()
        program.process.wait()


def processes(title: str) -> list[psutil.Process]:
    """The cluster's processes that do this."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


@on_a_cluster
def test_the_run_goes_on_without_a_worker_and_without_a_node(run, cluster):
    program = run("cluster_a3c.py", address=cluster.address, num_workers=3, **FOR_EVER)
    folder = program.files("metrics.csv", lines=2)[0].parent
    wait_until(lambda: set(tables(folder)[0]["worker"]) == {0, 1, 2})
    processes("ray::work")[0].kill()
    program.wait_for("was lost and has been started again")
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    program.files("metrics.csv", lines=len(tables(folder)[1]) + 10)
    code, output = program.stop(signal.SIGINT)
    assert code == 130, output
    step = load(folder)["step"]
    for table in tables(folder):
        assert (table["step"] <= step).all()
    assert f"a3c: stopped at step {step:,}; {folder.relative_to(folder.parents[1])}\n" in output
    # The script goes on with it.
    arguments = json.loads((folder / "args.json").read_text())
    args = {key: value for key, value in arguments.items() if hasattr(a3c.Args, key)}
    args |= {"resume": str(folder), "num_workers": 1, "total_timesteps": step + 500, "eval_episodes": 1}
    assert a3c.main(a3c.Args(**args)) == 0
    assert step + 500 < load(folder)["step"] <= step + 500 + 32


@on_a_cluster
def test_the_server_is_lost(run, cluster):
    program = run("cluster_a3c.py", address=cluster.address, num_workers=1, **FOR_EVER)
    folder = program.files("metrics.csv", lines=3)[0].parent
    for process in processes("ray::Server"):
        process.kill()
    code, output = program.finish()
    assert code == 1
    resume = f"--script a3c.py --resume {folder.relative_to(folder.parents[1])} --address {cluster.address}"
    assert f"a3c: the parameter server is lost: python experiments/cluster_a3c.py {resume}\n" in output
    assert load(folder)["step"] > 0


@on_a_cluster
def test_a_worker_that_raises_ends_the_run(run, cluster):
    options = {"env_id": "faulty:Failing-v0", "num_workers": 1, "total_timesteps": 1000, "t_max": 10}
    program = run("cluster_a3c.py", address=cluster.address, **options)
    code, output = program.finish()
    assert code == 1
    assert "RuntimeError: the probe broke" in output
    (checkpoint,) = program.runs.rglob("checkpoint.pt")
    assert load(checkpoint.parent)["step"] == 35  # an episode has 5 steps


@on_a_cluster
def test_asynchronous_q_learning_on_this_machine_alone(run):
    options = {"script": "async_qlearning.py", "env_id": "CartPole-v1", "num_workers": 2, "lag": 1}
    program = run("cluster_a3c.py", **options, total_timesteps=5000, eval_episodes=3)
    code, output = program.finish()
    assert code == 0, output
    (evaluation,) = program.runs.rglob("evaluation.json")
    assert json.loads(evaluation.read_text())["episodes"] == 3
    checkpoint = load(evaluation.parent)
    assert checkpoint["script"] == "async_qlearning"
    assert 5000 < checkpoint["step"] < 5000 + 2 * 3 * 40  # segments of each worker, under way and ahead
    assert checkpoint["theta_target"].shape == checkpoint["g"].shape


@on_a_cluster
def test_a_sweep_survives_the_loss_of_a_node_and_sigterm(run, cluster):
    grid = ["num_workers=1", "log_interval=500", "total_timesteps=15000", "t_max=32,64,128"]
    command = "sweep.py", "a3c.py", "--seeds", "1", "--address", cluster.address, "--grid", *grid
    program = run(*command)
    program.files("checkpoint.pt", number=3)
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    starts = "a3c: CartPole-v1"
    wait_until(lambda: max(path.read_text().count(starts) for path in program.files("output.txt")) == 2)
    code, output = program.stop(signal.SIGTERM)
    assert code == 143
    assert "stopped; the same command goes on with what is left" in output
    wait_until(lambda: not processes("a3c.py"))
    program = run(*command)
    code, output = program.finish()
    assert code == 0, output
    rows = pd.read_csv(program.runs / "sweep.csv")
    assert rows["t_max"].tolist() == [32, 64, 128]
    assert all(load(program.runs.parent / folder)["step"] > 15_000 for folder in rows["folder"])
    assert len([*program.runs.rglob("args.json")]) == 3  # the lost one was resumed, not begun anew
    assert "| a3c.py CartPole-v1 t_max=64 | 1 |" in output


@on_a_cluster
def test_a_sweep_reports_what_fails_and_skips_what_is_finished(run, cluster, tmp_path):
    options = ["num_workers=1", "total_timesteps=100", "eval_episodes=1"]
    command = ["sweep.py", "a3c.py", "--address", cluster.address, "--grid", *options, "--seeds", "3", "--env-ids"]
    code, output = run(*command, "CartPole-v1", "faulty:Failing-v0").finish()
    assert code == 1
    assert output.count("faulty:Failing-v0 seed 3: exit code 1: RuntimeError: the probe broke") == 1
    assert "2 runs, of which 1 have failed" in output
    # As if it had been lost before its evaluation was written
    (evaluation,) = (tmp_path / "runs").rglob("evaluation.json")
    evaluation.unlink()
    code, output = run(*command, "CartPole-v1").finish()
    assert code == 0
    assert len([*(tmp_path / "runs").rglob("evaluation.json")]) == 1
    last_change = evaluation.stat().st_mtime
    code, output = run(*command, "CartPole-v1").finish()
    assert code == 0
    assert evaluation.stat().st_mtime == last_change
    assert "| a3c.py CartPole-v1 | 1 |" in output


# Command lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": "1-"}, "--seeds must be as 1-10 or 1,3,8, not 1-"),
        ({"grid": ("gamma=0.9,2",)}, "--gamma must be between 0 and 1, not 2"),
        ({"seeds": "3-1"}, "nothing to run"),
        ({"grid": ("seed=1",)}, "--grid takes every argument once, and none of"),
        ({"grid": ("gamma=0", "gamma=1")}, "--grid takes every argument once"),
        ({"grid": ("eval_episodes=0",)}, "the result of a run is its evaluation"),
        ({"grid": ("no_such=1",)}, "no-such"),
    ],
)
def test_bad_input_of_a_sweep(capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as end:
        sweep.main(sweep.Args(("a3c.py",), log_dir=tmp_path / "sweep", **arguments))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_the_runs_of_a_sweep():
    args = sweep.Args(
        ("a3c.py", "async_qlearning.py"), seeds="2-3,7", grid=("learning_rate=1e-3,1", "anneal-lr=True,False")
    )
    runs = sweep.all_runs(args)
    assert len(runs) == 2 * 3 * 2 * 2
    assert runs["seed"].unique().tolist() == [2, 3, 7]
    flags = ["--env-id=CartPole-v1", "--learning-rate=1", "--no-anneal-lr", "--seed=7"]
    assert sweep.to_flags(runs.iloc[11].to_dict()) == flags


def test_a_setting_that_is_given_twice_is_run_once():
    args = sweep.Args(("a3c.py", "a3c.py"), seeds="1,1-2", env_ids=("CartPole-v1", "CartPole-v1"))
    assert sweep.all_runs(args)["seed"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "--learning-rate must be above 0, not -1"),
        ({"evaluate": "runs/x"}, "evaluate with: python a3c.py --evaluate runs/x"),
        ({"resume": "runs/x"}, "'runs/x' holds no checkpoint.pt, or a damaged one"),
        ({"env_id": "NoSuch-v0"}, "NoSuch-v0 cannot be used"),
    ],
)
def test_bad_input_of_a_cluster_run(capsys, tmp_path, arguments, message):
    args = cluster_a3c.args_class("a3c")(log_dir=str(tmp_path / "runs"), **arguments)
    with pytest.raises(SystemExit) as end:
        cluster_a3c.main(a3c, args)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
