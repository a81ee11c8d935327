"""Learning curves of run folders: which runs belong together, and the picture."""

import json

import pytest

pytest.importorskip("scipy")
import plot


def new_run(folder, name: str, returns: tuple = (1.0, 2.0), **arguments) -> None:
    run = folder / f"{name}__1"
    run.mkdir(parents=True)
    rows = [f"{10 * i},{i},0,{score},10\n" for i, score in enumerate(returns, 1)]
    (run / "episodes.csv").write_text("step,time,worker,return,length\n" + "".join(rows))
    (run / "args.json").write_text(json.dumps({"env_id": "A-v0", "seed": 1, "gamma": 0.9, "cores": 2} | arguments))


def test_runs_are_told_apart_by_what_differs(tmp_path):
    new_run(tmp_path / "x", "A-v0__a3c__1")
    new_run(tmp_path / "x", "A-v0__a3c__2", seed=2, cores=4)
    new_run(tmp_path / "y", "A-v0__a3c__3", gamma=0.5)
    new_run(tmp_path / "y", "A-v0__gae__1", lr=3)
    new_run(tmp_path / "y", "B-v0__gae__1", env_id="B-v0", lr=4)
    new_run(tmp_path / "y", "A-v0__gae__9", returns=())
    runs = plot.read_runs((tmp_path, tmp_path / "x"))
    assert sorted(runs["setting"]) == ["a3c, gamma=0.5", "a3c, gamma=0.9", "a3c, gamma=0.9", "gae", "gae"]
    assert runs["env_id"].tolist().count("B-v0") == 1


def test_a_folder_without_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        plot.read_runs((tmp_path,))
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: no run with an episode in {tmp_path}\n"


@pytest.mark.parametrize("x", ["step", "time"])
def test_the_curves(tmp_path, monkeypatch, x):
    """Each run has a thin line, a setting the mean with its interval as far as all its runs go."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    figures = []
    new_run(tmp_path, "A-v0__a3c__1", returns=(0.0, 2.0, 4.0))
    new_run(tmp_path, "A-v0__a3c__2", returns=(0.0, 4.0), seed=2)
    assert plot.main(plot.Args((tmp_path,), x=x, points=3)) == 0
    (axes,) = figures[0].axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0, 2, 4], [0, 4], [0, 3]]
    unit = {"step": 10, "time": 1}[x]
    assert axes.lines[2].get_xdata().tolist() == [unit, 2 * unit]
    low, high = [edge(axes.collections[0].get_paths()[0].vertices[:, 1]) for edge in (min, max)]
    assert (low, high) == (0, 4)
    assert axes.get_legend().get_texts()[0].get_text() == "a3c (2 runs)"
