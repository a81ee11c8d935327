"""What goes wrong: workers that fail or are killed, Ctrl-C, kill -9 and resuming, NaN, bad input. Nothing may hang."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT

import a3c
import async_qlearning
from common.inputs import command_line
from common.run import Run
from common.workers import train

SCRIPTS = pytest.mark.parametrize("script", [a3c, async_qlearning], ids=lambda script: script.SCRIPT)
BACKENDS = pytest.mark.parametrize("backend", ["thread", "process"])
ENDLESS = (
    "--total-timesteps",
    10**9,
    "--num-workers",
    2,
    "--log-interval",
    500,
    "--no-anneal-lr",
    "--learning-rate",
    1e-4,
)


def load(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def check_tables(folder: Path, until: int | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables load, have no gaps in a row and do not go back in time. Returns them."""
    episodes, metrics = pd.read_csv(folder / "episodes.csv"), pd.read_csv(folder / "metrics.csv")
    assert list(episodes) == ["step", "time", "worker", "return", "length"]
    assert {"step", "time", "grad_norm", "learning_rate", "steps_per_second"} <= set(metrics)
    for table in (episodes, metrics):
        assert len(table)
        assert not table.isna().any().any()
        assert until is None or table["step"].max() <= until
    assert metrics["step"].is_monotonic_increasing
    return episodes, metrics


def run_here(tmp_path, capsys, script=a3c, **arguments) -> tuple[int, str, Path]:
    """The script's main() in this process: exit code, standard error, the run's folder."""
    defaults = {"log_dir": str(tmp_path / "runs"), "num_workers": 2, "log_interval": 10}
    code = script.main(script.Args(**(defaults | arguments)))
    (folder,) = (tmp_path / "runs").iterdir()
    return code, capsys.readouterr().err, folder


@SCRIPTS
@BACKENDS
@pytest.mark.parametrize(
    ("env_id", "text"), [("Failing", "RuntimeError: the probe broke"), ("FailsAtReset", "the probe cannot be reset")]
)
def test_an_environment_that_raises_ends_the_run(tmp_path, capsys, script, backend, env_id, text):
    code, err, folder = run_here(
        tmp_path, capsys, script, env_id=f"probes:{env_id}-v0", backend=backend, total_timesteps=10**9
    )
    assert code == 1
    assert "Traceback" in err
    assert text in err
    assert "probes.py" in err
    checkpoint = load(folder)
    if env_id == "Failing":  # what was learned until then is saved
        assert 0 < checkpoint["step"] <= 2 * 40
        check_tables(folder, until=checkpoint["step"])


@SCRIPTS
def test_a_killed_worker_ends_the_run(tmp_path, capsys, script):
    code, err, folder = run_here(
        tmp_path, capsys, script, env_id="probes:Killed-v0", backend="process", total_timesteps=10**9, num_workers=4
    )
    assert code == 1
    assert "was killed by SIGKILL" in err
    assert load(folder)["step"] > 0
    check_tables(folder)


@SCRIPTS
@BACKENDS
@pytest.mark.parametrize("env_id", ["NotANumber", "InfiniteReward"])
def test_nan_stops_the_run_and_spares_the_checkpoint(tmp_path, capsys, script, backend, env_id):
    code, err, folder = run_here(
        tmp_path, capsys, script, env_id=f"probes:{env_id}-v0", backend=backend, total_timesteps=10**9
    )
    assert code == 1
    assert "the gradient is nan at step" in err or "the gradient is inf at step" in err
    assert "so is what the environment returned" in err
    assert all(tensor.isfinite().all() for tensor in load(folder)["model"].values())


@SCRIPTS
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_parameters_that_overflow_are_never_saved(tmp_path, capsys, script):
    code, err, folder = run_here(tmp_path, capsys, script, total_timesteps=10**9, learning_rate=1e38, num_workers=1)
    assert code == 1
    assert "at step" in err
    if (folder / "checkpoint.pt").exists():
        assert all(tensor.isfinite().all() for tensor in load(folder)["model"].values())


@SCRIPTS
def test_parameters_that_overflow_in_the_last_update_are_not_evaluated(tmp_path, capsys, script):
    one = {"total_timesteps": 1, "num_workers": 1, "anneal_lr": False}
    if script is async_qlearning:
        one |= {"train_frequency": 2}
    code, err, folder = run_here(tmp_path, capsys, script, learning_rate=1e38, **one)
    assert code == 1
    assert "model is not finite at step" in err
    assert not (folder / "evaluation.json").exists()


@SCRIPTS
@BACKENDS
def test_ctrl_c_saves_and_exits_with_130(start, script, backend):
    script = start(f"{script.SCRIPT}.py", *ENDLESS, "--backend", backend)
    folder = script.wait_for_episodes(20)
    os.killpg(script.process.pid, signal.SIGINT)  # as a terminal does: to every process of the run
    code, _, err = script.finish()
    assert code == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    checkpoint = load(folder)
    episodes, metrics = check_tables(folder, until=checkpoint["step"])
    assert metrics["step"].iloc[-1] == checkpoint["step"] >= episodes["step"].iloc[-1]


@BACKENDS
def test_ctrl_c_ends_a_run_whose_worker_hangs(start, backend):
    script = start("a3c.py", *ENDLESS, "--backend", backend, "--env-id", "probes:Hangs-v0")
    script.wait_for_episodes(2)
    script.process.send_signal(signal.SIGINT)
    assert script.finish()[0] == 130


@SCRIPTS
def test_sigterm_saves(start, script):
    script = start(f"{script.SCRIPT}.py", *ENDLESS)
    folder = script.wait_for_episodes(20)
    script.process.terminate()
    assert script.finish()[0] == 143
    assert load(folder)["step"] > 0


@SCRIPTS
def test_no_worker_outlives_a_killed_run(start, script):
    """Not even one that has nothing to report."""
    script = start(f"{script.SCRIPT}.py", *ENDLESS, "--env-id", "probes:Endless-v0", "--backend", "process")
    script.wait_for_episodes(0, checkpoint=True)
    children = psutil.Process(script.process.pid).children(recursive=True)
    assert len(children) >= 4  # the fork server, its resource tracker and two workers
    script.process.kill()
    script.process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]


@SCRIPTS
def test_kill_9_then_resume(start, script):
    first = start(f"{script.SCRIPT}.py", *ENDLESS)
    folder = first.wait_for_episodes(100, checkpoint=True)
    first.process.kill()
    first.process.wait()

    check_tables(folder)
    before = load(folder)
    with open(folder / "episodes.csv", "a") as table:  # as if killed within a row, and after rows that were not saved
        table.write(f"{before['step'] + 1},1.0,0,9,9\n{before['step']},1.")
    known = pd.read_csv(folder / "episodes.csv").dropna().query(f"step <= {before['step']}").astype({"worker": int})

    target = before["step"] + 3000
    resumed = start(f"{script.SCRIPT}.py", "--resume", folder, "--total-timesteps", target, "--eval-episodes", 1)
    code, out, err = resumed.finish()
    assert code == 0, err
    assert "greedy return" in out
    after = load(folder)
    assert target < after["step"] < target + 100
    assert after["seconds"] > before["seconds"]
    episodes, _ = check_tables(folder, until=after["step"])
    pd.testing.assert_frame_equal(episodes.head(len(known)), known, check_dtype=False)  # nothing lost
    assert len(episodes) > len(known)
    assert (episodes["step"].iloc[len(known) :] > before["step"]).all()
    assert episodes["length"].sum() <= after["step"]
    assert json.loads((folder / "args.json").read_text())["learning_rate"] == 1e-4  # the run's, not the default
    assert list(folder.parent.iterdir()) == [folder]


def test_a_worker_that_does_not_close_cannot_hold_up_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.workers.OVERTIME_SECONDS", 0.5)
    monkeypatch.setattr("common.workers.GRACE_SECONDS", 0.5)
    code, err, folder = run_here(
        tmp_path, capsys, env_id="probes:HangsAtClose-v0", backend="process", total_timesteps=100, eval_episodes=0
    )
    assert code == 1
    assert "2 workers have not ended after the last step" in err
    assert load(folder)["step"] > 100


@pytest.mark.parametrize("log_interval", [4, 44])
def test_a_row_holds_the_updates_of_its_own_steps(tmp_path, log_interval):
    """Here a worker has made one more update of 4 steps whenever T has been read; the metric is the update's number.

    The last update comes when its steps have been counted already, beyond the last step: it has no row before that.
    """

    class Shared:
        def __init__(self):
            self.steps, self.sums, self.stop = 0, torch.zeros(1, 2), torch.zeros((), dtype=torch.bool)

        def T(self) -> int:
            step = self.steps
            if step <= 40:
                self.steps += 4
            if step != 40 and not done.is_set():
                self.sums += torch.tensor([1.0, self.steps / 4])
            if step > 40:
                done.set()
            return step

    def worker(channel, _, rng):
        channel.wait_for_start()
        done.wait()
        channel.send((None, rng.bit_generator.state))

    done, args = threading.Event(), a3c.Args(total_timesteps=40, log_interval=log_interval, log_dir=str(tmp_path))
    run = Run("a3c", args, {"number": "losses"}, {})
    assert train(run, worker, [(np.random.default_rng(),)], "thread", Shared(), dict) == 0
    steps, numbers = pd.read_csv(run.folder / "metrics.csv")[["step", "number"]].to_numpy().T
    assert steps[-1] == load(run.folder)["step"] == 44
    first, last = np.append(4, steps[:-1] + 4) / 4, steps / 4
    np.testing.assert_allclose(numbers, (first + last) / 2)


def test_steps_without_an_update_are_counted(tmp_path, capsys):
    arguments = {"total_timesteps": 20, "train_frequency": 64, "num_workers": 1, "log_dir": str(tmp_path)}
    args = async_qlearning.Args(env_id="probes:Endless-v0", eval_episodes=0, **arguments)
    assert async_qlearning.main(args) == 0
    assert "async_qlearning: 21 steps in" in capsys.readouterr().out


def test_an_error_while_logging_ends_the_run(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("common.run.Run.log_metrics", fail)
    with pytest.raises(OSError, match="no space left"):
        run_here(tmp_path, capsys, total_timesteps=10**9, backend="process")
    assert not multiprocessing.active_children()


@BACKENDS
def test_ctrl_c_while_workers_start(start, backend):
    script = start("a3c.py", *ENDLESS, "--backend", backend, "--env-id", "probes:HangsAtReset-v0")
    script.wait_for_episodes(0)
    script.process.send_signal(signal.SIGINT)
    code, _, err = script.finish()
    assert code == 130
    assert "Traceback" not in err


def test_a_copy_under_another_name_resumes_its_own_runs(start, tmp_path):
    shutil.copytree(ROOT / "common", tmp_path / "common")
    copy = shutil.copy(ROOT / "a3c.py", tmp_path / "my_a3c.py")
    code, _, err = start(copy, "--total-timesteps", 100, "--num-workers", 1, "--eval-episodes", 1).finish()
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert "__my_a3c__" in folder.name
    code, _, err = start(copy, "--resume", folder, "--total-timesteps", 200).finish()
    assert code == 0, err
    assert load(folder)["step"] > 200


@SCRIPTS
def test_resume_continues_from_the_checkpoint(tmp_path, capsys, script):
    """A learning rate of almost nothing leaves theta as the checkpoint had it, alpha 1 leaves g; the rest goes on."""
    _, _, folder = run_here(tmp_path, capsys, script, total_timesteps=500, eval_episodes=0)
    before = load(folder)
    frozen = {"learning_rate": 1e-30, "rmsprop_alpha": 1.0}
    script.main(script.Args(resume=str(folder), total_timesteps=900, num_workers=3, eval_episodes=0, **frozen))
    after = load(folder)
    assert 500 < before["step"] < 900 < after["step"]
    for name, tensor in before["model"].items():
        torch.testing.assert_close(after["model"][name], tensor, rtol=0, atol=0)
    assert (before["g"] > 0).any()
    for name in {"g", "theta_target"} & before.keys():
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    assert set(before["random_states"]) == {0, 1}
    assert set(after["random_states"]) == {0, 1, 2}
    assert before["random_states"][0] != after["random_states"][0]


@SCRIPTS
def test_resume_goes_on_with_the_random_numbers(tmp_path, capsys, script):
    """The first worker of a resumed run draws what follows the state in the checkpoint."""
    one = {"num_workers": 1, "eval_episodes": 0}
    if script is async_qlearning:
        one |= {"final_epsilons": (0.1,), "final_epsilon_probs": (1.0,)}
    _, _, folder = run_here(tmp_path, capsys, script, total_timesteps=500, **one)
    copy = shutil.copytree(folder, tmp_path / "copy")
    states = []
    for path in (folder, copy):
        script.main(script.Args(resume=str(path), total_timesteps=900, seed=len(states), **one))
        states.append(load(path)["random_states"])
    assert states[0] == states[1]  # whatever --seed says


def test_resume_with_another_number_of_workers_keeps_every_column(tmp_path, capsys):
    _, _, folder = run_here(tmp_path, capsys, async_qlearning, total_timesteps=500, num_workers=2, eval_episodes=0)
    before, rows = pd.read_csv(folder / "metrics.csv"), [0]
    for num_workers, total in ((3, 900), (1, 1300)):
        rows.append(len(pd.read_csv(folder / "metrics.csv")))
        args = async_qlearning.Args(resume=str(folder), total_timesteps=total, num_workers=num_workers, eval_episodes=0)
        async_qlearning.main(args)
    after = pd.read_csv(folder / "metrics.csv")
    pd.testing.assert_frame_equal(after[list(before)].head(len(before)), before)
    counts = after[["epsilon_0", "epsilon_1", "epsilon_2"]].notna().sum().tolist()
    assert counts == [len(after), rows[2], rows[2] - rows[1]]
    assert after[["steps_per_second", "learning_rate"]].notna().all(axis=None)


def test_without_tensorboard_the_tables_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    a3c.main(
        a3c.Args(log_dir=str(tmp_path / "runs"), num_workers=1, total_timesteps=300, log_interval=100, eval_episodes=0)
    )
    assert "tensorboard is not installed: only the CSV files are written" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    check_tables(folder)
    assert not list(folder.glob("events*"))


# Bad input: one line that says what is wrong, exit code 2, nothing written


def short_run(tmp_path, capsys, script=a3c) -> Path:
    folder = run_here(tmp_path, capsys, script, total_timesteps=100, eval_episodes=0, num_workers=1)[2]
    return folder.rename(tmp_path / "a_run")


def refuse(monkeypatch, capsys, tmp_path, script, *arguments) -> str:
    """The one line with which the script refuses `arguments`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *map(str, arguments)])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        command_line(script.main, script.Args)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script.SCRIPT}: error: ")
    assert sorted(tmp_path.rglob("*")) == before
    return line


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--env-id", "CartPol-v1"), "did you mean CartPole-v1"),
        (("--env-id", "cartpole-v1"), "did you mean CartPole-v1"),
        (("--env-id", "CartPole-v99"), "did you mean CartPole-v1"),
        (("--env-id", "no_such_module:Env-v0"), "no_such_module"),
        (("--env-id", "probes:NoSuchProbe-v0"), "NoSuchProbe"),
        (("--env-id", "probes:Images-v0"), "images"),
        (("--env-id", "probes:Words-v0"), "vector of fixed length"),
        (("--env-id", "probes:ManyActions-v0"), "MultiDiscrete([2 2])"),
        (("--env-id", "probes:IntegerBox-v0"), "Box of real numbers"),
        (("--total-timesteps", 0), "--total-timesteps must be at least 1, not 0"),
        (("--num-workers", 0), "--num-workers must be at least 1, not 0"),
        (("--num-workers", -3), "--num-workers must be at least 1, not -3"),
        (("--t-max", 0), "--t-max must be at least 1"),
        (("--log-interval", 0), "--log-interval must be at least 1"),
        (("--eval-episodes", -1), "--eval-episodes must be at least 0"),
        (("--seed", -1), "--seed must be between 0 and 2^32 - 1, not -1"),
        (("--seed", 10**20), "--seed must be between 0 and 2^32 - 1"),
        (("--resume", ""), "there is no checkpoint.pt in an empty name"),
        (("--log-dir", "/dev/null/runs"), "--log-dir: the folder /dev/null/runs"),
        (("--gamma", 1.1), "--gamma must be between 0 and 1, not 1.1"),
        (("--gamma", "nan"), "--gamma must be between 0 and 1, not nan"),
        (("--rmsprop-alpha", -0.1), "--rmsprop-alpha must be between 0 and 1"),
        (("--learning-rate", 0), "--learning-rate must be above 0"),
        (("--learning-rate", "inf"), "--learning-rate must be above 0"),
        (("--ent-coef", "nan"), "--ent-coef must be at least 0, not nan"),
        (("--max-grad-norm", 0), "--max-grad-norm must be above 0"),
        (("--capture-video", "--eval-episodes", 0), "--capture-video needs an evaluation"),
        (("--resume", "nowhere"), "there is no checkpoint.pt in nowhere"),
        (("--evaluate", "nowhere"), "there is no checkpoint.pt in nowhere"),
        (("--resume", "here", "--evaluate", "there"), "give one of them"),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, arguments, text):
    assert text in refuse(monkeypatch, capsys, tmp_path, a3c, *arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--env-id", "Pendulum-v1"), "Q-learning needs Discrete ones; ddpg.py is for those"),
        (("--env-id", "probes:ManyActions-v0"), "MultiDiscrete([2 2]): Q-learning needs Discrete ones"),
        (("--env-id", "CartPol-v1"), "did you mean CartPole-v1"),
        (("--num-workers", 0), "--num-workers must be at least 1, not 0"),
        (("--n-step", 0), "--n-step must be at least 1, not 0"),
        (("--train-frequency", 0), "--train-frequency must be at least 1, not 0"),
        (("--target-network-frequency", 0), "--target-network-frequency must be at least 1, not 0"),
        (("--exploration-fraction", 1.5), "--exploration-fraction must be between 0 and 1, not 1.5"),
        (("--final-epsilons", 0.1, 0.01, 1.5), "--final-epsilons must be between 0 and 1, not 1.5"),
        (("--final-epsilon-probs", 0.5, -0.5, 1), "--final-epsilon-probs must be between 0 and 1, not -0.5"),
        (("--final-epsilon-probs", 0.4, 0.3, 0.2), "--final-epsilon-probs must sum to 1, not to 0.9"),
        (("--final-epsilon-probs", 0.4, 0.3, "nan"), "--final-epsilon-probs must be between 0 and 1, not nan"),
        (("--final-epsilons", 0.1, 0.5), "must have equally many numbers, not 2 and 3"),
        (("--final-epsilons", "--final-epsilon-probs"), "--final-epsilon-probs must sum to 1, not to 0"),
        (("--resume", "nowhere"), "there is no checkpoint.pt in nowhere"),
    ],
)
def test_bad_input_of_async_qlearning(monkeypatch, capsys, tmp_path, arguments, text):
    assert text in refuse(monkeypatch, capsys, tmp_path, async_qlearning, *arguments)


@SCRIPTS
def test_bad_checkpoints(monkeypatch, capsys, tmp_path, script):
    run_folder = short_run(tmp_path, capsys, script)
    path = run_folder / "checkpoint.pt"
    whole, content = path.read_bytes(), load(run_folder)

    def refused(*arguments) -> str:
        return refuse(monkeypatch, capsys, tmp_path, script, "--resume", run_folder, *arguments)

    assert "steps already" in refused()
    assert "is a run on CartPole-v1, not on Acrobot-v1" in refused("--env-id", "Acrobot-v1")
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "damaged or not a checkpoint" in refused()
    path.write_bytes(b"certainly not a checkpoint" * 100)
    assert "damaged or not a checkpoint" in refused()
    torch.save([1, 2, 3], path)
    assert "damaged or not a checkpoint" in refused()
    torch.save(content | {"script": "ddpg"}, path)
    assert f"is a run of ddpg.py, not of {script.SCRIPT}.py" in refused()
    torch.save(content | {"model": {"wrong": torch.zeros(1)}}, path)
    assert "does not fit CartPole-v1" in refused("--total-timesteps", 1000)
    for missing in content.keys() - {"script", "args"}:  # without these it is no checkpoint of ours
        assert missing in ("g", "step", "seconds", "random_states", "model", "theta_target")
        torch.save({name: value for name, value in content.items() if name != missing}, path)
        assert "does not fit CartPole-v1" in refused("--total-timesteps", 1000)
    path.write_bytes(whole)
    assert "needs an evaluation" in refuse(
        monkeypatch, capsys, tmp_path, script, "--evaluate", run_folder, "--eval-episodes", 0
    )


@SCRIPTS
def test_evaluate_repeats_the_evaluation(monkeypatch, capsys, tmp_path, script):
    run_folder = short_run(tmp_path, capsys, script)
    monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", "--evaluate", str(run_folder), "--eval-episodes", "3"])
    results = []
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_info:
            command_line(script.main, script.Args)
        assert exit_info.value.code == 0
        assert "over 3 episodes" in capsys.readouterr().out
        results.append(json.loads((run_folder / "evaluation.json").read_text()))
    assert results[0] == results[1]
    assert results[0]["mean_return"] == pytest.approx(np.mean(results[0]["returns"]))
    assert len(results[0]["returns"]) == results[0]["episodes"] == 3


def test_capture_video_films_the_evaluation(monkeypatch, capsys, tmp_path):
    run_folder = short_run(tmp_path, capsys)
    pytest.importorskip("moviepy")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(
        sys, "argv", ["a3c.py", "--evaluate", str(run_folder), "--eval-episodes", "1", "--capture-video"]
    )
    with pytest.raises(SystemExit) as exit_info:
        command_line(a3c.main, a3c.Args)
    assert exit_info.value.code == 0
    (video,) = (run_folder / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000


def test_capture_video_says_what_it_needs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install moviepy" in refuse(monkeypatch, capsys, tmp_path, a3c, "--capture-video")
