"""common/run.py: the folder of a run, its tables, its checkpoint, its lines on the terminal, and how it stops."""

import io
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import load, tables

from common.run import Run, _Table, has_gil, signals_blocked

inf, nan = math.inf, math.nan


# Tables


def read(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_rows_are_on_the_disk_when_write_returns(tmp_path):
    table = _Table(tmp_path / "a.csv", 0, "step", "loss", "note")
    table.write({"step": 12345678901, "loss": 1 / 3})
    assert read(tmp_path / "a.csv") == ["step,loss,note", "12345678901,0.33333333,"]


def test_rows_that_are_torn_or_beyond_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n5,1\n12,2\n11,3\n10,4\n13,5\n10,")
    table = _Table(path, 10, "step", "loss")
    assert read(path) == ["step,loss", "5,1", "10,4"]
    table.write({"step": 11, "loss": 6})
    assert read(path) == ["step,loss", "5,1", "10,4", "11,6"]
    assert os.listdir(tmp_path) == ["a.csv"]


def test_new_columns_lose_no_old_one(tmp_path):
    path = tmp_path / "a.csv"
    for step, columns in enumerate((("loss", "kl"), ("entropy", "loss"), ("kl",))):
        table = _Table(path, step, "step", *columns)
        table.write({"step": step} | {name: 10 * step + len(name) for name in columns})
    frame = pd.read_csv(path).set_index("step")
    expected = {"loss": [4, 14, nan], "kl": [2, nan, 22], "entropy": [nan, 17, nan]}
    pd.testing.assert_frame_equal(frame, pd.DataFrame(expected, index=frame.index, dtype=float), check_dtype=False)


class FullDisk(io.FileIO):
    """Has room for three more bytes."""

    def write(self, data) -> int:
        return super().write(data[:3])


def test_a_row_without_room_is_taken_back(tmp_path):
    path = tmp_path / "a.csv"
    table = _Table(path, 0, "step", "loss")
    table.write({"step": 1, "loss": 0.5})
    table.file = FullDisk(path, "a")
    for _ in range(2):
        with pytest.raises(OSError, match=r"no space left on the disk for .*a\.csv"):
            table.write({"step": 2, "loss": 0.5})
        assert path.read_text() == "step,loss\n1,0.5\n"


# The run


@pytest.fixture
def new_run(tmp_path):
    def call(checkpoint: dict | None = None, env_id: str = "CartPole-v1", seed: int = 1) -> Run:
        args = {"env_id": env_id, "seed": seed, "sizes": (64, 64), "total_timesteps": 1000, "resume": None}
        args = SimpleNamespace(log_dir=str(tmp_path / "runs"), **args)
        return Run("script", args, {"loss": "losses", "epsilon": "charts"}, {"colour": "green"}, checkpoint)

    return call


def test_the_folder_says_what_was_run(new_run):
    run = new_run(env_id="module:Some/Env-v0", seed=5)
    assert run.folder.name.startswith("module-Some-Env-v0__script__5__")
    assert abs(int(run.folder.name.split("__")[-1]) - time.time()) < 60  # seconds, as README says
    args = json.loads((run.folder / "args.json").read_text())
    assert args.pop("sizes") == [64, 64]
    assert vars(run.args).items() - {("sizes", (64, 64))} <= args.items()
    assert args["colour"] == "green"
    versions = args["versions"]
    assert (versions["torch"], versions["numpy"]) == (version("torch"), np.__version__)
    assert (versions["gymnasium"], versions["python"]) == (gym.__version__, platform.python_version())
    assert (args["cores"], args["gil"]) == (os.cpu_count(), has_gil())


def test_each_run_has_a_folder_of_its_own(new_run):
    """Also those that begin in the same second."""
    assert len({new_run().folder for _ in range(3)}) == 3


def test_a_signal_sets_a_flag_and_a_later_one_ends_the_process(new_run, monkeypatch):
    """Not one that comes at the same time: `timeout` sends each signal twice."""
    ended, now = [], 1000.0
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for number in (signal.SIGINT, signal.SIGTERM):
        run, handler, seen = new_run(), signal.getsignal(number), []
        with run:  # an assertion would not get out of this block
            seen.append((run.stopped, run.exit_code, len(ended)))
            for later in (0.0, 0.0, 0.4):
                now += later
                signal.raise_signal(number)
                seen.append((run.stopped, run.exit_code, len(ended)))
            now += 0.2
            signal.raise_signal(signal.SIGINT)
        assert seen == [(False, 0, 0), *[(True, 128 + number, 0)] * 3]
        assert ended.pop() == 130
        assert signal.getsignal(number) == handler


def test_after_a_failure_or_the_end_a_signal_ends_the_process(new_run, monkeypatch):
    """What is still running may hang."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for last_step in (lambda run: run.fail("a worker has failed"), lambda run: run.close(10)):
        run = new_run()
        with run:
            last_step(run)
            signal.raise_signal(signal.SIGINT)
        assert ended == [130]
        ended.clear()


@pytest.mark.parametrize("error", [ValueError("it broke"), SystemExit(0), KeyboardInterrupt()], ids=repr)
def test_an_error_is_printed_and_makes_the_exit_code_1(new_run, capsys, error):
    run = new_run()
    with run:
        raise error
    assert run.stopped
    assert run.exit_code == 1
    err = capsys.readouterr().err
    assert err.startswith("script: Traceback")
    assert f"{type(error).__name__}" in err


def test_an_error_that_nobody_reads_does_not_keep_the_run_from_being_saved(new_run, monkeypatch):
    """As after `2>&1 | head`."""

    def write(text: str):
        raise BrokenPipeError

    run = new_run()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", SimpleNamespace(write=write, flush=lambda: None))
        with run:
            raise BrokenPipeError
    assert run.exit_code == 1


def test_a_failure_outweighs_a_signal(new_run):
    run = new_run()
    with run:
        signal.raise_signal(signal.SIGINT)
        run.fail("a worker does not end")
    assert run.exit_code == 1


def test_blocked_signals_arrive_afterwards(new_run):
    run, mask = new_run(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with run:
        with suppress(RuntimeError), signals_blocked():
            signal.raise_signal(signal.SIGTERM)
            seen = [signal.pthread_sigmask(signal.SIG_BLOCK, []), run.stopped]
            raise RuntimeError("a worker cannot be started")
        seen.append(run.stopped)
    assert seen == [mask | {signal.SIGINT, signal.SIGTERM}, False, True]
    assert run.exit_code == 143
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_a_checkpoint_is_whole_or_the_one_before(new_run, monkeypatch):
    run = new_run()
    run.save(10, model={"weight": torch.ones(2)}, g=torch.zeros(1))
    first = load(run.folder)
    assert first.keys() == {"script", "args", "step", "seconds", "model", "g"}
    assert first["args"] == vars(run.args)
    deep = {"optimizers": {"actor": {"state": {0: {"exp_avg": torch.tensor([nan])}}}}}
    for state in ({"model": {"weight": torch.tensor([1.0, nan])}}, {"g": torch.tensor([inf])}, deep):
        with pytest.raises(FloatingPointError, match="a parameter is not finite at step 1,234"):
            run.save(1234, **state)
        assert load(run.folder)["step"] == 10

    def half(state: dict, path: Path):
        path.write_bytes(b"half a checkpoint")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="no space left"):
            run.save(20, g=torch.zeros(1))
    assert load(run.folder)["step"] == 10
    run.save(30, g=torch.zeros(1))
    assert load(run.folder)["step"] == 30
    assert not list(run.folder.glob("*.tmp"))


def test_numbers_that_change_meanwhile_are_finite(new_run):
    run, g, stop = new_run(), torch.zeros(200_000), threading.Event()

    def write():
        while not stop.is_set():
            g.add_(1e-3)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for step in range(50):
            run.save(step, g=g)
    finally:
        stop.set()
        thread.join()
    assert load(run.folder)["step"] == 49


def test_rows_and_the_last_line_tell_steps_time_and_speed(new_run, monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    run = new_run({"step": 1000, "seconds": 50.0})
    for i in range(60):
        run.log_episode(1001 + i, 3, {"r": np.float32(i), "l": 2 * i}, now=110.0 + i)
    now = 180.0
    run.log_metrics(1400, {"loss": 0.5, "epsilon": 0.25})
    now = 190.0
    run.log_metrics(1420, {"loss": 1.5, "epsilon": 0.25})
    episodes, metrics = tables(run.folder)
    assert episodes.to_numpy()[[0, -1]].tolist() == [[1001, 60, 3, 0, 0], [1060, 119, 3, 59, 118]]
    assert list(metrics) == ["step", "time", "loss", "epsilon", "steps_per_second"]
    assert metrics.to_numpy().tolist() == [[1400, 130, 0.5, 0.25, 5], [1420, 140, 1.5, 0.25, 2]]
    run.close(1420)
    run.finish("evaluated", 7.0)  # of this part of a resumed run
    assert f"script: 420 steps in 90.0 s, 5 steps per second; evaluated; {run.folder}\n" in capsys.readouterr().out
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run.folder)).Reload()
    last = {tag: (events.Scalars(tag)[-1].step, events.Scalars(tag)[-1].value) for tag in events.Tags()["scalars"]}
    expected = {"losses/loss": 1.5, "charts/epsilon": 0.25, "charts/SPS": 2, "charts/episodic_return": 34.5}
    expected |= {"charts/episodic_length": 69, "eval/mean_return": 7}
    assert last == {tag: (1420, value) for tag, value in expected.items()}


@pytest.mark.parametrize("gil", [True, False])
def test_an_interpreter_says_whether_it_has_a_gil(monkeypatch, gil):
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: gil, raising=False)
    assert has_gil() is gil
    monkeypatch.delattr(sys, "_is_gil_enabled")  # before Python 3.13
    assert has_gil() is True


def test_no_episode_ends_before_training_begins(new_run):
    """A worker's first may be reported a moment before the main process says that it begins."""
    run = new_run({"step": 1000, "seconds": 50.0})
    run.log_episode(1001, 0, {"r": 1.0, "l": 1}, now=run.zero)
    assert tables(run.folder)[0]["time"].tolist() == [50]


def test_progress_is_a_plain_line_now_and_then(new_run, monkeypatch, capsys, tmp_path):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    run = new_run({"step": 100, "seconds": 50.0})
    now = 104.0
    run.progress(200)
    now = 110.0
    run.progress(200)
    now = 111.0
    run.progress(200)
    run.log_episode(250, 0, {"r": 7.0, "l": 3})
    now = 120.0
    run.progress(300)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 200: return -, 10 steps per second, 80 s left"
    assert second == "step 300: return 7.0, 10 steps per second, 70 s left"
    now = 130.0
    with open(tmp_path / "log", "w") as log, redirect_stdout(log):
        run.progress(400)
        assert (tmp_path / "log").read_text().startswith("step 400")


def test_on_a_terminal_there_is_a_progress_bar(new_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run = new_run({"step": 100, "seconds": 5.0})
    run.bar.delay = 0  # otherwise it comes after a second
    run.log_episode(250, 0, {"r": 7.0, "l": 3})
    assert (run.bar.initial, run.bar.n) == (100, 100)
    for step, shown in ((400, 400), (900, 900), (1020, 1000)):
        run.progress(step)
        assert run.bar.n == shown
    run.close(1000)
    out = capsys.readouterr().out
    assert "1000/1000" in out
    assert "return 7.0" in out
