"""Learning curves of run folders: which runs belong together, and the picture."""

import json

import pytest

pytest.importorskip("scipy")
import plot


def new_run(folder, name: str, returns: tuple = (1.0, 2.0), **arguments) -> None:
    run = folder / f"{name}__1"
    run.mkdir(parents=True)
    rows = [f"{10 * i},{i},0,{score},10\n" for i, score in enumerate(returns, 1) if score is not None]
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


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are saved."""
    pyplot, saved = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda figure, *args, **kwargs: saved.append(figure))
    return saved


@pytest.mark.parametrize("x", ["step", "time"])
def test_the_curves(tmp_path, figures, x):
    """Each run has a thin line, a setting the mean with its interval as far as all its runs go."""
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


def test_a_part_in_which_one_run_has_no_episode(tmp_path, figures):
    new_run(tmp_path, "A-v0__a3c__1", returns=(0.0, 6.0, 8.0))
    new_run(tmp_path, "A-v0__a3c__2", returns=(0.0, None, 4.0), seed=2)
    assert plot.main(plot.Args((tmp_path,), points=3)) == 0
    assert figures[0].axes[0].lines[-1].get_ydata().tolist() == [
        0,
        4,
        6,
    ]  # the mean of 6 and 2, which is between 0 and 4


def test_a_short_setting_beside_a_long_one_and_a_renamed_folder(tmp_path, figures):
    new_run(tmp_path, "A-v0__a3c__1", returns=(1.0,) * 9)
    new_run(tmp_path, "A-v0__ddpg__1", returns=(2.0, 3.0))
    (tmp_path / "A-v0__ddpg__1__1").rename(tmp_path / "mine")
    assert plot.main(plot.Args((tmp_path,), points=3, output=tmp_path / "new" / "curves.png")) == 0
    assert (tmp_path / "new").is_dir()
    (axes,) = figures[0].axes
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.lines if line.get_label()[0] != "_"} == {
        "a3c (1 run)": [1, 1, 1],
        "mine (1 run)": [2, 3],
    }
