"""gae.py against the definitions, on probe environments, with every option, and when something goes wrong."""

import csv
import json
import math
import shutil
import signal
import sys

import gymnasium as gym
import numpy as np
import pandas as pd
import probes
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

import gae
from common.inputs import command_line
from gae import ActorCritic, Args, compute_gae, conjugate_gradients, fisher_vector_product, update_policy

BOUNDS = (  # finite, asymmetric, half-open and open bounds in one space
    np.array([-2.0, 0.0, -np.inf, 5.0, -np.inf], np.float32),
    np.array([2.0, 10.0, 3.0, np.inf, np.inf], np.float32),
)
SPACES = [spaces.Discrete(3), spaces.Box(*BOUNDS)]


def make_model(space, observation_size=4, seed=0) -> ActorCritic:
    """A network with outputs far from zero, so that nothing hides behind a uniform policy."""
    torch.manual_seed(seed)
    model = ActorCritic(observation_size, space)
    model.theta.add_(0.3 * torch.randn_like(model.theta))
    return model


def train(tmp_path, **arguments):
    """Run gae.py's main in this process. Returns the run's folder and its checkpoint."""
    args = Args(**{"log_dir": str(tmp_path / "runs"), "eval_episodes": 0} | arguments)
    assert gae.main(args) == 0
    folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return folder, load(folder)


def load(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def load_model(checkpoint, env_id) -> ActorCritic:
    env = gym.make(env_id)
    model = ActorCritic(spaces.flatdim(env.observation_space), env.action_space)
    model.load_state_dict(checkpoint["model"])
    return model


def value(model, *observation) -> float:
    return model.value(torch.from_numpy(model.normalize(np.array([observation], np.float32)))).item()


def policy(model, *observation):
    return model.policy(torch.from_numpy(model.normalize(np.array([observation], np.float32))))


def read(table) -> list[dict]:
    with open(table) as file:
        return list(csv.DictReader(file))


# Oracles: the advantages


@st.composite
def batches(draw):
    """Rewards, values, next values, terminated, truncated of shape (steps, environments), gamma and lambda."""
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ends = rng.choice(3, shape, p=draw(st.sampled_from([(1, 0, 0), (0.7, 0.2, 0.1), (0.2, 0.4, 0.4)])))
    rewards, values, last_values = rng.normal(size=(3, *shape))
    next_values = np.where((ends > 0) | (np.arange(shape[0]) == shape[0] - 1)[:, None], last_values, 0.0)
    next_values[:-1] = np.where(ends[:-1] > 0, next_values[:-1], values[1:])  # V(s_{t+1}) where the episode goes on
    fractions = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
    return rewards, values, next_values, ends == 1, ends == 2, draw(fractions), draw(fractions)


def naive_gae(t, i, rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """The sum over l of (gamma lambda)^l delta_{t+l}, written out for one step of one environment."""
    total = 0.0
    for k in range(t, len(rewards)):
        bootstrap = 0.0 if terminated[k, i] else next_values[k, i]
        total += (gamma * gae_lambda) ** (k - t) * (rewards[k, i] + gamma * bootstrap - values[k, i])
        if terminated[k, i] or truncated[k, i]:
            break
    return total


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches())
def test_gae_is_the_double_sum(batch):
    advantages = compute_gae(*batch)
    assert advantages.shape == batch[0].shape
    expected = [[naive_gae(t, i, *batch) for i in range(advantages.shape[1])] for t in range(len(advantages))]
    np.testing.assert_allclose(advantages, expected, atol=1e-9)


def k_step_advantage(k, t, rewards, values, next_values, terminated, gamma):
    """A^(k): k rewards and the value after them, minus V(s_t), of the only environment."""
    bootstrap = 0.0 if terminated[t + k - 1, 0] else next_values[t + k - 1, 0]
    return sum(gamma**j * rewards[t + j, 0] for j in range(k)) + gamma**k * bootstrap - values[t, 0]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.9, 1.0])
def test_gae_is_the_weighted_mean_of_k_step_advantages(terminal, gae_lambda):
    """(1 - lambda)(A^(1) + lambda A^(2) + ...). Beyond the end every A^(k) is the last one, which has the rest."""
    n, gamma, rng = 7, 0.9, np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, n, 1))
    next_values = np.append(values[1:], [[1.5]], axis=0)
    terminated = np.zeros((n, 1), bool)
    terminated[-1] = terminal
    advantages = compute_gae(rewards, values, next_values, terminated, ~terminated & False, gamma, gae_lambda)
    for t in range(n):
        A = [k_step_advantage(k, t, rewards, values, next_values, terminated, gamma) for k in range(1, n - t + 1)]
        weights = [(1 - gae_lambda) * gae_lambda**k for k in range(len(A) - 1)] + [gae_lambda ** (len(A) - 1)]
        assert advantages[t, 0] == pytest.approx(np.dot(weights, A), abs=1e-12)
        if gae_lambda == 0:  # delta_t
            assert advantages[t, 0] == pytest.approx(A[0])
        if gae_lambda == 1:  # the return minus V(s_t)
            assert advantages[t, 0] == pytest.approx(A[-1])


def test_gae_at_the_ends_of_episodes():
    ones, no = np.ones((3, 1)), np.zeros((3, 1), bool)
    end = np.array([[False], [True], [False]])
    going_on = compute_gae(ones, 2 * ones, 4 * ones, no, no, 0.5, 1.0)  # delta = 1 + 2 - 2 = 1
    np.testing.assert_allclose(going_on[:, 0], [1.75, 1.5, 1])
    truncated = compute_gae(ones, 2 * ones, 4 * ones, no, end, 0.5, 1.0)  # bootstraps and ends
    np.testing.assert_allclose(truncated[:, 0], [1.5, 1, 1])
    terminated = compute_gae(ones, 2 * ones, 4 * ones, end, no, 0.5, 1.0)  # delta = 1 - 2 = -1, and ends
    np.testing.assert_allclose(terminated[:, 0], [0.5, -1, 1])


# Oracles: the policy


@pytest.mark.parametrize("space", SPACES)
def test_numpy_policy_equals_torch(space):
    model = make_model(space)
    for seed in range(3):  # what is written to theta must reach both
        model.theta.copy_(make_model(space, seed=seed).theta)
        observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
        outputs = model.actor(torch.from_numpy(observations)).detach().numpy()
        actions = model.act(observations)
        if model.discrete:
            assert actions.tolist() == outputs.argmax(-1).tolist()
        else:
            np.testing.assert_allclose(actions, outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_actions_are_drawn_from_the_policy(space):
    model, rng = make_model(space), np.random.default_rng(0)
    observation = rng.normal(size=4).astype(np.float32)
    draws = model.act(np.tile(observation, (20_000, 1)), rng)
    distribution = model.policy(torch.from_numpy(observation[None]))
    if model.discrete:
        shares = np.bincount(draws, minlength=3) / 20_000
        np.testing.assert_allclose(shares, distribution.probs[0].detach().numpy(), atol=0.015)  # four standard errors
    else:
        std = distribution.stddev[0].detach().numpy()
        np.testing.assert_allclose(draws.mean(0), distribution.mean[0].detach().numpy(), atol=4 * std.max() / 141)
        np.testing.assert_allclose(draws.std(0), std, rtol=0.03)


def test_gaussian_log_prob_entropy_and_kl_are_the_formulas():
    model, other = make_model(SPACES[1]), make_model(SPACES[1], seed=1)
    observations, actions = torch.randn(7, 4), torch.randn(7, 5)
    p, q = model.policy(observations), other.policy(observations)
    (m, s), (n, r) = ((x.actor(observations), x.log_std.exp()) for x in (model, other))
    log_prob = (-0.5 * ((actions - m) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(p.log_prob(actions), log_prob)
    entropy = (0.5 + 0.5 * math.log(2 * math.pi) + s.log()).sum()
    torch.testing.assert_close(p.entropy(), entropy.expand(7))
    kl = ((r / s).log() + (s**2 + (m - n) ** 2) / (2 * r**2) - 0.5).sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), kl)


def test_actions_stay_within_bounds_and_reach_them():
    model = make_model(SPACES[1])
    low, high = BOUNDS
    np.testing.assert_allclose(model.to_env(np.zeros(5)), [0, 5, 2, 6, 0])
    np.testing.assert_array_equal(model.to_env(np.full(5, 1e6))[:3], high[:3])
    np.testing.assert_array_equal(model.to_env(np.full(5, -1e6))[[0, 1, 3]], low[[0, 1, 3]])
    assert model.space.contains(model.to_env(np.random.default_rng(0).normal(size=5) * 100))


def test_discrete_actions_begin_at_the_spaces_start():
    model = make_model(spaces.Discrete(3, start=-1))
    assert [model.to_env(index) for index in range(3)] == [-1, 0, 1]


def test_running_statistics_are_those_of_all_observations():
    model, rng = make_model(SPACES[0]), np.random.default_rng(0)
    observations = rng.normal(size=(300, 4)).astype(np.float32)
    np.testing.assert_array_equal(model.normalize(observations), observations)  # nothing known yet: as they are
    data = rng.normal([0, 5, -3, 100], [1, 0.1, 20, 3], size=(1000, 4))
    for part in np.split(data, [1, 10, 500]):
        model.observations.update(part)
    np.testing.assert_allclose(model.observations.mean, data.mean(0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(model.observations.std, data.std(0), rtol=1e-2)
    normalized = model.normalize(data)
    np.testing.assert_allclose(normalized.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(normalized.std(0), 1, rtol=1e-2)
    assert np.abs(model.normalize(data * 1e6)).max() == 10
    constant = gae.RunningStatistics(1)
    constant.update(np.full((1_000_000, 1), 3.0))
    assert constant.std == pytest.approx(1e-4)  # nothing is ever divided by zero


def test_returns_are_normalised_and_values_stay_the_same():
    model, observations, rng = make_model(SPACES[0]), torch.randn(64, 4), np.random.default_rng(0)
    first = model.value(observations).detach()
    mean, var = 0.0, 0.0
    for i in range(14):
        batch = rng.normal(50 * i, 1 + i, 100)
        model.normalize_returns(batch)
        torch.testing.assert_close(model.value(observations), first, rtol=1e-3, atol=1e-2)
        share = max(1 / (i + 1), 1 / 10)  # of the latest batch: all alike at first, then a tenth
        means, variances = np.array([mean, batch.mean()]), np.array([var, batch.var()])
        mean = np.array([1 - share, share]) @ means
        var = np.array([1 - share, share]) @ (variances + (means - mean) ** 2)
        assert model.returns.mean.item() == pytest.approx(mean, rel=1e-3, abs=1e-3)
        assert model.returns.std.item() == pytest.approx(math.sqrt(var), rel=1e-3)


# Oracles: the trust region


def test_fisher_vector_product_is_the_hessian_of_the_kl_divergence():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    observations, names = torch.randn(20, 2, dtype=torch.float64), [name for name, _ in network.named_parameters()]
    old = Categorical(logits=network(observations).detach())

    def kl_of(theta):
        parts = theta.split([p.numel() for p in network.parameters()])
        parameters = {n: x.view_as(p) for n, x, p in zip(names, parts, network.parameters(), strict=True)}
        return kl_divergence(old, Categorical(logits=functional_call(network, parameters, observations))).mean()

    H = torch.autograd.functional.hessian(kl_of, parameters_to_vector(network.parameters()).detach())
    kl = kl_divergence(old, Categorical(logits=network(observations))).mean()
    product = fisher_vector_product(kl, list(network.parameters()), damping=0.3)
    assert torch.linalg.eigvalsh(H).max() > 0.01
    for v in torch.randn(5, len(H), dtype=torch.float64):
        torch.testing.assert_close(product(v), H @ v + 0.3 * v)


def test_conjugate_gradients_solve():
    torch.manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64)
    A, b = root @ root.T + 0.5 * torch.eye(12), torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(conjugate_gradients(lambda v: A @ v, b, 40, 1e-20), torch.linalg.solve(A, b))
    few = conjugate_gradients(lambda v: A @ v, b, 3)
    assert 0 < (A @ few - b).norm() < b.norm() * 2
    assert torch.equal(conjugate_gradients(lambda v: A @ v, torch.zeros(12).double(), 3), torch.zeros(12).double())


def random_batch(space, n=200, seed=0):
    torch.manual_seed(seed)
    actions = torch.randint(3, (n,)) if isinstance(space, spaces.Discrete) else torch.randn(n, 5)
    return torch.randn(n, 4), actions, torch.randn(n)


@pytest.mark.parametrize("space", SPACES)
def test_without_trust_region_the_step_is_the_lectures_policy_gradient(space):
    """A step of gradient descent with learning rate 1 has the gradient's length: mean of A grad log pi(a|s; theta)."""
    model, (observations, actions, advantages) = make_model(space), random_batch(space, 30)
    expected = torch.zeros_like(model.theta)
    for observation, action, advantage in zip(observations, actions, advantages, strict=True):
        log_prob = model.policy(observation[None]).log_prob(action[None]).squeeze()
        gradient = torch.autograd.grad(log_prob, model.policy_parameters())
        expected += advantage * parameters_to_vector(gradient) / 30
    before, optimizer = model.theta.clone(), torch.optim.SGD(model.policy_parameters(), lr=1.0)
    metrics = update_policy(model, optimizer, observations, actions, advantages, Args(trust_region=False))
    torch.testing.assert_close(model.theta - before, expected, rtol=1e-3, atol=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    assert metrics["line_search_steps"] == metrics["rejected"] == 0


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 0.5])
def test_a_step_improves_and_never_leaves_the_trust_region(space, max_kl):
    accepted = 0
    for seed in range(6):
        model, (observations, actions, advantages) = make_model(space, seed=seed), random_batch(space, seed=seed)
        with torch.no_grad():
            old, before = model.policy(observations), model.theta.clone()
        metrics = update_policy(model, None, observations, actions, advantages, Args(max_kl=max_kl))
        with torch.no_grad():
            new = model.policy(observations)
            kl = kl_divergence(old, new).mean().item()
            gain = ((new.log_prob(actions) - old.log_prob(actions)).exp() * advantages).mean() - advantages.mean()
        assert kl <= max_kl * (1 + 1e-5)
        assert metrics["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert metrics["entropy"] == pytest.approx(old.entropy().mean().item(), rel=1e-5)
        accepted += not metrics["rejected"]
        if metrics["rejected"]:
            assert torch.equal(model.theta, before)
        else:
            assert gain > 0
            assert 1 <= metrics["line_search_steps"] <= 10
    assert accepted >= 5


@pytest.fixture
def tiny_step():
    """A step so small that the KL divergence is almost quadratic. Returns the model, its batch and the step."""
    space, args = SPACES[0], Args(max_kl=1e-4, cg_iterations=100, cg_damping=1e-2, fisher_stride=1)
    model, batch = make_model(space), random_batch(space)
    before = model.theta.clone()
    metrics = update_policy(model, None, *batch, args)
    step = model.theta - before
    model.theta.copy_(before)
    return model, batch, step, metrics


def test_the_step_is_the_natural_gradient_on_the_edge_of_the_trust_region(tiny_step):
    model, (observations, actions, advantages), step, metrics = tiny_step
    assert metrics["line_search_steps"] <= 2
    length = 0.5 ** (metrics["line_search_steps"] - 1)
    policy = model.policy(observations)
    L = (policy.log_prob(actions) * advantages).mean()
    g = parameters_to_vector(torch.autograd.grad(L, model.policy_parameters(), retain_graph=True))
    old = Categorical(logits=policy.logits.detach())
    product = fisher_vector_product(kl_divergence(old, policy).mean(), model.policy_parameters(), 1e-2)
    F_step = product(step)
    assert 0.5 * (step @ F_step).item() == pytest.approx(length**2 * 1e-4, rel=0.05)  # 1/2 x F x = max_kl
    assert torch.cosine_similarity(F_step, g, 0) > 0.999  # x ~ F^-1 g
    assert torch.cosine_similarity(step, g, 0) < 0.9  # which is not the gradient


def test_the_fisher_matrix_is_taken_over_part_of_the_batch(monkeypatch):
    model, (observations, actions, advantages) = make_model(SPACES[0]), random_batch(SPACES[0])
    seen, policy = [], model.policy
    monkeypatch.setattr(model, "policy", lambda some: seen.append(some.clone()) or policy(some))
    update_policy(model, None, observations, actions, advantages, Args(fisher_stride=4))
    parts = [some for some in seen if len(some) != len(observations)]
    assert len(parts) == 2  # the old policy and the new one
    assert all(torch.equal(part, observations[::4]) for part in parts)


def test_a_step_that_fails_is_taken_back(monkeypatch):
    model, batch = make_model(SPACES[0]), random_batch(SPACES[0])
    before = model.theta.clone()
    monkeypatch.setattr("gae.conjugate_gradients", lambda product, b, iterations: -b)  # downhill
    metrics = update_policy(model, None, *batch, Args(line_search_steps=4))
    assert metrics["rejected"] == 1
    assert metrics["line_search_steps"] == 4
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(model.theta, before)


def test_no_advantage_no_step():
    model, (observations, actions, advantages) = make_model(SPACES[0]), random_batch(SPACES[0])
    before = model.theta.clone()
    update_policy(model, None, observations, actions, 0 * advantages, Args())
    assert torch.equal(model.theta, before)


@pytest.mark.parametrize("norm_returns", [True, False])
def test_value_function_is_fitted_to_the_returns(norm_returns):
    model, observations = make_model(SPACES[0]), torch.randn(512, 4)
    returns = 5 * observations.sum(-1) + 20
    optimizer, rng = torch.optim.Adam(model.critic.parameters(), 1e-2), np.random.default_rng(0)
    with torch.no_grad():
        error = (model.value(observations) - returns).square().mean().item()
    args = Args(vf_epochs=1, minibatch_size=512, norm_returns=norm_returns)
    assert gae.fit_value_function(model, optimizer, observations, returns, args, rng) == pytest.approx(error, rel=1e-3)
    args = Args(vf_epochs=100, norm_returns=norm_returns)
    gae.fit_value_function(model, optimizer, observations, returns, args, rng)
    assert (model.value(observations) - returns).square().mean() < 0.02 * returns.var()
    assert (model.returns.count > 1) == norm_returns


# Oracles: what the update is given


@pytest.mark.parametrize("env_id", ["Script-v0", "ScriptBox-v0"])
def test_batches_are_what_happened(monkeypatch, env_id):
    args = Args(env_id=env_id, num_envs=3, batch_size=40, total_timesteps=100, gamma=0.9, gae_lambda=0.8)
    model, given = make_model(gym.make(env_id).action_space, 3), []
    probes.Script.log.clear()

    def record(model, optimizer, observations, *arguments):
        given.append((observations.clone(), *arguments))
        return dict.fromkeys(gae.METRICS, 0.0)

    monkeypatch.setattr(gae, "update_policy", record)
    monkeypatch.setattr(gae, "fit_value_function", lambda *arguments: record(*arguments) and 0.0)
    optimizers = {"actor": None, "critic": None}
    results = list(gae.learn(model, optimizers, args, 0, np.random.default_rng(0), lambda: 0.0))
    assert [T for T, _, _ in results] == [39, 78, 117]
    log, ends = list(probes.Script.log), set()
    assert len(log) == 117
    reference = make_model(model.space, 3)
    for number, (_, episodes, metrics) in enumerate(results):
        steps = log[39 * number : 39 * (number + 1)]  # 13 of each environment, in turn
        observations, next_observations = (
            reference.normalize(np.array([step[k] for step in steps], np.float32)) for k in (0, 3)
        )
        values, next_values = (
            reference.value(torch.from_numpy(x)).detach().numpy().reshape(13, 3)
            for x in (observations, next_observations)
        )
        rewards, terminated, truncated = (np.array([s[k] for s in steps]).reshape(13, 3) for k in (2, 4, 5))
        ends |= {"terminated"} if terminated.any() else set()
        ends |= {"truncated"} if truncated.any() else set()
        advantages = np.array(
            [
                naive_gae(t, i, rewards, values, next_values, terminated, truncated, 0.9, 0.8)
                for t in range(13)
                for i in range(3)
            ]
        )
        given_observations, given_actions, given_advantages, _ = given[2 * number]
        np.testing.assert_allclose(given_observations, observations, rtol=1e-5)
        actions = np.array([step[1] for step in steps])
        np.testing.assert_allclose(given_actions.numpy().reshape(actions.shape), actions, rtol=1e-5)
        normalized = (advantages - advantages.mean()) / advantages.std()
        np.testing.assert_allclose(given_advantages, normalized, rtol=1e-3, atol=1e-4)
        fit_observations, returns, _, _ = given[2 * number + 1]
        np.testing.assert_allclose(fit_observations, observations, rtol=1e-5)
        np.testing.assert_allclose(returns, advantages + values.flatten(), rtol=1e-3, atol=1e-4)
        assert metrics["advantage_mean"] == pytest.approx(advantages.mean(), abs=1e-5)
        assert metrics["advantage_std"] == pytest.approx(advantages.std(), rel=1e-4)
        targets = advantages + values.flatten()
        assert metrics["explained_variance"] == pytest.approx(1 - advantages.var() / targets.var(), rel=1e-3)
        over = [39 * number + j for j, step in enumerate(steps) if step[4] or step[5]]
        assert [row[0] for row in episodes] == [j + 1 for j in over]
        assert [row[2] for row in episodes] == [j % 3 for j in over]
        reference.observations.update(np.array([step[0] for step in steps], np.float32))  # after the batch, not before
    assert ends == {"terminated", "truncated"}


def test_episodes_are_counted(tmp_path):
    folder, checkpoint = train(tmp_path, env_id="probes:Constant-v0", total_timesteps=600, batch_size=101, num_envs=3)
    rows = read(folder / "episodes.csv")  # every episode has one step, so every step is a row
    assert checkpoint["step"] == len(rows) == 693  # batches of 99
    assert [int(row["step"]) for row in rows] == list(range(1, 694))
    assert {row["worker"] for row in rows} == {"0", "1", "2"}
    assert {(row["return"], row["length"]) for row in rows} == {("1", "1")}


def test_one_seed_repeats_a_run(tmp_path):
    def episodes(**arguments):
        folder, _ = train(tmp_path, total_timesteps=3000, **arguments)
        return [[v for k, v in row.items() if k != "time"] for row in read(folder / "episodes.csv")]

    first = episodes()
    assert len(first) > 20
    assert episodes() == first
    assert episodes(seed=2) != first


# Probe environments: one thing at a time has to be learned

PROBE = {"total_timesteps": 6000, "batch_size": 200, "gamma": 0.5, "learning_rate": 0.01, "vf_epochs": 10}


def test_probe_constant_reward(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:Constant-v0", **PROBE)
    assert value(load_model(checkpoint, "Constant-v0"), 0) == pytest.approx(1, abs=0.05)


def test_probe_reward_by_observation(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByObservation-v0", **PROBE)
    model = load_model(checkpoint, "ByObservation-v0")
    assert value(model, 1) == pytest.approx(1, abs=0.05)
    assert value(model, -1) == pytest.approx(-1, abs=0.05)


@pytest.mark.parametrize("trust_region", [True, False])
def test_probe_reward_by_action(tmp_path, trust_region):
    _, checkpoint = train(tmp_path, env_id="probes:ByAction-v0", trust_region=trust_region, **PROBE)
    model = load_model(checkpoint, "ByAction-v0")
    for observation in (-1.0, 1.0):
        assert policy(model, observation).probs[0, int(observation > 0)].item() > 0.8


def test_probe_reward_by_earlier_action(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByEarlierAction-v0", **PROBE)
    model = load_model(checkpoint, "ByEarlierAction-v0")
    assert policy(model, 0, 0).probs[0, 1].item() > 0.8
    assert value(model, 1, 1) == pytest.approx(1, abs=0.1)


def test_probe_that_only_truncates(tmp_path):
    """1 / (1 - 0.5) = 2; who takes the time limit for a terminal state learns the mean of 1, 1.5 and 1.75."""
    _, checkpoint = train(tmp_path, env_id="probes:OnlyTruncates-v0", **PROBE)
    assert value(load_model(checkpoint, "OnlyTruncates-v0"), 0) == pytest.approx(2, abs=0.1)


def test_probe_continuous_target(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:Target-v0", total_timesteps=12_000, batch_size=200, max_kl=0.05)
    model = load_model(checkpoint, "Target-v0")
    np.testing.assert_allclose(model.to_env(model.act(np.zeros((1, 1), np.float32))[0]), [7, -2], atol=0.4)


# Smoke: every option, short


@pytest.mark.parametrize(
    "env_id", ["Acrobot-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1", "probes:DictObservation-v0"]
)
@pytest.mark.parametrize(
    "options", [{}, {"num_envs": 1, "batch_size": 77}, {"trust_region": False, "norm_obs": False}], ids=str
)
def test_smoke_environments(tmp_path, env_id, options):
    folder, checkpoint = train(
        tmp_path, **({"env_id": env_id, "total_timesteps": 300, "batch_size": 100, "eval_episodes": 1} | options)
    )
    assert checkpoint["step"] >= 300
    assert json.loads((folder / "evaluation.json").read_text())["episodes"] == 1
    assert (checkpoint["model"]["observations.count"] > 1) == options.get("norm_obs", True)


def test_the_statistics_are_part_of_the_evaluation(tmp_path, monkeypatch, capsys):
    folder, checkpoint = train(tmp_path, total_timesteps=10_000, eval_episodes=5)
    returns = json.loads((folder / "evaluation.json").read_text())["returns"]
    monkeypatch.setattr(sys, "argv", ["gae.py", "--evaluate", str(folder), "--eval-episodes", "5"])
    for scale, same in ((1.0, True), (1e6, False)):
        checkpoint["model"]["observations.std"] *= scale
        torch.save(checkpoint, folder / "checkpoint.pt")
        with pytest.raises(SystemExit) as exit_info:
            command_line(gae.main, Args)
        assert exit_info.value.code == 0
        assert (json.loads((folder / "evaluation.json").read_text())["returns"] == returns) == same


def test_smoke_tensorboard_and_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, checkpoint = train(tmp_path, total_timesteps=2000, batch_size=200, log_interval=400, eval_episodes=1)
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"losses/kl", "losses/rejected", "losses/explained_variance", "charts/SPS", "eval/mean_return"} <= tags
    rows = read(folder / "metrics.csv")
    assert [int(row["step"]) for row in rows[:3]] == [400, 800, 1200]
    assert int(rows[-1]["step"]) == checkpoint["step"] == 2000
    assert all(0 <= float(row["kl"]) <= 1.01 * Args().max_kl for row in rows)
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())


# What goes wrong


def run_here(tmp_path, capsys, **arguments):
    """main() in this process: exit code, standard error, the run's folder."""
    defaults = {"log_dir": str(tmp_path / "runs"), "num_envs": 2, "batch_size": 20, "log_interval": 20}
    code = gae.main(Args(**(defaults | arguments)))
    (folder,) = (tmp_path / "runs").iterdir()
    return code, capsys.readouterr().err, folder


def test_an_environment_that_raises_ends_the_run(tmp_path, capsys):
    code, err, folder = run_here(tmp_path, capsys, env_id="probes:Failing-v0", total_timesteps=10**9)
    assert code == 1
    assert "RuntimeError: the probe broke" in err
    assert "probes.py" in err
    assert load(folder)["step"] == 60  # three whole batches; the fourth counts as not begun
    assert pd.read_csv(folder / "episodes.csv")["step"].max() <= 60


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("env_id", "step"), [("NotANumber", 80), ("InfiniteReward", 60)])
def test_nan_stops_the_run_and_spares_the_checkpoint(tmp_path, capsys, env_id, step):
    code, err, folder = run_here(tmp_path, capsys, env_id=f"probes:{env_id}-v0", total_timesteps=10**9)
    assert code == 1
    assert "the advantages are nan at step" in err or "the advantages are inf at step" in err
    assert "so is what the environment returned" in err
    checkpoint = load(folder)
    assert checkpoint["step"] == step
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


ENDLESS = ("--total-timesteps", 10**9, "--batch-size", 200, "--log-interval", 400)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save(start, number, code):
    script = start("gae.py", *ENDLESS)
    folder = script.wait_for_episodes(20)
    script.process.send_signal(number)
    result, _, err = script.finish()
    assert result == code
    assert "Traceback" not in err
    checkpoint = load(folder)
    assert checkpoint["step"] % 200 == 0
    for table in ("episodes.csv", "metrics.csv"):
        assert pd.read_csv(folder / table)["step"].max() <= checkpoint["step"]


def test_kill_9_then_resume(start):
    first = start("gae.py", *ENDLESS)
    folder = first.wait_for_episodes(100, checkpoint=True)
    first.process.kill()
    first.process.wait()
    before, known = load(folder), pd.read_csv(folder / "episodes.csv")
    known = known[known["step"] <= before["step"]]
    resumed = start("gae.py", "--resume", folder, "--total-timesteps", before["step"] + 1000, "--eval-episodes", 1)
    code, out, err = resumed.finish()
    assert code == 0, err
    assert "greedy return" in out
    after = load(folder)
    assert after["step"] == before["step"] + 1000
    count = after["model"]["observations.count"]  # of the statistics: none is forgotten
    assert count == pytest.approx(after["step"], rel=1e-3)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "episodes.csv").head(len(known)), known, check_dtype=False)


def test_resume_goes_on_with_everything(tmp_path, capsys):
    """Two runs that go on from the same checkpoint are the same, whatever --seed says."""
    _, _, folder = run_here(tmp_path, capsys, total_timesteps=400, eval_episodes=0)
    before, folders = load(folder), [folder, shutil.copytree(folder, tmp_path / "copy")]
    for seed, path in enumerate(folders):
        again = {"resume": str(path), "num_envs": 2, "batch_size": 20, "eval_episodes": 0, "seed": seed}
        assert gae.main(Args(total_timesteps=800, **again)) == 0
    after = [load(path) for path in folders]
    for name, tensor in after[0]["model"].items():
        assert torch.equal(tensor, after[1]["model"][name])
    assert after[0]["random_states"] == after[1]["random_states"] != before["random_states"]
    steps = [checkpoint["critic_optimizer"]["state"][0]["step"].item() for checkpoint in (before, after[0])]
    assert steps[1] == 2 * steps[0] > 0
    assert after[0]["model"]["observations.count"] > 1.9 * before["model"]["observations.count"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--env-id", "CartPol-v1"), "did you mean CartPole-v1"),
        (("--env-id", "probes:ManyActions-v0"), "MultiDiscrete([2 2])"),
        (("--env-id", "probes:IntegerBox-v0"), "Box of real numbers"),
        (("--gae-lambda", 1.1), "--gae-lambda must be between 0 and 1, not 1.1"),
        (("--gamma", -0.1), "--gamma must be between 0 and 1, not -0.1"),
        (("--batch-size", 7), "--batch-size must be at least --num-envs, 8, not 7"),
        (("--batch-size", 0), "--batch-size must be at least 1"),
        (("--num-envs", 0), "--num-envs must be at least 1"),
        (("--max-kl", 0), "--max-kl must be above 0"),
        (("--cg-iterations", 0), "--cg-iterations must be at least 1"),
        (("--cg-damping", -1), "--cg-damping must be at least 0"),
        (("--line-search-steps", 0), "--line-search-steps must be at least 1"),
        (("--fisher-stride", 0), "--fisher-stride must be at least 1"),
        (("--minibatch-size", 0), "--minibatch-size must be at least 1"),
        (("--vf-epochs", -1), "--vf-epochs must be at least 0"),
        (("--resume", "nowhere"), "there is no checkpoint.pt in nowhere"),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, arguments, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gae.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        command_line(gae.main, Args)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gae: error: ")
    assert text in line
    assert not list(tmp_path.iterdir())
