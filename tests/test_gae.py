"""gae.py: its parts against their definitions, the training loop, and probe environments."""

import copy
import itertools
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import probes
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Categorical, MultivariateNormal, kl_divergence
from torch.func import functional_call, jacrev
from torch.nn import Linear, Sequential, Tanh

import gae
from gae import ActorCritic, Args, compute_gae, conjugate_gradients, fisher_vector_product

SPACES = [spaces.Discrete(3), spaces.Box(-np.inf, np.inf, (2,))]
torch.set_num_threads(1)


def make_model(space: spaces.Space, seed: int = 0) -> ActorCritic:
    """A tiny network for three observed numbers, far from its uniform start."""
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gae, "mlp", lambda n, m, gain: Sequential(Linear(n, 5), Tanh(), Linear(5, m)))
        model = ActorCritic(3, space)
    model.theta.add_(0.3 * torch.randn_like(model.theta))
    return model


def normalized(model: ActorCritic, observations) -> torch.Tensor:
    return (torch.tensor(observations, dtype=torch.float32) - model.observations.mean) / model.observations.std


def value_of(model: ActorCritic, observations) -> torch.Tensor:
    return (model.returns.mean + model.returns.std * model.critic(normalized(model, observations)).squeeze(-1)).detach()


def policy_at(model: ActorCritic, theta: torch.Tensor, inputs: torch.Tensor) -> torch.distributions.Distribution:
    """pi(.|s; theta) for normalised observations, from the vector theta alone."""
    parts = theta.split([parameter.numel() for parameter in model.policy_parameters()])
    named = zip(model.actor.named_parameters(), parts, strict=False)  # log_std is left over
    outputs = functional_call(model.actor, {name: part.view_as(p) for (name, p), part in named}, (inputs,))
    return Categorical(logits=outputs) if model.discrete else MultivariateNormal(outputs, parts[-1].exp().diag() ** 2)


def test_outputs_begin_small():
    model = ActorCritic(3, SPACES[1])
    assert [layer.weight[0].norm().item() for layer in (model.actor[-1], model.critic[-1])] == pytest.approx([0.01, 1])
    assert not model.log_std.any()
    assert (ActorCritic(3, SPACES[1], 0.5).policy(torch.zeros(1, 3)).stddev == 0.5).all()


@pytest.mark.parametrize("space", SPACES)
def test_policy_is_what_theta_says_in_numpy_and_in_torch(space):
    model, other, observations = make_model(space), make_model(space, 1), torch.randn(50, 3).numpy()
    model.update_observation_statistics(np.add(observations, [0, 5, -3]))
    writes = [lambda: None, lambda: model.theta.copy_(other.theta), lambda: model.load_state_dict(other.state_dict())]
    for write in writes:  # whatever is written reaches theta, numpy and torch
        write()
        inputs = normalized(model, observations)
        p, P, Q = model.policy(inputs), policy_at(model, model.theta, inputs), policy_at(other, other.theta, inputs)
        actions = P.sample()
        ours = p.log_prob(actions), p.entropy(), kl_divergence(p, other.policy(inputs))
        torch.testing.assert_close(ours, (P.log_prob(actions), P.entropy(), kl_divergence(P, Q)))
        np.testing.assert_allclose(model.act(observations), P.mode.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(P.log_prob(actions), Q.log_prob(actions))
    draws = model.act(np.tile(observations[0], (20_000, 1)), np.random.default_rng(0))
    if model.discrete:
        np.testing.assert_allclose(np.bincount(draws) / 20_000, P.probs[0].detach(), atol=0.015)
    else:
        np.testing.assert_allclose(draws.mean(0), P.mean[0].detach(), atol=0.04)
        np.testing.assert_allclose(np.cov(draws.T), P.covariance_matrix[0].detach(), atol=0.06)


def test_statistics_of_observations_move_neither_policy_nor_value():
    model, rng, data = make_model(SPACES[0]), np.random.default_rng(0), np.empty((0, 3))
    observations = rng.normal([0, 3, -1], [10, 1, 1], (50, 3)).astype(np.float32)
    expected = model.actor(normalized(model, observations)), value_of(model, observations)
    for stds in ([1, 0, 0], [5, 0, 0], [90, 0, 0], [9, 2, 0], [9, 0.1, 0]):  # the last number never varies
        data = np.concatenate([data, rng.normal([len(data), 3, -1], stds, (100, 3))])
        model.update_observation_statistics(data[-100:])
        np.testing.assert_allclose(model.observations.mean, data.mean(0), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(model.observations.std, np.where(data.std(0) > 1e-9, data.std(0), 1), rtol=1e-3)
        got = model.actor(normalized(model, observations)), value_of(model, observations)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_statistics_of_returns_forget_and_do_not_move_the_value():
    model, rng, mean, var = make_model(SPACES[0]), np.random.default_rng(0), 0.0, 0.0
    expected = value_of(model, np.ones((1, 3)))
    for i in range(16):
        batch = rng.normal(7 + 50 * max(0, i - 2), max(0, i - 2), 100)  # constant at first
        model.update_return_statistics(batch)
        torch.testing.assert_close(value_of(model, np.ones((1, 3))), expected, rtol=1e-3, atol=0.01)
        shares = [max(1 / (i + 1), 0.1), 1 - max(1 / (i + 1), 0.1)]  # of the latest batch: a tenth at least
        mean, last = np.dot(shares, [batch.mean(), mean]), mean
        var = np.dot(shares, [batch.var() + (batch.mean() - mean) ** 2, var + (last - mean) ** 2])
        assert model.returns.mean.item() == pytest.approx(mean, rel=1e-3)
        assert model.returns.std.item() == pytest.approx(var**0.5 if var > 1e-9 else 1, rel=1e-3)


def slow_gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda) -> np.ndarray:
    """(1 - lambda)(A^(1) + lambda A^(2) + ...). Beyond the end every A^(k) is the last one, which gets the rest."""
    advantages = np.zeros(rewards.shape)
    for t, i in np.ndindex(*rewards.shape):
        r, V, end = rewards[t:, i], np.where(terminated, 0, next_values)[t:, i], (terminated | truncated)[t:, i]
        n = end.argmax() + 1 if end.any() else len(end)  # steps to the end of the episode or of the batch
        A = [sum(gamma**j * r[j] for j in range(k)) + gamma**k * V[k - 1] - values[t, i] for k in range(1, n + 1)]
        weights = [(1 - gae_lambda) * gae_lambda**k for k in range(n - 1)] + [gae_lambda ** (n - 1)]
        advantages[t, i] = np.dot(weights, A)
    return advantages


@pytest.mark.parametrize(("gamma", "gae_lambda"), [*itertools.product((0.0, 0.9, 1.0), (0.0, 0.5, 1.0))])
def test_gae_is_the_weighted_mean_of_k_step_advantages(gamma, gae_lambda):
    rng = np.random.default_rng(0)
    ends, (rewards, values, next_values) = rng.choice(4, (20, 3), p=[0.6, 0.2, 0.1, 0.1]), rng.normal(size=(3, 20, 3))
    next_values[:-1] = np.where(ends[:-1] == 0, values[1:], next_values[:-1])  # V(s_{t+1}) where the episode goes on
    batch = rewards, values, next_values, ends % 2 == 1, ends >= 2, gamma, gae_lambda
    np.testing.assert_allclose(compute_gae(*batch), slow_gae(*batch), atol=1e-12)


def hessian_of_kl(model: ActorCritic, theta: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The Fisher matrix at theta: the Hessian of the mean KL divergence from the policy there."""
    old = policy_at(model, theta, inputs)
    return torch.autograd.functional.hessian(lambda x: kl_divergence(old, policy_at(model, x, inputs)).mean(), theta)


@pytest.mark.parametrize("space", SPACES)
def test_fisher_vector_product_is_the_hessian_of_the_kl_divergence(space):
    model, inputs = make_model(space), torch.randn(20, 3)
    with torch.no_grad():
        old = model.policy(inputs)
    kl, v = kl_divergence(old, model.policy(inputs)).mean(), torch.randn(len(model.theta))
    product = fisher_vector_product(kl, model.policy_parameters(), damping=0.3)
    expected = hessian_of_kl(model, model.theta.clone(), inputs) @ v + 0.3 * v
    torch.testing.assert_close(product(v), expected, rtol=1e-4, atol=1e-5)


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_eigenvalues():
    U, b = torch.randn(13, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).split([12, 1])
    A, b = torch.eye(12) + U[:, :2] @ U[:, :2].T, b[0]
    for n, is_solved in ((2, False), (3, True), (50, True)):
        assert torch.allclose(conjugate_gradients(lambda v: A @ v, b, n), torch.linalg.solve(A, b)) == is_solved
    assert torch.equal(conjugate_gradients(lambda v: A @ v, 0 * b, 3), 0 * b)
    tiny = 1e-7 * b  # as gradients of a nearly deterministic policy are
    assert torch.allclose(conjugate_gradients(lambda v: A @ v, tiny, 3), torch.linalg.solve(A, tiny), atol=0)


@pytest.mark.parametrize(("space", "seed", "max_kl", "halvings"), [(0, 0, 0.01, 0), (1, 0, 0.01, 0), (1, 7, 1.0, 1)])
def test_update_of_the_policy(monkeypatch, space, seed, max_kl, halvings):
    def update(optimizer=None, A=1.0, **options):
        model.theta.copy_(theta)
        batch = inputs, actions, A * advantages
        return gae.update_policy(model, optimizer, *batch, Args(**options), np.random.default_rng(0))

    model, inputs, advantages = make_model(SPACES[space], seed), torch.randn(202, 3), torch.randn(202)
    theta, policy, seen, parameters = model.theta.clone(), model.policy, [], model.policy_parameters()
    old = policy_at(model, theta, inputs)
    actions = old.sample()
    log_probs = jacrev(lambda theta: policy_at(model, theta, inputs).log_prob(actions))(theta)
    g = (advantages[:, None] * log_probs).mean(0)  # the lecture's: the mean of A grad log pi(a|s; theta)
    parameters[0].grad = torch.ones_like(parameters[0])  # left over from something else
    metrics = update(torch.optim.SGD(parameters, lr=1.0), trust_region=False)
    torch.testing.assert_close(model.theta - theta, g, rtol=1e-3, atol=1e-5)
    assert (metrics["line_search_steps"], metrics["rejected"]) == (0, 0)
    monkeypatch.setattr(gae, "CG_ITERATIONS", 200)
    monkeypatch.setattr(model, "policy", lambda part: seen.append(part) or policy(part))
    metrics = update(max_kl=max_kl, cg_damping=0.2)
    some = next(part for part in seen if len(part) < 202)
    steps = {inputs.tolist().index(row) for row in some.tolist()}
    assert (len(some), len(steps), max(steps) > 51) == (51, 51, True)  # a random quarter of the steps
    assert {t % 8 for t in steps} == {*range(8)}  # of all of 8 environments
    F = hessian_of_kl(model, theta, some) + 0.2 * torch.eye(len(theta))
    y = torch.linalg.solve(F, g)
    step = torch.sqrt(2 * max_kl / (y @ F @ y)) * y
    for i in range(10):
        new = policy_at(model, theta + 0.5**i * step, inputs)
        L, kl = ((new.log_prob(actions) - old.log_prob(actions)).exp() * advantages).mean(), kl_divergence(old, new)
        if L > advantages.mean() and kl.mean() <= max_kl:
            break
    assert i == halvings
    torch.testing.assert_close(model.theta, theta + 0.5**i * step, rtol=1e-3, atol=1e-3 * max_kl**0.5)
    expected = {"line_search_steps": i + 1, "rejected": 0, "kl": kl.mean().item(), "policy_loss": -L.item()}
    expected |= {"grad_norm": g.norm().item(), "entropy": old.entropy().mean().item()}
    assert metrics == pytest.approx(expected, rel=1e-2, abs=1e-5)
    update(A=0.0)
    assert torch.equal(model.theta, theta)
    monkeypatch.setattr(gae, "conjugate_gradients", lambda product, b, iterations: -b)  # downhill
    metrics = update()
    assert (metrics["line_search_steps"], metrics["rejected"], torch.equal(model.theta, theta)) == (10, 1, True)
    with pytest.raises(AssertionError):  # shapes that would broadcast
        update(A=torch.ones(202, 1))


@pytest.mark.parametrize(("norm", "minibatch_size", "parts"), [(True, 250, 2), (False, 2000, 1)])
def test_value_function_is_fitted_in_minibatches(norm, minibatch_size, parts):
    model, inputs, losses = make_model(SPACES[0]), torch.randn(511, 3), []
    returns, ours, parameters = 5 * inputs.sum(-1) + 20, copy.deepcopy(model), list(model.critic.parameters())
    ours.critic[0].weight.grad = torch.ones_like(parameters[0])  # left over from something else
    args = Args(vf_epochs=3, minibatch_size=minibatch_size, norm_returns=norm), np.random.default_rng(0)
    result = gae.fit_value_function(ours, torch.optim.SGD(ours.critic.parameters(), 0.1), inputs, returns, *args)
    rng, _ = np.random.default_rng(0), norm and model.update_return_statistics(returns.numpy())
    for indices in itertools.chain(*(np.array_split(rng.permutation(511), parts) for _ in range(3))):
        errors = model.returns.mean + model.returns.std * model.critic(inputs[indices])[:, 0] - returns[indices]
        losses.append((errors**2).mean())
        for parameter, gradient in zip(parameters, torch.autograd.grad(losses[-1], parameters), strict=True):
            parameter.data -= 0.1 * gradient / model.returns.std**2
    assert result == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    torch.testing.assert_close(ours.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.fixture
def calls(monkeypatch) -> dict[str, list[SimpleNamespace]]:
    """What main does: for each function the model, the model as it was before, the arguments and the result."""
    happened = {name: [] for name in ("collect", "update_policy", "fit_value_function")}

    def call(name, function, model, *arguments):
        happened[name].append(SimpleNamespace(before=copy.deepcopy(model), model=model, arguments=arguments))
        happened[name][-1].result = function(model, *arguments)
        return happened[name][-1].result

    for name in happened:
        monkeypatch.setattr(gae, name, partial(call, name, getattr(gae, name)))
    return happened


def run_main(log_dir, env_id: str, **arguments) -> tuple[int, dict, pd.DataFrame, pd.DataFrame]:
    """Call gae.py's `main`. Returns the exit code, the checkpoint, metrics.csv and episodes.csv."""
    code = gae.main(Args(env_id, log_dir=str(log_dir), eval_episodes=0, **arguments))
    (folder,) = log_dir.iterdir()
    tables = (pd.read_csv(folder / name) for name in ("metrics.csv", "episodes.csv"))
    return code, torch.load(folder / "checkpoint.pt", weights_only=True), *tables


@pytest.mark.parametrize(("env_id", "norm"), [("probes:Script-v0", True), ("probes:ScriptBox-v0", False)])
def test_training_loop(tmp_path, calls, env_id, norm):
    probes.Script.log.clear()
    options = {"num_envs": 3, "batch_size": 100, "total_timesteps": 400, "log_interval": 150, "trust_region": norm}
    options |= {"gamma": 0.9, "gae_lambda": 0.8, "vf_epochs": 2, "norm_obs": norm, "norm_returns": norm}
    code, checkpoint, table, episodes = run_main(tmp_path, env_id, **options)
    columns, metrics = [np.array(column) for column in zip(*probes.Script.log, strict=True)], []
    T = [6, 105, 204, 303, 402] if norm else [0, 102, 204, 303, 402]  # the first hundredth gives statistics alone
    batches = zip(itertools.pairwise(T), calls["update_policy"], calls["fit_value_function"], strict=True)
    for (first, last), actor, critic in batches:
        model, known = actor.before, columns[0][:first] if norm else np.array([[1] * 3, [-1] * 3])
        observations, actions, rewards, following, *ends = (column[first:last] for column in columns)
        inputs, values = (observations - known.mean(0)) / known.std(0), value_of(model, observations).numpy()
        batch = [x.reshape(-1, 3) for x in (rewards, values, value_of(model, following).numpy(), *ends)]
        advantages = slow_gae(*batch, 0.9, 0.8).flatten()
        returns = slow_gae(*batch, 0.9, 1.0).flatten() + values  # discounted rewards, not what V is fitted to
        scaled = (advantages - advantages.mean()) / advantages.std()
        given = [*actor.arguments[1:4], *critic.arguments[1:3]]
        for got, expected in zip(given, (inputs, actions, scaled, inputs, advantages + values), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
        metrics.append(actor.result | {"value_loss": critic.result, "learning_rate": 3e-3})
        metrics[-1] |= {"advantage_mean": advantages.mean(), "advantage_std": advantages.std()}
        metrics[-1] |= {"explained_variance": 1 - (returns - values).var() / returns.var()}
    means = [pd.DataFrame(rows).mean() for rows in (metrics[:2], metrics[2:3], metrics[3:])]
    expected = pd.DataFrame(means).assign(step=[204, 303, 402])[["step", *gae.METRICS]]
    pd.testing.assert_frame_equal(table[list(expected)], expected, check_dtype=False, rtol=1e-3, atol=1e-4)
    ended = np.flatnonzero(columns[4] | columns[5])  # T counts steps in order of time, then of environment
    np.testing.assert_array_equal(episodes[["step", "worker"]], np.transpose([ended + 1, ended % 3]))
    assert (code, checkpoint["step"], columns[4].any(), columns[5].any()) == (0, 402, True, True)
    assert len({*map(tuple, columns[0][:3])}) == 3  # each environment has its own seed
    torch.testing.assert_close(checkpoint["model"], dict(actor.model.state_dict()), rtol=0, atol=0)
    groups = actor.model.policy_parameters(), actor.model.critic.parameters()
    for name, group, call in zip(("actor", "critic"), groups, (actor, critic), strict=True):
        assert all(x is y for x, y in zip(call.arguments[0].param_groups[0]["params"], group, strict=True))
        torch.testing.assert_close(checkpoint["optimizers"][name], call.arguments[0].state_dict())


@pytest.mark.parametrize(("T", "n", "batch", "sizes"), [(500, 8, 300, [8, 248, 248]), (99, 7, 33, [7, 35, 35, 28])])
def test_steps_are_divided_evenly(tmp_path, calls, T, n, batch, sizes):
    data = run_main(tmp_path, "probes:Constant-v0", total_timesteps=T, num_envs=n, batch_size=batch)
    assert [call.result[2].size for call in calls["collect"]] == sizes
    assert data[1]["step"] == sum(sizes) < T + n
    assert np.isfinite(data[2]).all(axis=None)  # where nothing varies, too


@pytest.mark.parametrize("fault", [lambda: signal.raise_signal(signal.SIGINT), lambda: 1 / 0], ids=["Ctrl-C", "error"])
def test_fault_in_a_batch_leaves_the_last_update(monkeypatch, tmp_path, calls, fault):
    count, options = itertools.count(1), {"num_envs": 2, "batch_size": 20, "log_interval": 40}
    monkeypatch.setattr(probes.ByAction, "play", lambda env, action: float((next(count) == 57 and fault()) or action))
    _, checkpoint, *_ = run_main(tmp_path, "probes:ByAction-v0", total_timesteps=2500, **options)
    assert (checkpoint["step"], next(count) <= 59) == (40, True)  # of two batches; a hundredth would have been 25 steps
    options |= {"total_timesteps": 200, "resume": str(next(tmp_path.iterdir()))}
    _, _, metrics, episodes = run_main(tmp_path, "probes:ByAction-v0", **options)
    for call in calls["collect"][2:4]:  # the one that failed, and the first of the resumed run
        torch.testing.assert_close(checkpoint["model"], dict(call.before.state_dict()), rtol=0, atol=0)
    assert call.arguments[2:4] == (10, 40)  # no hundredth of the steps for statistics, which are there
    assert (metrics["step"].tolist(), episodes["step"].tolist()) == ([40, 80, 120, 160, 200], [*range(1, 201)])


@pytest.mark.parametrize(
    ("env_id", "options", "values", "best"),
    [
        ("ByAction", {"trust_region": False}, {}, {(-1,): 0, (1,): 1}),
        ("ByEarlierAction", {}, {(0, 0): 0.5, (1, 1): 1}, {(0, 0): 1}),
        ("OnlyTruncates", {}, {(0,): 2}, {}),  # 1 / (1 - gamma); who takes the time limit for an end learns 1.4
        ("Target", {"max_kl": 0.05, "total_timesteps": 6000}, {}, {(0,): [0.4, -2]}),  # which stands for (7, -2)
    ],
)
def test_probe_is_learned(tmp_path, calls, env_id, options, values, best):
    options = {"total_timesteps": 3000, "batch_size": 100, "gamma": 0.5, "learning_rate": 0.01} | options
    run_main(tmp_path, f"probes:{env_id}-v0", **options)
    model = calls["collect"][-1].model
    for observation, value in values.items():
        assert value_of(model, observation).item() == pytest.approx(value, abs=0.1)
    for observation, action in best.items():
        np.testing.assert_allclose(model.act(np.array(observation, np.float32)), action, atol=0.2)
