"""What experiments keep of their runs."""

from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("scipy")
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
