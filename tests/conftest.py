"""What several test files need: the scripts with arguments for short runs, in this process or as a child process."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faulty
import numpy as np
import pandas as pd
import probes
import pytest
import torch
from gymnasium import spaces

import a3c
import async_qlearning
import ddpg
import gae
from common.arguments import parse_args

ROOT = Path(__file__).parent.parent
SHORT = {  # arguments of runs that learn within 40 steps
    a3c: {"num_workers": 1, "t_max": 5},
    async_qlearning: {"num_workers": 1, "train_frequency": 5, "target_network_frequency": 30},
    gae: {"num_envs": 1, "batch_size": 10, "norm_obs": False},
    ddpg: {"env_id": "CartPole-v1", "buffer_size": 1000, "learning_starts": 20, "batch_size": 8},
}
WITH_WORKERS = [a3c, async_qlearning]


def each_script(*scripts) -> pytest.MarkDecorator:
    """Run a test once for each of these scripts, by default for all."""
    return pytest.mark.parametrize("script", scripts or list(SHORT), ids=lambda script: script.SCRIPT)


def as_options(**arguments) -> list[str]:
    """The arguments as they stand on a command line."""
    options = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        options += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return options


def load(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """episodes.csv and metrics.csv. Both are whole and do not go back in time."""
    episodes, metrics = pd.read_csv(folder / "episodes.csv"), pd.read_csv(folder / "metrics.csv")
    assert list(episodes) == ["step", "time", "worker", "return", "length"]
    assert not episodes.isna().any(axis=None)
    assert not metrics[["step", "time", "steps_per_second"]].isna().any(axis=None)
    for table in (metrics, *(rows for _, rows in episodes.groupby("worker"))):
        assert table["step"].is_monotonic_increasing
        assert table["time"].is_monotonic_increasing
        assert (table["time"] >= 0).all()
    return episodes, metrics


def load_rows(path: Path) -> np.ndarray:
    """A replay memory's file as a matrix, with s, a, r, s' and terminated in each row."""
    rows = np.load(path)
    return rows.view(np.float32).reshape(len(rows), -1)


def received(make_env: Callable, space: spaces.Space, actions) -> tuple[list, spaces.Space]:
    """What an environment with this action space gets when `make_env`'s takes `actions`, and the space of these."""
    log = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes.Constant, "action_space", space)
        patch.setattr(probes.Constant, "play", lambda self, action: log.append(action) or 1.0)
        env = make_env("probes:Constant-v0")
        for action in actions:
            env.reset()
            env.step(action)
        assert all(space.contains(np.asarray(action)) for action in log)
        return log, env.action_space


def wait_until(condition: Callable, seconds: float = 60):
    """What `condition` returns as soon as that is true. There is nothing to wait for but the deadline."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{condition} did not become true in {seconds} s"
        time.sleep(0.02)
    return result


def nothing_runs() -> bool:
    """No worker is left, neither a process nor a thread."""
    return not multiprocessing.active_children() and not any("(worker)" in t.name for t in threading.enumerate())


@pytest.fixture
def nothing_is_left_running():
    """By the end of the test every worker has ended; a thread, which nobody can end, hangs no longer."""
    yield
    faulty.test_is_over.set()
    wait_until(nothing_runs)
    faulty.test_is_over.clear()


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """A script turns them off; other tests need them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def visible_tracebacks(monkeypatch):
    """A thread that raises prints its traceback, as it does without pytest."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Call a script's `main` in this process. Returns the exit code and the run's folder."""
    monkeypatch.setattr(ddpg, "HIDDEN", 16)

    def call(script, **arguments) -> tuple[int, Path]:
        runs = tmp_path / "runs"
        before = set(runs.glob("*"))
        args = {"log_dir": str(runs), "log_interval": 10, "eval_episodes": 0} | SHORT[script] | arguments
        code = script.main(script.Args(**args))
        (folder,) = {Path(args["resume"])} if "resume" in args else set(runs.glob("*")) - before
        return code, folder

    return call


@pytest.fixture
def command(monkeypatch):
    """Call a script's command line in this process. Returns the exit code."""

    def call(script, *arguments) -> int:
        monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *map(str, arguments)])
        try:
            return script.main(parse_args(script.Args, script.SCRIPT))
        except SystemExit as end:
            return end.code

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Child:
    """A script as a child process, in a process group of its own as a terminal would start it."""

    def __init__(self, script, arguments: tuple, log_dir: Path):
        options = as_options(log_dir=log_dir, log_interval=10, eval_episodes=0, **SHORT[script])
        self.log_dir = log_dir
        self.process = subprocess.Popen(
            [sys.executable, script.__file__, *map(str, [*options, *arguments])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's "&" ignores it
        )

    def finish(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def wait_for(self, name: str, lines: int = 0) -> Path:
        """The run's folder, as soon as it holds a file of this name with at least so many lines."""

        def find() -> Path | None:
            assert self.process.poll() is None, self.finish()
            paths = [path for path in self.log_dir.glob(f"*/{name}") if path.read_bytes().count(b"\n") >= lines]
            return paths[0].parent if paths else None

        return wait_until(find)


@pytest.fixture
def start(tmp_path):
    """Start a script as a child process; what is left of it is killed afterwards."""
    children = []

    def start_script(script, *arguments) -> Child:
        children.append(Child(script, arguments, tmp_path / "runs"))
        return children[-1]

    yield start_script
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.communicate()
