"""ddpg.py against the definitions, on probe environments, with every branch, and when something goes wrong."""

import copy
import csv
import itertools
import json
import math
import shutil
import signal
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import probes
import psutil
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ddpg
from common.inputs import command_line
from ddpg import (
    DDPG,
    METRICS,
    Actor,
    Args,
    GaussianNoise,
    OrnsteinUhlenbeckNoise,
    ReplayBuffer,
    actor_gradient,
    critic_loss,
    soft_update,
    td_target,
    update,
)

BOX, DISCRETE = probes.BOUNDED, spaces.Discrete(3)
BRANCHES = [
    {"target_network": target, "batch_norm": batch_norm, "action_layer": action_layer}
    for target, batch_norm, action_layer in itertools.product([True, False], [False, True], [2, 1])
]
EACH_BRANCH = pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: "-".join(map(str, branch.values())))


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(ddpg, "HIDDEN", 16)


def make_model(space=BOX, observation_size=3, seed=0, **arguments) -> DDPG:
    """Networks in float64 that are far from zero and from their targets, with running statistics of all kinds."""
    torch.manual_seed(seed)
    model = DDPG(observation_size, space, Args(**arguments)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def random_batch(n=7, seed=0) -> list[torch.Tensor]:
    """s, a, r, s' and terminated of shapes as ReplayBuffer.sample has them, a third of them terminated."""
    rng = np.random.default_rng(seed)
    terminated = np.arange(n) % 3 == 1
    parts = rng.normal(size=(n, 3)), rng.uniform(-1, 1, (n, 2)), rng.normal(size=n), rng.normal(size=(n, 3)), terminated
    return [torch.from_numpy(part.astype(np.float64)) for part in parts]


def linears(network) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def norms(network) -> list[nn.BatchNorm1d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]


def state(*modules) -> list[torch.Tensor]:
    """Copies of all parameters and buffers."""
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def are_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train(tmp_path, **arguments):
    """Run ddpg.py's main in this process. Returns the run's folder and its checkpoint."""
    defaults = {"log_dir": str(tmp_path / "runs"), "eval_episodes": 0, "buffer_size": 5000, "batch_size": 16}
    assert ddpg.main(Args(**(defaults | {"learning_starts": 50, "log_interval": 50} | arguments))) == 0
    folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return folder, load(folder)


def load(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def load_model(checkpoint, env_id) -> DDPG:
    env = gym.make(env_id)
    model = DDPG(spaces.flatdim(env.observation_space), env.action_space, Args(**checkpoint["args"]))
    model.load_state_dict(checkpoint["model"])
    return model


def read(table) -> list[dict]:
    with open(table) as file:
        return list(csv.DictReader(file))


# Oracles: networks, written out once more, without modules


def normalize(x, norm, by_batch, track):
    """Batch normalisation; `track` moves the running statistics as training does."""
    if not by_batch:
        return (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    mean, variance = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    if track:
        with torch.no_grad():
            norm.running_mean.copy_(0.9 * norm.running_mean + 0.1 * mean)
            norm.running_var.copy_(0.9 * norm.running_var + 0.1 * variance * len(x) / (len(x) - 1))
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def mu(actor, x, by_batch=False, track=False):
    """The actor: normalised observations, two layers that are normalised before the rectifier, tanh."""
    normal, (first, second, last) = norms(actor), linears(actor)
    for number, linear in enumerate([None, first, second]):
        x = x if linear is None else x @ linear.weight.T + linear.bias
        x = normalize(x, normal[number], by_batch, track) if normal else x
        x = x if linear is None else x.clamp(min=0)
    return (x @ last.weight.T + last.bias).tanh()


def Q(critic, x, actions, action_layer, by_batch=False, track=False):
    """The critic: normalised observations and, before the action enters, a normalised layer."""
    normal, (first, second, last) = norms(critic), linears(critic)
    x = normalize(x, normal[0], by_batch, track) if normal else x
    x = torch.cat([x, actions], 1) if action_layer == 1 else x
    x = x @ first.weight.T + first.bias
    x = normalize(x, normal[1], by_batch, track) if normal and action_layer == 2 else x
    x = x.clamp(min=0)
    x = torch.cat([x, actions], 1) if action_layer == 2 else x
    x = (x @ second.weight.T + second.bias).clamp(min=0)
    return (x @ last.weight.T + last.bias)[:, 0]


def each_Q(critic, x):
    """The critic of Discrete actions: the values of all of them."""
    first, second, last = linears(critic)
    x = (x @ first.weight.T + first.bias).clamp(min=0)
    x = (x @ second.weight.T + second.bias).clamp(min=0)
    return x @ last.weight.T + last.bias


def naive_targets(model, batch, gamma, action_layer) -> torch.Tensor:
    """y, a transition at a time."""
    y = []
    for _, _, reward, next_observation, terminated in zip(*batch, strict=True):
        s = next_observation[None]
        next_value = Q(model.target_critic, s, mu(model.target_actor, s), action_layer).item()
        y.append(reward.item() if terminated else reward.item() + gamma * next_value)
    return torch.tensor(y, dtype=torch.float64)


def finite_differences(function, network, eps=1e-6) -> list[torch.Tensor]:
    """The gradient of function() for each of the network's parameters, a number at a time."""
    gradients = []
    with torch.no_grad():
        for parameter in network.parameters():
            gradient, flat = torch.zeros_like(parameter), parameter.view(-1)
            for i in range(len(flat)):
                value = flat[i].item()
                flat[i] = value + eps
                above = function().item()
                flat[i] = value - eps
                gradient.view(-1)[i] = (above - function().item()) / (2 * eps)
                flat[i] = value
            gradients.append(gradient)
    return gradients


def check_gradient(network, expected) -> None:
    assert max(gradient.abs().max() for gradient in expected) > 0.01
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@EACH_BRANCH
def test_the_critics_gradient_is_that_of_the_squared_error_with_y_held_fixed(monkeypatch, branch):
    monkeypatch.setattr(ddpg, "HIDDEN", 5)
    model, batch, action_layer = make_model(**branch), random_batch(), branch["action_layer"]
    y = naive_targets(model, batch, 0.9, action_layer)

    def error():
        return ((y - Q(model.critic, *batch[:2], action_layer, by_batch=True)) ** 2).sum() / 7

    with torch.no_grad():
        expected, mean = error(), Q(model.critic, *batch[:2], action_layer, by_batch=True).mean()
    gradients = finite_differences(error, model.critic)
    loss, q_values = critic_loss(model, batch, 0.9)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(q_values, mean)
    loss.backward()
    check_gradient(model.critic, gradients)
    others = [model.actor, model.target_actor] + [model.target_critic] * branch["target_network"]
    assert all(parameter.grad is None for network in others for parameter in network.parameters())


@EACH_BRANCH
def test_the_actors_gradient_is_that_of_the_critics_value(monkeypatch, branch):
    monkeypatch.setattr(ddpg, "HIDDEN", 5)
    model, (observations, *_), action_layer = make_model(**branch), random_batch(), branch["action_layer"]

    def minus_J():
        return -Q(model.critic, observations, mu(model.actor, observations, by_batch=True), action_layer).sum() / 7

    with torch.no_grad():
        expected = minus_J()
    gradients = finite_differences(minus_J, model.actor)
    loss = actor_gradient(model, observations, 0.3)  # the penalty is for Discrete actions
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad
    check_gradient(model.actor, gradients)
    others = [model.critic] + [model.target_actor, model.target_critic] * branch["target_network"]
    assert all(parameter.grad is None for network in others for parameter in network.parameters())
    actor_gradient(model, observations)  # adds to what is there
    check_gradient(model.actor, [2 * gradient for gradient in gradients])


def test_td_target():
    rewards, values, terminated = np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0]), np.array([0.0, 1.0, 0.0])
    np.testing.assert_allclose(td_target(rewards, values, terminated, 0.5), [6, 2, 18])
    y = td_target(*(torch.from_numpy(part) for part in (rewards, values, terminated)), 0.5)
    torch.testing.assert_close(y, torch.tensor([6.0, 2.0, 18.0], dtype=torch.float64))
    with pytest.raises(AssertionError):  # (3,) and (3, 1) would give nine numbers
        td_target(rewards, values[:, None], terminated, 0.5)


@pytest.mark.parametrize("target_network", [True, False])
def test_targets_are_computed_by_the_target_networks(target_network):
    """Or, without them, by the networks themselves."""
    model, batch = make_model(target_network=target_network), random_batch()

    def y() -> torch.Tensor:
        """From the loss, for every transition on its own."""
        values = model.critic(*batch[:2]).detach()
        losses = [critic_loss(model, [part[i : i + 1] for part in batch], 0.9)[0] for i in range(7)]
        signs = (naive_targets(model, batch, 0.9, 2) - values).sign()
        return values + signs * torch.stack(losses).detach().sqrt()

    assert (model.target_actor is model.actor) == (model.target_critic is model.critic) == (not target_network)
    for network in ("actor", "critic"):
        for name, matters in ((f"target_{network}", True), (network, not target_network)):
            before = y()
            torch.testing.assert_close(before, naive_targets(model, batch, 0.9, 2))
            with torch.no_grad():
                linears(getattr(model, name))[-1].bias.add_(0.5)
            same = torch.isclose(before, y())
            assert same[batch[4] == 1].all()
            assert matters == (not same[batch[4] == 0].any()) == (not same.all())


def test_targets_of_discrete_actions_are_values_of_the_sampled_one():
    model = make_model(DISCRETE)
    with torch.no_grad():
        linears(model.target_actor)[-1].bias.copy_(torch.tensor([0.0, 100.0, 0.0]))  # always the second
    observations, _, rewards, next_observations, terminated = batch = random_batch()
    batch[1] = nn.functional.one_hot(torch.arange(7) % 3, 3).double()
    y = rewards + 0.9 * (1 - terminated) * each_Q(model.target_critic, next_observations)[:, 1]
    values = each_Q(model.critic, observations)[range(7), [0, 1, 2, 0, 1, 2, 0]]
    loss, q_values = critic_loss(model, batch, 0.9)
    torch.testing.assert_close(loss, ((y - values) ** 2).mean())
    torch.testing.assert_close(q_values, values.mean().detach())


def test_the_slope_by_a_discrete_action_is_what_each_is_worth():
    model, observations = make_model(DISCRETE), random_batch()[0]
    expected = each_Q(model.critic, observations)
    assert expected.std(1).min() > 0.01
    for action in torch.eye(3, dtype=torch.float64):
        actions = action.repeat(7, 1).requires_grad_()
        values = model.critic(observations, actions)
        torch.testing.assert_close(values, expected[:, action.argmax()])
        torch.testing.assert_close(torch.autograd.grad(values.sum(), actions)[0], expected)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_soft_update(tau):
    model = make_model(batch_norm=True)
    pairs = (model.target_critic, model.critic), (model.target_actor, model.actor)
    theirs, ours = ([copy.deepcopy(net.state_dict()) for net in nets] for nets in zip(*pairs, strict=True))
    soft_update(*model.tensors, tau)
    for (target, network), our_own, their_own in zip(pairs, ours, theirs, strict=True):
        assert are_equal(list(our_own.values()), list(network.state_dict().values()))
        assert sum("running" in name for name in their_own) == 2 * len(norms(target)) > 0
        for name, tensor in target.state_dict().items():
            if tensor.is_floating_point():
                expected = tau * our_own[name] + (1 - tau) * their_own[name]
                torch.testing.assert_close(tensor, expected, msg=name)


def adams(model, **kwargs) -> dict:
    """Optimisers by name, with different rates."""
    return {
        name: torch.optim.Adam(getattr(model, name).parameters(), rate, **kwargs)
        for name, rate in (("actor", 0.01), ("critic", 0.03))
    }


def reference_update(model, optimizers, batch, args) -> dict:
    """The lecture's lines, each as it stands there."""
    observations, actions, *_ = batch
    y = naive_targets(model, batch, args.gamma, args.action_layer)
    values = Q(model.critic, observations, actions, args.action_layer, by_batch=True, track=True)
    loss = ((y - values) ** 2).sum() / len(y)
    for parameter, gradient in zip(
        model.critic.parameters(), torch.autograd.grad(loss, list(model.critic.parameters())), strict=True
    ):
        parameter.grad = gradient
    optimizers["critic"].step()
    policy = mu(model.actor, observations, by_batch=True, track=True)
    J = Q(model.critic, observations, policy, args.action_layer).sum() / len(y)
    for parameter, gradient in zip(
        model.actor.parameters(), torch.autograd.grad(J, list(model.actor.parameters())), strict=True
    ):
        parameter.grad = -gradient
    optimizers["actor"].step()
    if args.target_network:
        for target, network in ((model.target_actor, model.actor), (model.target_critic, model.critic)):
            for name, tensor in target.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(args.tau * network.state_dict()[name] + (1 - args.tau) * tensor)
    return {"critic_loss": loss, "actor_loss": -J, "q_values": values.mean()}


@EACH_BRANCH
def test_updates_equal_an_independent_implementation(branch):
    args = Args(tau=0.3, gamma=0.8, **branch)
    model = make_model(**branch)
    reference = copy.deepcopy(model)
    optimizers, its_optimizers = adams(model), adams(reference, foreach=False)
    assert not any(module.training for module in model.modules())
    for seed in range(3):
        batch = random_batch(9, seed)
        metrics, expected = (
            update(model, optimizers, batch, args),
            reference_update(reference, its_optimizers, batch, args),
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(metrics[name], tensor.detach(), msg=name)
            assert not metrics[name].requires_grad
        for name, tensor in reference.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)
        assert not any(module.training for module in model.modules())


def test_target_networks_begin_as_copies():
    model = DDPG(3, BOX, Args(batch_norm=True))
    for target, network in ((model.target_actor, model.actor), (model.target_critic, model.critic)):
        assert are_equal(state(target), state(network))
        assert not {id(p) for p in target.parameters()} & {id(p) for p in network.parameters()}


@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=str)
def test_the_last_layers_begin_small(space):
    model = DDPG(3, space, Args())
    for network in (model.actor, model.critic):
        for tensor in (linears(network)[-1].weight, linears(network)[-1].bias):
            assert 0 < tensor.abs().max() <= 3e-3
        assert linears(network)[-1].weight.abs().max() > 2e-3
        assert all(linear.weight.abs().max() > 0.01 for linear in linears(network)[:-1])
    model = DDPG(3, space, Args(small_last_layer=False))
    assert all(linears(network)[-1].weight.abs().max() > 0.1 for network in (model.actor, model.critic))


# Oracles: batch normalisation


@pytest.mark.parametrize("action_layer", [1, 2])
def test_batch_normalisation_is_where_the_paper_has_it(action_layer):
    """Observations, the actor's layers, the critic's layers before the action: none of its inputs has the action."""
    model = DDPG(3, BOX, Args(batch_norm=True, action_layer=action_layer))
    assert [norm.num_features for norm in norms(model.actor)] == [3, 16, 16]
    assert [norm.num_features for norm in norms(model.critic)] == [3, 16][:action_layer]
    discrete = DDPG(3, DISCRETE, Args(batch_norm=True, action_layer=action_layer))
    assert [norm.num_features for norm in norms(discrete.critic)] == [3, 16, 16]
    without = DDPG(3, BOX, Args(action_layer=action_layer))
    assert not norms(without)
    for net in (model, without):
        assert [linear.in_features for linear in linears(net.critic)] == [[5, 16, 16], [3, 18, 16]][action_layer - 1]
        assert [linear.out_features for linear in linears(net.actor)] == [16, 16, 2]
    inputs = []
    for norm in norms(model.critic):
        norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))
    batch = [part.float() for part in random_batch()]
    for actions in (batch[1], -batch[1]):
        model.critic(batch[0], actions)
    assert len(inputs) == 2 * action_layer
    assert are_equal(inputs[:action_layer], inputs[action_layer:])


@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=str)
def test_acting_leaves_no_trace_in_the_running_statistics(space):
    model = make_model(space, batch_norm=True).float()
    before, observations = state(model), np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    for observation in observations:
        model.actor.act(observation)
        model.actor.act(observation, greedy=True)
    assert are_equal(state(model), before)
    if space == BOX:  # by the running statistics, not by the one observation
        with torch.no_grad():
            np.testing.assert_allclose(
                model.actor.act(observations[0]), mu(model.actor, torch.from_numpy(observations[:1]))[0], rtol=1e-5
            )


@pytest.mark.parametrize("action_layer", [1, 2])
@pytest.mark.parametrize("target_network", [True, False])
def test_each_network_counts_its_own_minibatches_alone(target_network, action_layer):
    model = make_model(target_network=target_network, batch_norm=True, action_layer=action_layer)
    batch = random_batch()

    def follow(network, step, others):
        before, rest = (
            [(norm.running_mean.clone(), norm.num_batches_tracked.item()) for norm in norms(network)],
            state(*others),
        )
        step()
        assert are_equal(state(*others), rest)
        for norm, (_, count) in zip(norms(network), before, strict=True):
            assert norm.num_batches_tracked == count + 1
        mean = 0.9 * before[0][0] + 0.1 * batch[0].mean(0)
        torch.testing.assert_close(norms(network)[0].running_mean, mean)
        assert not any(module.training for module in model.modules())

    targets = [model.target_actor, model.target_critic] * target_network
    follow(model.critic, lambda: critic_loss(model, batch, 0.9)[0].backward(), [model.actor, *targets])
    follow(model.actor, lambda: actor_gradient(model, batch[0]), [model.critic, *targets])


# Oracles: Gumbel-Softmax


def test_samples_of_discrete_actions_have_the_softmaxs_frequencies():
    actor, observation = make_model(DISCRETE).actor.float(), torch.tensor([[0.3, -0.2, 0.5]])
    logits = actor.net(observation)[0].detach()
    shares = actor(observation.expand(20_000, -1)).detach()
    assert ((shares == 0) | (shares == 1)).all()
    assert (shares.sum(1) == 1).all()
    probabilities = (logits - logits.logsumexp(0)).exp()
    assert probabilities.max() - probabilities.min() > 0.2
    torch.testing.assert_close(shares.mean(0), probabilities, rtol=0, atol=4 * 0.5 / 20_000**0.5)
    acts = np.mean([actor.act(observation[0].numpy()) for _ in range(2000)], axis=0)
    np.testing.assert_allclose(acts, probabilities, atol=4 * 0.5 / 2000**0.5)
    greedy = nn.functional.one_hot(logits.argmax(), 3).numpy()
    for _ in range(20):
        np.testing.assert_array_equal(actor.act(observation[0].numpy(), greedy=True), greedy)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_of_discrete_actions_pass_on_the_gradient_of_the_softened_sample(temperature):
    """Of two actions, the first is a sigmoid of (difference of the logits + logistic noise) / temperature."""
    actor = make_model(spaces.Discrete(2), gumbel_temperature=temperature).actor
    observation = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    logits = actor.net(observation)[0].detach()
    actor(observation.expand(20_000, -1))[:, 0].mean().backward()
    noise = np.linspace(-40, 40, 400_001)
    density = np.exp(-np.abs(noise)) / (1 + np.exp(-np.abs(noise))) ** 2
    soft = 1 / (1 + np.exp(-((logits[0] - logits[1]).item() + noise) / temperature))
    expected = np.sum(soft * (1 - soft) / temperature * density) * (noise[1] - noise[0])
    gradient = linears(actor)[-1].bias.grad
    error = 4 * 0.25 / temperature / 20_000**0.5
    np.testing.assert_allclose(gradient, [expected, -expected], atol=error)
    assert expected > 5 * error


def test_the_actors_gradient_reaches_discrete_policies():
    """Where the critic pays for the third action, a step raises its probability."""
    model = make_model(DISCRETE)
    observations = random_batch(500)[0]
    with torch.no_grad():
        last = linears(model.critic)[-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 0.0, 2.0]))  # Q = 2 times the action's third number
    before = model.actor.net(observations).softmax(1).mean(0).detach()
    loss = actor_gradient(model, observations)
    assert loss.item() == pytest.approx(-2 * before[2].item(), abs=2 * 4 * 0.5 / 500**0.5)
    with torch.no_grad():
        for parameter in model.actor.parameters():
            parameter -= 0.1 * parameter.grad
    assert model.actor.net(observations).softmax(1).mean(0)[2] > before[2] + 0.01


def test_the_logits_of_discrete_policies_are_kept_small():
    """What the penalty adds to the actor's gradient, with the same samples."""
    batch = random_batch()
    batch[1] = nn.functional.one_hot(torch.arange(7) % 3, 3).double()
    model = make_model(DISCRETE)

    def penalty():
        return 0.3 * model.actor.net(batch[0]).square().sum() / (7 * 3)

    expected = finite_differences(penalty, model.actor)
    gradients = []
    for logit_penalty in (0.0, 0.3):
        its_model = make_model(DISCRETE)
        metrics = update(its_model, adams(its_model), batch, Args(logit_penalty=logit_penalty))
        gradients.append([parameter.grad for parameter in its_model.actor.parameters()])
        gradients[-1].append(metrics["actor_loss"])
    *added, added_to_J = [after - before for before, after in zip(*gradients, strict=True)]
    assert added_to_J == 0
    for parameter, gradient in zip(model.actor.parameters(), added, strict=True):
        parameter.grad = gradient
    check_gradient(model.actor, expected)


# Oracles: actions


def test_actions_lie_within_bounds_and_reach_them():
    actor = make_model().actor
    for action, expected in ((0, [5, -1]), (1, [10, 3]), (-1, [0, -5]), (0.5, [7.5, 1])):
        executed = actor.to_env(np.full(2, action, np.float32))
        np.testing.assert_array_equal(executed, expected)
        assert BOX.contains(executed)
    np.testing.assert_array_equal(actor.to_env(np.array([1, -1])), [10, -5])
    matrix = spaces.Box(np.array([[0, 1], [2, 3]]), np.array([[10, 11], [12, 13]]), dtype=np.float64)
    actor = Actor(3, matrix, Args())
    assert actor.action_size == 4
    np.testing.assert_allclose(actor.to_env(np.array([-1, 1, 0, 0.2])), [[0, 11], [7, 9]])
    assert matrix.contains(actor.to_env(actor.act(np.zeros(3, np.float32))))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from([np.float32, np.float64]),
    st.floats(-1e6, 1e6, width=32),
    st.floats(0.015625, 1e6, width=32),
    st.one_of(st.sampled_from([-1.0, 1.0]), st.floats(-1, 1)),
)
def test_every_action_between_minus_1_and_1_is_in_the_space(dtype, low, width, action):
    low, width = (low, width) if dtype == np.float32 else (low / 7, width / 3)  # not short binary fractions
    space = spaces.Box(np.array([low], dtype), np.array([low + width], dtype), dtype=dtype)
    executed = Actor(1, space, Args()).to_env(np.array([action]))
    assert space.contains(executed)
    low, high = float(space.low[0]), float(space.high[0])
    expected = low + (action + 1) / 2 * (high - low)
    assert executed[0] == pytest.approx(expected, abs=1e-6 * max(abs(low), abs(high)))


def test_actions_are_the_networks_outputs_by_tanh():
    model = make_model().float()
    observations = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    with torch.no_grad():
        for observation in observations:
            expected = mu(model.actor, torch.from_numpy(observation[None]))[0]
            for greedy in (False, True):
                np.testing.assert_allclose(model.actor.act(observation, greedy), expected, rtol=1e-4, atol=1e-6)
        linears(model.actor)[-1].bias.add_(100)
    assert model.actor.act(observations[0]).tolist() == [1, 1]


def test_discrete_actions_begin_at_the_spaces_start():
    space = spaces.Discrete(3, start=-1)
    actor = make_model(space).actor
    for index in range(3):
        action = actor.to_env(np.eye(3)[index])
        assert action == index - 1
        assert space.contains(action)


def test_random_actions_are_uniform():
    rng = np.random.default_rng(0)
    actor = make_model().actor
    actions = np.array([actor.random_action(rng) for _ in range(5000)])
    assert actions.shape == (5000, 2)
    for column in actions.T:  # Kolmogorov-Smirnov, at the level 0.001
        assert np.abs(np.sort(column) - (2 * (np.arange(5000) + 0.5) / 5000 - 1)).max() / 2 < 1.95 / 5000**0.5
    assert abs(np.corrcoef(actions.T)[0, 1]) < 4 / 5000**0.5
    actor = make_model(DISCRETE).actor
    actions = np.array([actor.random_action(rng) for _ in range(5000)])
    assert (np.sort(actions, 1) == [0, 0, 1]).all()
    np.testing.assert_allclose(actions.mean(0), 1 / 3, atol=4 * (2 / 9 / 5000) ** 0.5)


# Oracles: noise


def test_gaussian_noise():
    noise = GaussianNoise(4, np.random.default_rng(0))
    samples = np.array([noise.sample(0.3) for _ in range(10_000)])
    assert samples.shape == (10_000, 4)
    np.testing.assert_allclose(samples.mean(0), 0, atol=4 * 0.3 / 100)
    np.testing.assert_allclose(samples.std(0), 0.3, rtol=4 / 20_000**0.5)
    np.testing.assert_allclose((samples**4).mean(0), 3 * 0.3**4, rtol=0.15)  # normal: 4 standard errors of 9.8 / 100^2
    correlations = np.corrcoef(np.concatenate((samples[1:], samples[:-1]), axis=1).T)
    assert np.abs(correlations - np.eye(8)).max() < 5 / 100
    noise.reset()
    assert not noise.sample(0.0).any()


@pytest.mark.parametrize(("theta", "std"), [(0.15, 0.2), (0.6, 1.0)])
def test_ornstein_uhlenbeck_noise_has_the_processs_moments(theta, std):
    """Tolerances: five standard errors, which grow with the autocorrelation (Bartlett)."""
    size, steps, phi = 2000, 500, 1 - theta
    noise = OrnsteinUhlenbeckNoise(size, np.random.default_rng(0), theta)
    start = np.array([noise.sample(std) for _ in range(3)])
    for t, row in enumerate(start, 1):  # from 0 on, the variance grows
        variance = std**2 * (1 - phi ** (2 * t)) / (1 - phi**2)
        assert row.var() == pytest.approx(variance, rel=5 * (2 / size) ** 0.5)
    for _ in range(100):
        noise.sample(std)
    samples, n = np.array([noise.sample(std) for _ in range(steps)]), size * steps
    variance, inertia = std**2 / (1 - phi**2), (1 + phi**2) / (1 - phi**2)
    assert samples.mean() == pytest.approx(0, abs=5 * std / theta / n**0.5)
    assert samples.var() == pytest.approx(variance, rel=5 * (2 * inertia / n) ** 0.5)
    for k in (1, 2, 5, 10):
        correlation = (samples[k:] * samples[:-k]).mean() / (samples**2).mean()
        assert correlation == pytest.approx(phi**k, abs=5 * (inertia / n) ** 0.5)
    across = np.corrcoef(samples[:, :20].T) - np.eye(20)
    assert np.abs(across).max() < 5 * (inertia / steps) ** 0.5  # components do not know of each other


def test_ornstein_uhlenbeck_noise_returns_to_0_and_begins_there():
    noise = OrnsteinUhlenbeckNoise(3, np.random.default_rng(0), 0.25)
    assert not noise.sample(0.0).any()
    first = noise.sample(1.0).copy()
    assert (first != 0).all()
    np.testing.assert_allclose(noise.sample(0.0), 0.75 * first)
    np.testing.assert_allclose(noise.sample(0.0), 0.75**2 * first)
    noise.reset()
    assert not noise.sample(0.0).any()


# Oracles: the replay memory


def transition(number: int) -> tuple:
    """The transition of this number, all of whose parts tell it."""
    s = np.array([number, number + 0.25], np.float32)
    return s, np.array([-number, 0.5, number]), 10.0 * number, s + 1, number % 3 == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(capacity=st.integers(1, 7), parts=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_replay_memory_holds_the_latest_transitions(tmp_path_factory, capacity, parts):
    """Opened anew between the parts, as by resumed runs."""
    path, known, rng = tmp_path_factory.mktemp("memory") / "replay.npy", [], np.random.default_rng(0)
    for part in parts:
        buffer = ReplayBuffer(path, capacity, 2, 3, len(known))
        for _ in range(part):
            known.append(len(known))
            buffer.add(*transition(known[-1]))
        assert buffer.count == len(known)
        if not known:
            continue
        batch = buffer.sample(200, rng)
        assert [tuple(column.shape) for column in batch] == [(200, 2), (200, 3), (200,), (200, 2), (200,)]
        assert all(column.dtype == torch.float32 for column in batch)
        numbers = (batch[2] / 10).round().int().tolist()
        assert set(numbers) == set(known[-capacity:])
        for column, expected in zip(batch, zip(*map(transition, numbers), strict=True), strict=True):
            assert np.array_equal(column.numpy(), np.array(expected, np.float32))


def test_replay_memory_samples_uniformly_and_copies(tmp_path):
    buffer, rng = ReplayBuffer(tmp_path / "replay.npy", 5, 2, 3), np.random.default_rng(0)
    for number in range(7):
        buffer.add(*transition(number))
    numbers = (buffer.sample(10_000, rng)[2] / 10).round().int().numpy()
    np.testing.assert_allclose(np.bincount(numbers)[2:] / 10_000, 0.2, atol=4 * (0.16 / 10_000) ** 0.5)
    assert np.corrcoef(numbers[1:], numbers[:-1])[0, 1] == pytest.approx(0, abs=0.04)
    batch = buffer.sample(8, rng)
    before = [part.clone() for part in batch]
    for number in range(7, 12):
        buffer.add(*transition(number))
    assert are_equal(batch, before)


def test_replay_memory_refuses_a_file_that_does_not_fit(tmp_path):
    path = tmp_path / "replay.npy"
    with pytest.raises(OSError, match="replay"):
        ReplayBuffer(path, 5, 2, 3, 4)
    assert not path.exists()
    buffer = ReplayBuffer(path, 5, 2, 3)
    for number in range(4):
        buffer.add(*transition(number))
    whole = path.read_bytes()
    for sizes in ((6, 2, 3), (5, 3, 3), (5, 2, 2)):
        with pytest.raises(ValueError, match="shape"):
            ReplayBuffer(path, *sizes, 4)
    path.write_bytes(b"certainly no array" * 100)
    with pytest.raises(ValueError, match="magic string"):
        ReplayBuffer(path, 5, 2, 3, 4)
    path.write_bytes(whole)
    assert ReplayBuffer(path, 5, 2, 3, 4).sample(9, np.random.default_rng(0))[2].max() <= 30


# Oracles: a whole run


class Play:
    """`learn` on a `Script`, with networks that stay as they are, and what it did.

    `calls` has ("reset", steps so far), ("noise", steps so far, sigma, sample) and ("update", steps so far, batch,
    metrics). With `one_update` all updates but the first are left out, as they take the time.
    """

    def __init__(self, tmp_path, monkeypatch, env_id="BoundedScript", one_update=True, **arguments):
        args = Args(**{"env_id": f"probes:{env_id}-v0", "buffer_size": 1000, "batch_size": 6} | arguments)
        probes.Script.log.clear()
        self.log, self.calls = probes.Script.log, []
        torch.manual_seed(0)
        self.model = DDPG(3, gym.make(args.env_id).action_space, args)
        with torch.no_grad():
            for network in {self.model.actor, self.model.target_actor}:
                linears(network)[-1].weight.mul_(100)
        self.before = state(self.model)
        for cls in (GaussianNoise, OrnsteinUhlenbeckNoise):
            monkeypatch.setattr(ddpg, cls.__name__, self.recorder(cls))

        def record_update(model, optimizers, batch, args):
            updates = self.of("update")
            metrics = updates[0][2] if updates and one_update else update(model, optimizers, batch, args)
            self.call("update", batch, metrics)
            return dict(metrics)

        monkeypatch.setattr(ddpg, "update", record_update)
        size = self.model.actor.action_size
        self.buffer = ReplayBuffer(tmp_path / "replay.npy", args.buffer_size, 3, size)
        optimizers = {
            name: torch.optim.SGD(getattr(self.model, name).parameters(), 0.0) for name in ("actor", "critic")
        }
        rng = np.random.default_rng(0)
        self.results = list(ddpg.learn(self.model, optimizers, self.buffer, args, rng, lambda: 7.0))
        self.rows = np.split(self.buffer.rows[: self.buffer.count], np.cumsum([3, size, 1, 3]), axis=1)

    def call(self, name, *content) -> None:
        self.calls.append((name, len(self.log), *content))

    def of(self, name) -> list[tuple]:
        return [call[1:] for call in self.calls if call[0] == name]

    def recorder(self, cls) -> type:
        play = self

        class Recorder(cls):
            def reset(self):
                play.call("reset")
                super().reset()

            def sample(self, std):
                noise = super().sample(std)
                play.call("noise", std, noise.copy())
                return noise

        return Recorder


@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        ("BoundedScript", {"noise_std": 0.5}),
        ("BoundedScript", {"noise": "ou", "noise_std": 0.4, "batch_norm": True}),
        ("Script", {}),
    ],
    ids=str,
)
def test_the_replay_memory_holds_what_happened(tmp_path, monkeypatch, env_id, options):
    play = Play(tmp_path, monkeypatch, env_id, learning_starts=30, total_timesteps=230, **options)
    assert play.buffer.count == len(play.log) == play.results[-1][0] == 230
    observations, actions, rewards, next_observations, terminated = (
        np.array([step[k] for step in play.log]) for k in range(5)
    )
    s, a, r, s_next, end = play.rows
    np.testing.assert_array_equal(s, observations)
    np.testing.assert_array_equal(r[:, 0], rewards.astype(np.float32))
    np.testing.assert_array_equal(s_next, next_observations)
    np.testing.assert_array_equal(end[:, 0], terminated)
    if env_id == "Script":
        np.testing.assert_array_equal(a, np.eye(2)[actions])
        assert 20 < actions[30:].sum() < 180
    else:  # as executed, in units in which the bounds lie at -1 and 1
        np.testing.assert_allclose(a, (actions - [5, -1]) / [5, 4], atol=1e-6)
        assert ((actions >= BOX.low) & (actions <= BOX.high)).all()
    over = [T for T, step in enumerate(play.log, 1) if step[4] or step[5]]
    assert {"terminated" if play.log[T - 1][4] else "truncated" for T in over} == {"terminated", "truncated"}
    episodes = [row for _, rows, _ in play.results for row in rows]
    assert [row[0] for row in episodes] == over
    for first, (T, seconds, worker, episode_return, length) in zip([0, *over[:-1]], episodes, strict=True):
        assert (seconds, worker, length) == (7.0, 0, T - first)
        assert episode_return == pytest.approx(rewards[first:T].sum())


@pytest.mark.parametrize("noise", ["gaussian", "ou"])
def test_actions_are_mu_plus_noise_within_the_bounds(tmp_path, monkeypatch, noise):
    options = {"noise": noise, "noise_std": 0.7, "ou_theta": 0.5, "learning_starts": 30, "total_timesteps": 230}
    play = Play(tmp_path, monkeypatch, **options)
    s, a = play.rows[:2]
    with torch.no_grad():
        greedy = mu(play.model.actor, torch.tensor(s)).numpy()
    samples = play.of("noise")
    assert [T for T, *_ in samples] == list(range(30, 230))
    np.testing.assert_allclose(a[30:], np.clip(greedy[30:] + [sample for *_, sample in samples], -1, 1), atol=1e-5)
    for bound in (-1, 1):
        reached = a[30:, 0] == bound
        assert reached.sum() > 3
        executed = np.array([step[1][0] for step in play.log[30:]])[reached]
        assert (executed == (BOX.low if bound < 0 else BOX.high)[0]).all()
    steps = np.abs(np.diff([sample[0] for *_, sample in samples]))
    assert steps.mean() == pytest.approx(0.7 * (2 if noise == "gaussian" else 1.1) * (2 / math.pi) ** 0.5, rel=0.5)


def test_discrete_actions_are_samples_of_mu(tmp_path, monkeypatch):
    """As often as the softmax says, another action than the likeliest is taken."""
    play = Play(tmp_path, monkeypatch, "Script", learning_starts=30, total_timesteps=430)
    s, a = (torch.tensor(part[30:]) for part in play.rows[:2])
    with torch.no_grad():
        likeliest = play.model.actor.net(s).softmax(1).max(1)
    others = (a.argmax(1) != likeliest.indices).sum().item()
    p = 1 - likeliest.values
    assert others == pytest.approx(p.sum().item(), abs=4 * (p * (1 - p)).sum().sqrt().item())
    assert others > 40


@pytest.mark.parametrize("noise", ["gaussian", "ou"])
def test_noise_begins_anew_with_every_episode(tmp_path, monkeypatch, noise):
    play = Play(tmp_path, monkeypatch, noise=noise, learning_starts=30, total_timesteps=230)
    over = [T for T, step in enumerate(play.log, 1) if step[4] or step[5]]
    assert len(over) > 20
    assert [T for (T,) in play.of("reset") if 0 < T < 230] == [T for T in over if T < 230]


def test_ornstein_uhlenbeck_noise_is_given_its_theta(tmp_path, monkeypatch):
    options = {"noise": "ou", "noise_std": 0.2, "learning_starts": 0, "total_timesteps": 400, "ou_theta": 0.05}
    play = Play(tmp_path, monkeypatch, **options)
    ends, samples = {T for (T,) in play.of("reset")}, play.of("noise")
    pairs = [(x, y) for (_, _, x), (T, _, y) in itertools.pairwise(samples) if T not in ends]
    steps = np.array([y - 0.95 * x for x, y in pairs])
    assert np.corrcoef(steps.ravel(), np.array([x for x, _ in pairs]).ravel())[0, 1] == pytest.approx(0, abs=0.15)
    assert steps.std() == pytest.approx(0.2, rel=4 / (2 * steps.size) ** 0.5)


@pytest.mark.parametrize("final", [None, 0.1, 2.0])
def test_noise_is_annealed_linearly(tmp_path, monkeypatch, final):
    options = {"noise_std": 0.6, "final_noise_std": final, "learning_starts": 20, "total_timesteps": 220}
    play = Play(tmp_path, monkeypatch, **options)
    T, sigma = np.array([call[:2] for call in play.of("noise")]).T
    slope = ((0.6 if final is None else final) - 0.6) / 220
    np.testing.assert_allclose(sigma, 0.6 + slope * T, atol=1e-9 + abs(slope))  # a step more or less is no matter
    assert play.results[-1][2]["noise_std"] == pytest.approx(0.6 if final is None else final, abs=1e-9 + abs(slope))


def test_actions_are_random_until_learning_starts(tmp_path, monkeypatch):
    play = Play(tmp_path, monkeypatch, learning_starts=2000, total_timesteps=2000, noise_std=0.0)
    assert not play.of("noise")
    for column, low, high in zip(np.array([step[1] for step in play.log]).T, BOX.low, BOX.high, strict=True):
        shares = np.sort((column - low) / (high - low))
        assert np.abs(shares - (np.arange(2000) + 0.5) / 2000).max() < 1.95 / 2000**0.5


def test_actions_are_the_policys_once_learning_starts(tmp_path, monkeypatch):
    a = Play(tmp_path, monkeypatch, learning_starts=20, total_timesteps=60, noise_std=0.0).rows[1]
    assert np.abs(a[20:]).max() < 0.7 < np.abs(a[:20]).max()  # what follows is the policy, which is near 0


@EACH_BRANCH
def test_there_is_a_minibatch_for_each_step_once_learning_starts(tmp_path, monkeypatch, branch):
    play = Play(tmp_path, monkeypatch, one_update=False, learning_starts=37, total_timesteps=137, **branch)
    updates = play.of("update")
    assert [T for T, *_ in updates] == list(range(37, 138))
    stored = {row.tobytes(): number for number, row in enumerate(play.buffer.rows[:137])}
    drawn = []
    for T, batch, _ in updates:
        s, a, r, s_next, end = (np.asarray(part) for part in batch)
        rows = np.concatenate((s, a, r[:, None], s_next, end[:, None]), axis=1)
        assert len(rows) == 6
        numbers = [stored[row.tobytes()] for row in rows]
        assert max(numbers) < T
        drawn += numbers
    assert len(set(drawn)) > 100
    assert not play.results[0][2] or play.results[0][0] >= 37  # nothing to tell before that
    _, _, metrics = play.results[-1]
    assert set(metrics) == set(METRICS)
    for name in ("critic_loss", "actor_loss", "q_values"):
        assert metrics[name] == pytest.approx(updates[-1][2][name].item())
    for name in ("critic", "actor"):
        squares = [parameter.grad.square().sum().item() for parameter in getattr(play.model, name).parameters()]
        assert metrics[f"{name}_grad_norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
    assert metrics["critic_grad_norm"] > 10 * metrics["actor_grad_norm"] > 0
    assert metrics["learning_rate"] == Args().learning_rate
    if not branch["batch_norm"]:
        assert are_equal(state(play.model), play.before)  # as nothing was learned


# Probe environments: one thing at a time has to be learned

PROBE = {
    "total_timesteps": 700,
    "learning_starts": 200,
    "batch_size": 32,
    "log_interval": 500,
    "noise_std": 0.3,
    "gamma": 0.5,
    "tau": 0.05,
    "learning_rate": 0.01,
}


def q_value(model, observation, action) -> float:
    with torch.no_grad():
        return model.critic(torch.tensor([[float(observation)]]), torch.from_numpy(np.float32([action]))).item()


def executed(model, observation) -> np.ndarray:
    return model.actor.to_env(model.actor.act(np.array([observation], np.float32), greedy=True))


@pytest.mark.parametrize("options", [{}, {"target_network": False, "action_layer": 1}], ids=str)
def test_probe_constant_reward_that_is_terminal(tmp_path, options):
    """Who does not take the end for one learns 1 / (1 - 0.5) = 2."""
    _, checkpoint = train(tmp_path, env_id="probes:BoundedConstant-v0", **PROBE | {"total_timesteps": 400} | options)
    model = load_model(checkpoint, "probes:BoundedConstant-v0")
    for action in ([0, 0], [0.5, -0.5], model.actor.act(np.zeros(1, np.float32))):
        assert q_value(model, 0, action) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("target_network", [True, False])
def test_probe_that_only_truncates(tmp_path, target_network):
    """1 / (1 - 0.5) = 2; who takes the time limit for a terminal state learns about 1.6."""
    _, checkpoint = train(tmp_path, env_id="probes:BoundedOnlyTruncates-v0", target_network=target_network, **PROBE)
    model = load_model(checkpoint, "probes:BoundedOnlyTruncates-v0")
    assert q_value(model, 0, model.actor.act(np.zeros(1, np.float32))) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    "options", [{}, {"batch_norm": True, "target_network": False}, {"action_layer": 1, "noise": "ou"}], ids=str
)
def test_probe_target(tmp_path, monkeypatch, options):
    """Both actions, each in its own units, each from its own observation."""
    monkeypatch.setattr(ddpg, "HIDDEN", 32)
    options = PROBE | {"total_timesteps": 900, "eval_episodes": 10} | options
    folder, checkpoint = train(tmp_path, env_id="probes:BoundedTarget-v0", **options)
    model = load_model(checkpoint, "probes:BoundedTarget-v0")
    for observation, target in ((1, [7, -2]), (-1, [2, 1])):
        np.testing.assert_allclose((executed(model, observation) - target) / [5, 4], 0, atol=0.3)
    assert q_value(model, 1, [0.4, -0.25]) == pytest.approx(1, abs=0.15)
    returns = json.loads((folder / "evaluation.json").read_text())["returns"]
    assert len({round(value, 6) for value in returns}) == 2  # one for each observation: greedy, without noise
    assert min(returns) > 0.8


def test_probe_reward_by_later_action(tmp_path):
    """The first step's value is that of mu' in the second, discounted; its best actions lie at the bounds."""
    _, checkpoint = train(tmp_path, env_id="probes:BoundedByLaterAction-v0", **PROBE)
    model = load_model(checkpoint, "probes:BoundedByLaterAction-v0")
    np.testing.assert_allclose(executed(model, 1), [10, -5], atol=0.3)
    assert q_value(model, 1, [1, -1]) == pytest.approx(1, abs=0.1)
    assert q_value(model, 0, model.actor.act(np.zeros(1, np.float32))) == pytest.approx(0.5, abs=0.1)


def test_probe_discrete_reward_by_action(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByAction-v0", **PROBE)
    model = load_model(checkpoint, "probes:ByAction-v0")
    for observation in (-1.0, 1.0):
        best = int(observation > 0)
        assert model.actor.net(torch.tensor([[observation]])).softmax(1)[0, best] > 0.8
        assert executed(model, observation) == best
        assert q_value(model, observation, np.eye(2)[best]) == pytest.approx(1, abs=0.15)
        assert q_value(model, observation, np.eye(2)[1 - best]) == pytest.approx(-1, abs=0.15)


def test_probe_discrete_reward_by_later_action(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByLaterAction-v0", **PROBE)
    model = load_model(checkpoint, "probes:ByLaterAction-v0")
    assert executed(model, 1) == 1
    assert q_value(model, 1, [0, 1]) == pytest.approx(1, abs=0.1)
    share = model.actor.net(torch.tensor([[1.0]])).softmax(1)[0, 1].item()  # mu' is a sample, too
    assert q_value(model, 0, [1, 0]) == pytest.approx(0.5 * share, abs=0.1)


# Smoke: every option, short

SHORT = {"total_timesteps": 130, "learning_starts": 90}


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("noise", ["gaussian", "ou"])
@EACH_BRANCH
def test_smoke_branches(tmp_path, env_id, noise, branch):
    folder, checkpoint = train(tmp_path, env_id=env_id, noise=noise, **SHORT, **branch)
    assert checkpoint["step"] == 130
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    networks = [load_model(source, env_id) for source in (checkpoint, untrained(folder, env_id))]
    for name in ("actor", "critic", "target_actor", "target_critic"):
        assert not are_equal(*(state(getattr(model, name)) for model in networks))  # something was learned
    assert are_equal(state(networks[0].actor), state(networks[0].target_actor)) != branch["target_network"]


def untrained(folder, env_id) -> dict:
    """The run's networks as they were before its first step, where only the seed counts."""
    args, env = json.loads((folder / "args.json").read_text()), gym.make(env_id)
    args = {name: value for name, value in args.items() if hasattr(Args, name)}
    torch.manual_seed(args["seed"])
    model = DDPG(spaces.flatdim(env.observation_space), env.action_space, Args(**args))
    return {"args": args, "model": model.state_dict()}


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "probes:DictObservation-v0", "MountainCarContinuous-v0"])
def test_smoke_environments(tmp_path, env_id):
    folder, checkpoint = train(tmp_path, env_id=env_id, eval_episodes=1, **SHORT)
    assert checkpoint["step"] == 130
    assert json.loads((folder / "evaluation.json").read_text())["episodes"] == 1


@pytest.mark.parametrize("total", [1, 49, 51, 200])
def test_total_timesteps_are_hit_exactly(tmp_path, total):
    folder, checkpoint = train(tmp_path, env_id="probes:BoundedConstant-v0", total_timesteps=total)
    rows = read(folder / "episodes.csv")  # every episode has one step, so every step is a row
    assert checkpoint["step"] == len(rows) == total
    assert [int(row["step"]) for row in rows] == list(range(1, total + 1))
    assert {(row["worker"], row["return"], row["length"]) for row in rows} == {("0", "1", "1")}
    assert (folder / "replay.npy").stat().st_size > 0


def test_smoke_tensorboard_and_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, _ = train(
        tmp_path,
        env_id="probes:BoundedTarget-v0",
        total_timesteps=400,
        learning_starts=120,
        log_interval=100,
        eval_episodes=1,
        noise_std=0.5,
        final_noise_std=0.1,
        learning_rate=2e-3,
    )
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"{family}/{name}" for name, family in METRICS.items()} <= tags
    assert {"losses/critic_loss", "losses/actor_loss", "losses/q_values", "charts/noise_std"} <= tags
    assert {"charts/SPS", "charts/episodic_return", "eval/mean_return"} <= tags
    rows = read(folder / "metrics.csv")
    assert list(rows[0]) == ["step", "time", *METRICS, "steps_per_second"]
    assert [int(row["step"]) for row in rows] == [200, 300, 400]  # none before there is something to tell
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert all(float(row["learning_rate"]) == 2e-3 for row in rows)
    sigmas = [float(row["noise_std"]) for row in rows]
    assert 0.4 > sigmas[0] > sigmas[1] > sigmas[2] >= 0.1
    assert sigmas[2] < 0.2
    assert all(float(row["critic_loss"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("env_id", "options"),
    [("Pendulum-v1", {}), ("Pendulum-v1", {"noise": "ou"}), ("CartPole-v1", {})],
    ids=str,
)
def test_one_seed_repeats_a_run(tmp_path, env_id, options):
    def run(**arguments):
        folder, checkpoint = train(
            tmp_path, env_id=env_id, total_timesteps=120, learning_starts=60, **options, **arguments
        )
        return np.load(folder / "replay.npy")[:120], list(checkpoint["model"].values()), checkpoint["random_states"]

    rows, tensors, states = run()
    again, its_tensors, its_states = run()
    np.testing.assert_array_equal(again, rows)
    assert are_equal(tensors, its_tensors)
    assert states == its_states
    others, other_tensors, other_states = run(seed=2)
    assert not (others == rows).all(axis=1).any()
    assert not are_equal(tensors, other_tensors)
    assert states != other_states


def run_command(monkeypatch, *arguments) -> int:
    """The exit code of ddpg.py's command line."""
    monkeypatch.setattr(sys, "argv", ["ddpg.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        command_line(ddpg.main, Args)
    return exit_info.value.code


def contents(folder) -> dict:
    """Every file below the folder with what is in it."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_evaluate_is_greedy_and_repeats(tmp_path, monkeypatch, capsys):
    """It needs no replay memory and writes nothing but its result."""
    folder, checkpoint = train(tmp_path, env_id="probes:ByLaterAction-v0", total_timesteps=60)
    names = [name for name in checkpoint["model"] if name.startswith("actor.")][-2:]
    for name, tensor in zip(names, (torch.zeros(2, 16), torch.tensor([0.0, 0.5])), strict=True):
        checkpoint["model"][name].copy_(tensor)  # samples would take the second action 62 times in 100
    torch.save(checkpoint, folder / "checkpoint.pt")
    (folder / "replay.npy").unlink()
    before = contents(folder)
    assert run_command(monkeypatch, "--evaluate", folder, "--eval-episodes", 30) == 0
    assert "greedy return 1.0 ± 0.0 over 30 episodes" in capsys.readouterr().out
    after = contents(folder)
    assert after.keys() - before.keys() == {(folder / "evaluation.json").relative_to(folder)}
    assert all(after[name] == content for name, content in before.items())
    assert json.loads((folder / "evaluation.json").read_text())["returns"] == [1.0] * 30


def test_the_running_statistics_are_part_of_the_evaluation(tmp_path, monkeypatch):
    folder, checkpoint = train(tmp_path, env_id="probes:BoundedTarget-v0", batch_norm=True, eval_episodes=5, **SHORT)
    returns = json.loads((folder / "evaluation.json").read_text())["returns"]
    for shift, same in ((0.0, True), (1.0, False)):
        for name, tensor in checkpoint["model"].items():
            if name.startswith("actor.") and name.endswith("running_mean"):
                tensor += shift
        torch.save(checkpoint, folder / "checkpoint.pt")
        assert run_command(monkeypatch, "--evaluate", folder, "--eval-episodes", 5) == 0
        assert (json.loads((folder / "evaluation.json").read_text())["returns"] == returns) == same


# What goes wrong


def run_here(tmp_path, capsys, **arguments):
    """main() in this process, on an environment that fails in step 140: exit code, standard error, the run's folder."""
    defaults = {"total_timesteps": 10**9, "learning_starts": 20, "buffer_size": 1000, "batch_size": 8}
    code = ddpg.main(Args(**(defaults | {"log_dir": str(tmp_path / "runs"), "log_interval": 50} | arguments)))
    (folder,) = (tmp_path / "runs").iterdir()
    return code, capsys.readouterr().err, folder


def check_tables(folder) -> dict:
    """The tables and the replay memory know as much as the checkpoint, and no infinite number is in it. Returns it."""
    checkpoint = load(folder)
    for table in ("episodes.csv", "metrics.csv"):
        rows = pd.read_csv(folder / table)
        assert 0 < rows["step"].max() <= checkpoint["step"]
        assert not rows.isna().any().any()
    for name in ("model", "actor_optimizer", "critic_optimizer"):
        state = checkpoint[name].values() if name == "model" else checkpoint[name]["state"].values()
        for content in state:
            for tensor in content.values() if isinstance(content, dict) else (content,):
                assert tensor.isfinite().all()
    assert np.isfinite(np.load(folder / "replay.npy")[: checkpoint["step"]]).all()
    return checkpoint


def test_an_environment_that_raises_ends_the_run(tmp_path, capsys):
    code, err, folder = run_here(tmp_path, capsys, env_id="probes:FailsLater-v0")
    assert code == 1
    assert "RuntimeError: the probe broke" in err
    assert "probes.py" in err
    assert 40 < check_tables(folder)["step"] < 140


def test_what_is_saved_after_an_error_is_the_state_at_the_checkpoints_step(tmp_path, capsys):
    """The steps that the failed iteration had done count as not begun, so that a run as long as that is the same."""
    _, _, folder = run_here(tmp_path, capsys, env_id="probes:FailsLater-v0")
    failed = load(folder)
    _, _, folder = run_here(
        tmp_path / "again", capsys, env_id="probes:FailsLater-v0", total_timesteps=failed["step"], eval_episodes=0
    )
    whole = load(folder)
    assert failed["step"] == whole["step"]
    assert are_equal(list(failed["model"].values()), list(whole["model"].values()))
    for name in ("actor_optimizer", "critic_optimizer"):
        moments = [list(checkpoint[name]["state"][0].values()) for checkpoint in (failed, whole)]
        assert are_equal(*moments)
        assert len(moments[0]) == 3
    assert failed["random_states"] == whole["random_states"]
    assert torch.equal(failed["torch_random_state"], whole["torch_random_state"])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_num_threads_are_those_of_training(tmp_path, monkeypatch, num_threads):
    seen, update = [], ddpg.update
    monkeypatch.setattr(ddpg, "update", lambda *arguments: seen.append(torch.get_num_threads()) or update(*arguments))
    train(tmp_path, env_id="probes:BoundedConstant-v0", total_timesteps=60, num_threads=num_threads)
    assert seen == [num_threads] * 11


def test_an_environment_that_cannot_be_reset_ends_the_run(tmp_path, capsys):
    code, err, _ = run_here(tmp_path, capsys, env_id="probes:FailsAtReset-v0")
    assert code == 1
    assert "the probe cannot be reset" in err


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("env_id", ["NotANumberLater", "InfiniteRewardLater"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_nan_stops_the_run_and_spares_the_checkpoint(tmp_path, capsys, env_id, batch_norm):
    code, err, folder = run_here(tmp_path, capsys, env_id=f"probes:{env_id}-v0", batch_norm=batch_norm)
    assert code == 1
    assert "the losses are not finite at step" in err
    assert "Traceback" not in err
    assert 40 < check_tables(folder)["step"] < 140
    assert not (folder / "evaluation.json").exists()


def test_networks_that_overflow_are_never_saved(tmp_path, capsys):
    code, err, folder = run_here(
        tmp_path,
        capsys,
        env_id="probes:BoundedConstant-v0",
        learning_rate=1e38,
        total_timesteps=100,
        learning_starts=60,
    )
    assert code == 1
    assert "finite at step" in err
    assert load(folder)["step"] < 100
    assert all(tensor.isfinite().all() for tensor in load(folder)["model"].values())
    assert not (folder / "evaluation.json").exists()


@pytest.fixture
def signal_handlers():
    """As a terminal would have them; the test may set others."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(
    ("env_id", "code", "text"), [("Interrupted", 130, "interrupted"), ("Terminated", 143, "terminated")]
)
def test_signals_save(tmp_path, monkeypatch, capsys, env_id, code, text):
    arguments = ["--env-id", f"probes:{env_id}-v0", "--log-dir", tmp_path / "runs", "--log-interval", 50]
    options = ["--buffer-size", 1000, "--learning-starts", 20, "--batch-size", 8, "--total-timesteps", 10**6]
    assert run_command(monkeypatch, *arguments, *options) == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    step = check_tables(folder)["step"]
    assert 40 < step < 140
    assert not (folder / "evaluation.json").exists()
    resumed = ["--resume", folder, "--total-timesteps", step + 30, "--eval-episodes", 0]  # of which none is the 140th
    assert run_command(monkeypatch, *resumed) == 0
    assert load(folder)["step"] == step + 30


def test_kill_9_then_resume(start, monkeypatch, capsys, tmp_path):
    options = ("--buffer-size", 5000, "--learning-starts", 100, "--batch-size", 8, "--log-interval", 200)
    first = start("ddpg.py", "--total-timesteps", 10**9, *options, "--actor-learning-rate", 2e-4)
    folder = first.wait_for_episodes(2, checkpoint=True)
    first.process.kill()
    first.process.wait()
    before, known = load(folder), pd.read_csv(folder / "episodes.csv")
    known, rows = known[known["step"] <= before["step"]], np.load(folder / "replay.npy")
    assert before["step"] >= 200
    monkeypatch.setattr(ddpg, "HIDDEN", 256)
    total = before["step"] + 300
    assert run_command(monkeypatch, "--resume", folder, "--total-timesteps", total, "--eval-episodes", 1) == 0
    assert "greedy return" in capsys.readouterr().out
    after = load(folder)
    assert after["step"] == total
    assert after["seconds"] > before["seconds"]
    assert json.loads((folder / "args.json").read_text())["actor_learning_rate"] == 2e-4  # the run's, not the default
    pd.testing.assert_frame_equal(pd.read_csv(folder / "episodes.csv").head(len(known)), known, check_dtype=False)
    count = min(before["step"], 5000 - 300)  # beyond that the oldest are overwritten
    np.testing.assert_array_equal(np.load(folder / "replay.npy")[before["step"] - count : before["step"]], rows[:count])
    assert list(folder.parent.iterdir()) == [folder]


def resume(folder, **arguments) -> dict:
    """Go on with a run of `train`, to step 160. Returns the checkpoint."""
    again = {"buffer_size": 5000, "batch_size": 16, "eval_episodes": 0, "learning_starts": 50, "log_interval": 50}
    args = {"resume": str(folder), "env_id": load(folder)["args"]["env_id"], "total_timesteps": 160}
    assert ddpg.main(Args(**(again | args | arguments))) == 0
    return load(folder)


@pytest.mark.parametrize(
    ("env_id", "options"),
    [("Pendulum-v1", {"batch_norm": True}), ("Pendulum-v1", {"target_network": False}), ("CartPole-v1", {})],
    ids=str,
)
def test_resume_goes_on_with_everything(tmp_path, env_id, options):
    """Two runs that go on from the same checkpoint are the same, whatever --seed says."""
    folder, before = train(tmp_path, env_id=env_id, total_timesteps=100, **options)
    folders, rows = [folder, shutil.copytree(folder, tmp_path / "copy")], np.load(folder / "replay.npy")
    assert rows[:100].any(axis=1).all()
    assert not rows[100:].any()
    after = [resume(path, seed=seed, **options) for seed, path in enumerate(folders)]
    memories = [np.load(path / "replay.npy") for path in folders]
    np.testing.assert_array_equal(memories[0][:100], rows[:100])
    assert memories[0][100:160].any(axis=1).all()
    assert not memories[0][160:].any()
    np.testing.assert_array_equal(*memories)
    assert are_equal(*(list(checkpoint["model"].values()) for checkpoint in after))
    assert not are_equal(list(after[0]["model"].values()), list(before["model"].values()))
    assert after[0]["random_states"] == after[1]["random_states"] != before["random_states"]
    assert torch.equal(after[0]["torch_random_state"], after[1]["torch_random_state"])
    was_drawn_from = not torch.equal(after[0]["torch_random_state"], before["torch_random_state"])
    assert was_drawn_from == (env_id == "CartPole-v1")  # by Gumbel-Softmax
    for name in ("actor_optimizer", "critic_optimizer"):
        steps = [checkpoint[name]["state"][0]["step"].item() for checkpoint in (before, after[0])]
        assert steps == [51, 111]  # one for each step from the 50th on
    assert (pd.read_csv(folder / "metrics.csv")["time"].diff().dropna() > 0).all()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_resume_continues_from_the_checkpoint(tmp_path, env_id):
    """With learning rates and tau of almost nothing the networks stay as the checkpoint had them: each by its own."""
    folder, before = train(tmp_path, env_id=env_id, total_timesteps=100, batch_norm=True)
    for network, option in (("critic", "learning_rate"), ("actor", "actor_learning_rate")):
        path = shutil.copytree(folder, tmp_path / network)
        after = resume(path, batch_norm=True, tau=1e-30, **{option: 1e-30})
        assert after[f"{network}_optimizer"]["param_groups"][0]["lr"] == 1e-30
        for name, tensor in before["model"].items():
            if tensor.is_floating_point() and "running" not in name:
                is_same, stays = torch.equal(after["model"][name], tensor), name.startswith((f"{network}.", "target"))
                assert is_same == stays, name
            if "running" in name:
                assert torch.equal(after["model"][name], tensor) == name.startswith("target"), name


def test_resume_goes_on_with_the_annealing_and_without_random_actions(tmp_path, monkeypatch):
    options = {
        "env_id": "probes:BoundedScript-v0",
        "noise_std": 0.0,
        "learning_rate": 1e-30,
        "actor_learning_rate": 1e-30,
    }
    folder, _ = train(tmp_path, total_timesteps=100, **options)
    resume(folder, **options)
    actions = np.load(folder / "replay.npy")[:160, 3:5]
    assert np.abs(actions[:50]).max() > 0.9
    assert np.abs(actions[50:]).max() < 0.1
    args = options | {"noise_std": 0.1, "final_noise_std": 0.2}
    resume(folder, total_timesteps=320, **args)
    sigmas = pd.read_csv(folder / "metrics.csv").query("step > 160")["noise_std"]
    assert 0.15 < sigmas.iloc[0] < sigmas.iloc[-1] == pytest.approx(0.2, abs=0.01)


def refuse(monkeypatch, capsys, tmp_path, *arguments) -> str:
    """The one line with which ddpg.py refuses `arguments`, without writing anything."""
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert run_command(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpg: error: ")
    assert contents(tmp_path) == before
    return line


def test_resume_needs_the_replay_memory_as_it_was(tmp_path, monkeypatch, capsys):
    folder, checkpoint = train(tmp_path, env_id="probes:BoundedTarget-v0", total_timesteps=60)
    capsys.readouterr()
    path = folder / "replay.npy"

    def refused(*arguments) -> str:
        return refuse(monkeypatch, capsys, tmp_path, "--resume", folder, "--total-timesteps", 90, *arguments)

    whole = path.read_bytes()
    assert "--resume needs the replay memory" in refused("--buffer-size", 4000)
    assert "(4000, 6)" in refused("--buffer-size", 4000)
    path.write_bytes(b"certainly no array" * 100)
    assert "--resume needs the replay memory" in refused()
    path.unlink()
    assert "--resume needs the replay memory" in refused()
    assert "replay.npy" in refused()
    path.write_bytes(whole)
    assert "steps already" in refused("--total-timesteps", 60)
    assert "probes:BoundedTarget-v0, not on Pendulum-v1" in refused("--env-id", "Pendulum-v1")
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        assert "--buffer-size 5,000 needs" in refused()
    for missing in ("model", "actor_optimizer", "critic_optimizer", "torch_random_state", "random_states", "seconds"):
        torch.save({name: value for name, value in checkpoint.items() if name != missing}, folder / "checkpoint.pt")
        assert "does not fit probes:BoundedTarget-v0" in refused()
    torch.save(checkpoint, folder / "checkpoint.pt")
    assert run_command(monkeypatch, "--resume", folder, "--total-timesteps", 90, "--eval-episodes", 0) == 0
    assert load(folder)["step"] == 90


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--env-id", "Pendulm-v1"), "did you mean Pendulum-v1"),
        (
            ("--env-id", "probes:ManyActions-v0"),
            "MultiDiscrete([2 2]): ddpg.py needs a Box of real numbers with bounds",
        ),
        (("--env-id", "probes:IntegerBox-v0"), "needs a Box of real numbers"),
        (("--env-id", "probes:Target-v0"), "needs a Box of real numbers with bounds"),
        (("--env-id", "probes:ScriptBox-v0"), "needs a Box of real numbers with bounds"),
        (("--env-id", "probes:Images-v0"), "images"),
        (("--tau", 0), "--tau must be above 0 and at most 1, not 0"),
        (("--tau", 1.5), "--tau must be above 0 and at most 1, not 1.5"),
        (("--batch-size", 65, "--buffer-size", 64), "--batch-size must be at most --buffer-size, 64, not 65"),
        (("--batch-norm", "--batch-size", 1), "--batch-norm needs a --batch-size of at least 2"),
        (("--batch-size", 0), "--batch-size must be at least 1"),
        (("--num-threads", 0), "--num-threads must be at least 1"),
        (("--buffer-size", 0), "--buffer-size must be at least 1"),
        (("--buffer-size", 10**12), "--buffer-size 1,000,000,000,000 needs 34,332,275 MiB of memory"),
        (("--noise-std", -0.1), "--noise-std must be at least 0, not -0.1"),
        (("--final-noise-std", -0.1), "--final-noise-std must be at least 0, not -0.1"),
        (("--noise-std", "nan"), "--noise-std must be at least 0, not nan"),
        (("--ou-theta", 1.5), "--ou-theta must be between 0 and 1, not 1.5"),
        (("--gamma", -0.1), "--gamma must be between 0 and 1, not -0.1"),
        (("--learning-starts", -1), "--learning-starts must be at least 0"),
        (("--learning-rate", 0), "--learning-rate must be above 0"),
        (("--actor-learning-rate", 0), "--actor-learning-rate must be above 0"),
        (("--gumbel-temperature", 0), "--gumbel-temperature must be above 0"),
        (("--logit-penalty", -1), "--logit-penalty must be at least 0"),
        (("--total-timesteps", 0), "--total-timesteps must be at least 1"),
        (("--resume", "nowhere"), "there is no checkpoint.pt in nowhere"),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, arguments, text):
    short = () if "--total-timesteps" in arguments else ("--total-timesteps", 20)  # should it be accepted
    assert text in refuse(monkeypatch, capsys, tmp_path, *short, *arguments)


def test_a_replay_memory_that_does_not_fit_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=36_000_000 - 1))
    line = refuse(monkeypatch, capsys, tmp_path)
    assert "--buffer-size 1,000,000 needs 34 MiB of memory, and 34 are free: give 999,999 at most" in line
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=36_000_000))
    options = ("--total-timesteps", 10, "--eval-episodes", 0, "--log-dir", tmp_path / "runs")
    assert run_command(monkeypatch, *options) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert abs((folder / "replay.npy").stat().st_size - 36_000_000) < 1000
    assert "replay memory of 34.3 MiB" in capsys.readouterr().out
