"""What experiments keep of their runs."""

import math
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("scipy")
import pong
import tools


def command(value: int) -> tools.Command:
    """A run that writes a number into its folder; it fails with 0."""
    code = f"assert {value}; open('{{folder}}/value.txt', 'w').write('{value}')"
    return tools.Command(["-c", code], Path.cwd())


def read(folder: Path) -> dict:
    value = int((folder / "value.txt").read_text())
    return {tools.RETURN: float(value), "curve": pd.DataFrame({"step": [1], "return": [value]})}


def test_a_run_is_kept_under_its_name_seed_and_command(tmp_path):
    options = tools.Options(seeds=(1,), results=tmp_path / "results", log_dir=tmp_path / "runs")
    again = tools.Options(seeds=(1, 2), draw_only=True, results=tmp_path / "results", log_dir=tmp_path / "runs")
    for value in (1, 2):  # one name, two commands
        runs = tools.play({"x": command(value)}, read, options, "test")
        assert runs[tools.RETURN].tolist() == [value]
    for value in (1, 2):
        runs = tools.play({"x": command(value)}, read, again, "test")
        assert runs["failed"].tolist() == ["", tools.NOT_RUN]
        assert runs.loc[0, tools.RETURN] == value
        assert runs.loc[0, "curve"]["return"].tolist() == [value]


def test_a_run_that_fails_is_reported_and_not_kept(tmp_path, capsys):
    options = tools.Options(seeds=(1,), results=tmp_path / "results", log_dir=tmp_path / "runs")
    runs = tools.play({"bad": command(0), "good": command(3)}, read, options, "test")
    assert tools.finish(runs) == 1
    assert "bad, seed 1: FAILED: exit code 1: " in capsys.readouterr().out
    assert tools.succeeded(runs)["name"].tolist() == ["good"]
    assert pd.read_csv(tmp_path / "results" / "test" / "runs.csv")["name"].tolist() == ["good"]


@pytest.mark.parametrize(("step", "flag"), [(100, "--resume"), (101, "--evaluate")])
def test_pong_goes_on_where_it_was(monkeypatch, tmp_path, step, flag):
    """Its training, or its evaluation if T has gone beyond the total."""
    run = tmp_path / "Pong__a3c__1__5"
    run.mkdir()
    (run / "episodes.csv").write_text("time\n")
    torch.save({"step": step}, run / "checkpoint.pt")
    commands, process = [], SimpleNamespace(wait=lambda: 143)
    monkeypatch.setattr(subprocess, "Popen", lambda command: commands.append(command) or process)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(pong, "draw", lambda *_: None)
    assert pong.main(pong.Args(steps=100, log_dir=tmp_path, results=tmp_path / "results")) == 143
    assert commands[0][2] == f"{flag}={run}"


def test_each_run_has_its_seed_and_folder(tmp_path, monkeypatch):
    commands = []

    class Ended(subprocess.Popen):
        def __init__(self, command, **options):
            commands.append(command[1:])
            super().__init__([sys.executable, "-c", ""], **options)

    monkeypatch.setattr(subprocess, "Popen", Ended)
    monkeypatch.setattr(tools, "where", str)  # which calls git
    options = tools.Options(seeds=(3, 5), results=tmp_path / "results", log_dir=tmp_path / "runs")
    runs = tools.play({"x": tools.script("a3c.py", "--gamma=0.9")}, lambda folder: {}, options, "test")
    assert runs["seed"].tolist() == [3, 5]
    assert [command[:3] for command in commands] == [["a3c.py", "--gamma=0.9", f"--seed={seed}"] for seed in (3, 5)]
    assert len({command[3] for command in commands}) == 2


def test_what_is_read_of_a_run(tmp_path):
    """Two workers, of which the second has ended its first episode at step 20."""
    rows = [(10, 1.0, 0, 1.0), (20, 3.0, 1, 2.0), (30, 4.0, 0, 3.0), (40, 5.0, 1, 4.0), (60, 8.0, 0, 5.0)]
    episodes = pd.DataFrame(rows, columns=["step", "time", "worker", "return"])
    episodes.to_csv(tmp_path / "episodes.csv", index=False)
    assert tools.read_speed(tmp_path) == {tools.SPEED: 40 / 5}
    assert tools.read_speed(tmp_path, after=30) == {tools.SPEED: 30 / 4}
    assert tools.read_time_to_target(tmp_path, 3.0, window=3) == {tools.SECONDS_TO_TARGET: 5, tools.STEPS_TO_TARGET: 40}
    assert tools.read_time_to_target(tmp_path, 9.0, window=3)[tools.STEPS_TO_TARGET] == math.inf
    assert tools.last_fifth(episodes, 60) == 5.0
    assert tools.last_fifth(episodes, 49) == 4.5


def test_ratios_are_of_runs_with_the_same_seed():
    rows = [("a", 1, 6.0), ("a", 2, 8.0), ("b", 2, 2.0), ("b", 1, 3.0), ("c", 1, 3.0), ("c", 2, 16.0)]
    table = tools.ratios(pd.DataFrame(rows, columns=["name", "seed", "speed"]), "speed", ["a"], ["b", "c"])
    assert table.loc["a / b", ["runs", "median", "min", "max"]].tolist() == [2, 3, 2, 4]
    assert table.loc["a / c", ["geometric mean", *tools.INTERVAL]].tolist() == pytest.approx([1, 0.5, 2])
    assert table["each run"].tolist() == ["2, 4", "2, 0.50"]


def test_differences_are_of_runs_with_the_same_seed():
    rows = [("a", 1, 6.0), ("a", 2, 8.0), ("b", 2, 2.0), ("b", 1, 3.0), ("c", 1, 3.0), ("c", 2, 16.0)]
    runs = pd.DataFrame(rows, columns=["name", "seed", "speed"])
    table = tools.differences(runs, "speed", [("a", "b"), ("c", "a")])
    assert table["each run"].to_dict() == {"a - b": "3, 6", "c - a": "-3, 8"}
    assert table.loc["c - a", ["mean", *tools.INTERVAL]].tolist() == pytest.approx([2.5, -3, 8])
    assert tools.differences(runs, "speed", []).empty


def test_tables_without_a_single_figure(capsys):
    """As of runs that have all failed: nothing has such a column."""
    runs = pd.DataFrame({"name": ["a", "b"], "seed": [1, 1], "failed": [tools.NOT_RUN] * 2})
    tools.show(runs, tools.SPEED)
    tools.show_ratios(runs, tools.SPEED, ["a"], ["b"], of="Pong")
    speed, _, _, ratio, *_ = capsys.readouterr().out.splitlines()
    assert speed.startswith("| steps per second | runs | median |")
    assert ratio.startswith("| Pong steps per second, ratio | runs | median |")


def test_intervals_are_of_the_mean_over_the_runs():
    """Of 100 runs that reach 0 or 1, about 0.5 plus and minus two standard errors of 0.05."""
    assert tools.interval([0.0, 1.0] * 50) == pytest.approx((0.4, 0.6), abs=0.02)
    for unknown in ([1.0], [2.0, 2.0, 2.0], [1.0, math.inf]):
        assert all(map(math.isnan, tools.interval(unknown)))
    points = np.array([[0.0, 10.0, 0.0], [1.0, 14.0, 0.0]] * 50)
    bounds = tools.bootstrap(points, resamples=1000)
    np.testing.assert_allclose(bounds.low, [0.4, 11.6, 0], atol=0.15)
    np.testing.assert_allclose(bounds.high, [0.6, 12.4, 0], atol=0.15)


def test_a_seed_that_is_given_twice_runs_once(tmp_path):
    options = tools.Options(seeds=(2, 1, 2), results=tmp_path / "results", log_dir=tmp_path / "runs")
    assert tools.play({"x": command(1)}, read, options, "test")["seed"].tolist() == [2, 1]


def test_an_empty_list_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        tools.Options(seeds=())
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --seeds needs a value\n"


def test_runs_that_are_kept_at_the_same_time_are_all_kept(tmp_path):
    def keep(seed: int) -> None:
        tools.keep(tmp_path / "kept", {"name": "x", "seed": seed, "command": "y"}, {"value": 1.0})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep, range(40)))
    assert sorted(pd.read_csv(tmp_path / "kept" / "runs.csv")["seed"]) == list(range(40))


def test_another_run_of_pong_does_not_replace_the_one_that_is_kept(tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"seed": 1, "total_timesteps": 100}')
    with pytest.raises(SystemExit) as end:
        pong.main(pong.Args(steps=200, results=tmp_path, log_dir=tmp_path / "runs"))
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path} has another run: give --results and --log-dir of its own\n"


def test_a_ray_of_its_own_lets_calls_carry_parameters(monkeypatch):
    """A Ray that runs already has its own limit."""
    ray, name = pytest.importorskip("ray"), "RAY_max_direct_call_object_size"
    limits = []
    monkeypatch.setattr(ray, "init", lambda address, **options: limits.append(tools.os.environ.get(name)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(name, "")  # so that the test's end takes back what is set now
    monkeypatch.delenv(name)
    for address in ("auto", None):
        tools.start_ray(address)
    assert limits == [None, "1000000"]


@pytest.mark.parametrize(("option", "base"), [("parallel", "ParallelOptions"), ("pictures", "DrawingOptions")])
def test_no_experiment_offers_an_option_that_it_does_not_use(option, base):
    texts = {path.name: path.read_text() for path in Path(tools.__file__).parent.glob("*.py")}
    bases = {name: re.search(r"class Args\((.*tools\..*)\):", text) for name, text in texts.items()}
    offered = {name for name, match in bases.items() if match and base in match[1]}
    assert offered == {name for name, match in bases.items() if match and f"args.{option}" in texts[name]} != set()


def test_the_commit_is_that_of_the_directory(tmp_path):
    repository = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x"]
    assert tools.where(tmp_path).startswith("Python")  # no repository
    subprocess.run([*repository, "init", "-q"], check=True)
    subprocess.run([*repository, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.check_output([*repository, "rev-parse", "--short", "HEAD"], text=True).strip()
    assert tools.where(tmp_path).startswith(f"commit {commit}, Python")
