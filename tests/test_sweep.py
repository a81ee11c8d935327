"""What a sweep runs, without a cluster."""

import pytest

pytest.importorskip("ray")
import sweep

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
def test_bad_input_of_a_sweep(capsys, tmp_path, arguments, message):
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
