"""What main and the workers hand on: the right one of several things, at the right time."""

import copy
import queue
import re
import time

import numpy as np
import probes
import pytest
import torch
from conftest import WITH_WORKERS, each_script, load, tables, wait_until

import async_qlearning
import ddpg
import gae


@each_script(*WITH_WORKERS)
def test_rows_and_checkpoints_come_once_an_interval(train, monkeypatch, script):
    """Thirty steps within a second, of which the main process sees about twenty states."""

    def steady(index, args, shared, rng):
        for _ in range(30):
            time.sleep(0.03)
            shared.count_step(index)
            shared.log(index, dict.fromkeys(script.METRICS, 1.0))
        shared.done[index] = True

    saved, save = [], script.Run.save
    monkeypatch.setattr(script, "worker", steady)
    monkeypatch.setattr(script.Run, "save", lambda run, step, **state: saved.append(step) or save(run, step, **state))
    _, folder = train(script, total_timesteps=30, log_interval=10)
    assert len(tables(folder)[1]) <= 4
    assert len(saved) <= 4
    assert saved[-1] == 30


@each_script(*WITH_WORKERS)
def test_time_begins_with_the_first_step(train, monkeypatch, script):
    begun, start = [], script.Run.start

    def late(index, args, shared, rng):
        wait_until(lambda: len(begun) > 3, seconds=10)  # the main process has looked a few times and seen no step
        shared.count_step(index)
        shared.done[index] = True

    monkeypatch.setattr(script, "worker", late)
    monkeypatch.setattr(script.Run, "start", lambda run: begun.append(run) or start(run))
    assert train(script, total_timesteps=10)[0] == 0


def test_each_worker_has_its_own_final_epsilon(monkeypatch):
    args = async_qlearning.Args(env_id="probes:Script-v0", num_workers=3, total_timesteps=1)
    monkeypatch.setattr(async_qlearning, "annealed_epsilon", lambda T, final, args: seen.append(final) or 1.0)
    for index, epsilon in enumerate((0.01, 0.1, 0.5)):
        seen = []
        shared = async_qlearning.Shared(async_qlearning.QNetwork((3,), 2).theta, args, queue.SimpleQueue)
        async_qlearning.worker(index, args, shared, np.random.default_rng(0))
        assert set(seen) == {epsilon}


def test_the_greedy_policy_of_ddpg_is_the_actor_and_not_its_target(train, monkeypatch):
    models, policies = [], []
    monkeypatch.setattr(ddpg, "DDPG", lambda *args, new=ddpg.DDPG: models.append(new(*args)) or models[-1])
    monkeypatch.setattr(ddpg, "evaluate", lambda policy, *args: policies.append(policy.__self__) or ("", None))
    _, folder = train(ddpg, total_timesteps=25)
    ddpg.main(ddpg.Args(**load(folder)["args"] | {"evaluate": str(folder), "eval_episodes": 1}))
    assert len(models) == len(policies) == 2
    for model, policy in zip(models, policies, strict=True):
        assert policy is model.actor
        assert policy is not model.target_actor


@each_script(gae, ddpg)
def test_environments_are_closed(train, monkeypatch, script):
    closed = []
    monkeypatch.setattr(probes.BoundedScript, "close", lambda env: closed.append(env))
    options = {"num_envs": 3} if script is gae else {}
    train(script, env_id="probes:BoundedScript-v0", total_timesteps=30, **options)
    assert len(closed) == len(set(map(id, closed))) == (3 if script is gae else 1)


def test_statistics_of_observations_move_the_policy_of_gae_only_before_its_first_update(train, monkeypatch):
    """Later, what comes between two updates leaves actor and critic as the functions of observations that they are."""
    seen = []

    def look(name):
        function = getattr(gae, name)

        def call(model, *arguments):
            before = copy.deepcopy(model)
            result = function(model, *arguments)
            seen.append((name, before, copy.deepcopy(model)))
            return result

        monkeypatch.setattr(gae, name, call)

    def outputs(model):
        inputs = torch.from_numpy(model.normalize(observations))
        return model.actor(inputs), model.value(inputs)

    for name in ("collect", "fit_value_function"):
        look(name)
    train(gae, env_id="probes:Script-v0", total_timesteps=400, num_envs=4, batch_size=80, norm_obs=True)
    names, befores, afters = zip(*seen, strict=True)
    assert names == ("collect", *("collect", "fit_value_function") * 5)
    observations = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    # the first steps only measure observations: weights stay
    for after, before in zip(afters[0].parameters(), befores[1].parameters(), strict=True):
        assert torch.equal(after, before)
    assert not torch.equal(afters[0].observations.mean, befores[1].observations.mean)
    for after, before in zip(afters[2::2], befores[3::2], strict=False):
        assert not torch.equal(after.observations.mean, before.observations.mean)
        torch.testing.assert_close(outputs(after), outputs(before), rtol=1e-3, atol=1e-4)


def test_the_line_search_of_gae_bounds_the_divergence(monkeypatch):
    """Of steps that go uphill but are far too long: it is not L that shortens them."""
    torch.manual_seed(0)
    model = gae.ActorCritic(3, gae.spaces.Discrete(3))
    inputs = torch.randn(200, 3)
    actions = model.policy(inputs).sample()
    advantages = actions.float()  # the third action is always the best: the further, the larger L
    monkeypatch.setattr(gae, "fisher_vector_product", lambda kl, parameters, damping: lambda v: 1e-4 * v)
    args = gae.Args(max_kl=0.01)
    metrics = gae.update_policy(model, None, inputs, actions, advantages, args, np.random.default_rng(0))
    assert 0 < metrics["kl"] <= 0.01
    assert metrics["line_search_steps"] > 1
    assert metrics["rejected"] == 0


@pytest.mark.parametrize("script", [gae, ddpg], ids=["gae", "ddpg"])
def test_torch_takes_the_threads_it_is_given(train, script):
    torch.set_num_threads(2)
    train(script, total_timesteps=20)
    threads = re.findall(r"get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())  # of OpenMP and MKL
    assert set(threads) == {"1"}
