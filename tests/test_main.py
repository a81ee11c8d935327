"""What main and the workers hand on: the right one of several things, at the right time."""

import copy
import json
import os
import queue
import re
import runpy
import signal
import sys
import threading
import time

import numpy as np
import probes
import pytest
import torch
from conftest import SHORT, WITH_WORKERS, as_options, each_script, load, tables, wait_until

import async_qlearning
import ddpg
import gae


@each_script(*WITH_WORKERS)
def test_rows_and_checkpoints_come_once_an_interval(train, monkeypatch, script):
    """Thirty steps within a second, of which the main process sees about twenty states, the last beyond the total."""

    def steady(index, args, shared, first_step):
        for _ in range(30):
            time.sleep(0.03)
            shared.log(index, dict.fromkeys(script.METRICS, 1.0))
            shared.count_step(index)
            wait_until(lambda: len(saved) >= min(2, shared.T // 10), seconds=10)
        before = len(looks)
        wait_until(lambda: len(looks) > before + 3, seconds=10)
        shared.count_step(index)
        shared.done[index] = True

    saved, save, looks, progress = [], script.Run.save, [], script.Run.progress
    monkeypatch.setattr(script.Run, "progress", lambda run, step: looks.append(step) or progress(run, step))
    monkeypatch.setattr(script, "worker", steady)
    monkeypatch.setattr(script.Run, "save", lambda run, step, **state: saved.append(step) or save(run, step, **state))
    code, folder = train(script, total_timesteps=25, log_interval=10)
    assert code == 0
    assert len(tables(folder)[1]) <= 3
    assert saved[2:] == [31]
    assert len(looks) < 1000  # or the main process takes a core from the workers


def test_each_worker_has_its_own_final_epsilon(monkeypatch):
    args = async_qlearning.Args(env_id="probes:Script-v0", num_workers=3, total_timesteps=1)
    monkeypatch.setattr(async_qlearning, "annealed_epsilon", lambda T, final, args: seen.append(final) or 1.0)
    for index, epsilon in enumerate((0.01, 0.1, 0.5)):
        seen = []
        shared = async_qlearning.Shared(async_qlearning.QNetwork((3,), 2).theta, args, queue.SimpleQueue)
        async_qlearning.worker(index, args, shared, 0)
        assert set(seen) == {epsilon}


def test_args_json_has_the_final_epsilons(train):
    _, folder = train(async_qlearning, num_workers=3, backend="thread", total_timesteps=10)
    assert json.loads((folder / "args.json").read_text())["epsilons"] == [0.01, 0.1, 0.5]


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


@each_script()
def test_a_failure_is_the_exit_code_of_the_program(monkeypatch, tmp_path, script):
    options = SHORT[script] | {"env_id": "faulty:Failing-v0", "total_timesteps": 200, "log_dir": tmp_path}
    monkeypatch.setattr(sys, "argv", [script.__file__, *as_options(**options)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script.__file__, run_name="__main__")
    assert end.value.code == 1


@each_script()
def test_the_terminal_tells_what_is_run_where_and_how_far_it_is(train, monkeypatch, capsys, script):
    steps, flushed, progress = [], [], script.Run.progress
    monkeypatch.setattr(script.Run, "progress", lambda run, step: steps.append(step) or progress(run, step))
    monkeypatch.setattr(script, "print", lambda *a, flush: flushed.append(flush) or print(*a), raising=False)
    _, folder = train(script, total_timesteps=130)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{script.SCRIPT}: {load(folder)['args']['env_id']}, ")
    assert first.endswith(f", {folder}")
    assert steps[-1] >= 130
    assert flushed == [True]  # in a pipe, too, it is there while the run goes on


@each_script()
def test_only_the_first_reset_of_an_environment_has_a_seed(train, monkeypatch, script):
    """Or every episode would be the same."""
    seeds, reset = [], probes.Script.reset
    monkeypatch.setattr(
        probes.Script, "reset", lambda env, *, seed=None, **_: seeds.append(seed) or reset(env, seed=seed)
    )
    train(script, env_id="probes:Script-v0", total_timesteps=60)
    assert len(seeds) > 3
    assert isinstance(seeds[0], int)
    assert set(seeds[1:]) == {None}


# Workers, and what main makes of them


@each_script(*WITH_WORKERS)
def test_the_run_lasts_until_the_last_worker_has_ended(train, monkeypatch, script):
    """And none of them keeps the program alive."""
    daemons, ended, looks, progress = [], [], [], script.Run.progress

    def work(index, args, shared, first_step):
        daemons.append(threading.current_thread().daemon)
        if index == 0:  # main looks a few times after the other one has ended
            wait_until(lambda: ended and len(looks) > ended[0] + 3, seconds=5)
        shared.count_step(index)
        shared.done[index] = True
        ended.append(len(looks))

    monkeypatch.setattr(script, "worker", work)
    monkeypatch.setattr(script.Run, "progress", lambda run, step: looks.append(step) or progress(run, step))
    code, folder = train(script, num_workers=2, total_timesteps=1, backend="thread")
    assert (code, daemons) == (0, [True, True])
    assert load(folder)["step"] == 2


@each_script(*WITH_WORKERS)
def test_a_worker_that_fails_after_a_signal_is_reported(train, monkeypatch, capfd, script):
    def work(index, args, shared, first_step):
        shared.count_step(index)
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: shared.stop.value)
        raise RuntimeError("it broke while it stopped")

    monkeypatch.setattr(script, "worker", work)
    assert train(script, total_timesteps=10**6)[0] == 1
    assert capfd.readouterr().err.count("worker 0 has failed") == 1


@each_script(*WITH_WORKERS)
def test_episodes_are_written_in_the_order_of_their_steps(train, monkeypatch, script):
    def work(index, args, shared, first_step):
        shared.steps[index] = 9
        shared.done[index] = True

    now = time.monotonic()
    steps = (3, 0), (8, 0), (2, 1), (5, 1)
    episodes = [[(step, worker, {"r": 1.0, "l": 1}, now + 10 * step) for step, worker in steps]]
    monkeypatch.setattr(script, "worker", work)
    monkeypatch.setattr(script.Shared, "reported", lambda shared: episodes.pop() if episodes else [])
    _, folder = train(script, total_timesteps=8)
    assert tables(folder)[0]["step"].tolist() == [2, 3, 5, 8]
    np.testing.assert_allclose(tables(folder)[0]["time"].diff()[1:], [10, 20, 30], atol=1e-3)


@each_script(*WITH_WORKERS)
def test_what_workers_tell_is_neither_mixed_nor_rounded(script):
    shared = script.Shared(torch.ones(1), script.Args(num_workers=3), list)
    assert len(set(map(id, shared.episodes))) == 3  # of one that is killed while it writes, the others need nothing
    shared.steps[1] = 2**40
    shared.count_step(1)
    assert shared.T == 2**40 + 1
    for value in (1e9, 1.0):
        shared.log(0, dict.fromkeys(script.METRICS, value))
        assert shared.means() == dict.fromkeys(script.METRICS, value)


# Resumed runs, and numbers that are none


def test_a_resumed_run_keeps_the_averages_of_both_optimizers_of_gae(train):
    steps = []
    _, folder = train(gae, trust_region=False, total_timesteps=40)
    for total in (50, 60):
        states = load(folder)["optimizers"]
        steps.append([states[name]["state"][0]["step"].item() for name in ("actor", "critic")])
        train(gae, trust_region=False, total_timesteps=total, resume=str(folder))
    assert steps[1][0] > steps[0][0] > 0
    assert steps[1][1] > steps[0][1] > 0


def test_observations_of_gae_may_be_normalised_later_on(train):
    """The policy and V stay the functions of observations that they were."""
    still = {"env_id": "probes:Script-v0", "trust_region": False, "norm_returns": False, "learning_rate": 1e-30}
    _, folder = train(gae, total_timesteps=40, **still)
    before = load(folder)["model"]
    assert train(gae, total_timesteps=80, norm_obs=True, resume=str(folder), **still)[0] == 0
    outputs = []
    for state in (before, load(folder)["model"]):
        model = gae.ActorCritic(3, gae.spaces.Discrete(2))
        model.load_state_dict(state)
        inputs = torch.from_numpy(model.normalize(np.eye(3, dtype=np.float32)))
        outputs.append(torch.cat([model.actor(inputs), model.value(inputs)[:, None]], dim=1))
    assert not torch.equal(load(folder)["model"]["observations.mean"], before["observations.mean"])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def test_what_gae_has_measured_is_in_its_checkpoint():
    model, other = (gae.ActorCritic(3, gae.spaces.Box(-1, 1, (2,))) for _ in range(2))
    rng = np.random.default_rng(0)
    model.observations.update(rng.normal(3, 5, (100, 3)))
    model.update_return_statistics(rng.normal(7, 2, 100))
    other.load_state_dict(model.state_dict())
    observations = rng.normal(3, 5, (20, 3)).astype(np.float32)
    np.testing.assert_array_equal(other.normalize(observations), model.normalize(observations))
    inputs = torch.from_numpy(model.normalize(observations))
    assert torch.equal(other.value(inputs), model.value(inputs))
    more = rng.normal(9, 1, (50, 3))  # which weigh as much beside what came before
    for each in (model, other):
        each.observations.update(more)
        each.update_return_statistics(more[:, 0])
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def test_a_gaussian_of_gae_begins_with_the_standard_deviation_it_is_given(train):
    still = {"trust_region": False, "learning_rate": 1e-30, "initial_std": 0.5}
    _, folder = train(gae, env_id="probes:ScriptBox-v0", total_timesteps=10, **still)
    assert load(folder)["model"]["log_std"].exp().tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("std", "expected"), [(1e-3, 1e-3), (0.0, 1.0)])
def test_gae_normalises_what_varies_a_little(std, expected):
    model, rng = gae.ActorCritic(3, gae.spaces.Discrete(2)), np.random.default_rng(0)
    for _ in range(7):
        model.observations.update(rng.normal(0.1, std, (100, 3)))
    np.testing.assert_allclose(model.observations.std, expected, rtol=0.1)


def test_gae_tells_which_number_is_none(train, capfd):
    code, folder = train(gae, env_id="faulty:NotANumber-v0", total_timesteps=100, log_interval=1000)
    assert code == 1
    assert "the advantages are nan at step 50" in capfd.readouterr().err
    assert load(folder)["step"] == 50


def test_environments_of_gae_are_flat_and_unchecked(monkeypatch):
    monkeypatch.setattr(probes.Script, "observation_space", gae.spaces.Box(-1, 1, (2, 3)))
    env = gae.make_env("probes:Script-v0")
    assert env.observation_space.shape == (6,)
    assert "Checker" not in str(env)


def test_rows_of_ddpg_come_at_every_interval(train):
    _, folder = train(ddpg, total_timesteps=100, log_interval=20)
    assert tables(folder)[1]["step"].tolist() == [20, 40, 60, 80, 100]
