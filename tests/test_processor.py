"""What the scripts ask of the processor."""

import json

import pytest
from conftest import WITH_WORKERS, tables
from threadpoolctl import threadpool_limits

import ddpg
import gae

BACKENDS = [(script, {"backend": backend}) for script in WITH_WORKERS for backend in ("thread", "process")]


@pytest.mark.parametrize(("script", "backend"), [*BACKENDS, (gae, {})])
def test_numpy_takes_one_thread_in_workers_and_evaluation(train, script, backend):
    threadpool_limits(2)
    _, folder = train(script, env_id="probes:Threads-v0", total_timesteps=20, eval_episodes=1, **backend)
    assert set(tables(folder)[0]["return"]) == {1}
    assert json.loads((folder / "evaluation.json").read_text())["returns"] == [1]


@pytest.mark.parametrize(("script", "backend"), [*BACKENDS, (ddpg, {})])
def test_subnormal_numbers_are_taken_for_0(train, script, backend):
    """They take the processor long, and statistics of gradients that are 0 consist of them after a while."""
    _, folder = train(script, env_id="probes:Subnormal-v0", total_timesteps=20, **backend)
    assert set(tables(folder)[0]["return"]) == {0}
