"""The same seed gives the same run; what is not the same run draws other numbers."""

import shutil

import pandas as pd
import pytest
from conftest import SHORT, WITH_WORKERS, each_script, load, tables

import a3c
import async_qlearning
import ddpg
import gae

CASES = [(script, {}) for script in SHORT]
CASES += [(script, {"env_id": "probes:BoundedTarget-v0"}) for script in (a3c, gae, ddpg)]  # with continuous actions
CASES += [(ddpg, {"env_id": "image_probes:Painted-v0", "pixels": True})]


def rows_without_time(folder) -> list[list]:
    return pd.read_csv(folder / "episodes.csv").drop(columns="time").to_numpy().tolist()


@pytest.mark.parametrize(("script", "options"), CASES, ids=lambda x: getattr(x, "SCRIPT", None) or str(x))
def test_one_seed_repeats_a_run(train, script, options):
    if "pixels" in options:
        pytest.importorskip("cv2")

    def play(**arguments) -> tuple[list, dict]:
        short = {"total_timesteps": 60 if "pixels" in options else 400, "log_interval": 100}
        _, folder = train(script, **(short | options | arguments))
        return rows_without_time(folder), {name: x.tolist() for name, x in load(folder)["model"].items()}

    first = play()
    assert len(first[0]) > 10
    assert play() == first
    assert [one != other for one, other in zip(play(seed=2), first, strict=True)] == [True, True]
    if script in WITH_WORKERS:
        assert play(backend="process") == first


@each_script(a3c, async_qlearning, gae)
@pytest.mark.parametrize("env_id", ["Script", "TellsActions", "DrawsFromTorch", "DrawsFromNumpy"])
def test_workers_and_environments_all_differ(train, script, env_id):
    """In what the environment draws, what is drawn from the policy, torch's and numpy's numbers."""
    workers = {"num_workers": 4, "backend": "process", "learning_rate": 1e-30}
    arguments = {"num_envs": 4, "batch_size": 400} if script is gae else workers
    _, folder = train(script, env_id=f"probes:{env_id}-v0", total_timesteps=2000, log_interval=500, **arguments)
    first = tables(folder)[0].groupby("worker")["return"].first()
    assert len(first) == len(set(first)) == 4


@each_script()
@pytest.mark.parametrize("env_id", ["Script", "TellsActions"])
def test_a_resumed_run_draws_other_numbers(train, tmp_path, script, env_id):
    env_id = f"probes:{env_id}-v0"
    _, folder = train(script, env_id=env_id, total_timesteps=120, log_interval=50)
    copy, step = shutil.copytree(folder, tmp_path / "copy"), load(folder)["step"]
    for path in (folder, copy):
        assert train(script, env_id=env_id, total_timesteps=200, log_interval=50, resume=str(path))[0] == 0
    assert rows_without_time(folder) == rows_without_time(copy)
    returns = tables(folder)[0].set_index("step")["return"]
    assert returns[returns.index > step].iloc[0] != returns.iloc[0]
