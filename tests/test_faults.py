"""What goes wrong during a run: environments and workers that fail or hang, NaN, signals. No run hangs for it."""

import itertools
import multiprocessing
import os
import re
import signal
from pathlib import Path

import faulty
import psutil
import pytest
from conftest import WITH_WORKERS, each_script, load, tables, wait_until

import a3c
import async_qlearning
import ddpg
import gae

pytestmark = pytest.mark.usefixtures("nothing_is_left_running")
BACKENDS = pytest.mark.parametrize("backend", ["thread", "process"])
FOR_EVER = {"total_timesteps": 10**9}
LONG_SEGMENT = {  # of minutes
    a3c: {"t_max": 10**6},
    async_qlearning: {"train_frequency": 10**6},
    gae: {"batch_size": 10**6},
    ddpg: {},
}
ONE_UPDATE = {
    a3c: {"total_timesteps": 1, "anneal_lr": False},
    async_qlearning: {"total_timesteps": 1, "train_frequency": 2, "anneal_lr": False, "rmsprop_eps": 1e-3},
    gae: {"total_timesteps": 10, "log_interval": 100},
    ddpg: {"total_timesteps": 20, "log_interval": 100},
}


def check_saved(folder: Path) -> int:
    """The last checkpoint is finite, and the tables end no later; nothing was evaluated. Returns its step."""
    checkpoint = load(folder)
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    unlearned = checkpoint["args"]["batch_size"] if checkpoint["script"] == "gae" else 0  # of a batch that is not whole
    for table in tables(folder):
        assert not (table["step"] > checkpoint["step"] + unlearned).any()
    assert not (folder / "evaluation.json").exists()
    return checkpoint["step"]


@pytest.fixture
def no_patience(monkeypatch):
    for script in WITH_WORKERS:
        monkeypatch.setattr(script, "PATIENCE_SECONDS", 0.5)


# Runs in a child process


def test_a_run_may_be_in_a_process_and_its_workers_in_threads(tmp_path):
    """As in a pool of processes, one for each run."""
    args = a3c.Args(num_workers=1, total_timesteps=50, eval_episodes=0, log_dir=str(tmp_path))
    process = multiprocessing.get_context("spawn").Process(target=a3c.main, args=(args,))
    process.start()
    process.join()
    (folder,) = tmp_path.iterdir()
    assert load(folder)["step"] > 50


# Environments and workers that fail


@each_script()
@pytest.mark.parametrize(
    ("env_id", "text"),
    [("Failing", "RuntimeError: the probe broke"), ("FailsAtReset", "the probe cannot be reset"), ("Exits", "")],
)
def test_an_environment_that_fails_ends_the_run(train, capfd, script, env_id, text):
    code, folder = train(script, env_id=f"faulty:{env_id}-v0", eval_episodes=1, **FOR_EVER)
    err = capfd.readouterr().err
    assert code == 1
    assert text in err
    assert re.search(rf"^{script.SCRIPT}: stopped at step \d+; {folder}$", err, re.MULTILINE)
    if env_id == "Failing":
        assert "Traceback" in err
        assert "faulty.py" in err
        assert 0 < check_saved(folder) < 40


@each_script()
def test_an_environment_that_cannot_be_closed_fails_the_run(train, capfd, script):
    code, folder = train(script, env_id="faulty:RaisesAtClose-v0", total_timesteps=20, eval_episodes=0)
    assert code == 1
    assert "RuntimeError: the probe cannot be closed" in capfd.readouterr().err
    assert check_saved(folder) >= 20


@each_script()
@pytest.mark.parametrize("env_id", ["Failing", "Exits"])
def test_an_environment_that_fails_in_the_evaluation_spares_the_checkpoint(train, capfd, script, env_id):
    code, folder = train(script, env_id=f"faulty:{env_id}-v0", total_timesteps=20, eval_episodes=10)
    assert code == 1
    assert "Traceback" in capfd.readouterr().err
    assert 20 <= check_saved(folder) < 40


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize("env_id", ["Failing", "FailsAtReset", "Exits", "Killed"])
def test_a_process_that_fails_ends_the_run(train, capfd, script, env_id):
    """Whether it raises, exits or is killed, all the others stop."""
    code, folder = train(script, env_id=f"faulty:{env_id}-v0", backend="process", num_workers=3, **FOR_EVER)
    assert code == 1
    assert re.search(rf"{script.SCRIPT}: worker [012] has failed or was killed", capfd.readouterr().err)
    step = check_saved(folder)
    assert step == 0 if env_id == "FailsAtReset" else 30 < step < 3 * 40


@each_script(*WITH_WORKERS)
def test_a_process_that_raises_prints_its_traceback(start, script):
    child = start(script, "--env-id", "faulty:Failing-v0", "--backend", "process")
    code, _, err = child.finish()
    assert code == 1
    assert "Traceback" in err
    assert "RuntimeError: the probe broke" in err
    assert "worker 0 has failed" in err


@each_script()
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("env_id", ["NotANumber", "InfiniteReward"])
def test_nan_stops_the_run_and_spares_the_checkpoint(train, capfd, script, env_id):
    code, folder = train(script, env_id=f"faulty:{env_id}-v0", **FOR_EVER)
    assert code == 1
    assert re.search(r"(nan|inf|not finite).* at step \d+", capfd.readouterr().err)
    assert 0 < check_saved(folder) <= 50


@each_script()
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_parameters_that_overflow_are_never_saved(train, capfd, script):
    _, folder = train(script, total_timesteps=40)
    code, _ = train(script, learning_rate=1e38, eval_episodes=1, resume=str(folder), **FOR_EVER)
    assert code == 1
    assert re.search(r"(nan|inf|not finite).* at step \d+", capfd.readouterr().err)
    assert not (folder / "evaluation.json").exists()
    assert all(tensor.isfinite().all() for tensor in load(folder)["model"].values())


@each_script()
def test_parameters_that_overflow_in_the_last_update_are_not_evaluated(train, capfd, script):
    code, folder = train(script, learning_rate=1e38, eval_episodes=1, **ONE_UPDATE[script])
    assert code == 1
    assert re.search(r"a parameter is not finite at step \d+", capfd.readouterr().err)
    assert not list(folder.glob("checkpoint.*"))
    assert not (folder / "evaluation.json").exists()


@each_script(*WITH_WORKERS)
def test_an_error_in_the_main_process_leaves_no_worker_behind(train, capfd, monkeypatch, script):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("common.run.Run.log_metrics", fail)
    for backend in ("process", "thread"):
        assert train(script, backend=backend, num_workers=2, **FOR_EVER)[0] == 1
        err = capfd.readouterr().err
        assert "Traceback" in err
        assert "OSError: no space left on device" in err


# Workers that hang


@each_script(*WITH_WORKERS)
@BACKENDS
@pytest.mark.parametrize(
    ("env_id", "total", "step"),
    [("HangsAtReset", 39, 40), ("HangsAtClose", 39, 40), ("InterruptsAndHangs", 10**9, 0)],
)
@pytest.mark.usefixtures("no_patience")
def test_a_worker_that_hangs_at_the_end_is_given_up(train, capfd, script, backend, env_id, total, step):
    """After the last step, or after Ctrl-C. What has been learned is saved."""
    arguments = {"total_timesteps": total, "backend": backend, "eval_episodes": 1}
    code, folder = train(script, env_id=f"faulty:{env_id}-v0", **arguments)
    assert code == 1
    assert f"{script.SCRIPT}: a worker makes no progress and does not end" in capfd.readouterr().err
    assert check_saved(folder) == step


@each_script(*WITH_WORKERS)
@pytest.mark.usefixtures("no_patience")
def test_a_worker_that_raises_does_not_wait_for_one_that_hangs(train, capfd, monkeypatch, script):
    monkeypatch.setattr(faulty.OneRaises, "number", itertools.count())
    code, folder = train(script, env_id="faulty:OneRaises-v0", backend="thread", num_workers=2, **FOR_EVER)
    assert code == 1
    err = capfd.readouterr().err
    assert "the probe broke" in err
    assert len(re.findall(r"worker [01] has failed", err)) == 1
    assert check_saved(folder) > 0


def test_an_environment_that_is_slow_at_the_end_is_waited_for(train, monkeypatch):
    """The last segment takes three times as long as a worker may be without progress, but there is progress."""
    monkeypatch.setattr(a3c, "PATIENCE_SECONDS", 0.8)
    code, folder = train(a3c, env_id="faulty:SlowAtTheEnd-v0", total_timesteps=40, t_max=90)
    assert code == 0
    assert load(folder)["step"] == 90


# Signals


@each_script()
@pytest.mark.parametrize(("env_id", "code"), [("InterruptsMain", 130), ("TerminatesMain", 143)])
def test_a_signal_ends_the_run_between_two_steps_and_saves(train, capfd, script, env_id, code):
    """There is no other moment to save, and without the signal the segment would take minutes."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    arguments = {"log_interval": 10**9, "eval_episodes": 1} | FOR_EVER | LONG_SEGMENT[script]
    result, folder = train(script, env_id=f"faulty:{env_id}-v0", **arguments)
    assert result == code
    step = check_saved(folder)
    assert step == 0 if script is gae else 40 <= step < 10**6  # a batch of gae.py that is not whole does not count
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert "greedy" not in out
    assert f"{script.SCRIPT}: stopped at step {step:,}; {folder}" in err
    if script in WITH_WORKERS:  # what the worker had of its segment is learned
        assert tables(folder)[1]["step"].tolist() == [step]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@each_script(*WITH_WORKERS)
def test_processes_leave_signals_to_the_main_process(train, script):
    arguments = {"backend": "process", "num_workers": 2, "total_timesteps": 100}
    code, folder = train(script, env_id="faulty:SignalsItself-v0", **arguments)
    assert code == 0
    assert check_saved(folder) > 100


@each_script(*WITH_WORKERS)
@BACKENDS
def test_what_an_environment_starts_gets_signals(train, script, backend):
    code, _ = train(script, env_id="faulty:StartsAProcess-v0", backend=backend, total_timesteps=50)
    assert code == 0


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [(a3c, signal.SIGINT, 130), (a3c, signal.SIGTERM, 143), (async_qlearning, signal.SIGTERM, 143)],
    ids=["a3c-SIGINT", "a3c-SIGTERM", "async_qlearning-SIGTERM"],
)
def test_a_signal_to_the_whole_process_group_saves(start, script, number, code):
    """As a terminal, `timeout` and SLURM send it."""
    child = start(script, "--num-workers", 2, "--backend", "process", "--log-interval", 10**9)
    folder = child.wait_for("episodes.csv", lines=20)
    children = psutil.Process(child.process.pid).children(recursive=True)
    assert len(children) >= 4  # the fork server, its resource tracker and two workers
    for each in children:  # none of them minds; the run goes on
        each.send_signal(number)
    child.wait_for("episodes.csv", lines=(folder / "episodes.csv").read_text().count("\n") + 50)
    os.killpg(child.process.pid, number)
    result, _, err = child.finish()
    assert result == code
    assert "Traceback" not in err
    assert check_saved(folder) > 0
    assert not psutil.wait_procs(children, timeout=20)[1]


@each_script(*WITH_WORKERS)
def test_a_signal_before_the_last_save_saves(train, monkeypatch, script):
    """The workers have ended, and the rows since the last checkpoint are not written yet."""

    def interrupted() -> list:
        signal.raise_signal(signal.SIGINT)
        return []

    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing, "active_children", interrupted)
        code, folder = train(script, total_timesteps=200, log_interval=10**9)
    assert code == 130
    assert check_saved(folder) >= 200


@each_script(a3c, gae)  # a run with workers, and one without
def test_a_second_signal_ends_a_run_that_hangs(start, script):
    child = start(script, "--env-id", "faulty:Hangs-v0")
    folder = child.wait_for("checkpoint.pt")
    assert "the probe hangs\n" in child.process.stdout  # reads as far as that
    children = psutil.Process(child.process.pid).children(recursive=True)

    def ends() -> bool:
        child.process.send_signal(signal.SIGINT)
        return child.process.poll() is not None

    wait_until(ends, seconds=20)
    code, _, err = child.finish()
    assert code == 130
    assert "Traceback" not in err
    tables(folder)
    assert load(folder)["step"] > 0
    assert not psutil.wait_procs(children, timeout=20)[1]
