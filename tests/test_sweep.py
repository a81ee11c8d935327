"""What a sweep runs, without a cluster."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

pytest.importorskip("ray")
pytest.importorskip("scipy")
import ray
import sweep
import tools

import a3c
import ddpg
import gae


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
def test_bad_input_of_a_sweep(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.delattr(tools, "start_ray")
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


def test_a_run_is_finished_when_its_evaluation_is_whole(tmp_path):
    assert not sweep.is_finished(tmp_path)
    (tmp_path / "run").mkdir()
    for text, finished in ('{"mean_return": 1', False), ('{"mean_return": 1.0}', True):
        (tmp_path / "run" / "evaluation.json").write_text(text)
        assert sweep.is_finished(tmp_path) == finished


def test_a_run_claims_a_cpu_for_each_worker_or_thread():
    assert [sweep.cpus_of(args) for args in (a3c.Args(), gae.Args(), ddpg.Args(num_threads=4))] == [8, 1, 4]


def test_long_commands_have_folders_of_their_own():
    short, long = "a3c.py --seed=1", "a3c.py --learning-rate=" + "1" * 300
    assert sweep.folder_name(short) == "a3c.py_--seed=1"
    names = {sweep.folder_name(long + end) for end in ("1", "2")}
    assert len(names) == 2
    assert max(map(len, names)) < 255


@pytest.fixture
def no_ray(monkeypatch):
    """A task is played in this process, as soon as one waits for it."""
    task = SimpleNamespace(options=lambda **_: task, remote=sweep.task)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: task)
    monkeypatch.setattr(ray, "wait", lambda tasks, timeout: (tasks[:1], tasks[1:]))
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    monkeypatch.setattr(tools, "start_ray", lambda address: None)


def write_result(folder: Path, mean_return: float) -> None:
    """What a run leaves in its own folder in `folder`."""
    (folder / "run").mkdir(parents=True, exist_ok=True)
    (folder / "run" / "evaluation.json").write_text(json.dumps({"mean_return": mean_return}))
    (folder / "run" / "metrics.csv").write_text("step,time\n50,1\n100,4\n")


@pytest.mark.usefixtures("no_ray")
def test_the_table_of_a_sweep(tmp_path, capsys):
    """Of runs that are finished: nothing is started."""
    args = sweep.Args(("a3c.py",), seeds="1-2", grid=("gamma=0.5,0.9", "ent_coef=0"), log_dir=tmp_path)
    for number, run in enumerate(sweep.all_runs(args).to_dict("records")):
        folder = tmp_path / sweep.folder_name(" ".join([run["script"], *sweep.to_flags(run)]))
        write_result(folder, 100.0 * number)
    assert sweep.main(args) == 0
    rows = pd.read_csv(tmp_path / "sweep.csv")
    known = [(0.5, 1, 0), (0.5, 2, 100), (0.9, 1, 200), (0.9, 2, 300)]
    assert [*rows[["gamma", "seed", tools.RETURN]].itertuples(index=False, name=None)] == known
    assert set(rows[tools.SPEED]) == {25}
    lines = [line.strip(" |").split(" | ") for line in capsys.readouterr().out.splitlines() if "gamma" in line]
    table = {setting: (runs, mean, worst) for setting, runs, _, worst, _, mean, *_ in lines}
    assert table == {
        "a3c.py CartPole-v1 gamma=0.5": ("2", "50", "0"),
        "a3c.py CartPole-v1 gamma=0.9": ("2", "250", "200"),
    }


@pytest.mark.usefixtures("no_ray")
def test_a_run_that_fails_after_its_evaluation_has_failed(monkeypatch, tmp_path):
    def call(command: list[str], **_) -> int:
        write_result(Path(command[-1].removeprefix("--log-dir=")), 1.0)
        return int("--seed=1" in command)

    shown = []
    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr(sweep.tqdm, "set_postfix_str", lambda bar, text: shown.append(text))
    assert sweep.main(sweep.Args(("a3c.py",), seeds="1-2", log_dir=tmp_path)) == 1
    rows = pd.read_csv(tmp_path / "sweep.csv", keep_default_na=False)
    assert [text[:11] for text in rows["failed"]] == ["exit code 1", ""]
    assert [*rows[tools.RETURN]] == ["", "1.0"]
    first, second = (f"1 at work: a3c.py CartPole-v1 seed {seed}" for seed in (1, 2))
    assert shown == [first, "0 at work: ", second, "0 at work: "]
    assert sweep.main(sweep.Args(("a3c.py",), seeds="1-2", log_dir=tmp_path)) == 1  # it is not taken for finished


@pytest.mark.usefixtures("no_ray")
def test_two_sweeps_do_not_share_a_directory(monkeypatch, tmp_path, capsys):
    args = sweep.Args(("a3c.py",), seeds="1", log_dir=tmp_path)

    def call(command: list[str], **_) -> int:
        monkeypatch.setattr(subprocess, "call", lambda *_, **__: 0)
        with pytest.raises(SystemExit) as end:
            sweep.main(args)
        assert end.value.code == 2
        write_result(Path(command[-1].removeprefix("--log-dir=")), 1.0)
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    assert sweep.main(args) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} cannot be locked (is another sweep at work there?): ")
    assert error.count("\n") == 1
    assert sweep.main(args) == 0  # the first has ended


@pytest.fixture
def lost_run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").touch()
    return tmp_path / "run"


@pytest.mark.parametrize(("step", "flag"), [(100, "--evaluate"), (99, "--resume")])
def test_a_run_that_was_lost_goes_on_where_it_was(monkeypatch, lost_run, step, flag):
    torch.save({"step": step, "args": {"total_timesteps": 100}}, lost_run / "checkpoint.pt")
    commands = []
    monkeypatch.setattr(subprocess, "call", lambda command, **_: commands.append(command) or 0)
    assert sweep.play("gae.py", ["--seed=1"], lost_run.parent) == ""
    ((_, *command),) = commands
    assert command == ["gae.py", "--seed=1", f"{flag}={lost_run}", f"--log-dir={lost_run.parent}"]


def test_a_run_that_a_signal_ends_is_started_again(monkeypatch, tmp_path):
    """By Ray, for which the process of its task is lost."""

    class Ended(BaseException):
        pass

    def end(code: int):
        raise Ended

    monkeypatch.setattr(subprocess, "call", lambda command, **_: 143)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        sweep.play("gae.py", [], tmp_path)
