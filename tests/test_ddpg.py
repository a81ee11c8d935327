"""ddpg.py: its networks, targets, gradients and one update against their definitions."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import ddpg
from ddpg import DDPG, Args, td_target, update

BOX, DISCRETE = spaces.Box(-1, 1, (2,)), spaces.Discrete(3)
BRANCHES = [{"target_network": a, "batch_norm": b} for a, b in itertools.product([True, False], [False, True])]
EACH_BRANCH = pytest.mark.parametrize("branch", BRANCHES, ids=str)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(ddpg, "HIDDEN", 5)


def make_model(space: spaces.Space = BOX, **arguments) -> DDPG:
    """Networks in float64 that are far from 0 and from their targets, with running statistics of all kinds."""
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.float64)
        model = DDPG((3,), space, Args(**arguments))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(0.3 * torch.randn_like(tensor))
    return model


def random_batch(seed: int = 0, space: spaces.Space = BOX) -> list[torch.Tensor]:
    """s, a, r, s' and terminated of seven transitions, as `ReplayBuffer.sample` gives them."""
    rng = np.random.default_rng(seed)
    a = np.eye(3)[rng.integers(3, size=7)] if space == DISCRETE else rng.uniform(-1, 1, (7, 2))
    parts = rng.normal(size=(7, 3)), a, rng.normal(size=7), rng.normal(size=(7, 3)), np.arange(7) % 3 == 1.0
    return [torch.from_numpy(part.astype(np.float64)) for part in parts]


def make_optimizers(model: DDPG, optimizer: type, **rates: float) -> dict[str, torch.optim.Optimizer]:
    return {name: optimizer([getattr(model, name).theta], rate) for name, rate in rates.items()}


def parts(network: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


def floats(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and running statistics by name, as views."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


# The networks and the lecture's lines, written out once more


def normalize(x, norm: nn.BatchNorm1d | None, by_batch: bool):
    """Batch normalisation by the minibatch, which moves the running statistics, or by these."""
    if norm is None:
        return x
    mean, variance = norm.running_mean, norm.running_var
    if by_batch:
        mean, variance = x.mean(0), x.var(0, correction=0)
        norm.running_mean.lerp_(mean.detach(), 0.1)
        norm.running_var.lerp_(x.var(0).detach(), 0.1)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def affine(x, linear: nn.Linear, norm: nn.BatchNorm1d | None = None, by_batch: bool = False):
    return normalize(x @ linear.weight.T + linear.bias, norm, by_batch)


def outputs(network, x, by_batch: bool = False):
    """Of the actor, before tanh, or of the critic of Discrete actions: normalised wherever that is possible."""
    first, second, last = parts(network, nn.Linear)
    norms = parts(network, nn.BatchNorm1d) or [None] * 3
    x = normalize(x, norms[0], by_batch)
    return affine(affine(affine(x, first, norms[1], by_batch).relu(), second, norms[2], by_batch).relu(), last)


def Q(critic, x, actions, by_batch: bool = False):
    """Normalised before the action enters, at the second layer."""
    first, second, last = parts(critic, nn.Linear)
    before, between = parts(critic, nn.BatchNorm1d) or [None] * 2
    x = affine(normalize(x, before, by_batch), first, between, by_batch).relu()
    return affine(affine(torch.cat([x, actions], 1), second).relu(), last)[:, 0]


def targets(model: DDPG, batch: list, gamma: float, scale: float = 1.0) -> torch.Tensor:
    *_, rewards, s_next, terminated = batch
    q_next = Q(model.target_critic, s_next, outputs(model.target_actor, s_next).tanh())
    y = [r if end else r + gamma * q for r, q, end in zip(scale * rewards, q_next, terminated, strict=True)]
    return torch.stack(y).detach()


def lecture(model: DDPG, optimizers: dict, batch: list, args: Args) -> dict[str, torch.Tensor]:
    """The lecture's lines from "Set y_i" on, each as it stands there."""
    s, a, *_ = batch
    y = targets(model, batch, args.gamma, args.reward_scale)
    values = Q(model.critic, s, a, by_batch=True)
    L = ((y - values) ** 2).sum() / 7
    descend(L, optimizers["critic"])
    J = Q(model.critic, s, outputs(model.actor, s, by_batch=True).tanh()).sum() / 7
    descend(-J, optimizers["actor"])
    for target, network in (model.target_critic, model.critic), (model.target_actor, model.actor):
        for name, theta in floats(network).items() if args.target_network else ():
            floats(target)[name].copy_(args.tau * theta + (1 - args.tau) * floats(target)[name])
    return {"critic_loss": L, "actor_loss": -J, "q_values": values.mean()}


def descend(loss, optimizer: torch.optim.Optimizer) -> None:
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def check_gradient(gradient, function, network: nn.Module, eps: float = 1e-6) -> None:
    """`gradient` is that of function() with respect to the network's parameters, by finite differences."""
    assert gradient.abs().max() > 0.01
    expected = []
    for flat in (parameter.view(-1) for parameter in network.parameters()):
        for i in range(len(flat)):
            flat[i] += eps
            above = function()
            flat[i] -= 2 * eps
            expected.append((above - function()) / (2 * eps))
            flat[i] += eps
    torch.testing.assert_close(gradient, torch.stack(expected), rtol=1e-4, atol=1e-7)


@EACH_BRANCH
def test_update_is_the_lectures_lines(branch):
    """In every tensor: no network but that whose gradient is taken renews its running statistics, for one thing."""
    args = Args(tau=0.3, gamma=0.8, reward_scale=0.5, **branch)
    model, other = make_model(**branch), make_model(**branch)
    optimizers = make_optimizers(model, torch.optim.Adam, actor=0.01, critic=0.03)
    others = {name: torch.optim.Adam(getattr(other, name).parameters(), 0.01) for name in optimizers}
    others["critic"].param_groups[0]["lr"] = 0.03
    for seed in range(3):
        batch = random_batch(seed)
        metrics = update(model, optimizers, batch, args)
        expected = lecture(other, others, batch, args)
        torch.testing.assert_close(metrics, {name: tensor.detach() for name, tensor in expected.items()})
        assert not any(tensor.requires_grad for tensor in metrics.values())
        torch.testing.assert_close(floats(model), floats(other))
        assert not any(module.training for module in model.modules())


@EACH_BRANCH
def test_gradients_are_finite_differences(branch):
    model, batch, args = make_model(**branch), random_batch(), Args(gamma=0.9, **branch)
    optimizers = make_optimizers(model, torch.optim.SGD, actor=0.0, critic=0.0)
    update(model, optimizers, random_batch(1), args)  # the next gradients are not added to these
    before = copy.deepcopy(model)
    y = targets(before, batch, 0.9)
    update(model, optimizers, batch, args)
    after = copy.deepcopy(model)  # the running statistics of the critic have changed
    L = lambda: ((y - Q(before.critic, *batch[:2], True)) ** 2).sum() / 7  # noqa: E731
    check_gradient(model.critic.theta.grad, L, before.critic)
    minus_J = lambda: -Q(after.critic, batch[0], outputs(after.actor, batch[0], True).tanh()).mean()  # noqa: E731
    check_gradient(model.actor.theta.grad, minus_J, after.actor)
    networks = [model.actor, model.target_actor, *[model.target_critic] * branch["target_network"]]
    others = [parameter for network in networks for parameter in network.parameters()]
    loss = ddpg.critic_loss(model, batch, args)[0]
    assert not any(torch.is_tensor(each) for each in torch.autograd.grad(loss, others, allow_unused=True))


def test_td_target():
    r, values, terminated = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30]), torch.tensor([0.0, 1, 0])
    assert td_target(r, values, terminated, 0.5).tolist() == [6, 2, 18]
    for wrong in (r, values[:, None], terminated), (r, values, terminated[:, None]), (r[:, None], values, terminated):
        with pytest.raises(AssertionError):  # nine numbers
            td_target(*wrong, 0.5)


@pytest.mark.parametrize("reward", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_changes_no_parameter(reward):
    model, batch = make_model(), random_batch()
    before, optimizer = copy.deepcopy(floats(model)), torch.optim.Adam([model.critic.theta])
    batch[2][3] = reward
    with pytest.raises(FloatingPointError, match=f"the critic's loss is {reward}"):
        update(model, {"critic": optimizer, "actor": None}, batch, Args())
    assert all(torch.equal(tensor, before[name]) for name, tensor in floats(model).items())
    assert not optimizer.state


@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=str)
def test_networks_at_the_start(space):
    model = DDPG((3,), space, Args(batch_norm=True))
    without = DDPG((3,), space, Args(target_network=False))
    assert (without.target_actor, without.target_critic) == (without.actor, without.critic)
    for target, network in (model.target_actor, model.actor), (model.target_critic, model.critic):
        torch.testing.assert_close(target.state_dict(), network.state_dict(), rtol=0, atol=0)
        assert not set(map(id, target.parameters())) & set(map(id, network.parameters()))
        *hidden, last = parts(network, nn.Linear)
        assert all(linear.weight.abs().max() > 0.1 for linear in hidden)
        assert 1e-3 < last.weight.abs().max() <= 3e-3 >= last.bias.abs().max() > 0


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=str)
def test_acting_leaves_no_trace(space, batch_norm):
    model, observations = make_model(space, batch_norm=batch_norm).float(), random_batch()[0].float()
    before, logits = copy.deepcopy(model.state_dict()), outputs(model.actor, observations)
    greedy = logits.tanh() if space == BOX else nn.functional.one_hot(logits.argmax(1), 3)
    for observation, expected in zip(observations.numpy(), greedy.tolist(), strict=True):
        action, sample = model.actor.act(observation), model.actor.act(observation, greedy=False)
        np.testing.assert_allclose(action, expected, rtol=1e-4)
        assert action.dtype == sample.dtype == np.float32
        assert space == DISCRETE or np.array_equal(sample, action)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# Discrete actions


@pytest.mark.parametrize("batch_norm", [False, True])
def test_discrete_critic_is_linear_in_the_action(batch_norm):
    """Its slope is what each action is worth."""
    model, (s, actions, *_) = make_model(DISCRETE, batch_norm=batch_norm), random_batch(space=DISCRETE)
    values, each_value = model.critic(s, actions.requires_grad_()), outputs(model.critic, s)
    torch.testing.assert_close(values, each_value[actions == 1])
    torch.testing.assert_close(torch.autograd.grad(values.sum(), actions)[0], each_value)


def test_discrete_targets_are_values_of_a_sample():
    model, batch = make_model(DISCRETE), random_batch(space=DISCRETE)
    parts(model.target_actor, nn.Linear)[-1].bias.data = torch.tensor([0.0, 100.0, 0.0]).double()  # always the second
    s, a, r, s_next, terminated = batch
    errors = r + 0.9 * (1 - terminated) * outputs(model.target_critic, s_next)[:, 1] - outputs(model.critic, s)[a == 1]
    torch.testing.assert_close(ddpg.critic_loss(model, batch, Args(gamma=0.9))[0], errors.square().mean())
    parts(model.target_actor, nn.Linear)[-1].bias.data.zero_()  # now all are drawn
    assert len({ddpg.critic_loss(model, batch, Args(gamma=0.9))[0].item() for _ in range(5)}) > 1


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gumbel_softmax(temperature):
    """Of two actions, the softened sample is a sigmoid of (difference of the logits + logistic noise) / temperature."""
    actor, x = make_model(spaces.Discrete(2), gumbel_temperature=temperature).actor, torch.tensor([[0.3, -0.2, 0.5]])
    samples = actor(x.double().expand(5000, -1))
    difference = -outputs(actor, x.double())[0].diff().item()
    assert samples.unique().tolist() == [0, 1]
    assert (samples.sum(1) == 1).all()
    assert samples[:, 0].mean().item() == pytest.approx(1 / (1 + math.exp(-difference)), abs=4 * 0.5 / 5000**0.5)

    samples[:, 0].mean().backward()  # that of the softened sample
    noise = np.linspace(-40, 40, 100_001)
    density = np.exp(-np.abs(noise)) / (1 + np.exp(-np.abs(noise))) ** 2
    soft = 1 / (1 + np.exp(-(difference + noise) / temperature))
    slope = np.sum(soft * (1 - soft) / temperature * density) * (noise[1] - noise[0])
    gradient = parts(actor, nn.Linear)[-1].bias.grad
    np.testing.assert_allclose(gradient, [slope, -slope], atol=4 * 0.25 / temperature / 5000**0.5)


def test_logits_are_kept_small():
    """Where all actions are worth 0, the penalty's gradient is all there is."""
    model, batch = make_model(DISCRETE), random_batch(space=DISCRETE)
    for tensor in parts(model.critic, nn.Linear)[-1].parameters():
        tensor.data.zero_()
    optimizers = make_optimizers(model, torch.optim.SGD, actor=0.0, critic=0.0)
    assert update(model, optimizers, batch, Args(logit_penalty=0.3))["actor_loss"] == 0
    penalty = lambda: 0.3 * outputs(model.actor, batch[0]).square().sum() / (7 * 3)  # noqa: E731
    check_gradient(model.actor.theta.grad, penalty, model.actor)
