"""The scripts and sweeps on a Ray cluster whose nodes are simulated: lost workers and lost nodes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT, as_options, load, tables, wait_until

pytest.importorskip("ray")
pytest.importorskip("scipy")
import cluster_a3c
import ray
import sweep
import tools
from ray.cluster_utils import Cluster

import a3c
import async_qlearning

FOR_EVER = {"total_timesteps": 10**9, "log_interval": 500, "eval_episodes": 1}
SMALL = {"object_store_memory": 10**8}


def on_a_cluster(test: Callable) -> Callable:
    """All in one of pytest's processes, on the same cluster."""
    return pytest.mark.xdist_group("cluster")(pytest.mark.timeout(300)(test))


# On a cluster whose nodes have a CPU each


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> Path:
    """What faulty:Waits-v0 waits for."""
    return tmp_path_factory.mktemp("gate") / "open"


@pytest.fixture(scope="module")
def one_cluster(gate):
    """A head without CPUs; the nodes come later. Ray's processes find the modules of tests and experiments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATE", str(gate))
        ray.cloudpickle.register_pickle_by_value(sweep)  # as if it were the program
        path = [str(ROOT / name) for name in ("tests", "experiments")]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        soon = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}  # a lost node is noticed
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon} | SMALL
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.nodes = []
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def with_nodes(cluster: Cluster, number: int) -> Cluster:
    """The cluster with so many nodes, or more."""
    while len(cluster.nodes) < number:
        cluster.nodes.append(cluster.add_node(wait=False, num_cpus=1, **SMALL))
    cluster.wait_for_nodes()
    return cluster


@pytest.fixture
def cluster(one_cluster):
    return with_nodes(one_cluster, 1)


@pytest.fixture
def connected(cluster, monkeypatch):
    """This process is connected to the cluster; what it runs there finds workers that have imported everything."""
    if not ray.is_initialized():
        tools.start_ray(cluster.address)
    assert ray.get_runtime_context().gcs_address == cluster.address
    monkeypatch.setattr(tools, "start_ray", lambda address: None)


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


def processes(title: str, everywhere: bool = False) -> list[psutil.Process]:
    """The cluster's processes that have this on their command line, or all of the machine's."""
    found = []
    for process in psutil.process_iter() if everywhere else psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


@on_a_cluster
def test_the_run_goes_on_without_a_worker_and_without_a_node(run, cluster):
    with_nodes(cluster, 2)
    program = run("cluster_a3c.py", address=cluster.address, num_workers=2, **FOR_EVER)
    folder = program.files("metrics.csv", lines=2)[0].parent
    wait_until(lambda: set(tables(folder)[0]["worker"]) == {0, 1})
    assert "was lost" not in program.output.read_text()
    processes("ray::work")[0].terminate()
    program.wait_for("was lost and has been started again")
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    program.wait_for("now there is room for 1 workers")
    program.files("metrics.csv", lines=len(tables(folder)[1]) + 10)
    code, output = program.stop(signal.SIGINT)
    assert code == 130, output
    assert not (folder / "evaluation.json").exists()
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
@pytest.mark.usefixtures("connected")
def test_the_server_is_lost(cluster, tmp_path, capsys):
    def kill_server() -> None:
        wait_until(lambda: any(path.read_bytes().count(b"\n") >= 3 for path in tmp_path.rglob("metrics.csv")))
        for process in wait_until(lambda: processes("ray::Server")):
            process.kill()

    killer = threading.Thread(target=kill_server, daemon=True)
    killer.start()
    args = cluster_a3c.args_class("a3c")(**FOR_EVER, num_workers=1, address=cluster.address, log_dir=str(tmp_path))
    assert cluster_a3c.main(a3c, args) == 1
    killer.join()
    (folder,) = tmp_path.iterdir()
    resume = f"{cluster_a3c.__file__} --script a3c.py --resume {folder} --address {cluster.address}"
    error = capsys.readouterr().err
    assert error.count("a3c: the parameter server is lost: The actor died") == 1
    assert f"\n{sys.executable} {resume}\n" in error
    assert "Traceback" not in error
    assert load(folder)["step"] > 0
    assert load(folder)["args"]["address"] is None  # it may be another cluster that goes on
    assert not (folder / "evaluation.json").exists()


@on_a_cluster
@pytest.mark.usefixtures("connected")
def test_a_worker_that_raises_ends_the_run(tmp_path, capsys):
    options = {"env_id": "faulty:Failing-v0", "num_workers": 1, "total_timesteps": 1000, "t_max": 10}
    args = cluster_a3c.args_class("a3c")(**options, log_dir=str(tmp_path))
    assert cluster_a3c.main(a3c, args) == 1
    assert "RuntimeError: the probe broke" in capsys.readouterr().err
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert load(checkpoint.parent)["step"] == 35  # an episode has 5 steps


@on_a_cluster
@pytest.mark.usefixtures("connected")
def test_a_sweep_survives_the_loss_of_a_node_and_sigterm(run, cluster, gate, capsys):
    grid = ["num_workers=1", "log_interval=10", "total_timesteps=100", "t_max=5"]
    env_id = "faulty:Waits-v0"
    command = "sweep.py", "a3c.py", "--seeds", "1", "--address", cluster.address, "--env-ids", env_id, "--grid", *grid
    program = run(*command)
    program.files("checkpoint.pt")
    while cluster.nodes:
        cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    with_nodes(cluster, 1)
    starts = f"a3c: {env_id}"
    wait_until(lambda: program.files("output.txt")[0].read_text().count(starts) == 2)
    code, output = program.stop(signal.SIGTERM)
    assert code == 143
    assert "stopped; the same command goes on with what is left" in output
    wait_until(lambda: not processes(str(program.runs), everywhere=True))
    gate.touch()
    options = {"seeds": "1", "log_dir": program.runs, "grid": tuple(grid)}
    assert sweep.main(sweep.Args(("a3c.py",), env_ids=(env_id,), **options)) == 0
    rows = pd.read_csv(program.runs / "sweep.csv")
    assert rows["t_max"].tolist() == [5]
    assert load(Path(rows["folder"][0]))["step"] > 100
    assert len([*program.runs.rglob("args.json")]) == 1  # the lost one was resumed, not begun anew
    assert f"| a3c.py {env_id} | 1 |" in capsys.readouterr().out


@on_a_cluster
@pytest.mark.usefixtures("connected")
def test_a_sweep_reports_what_fails_and_skips_what_is_finished(tmp_path, capsys):
    grid = "num_workers=2", "backend=thread", "total_timesteps=100", "eval_episodes=1"  # on a node with one CPU
    options = {"seeds": "3", "log_dir": tmp_path, "grid": grid}

    def run_on(*env_ids: str) -> tuple[int, str]:
        code = sweep.main(sweep.Args(("a3c.py",), env_ids=env_ids, **options))
        return code, capsys.readouterr().out

    code, output = run_on("CartPole-v1", "faulty:Failing-v0")
    assert code == 1
    assert output.count("faulty:Failing-v0 seed 3: exit code 1: RuntimeError: the probe broke") == 1
    assert "2 runs, of which 1 have failed" in output
    (evaluation,) = tmp_path.rglob("evaluation.json")
    last_change = evaluation.stat().st_mtime
    code, output = run_on("CartPole-v1")
    assert code == 0
    assert evaluation.stat().st_mtime == last_change
    assert "| a3c.py CartPole-v1 | 1 |" in output


@on_a_cluster
@pytest.mark.usefixtures("connected")
def test_a_worker_that_hangs_is_given_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster_a3c, "PATIENCE_SECONDS", 1.0)
    options = {"env_id": "faulty:HangsAtClose-v0", "num_workers": 1, "total_timesteps": 100, "eval_episodes": 0}
    args = cluster_a3c.args_class("a3c")(**options, log_dir=str(tmp_path))
    assert cluster_a3c.main(a3c, args) == 1
    assert "a3c: 1 workers do not end and are given up" in capsys.readouterr().err
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    assert load(checkpoint.parent)["step"] > 100
    ray.shutdown()  # ends the worker


@on_a_cluster
@pytest.mark.usefixtures("connected")
def test_a_machine_that_is_too_small_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cluster_a3c.main(a3c, cluster_a3c.args_class("a3c")(cpus_per_worker=64.0, log_dir=str(tmp_path / "runs")))
    assert "no machine of the cluster has --cpus-per-worker 64 CPUs" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@on_a_cluster
def test_asynchronous_q_learning_goes_on_on_this_machine_alone(one_cluster, tmp_path):
    ray.shutdown()
    first = async_qlearning.Args(num_workers=1, total_timesteps=200, eval_episodes=0, log_dir=str(tmp_path))
    assert async_qlearning.main(first) == 0
    (folder,) = tmp_path.iterdir()
    before = load(folder)
    before["model"] = {name: tensor + 1 for name, tensor in before["model"].items()}  # far from where a run begins
    before["theta_target"] += 3
    torch.save(before | {"g": torch.full_like(before["g"], 7.0)}, folder / "checkpoint.pt")
    options = {"num_workers": 1, "lag": 1, "total_timesteps": 1000, "eval_episodes": 3, "resume": str(folder)}
    args = cluster_a3c.args_class("async_qlearning")(**options)
    try:
        assert cluster_a3c.main(async_qlearning, args) == 0
        assert ray.get_runtime_context().gcs_address != one_cluster.address
    finally:
        ray.shutdown()
    assert tables(folder)[0]["step"].min() < 200  # the script's own
    assert len(tables(folder)[1]) == 2
    assert json.loads((folder / "evaluation.json").read_text())["episodes"] == 3
    after = load(folder)
    assert after["script"] == "async_qlearning"
    assert 1000 < after["step"] < 1000 + 3 * 40  # segments, under way and ahead
    changes = [(after["model"][name] - tensor).abs() for name, tensor in before["model"].items()]
    assert all(0 < change.max() and change.median() < 0.3 for change in changes)
    assert after["g"].min() > 1
    assert (after["theta_target"] - before["theta_target"]).abs().median() > 1  # it is theta again, of step 1000
