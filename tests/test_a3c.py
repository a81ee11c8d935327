"""a3c.py: its parts against their definitions, one worker step by step, workers together, and probe environments."""

import time
from functools import partial
from math import inf, sqrt
from queue import SimpleQueue

import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Categorical, Independent, Normal

import a3c
from a3c import ActorCritic, Args, Shared, a3c_loss, make_env, n_step_returns, rmsprop_step, seed_everything

SPACES = [spaces.Discrete(3), spaces.Box(-1, 1, (2,))]


def make_model(space: spaces.Space, seed: int = 0) -> ActorCritic:
    """A network for three observed numbers, far from its uniform start."""
    torch.manual_seed(seed)
    model = ActorCritic((3,), space)
    model.theta.add_(0.3 * torch.randn_like(model.theta))
    return model


def policy_and_value(model: ActorCritic, observation) -> tuple[torch.distributions.Distribution, torch.Tensor]:
    """pi(.|s) and V(s) of one observation or several."""
    observation = torch.as_tensor(observation, dtype=torch.float32)
    outputs, V = model.actor(observation), model.critic(observation).squeeze(-1)
    if model.discrete:
        return Categorical(logits=outputs), V
    mean, raw_variance = outputs.split(outputs.shape[-1] // 2, -1)
    stddev = torch.sqrt(torch.log(1 + torch.exp(raw_variance)) + 0.01)
    return Independent(Normal(torch.tanh(mean), stddev), 1), V


def test_spaces_are_flat_or_refused(monkeypatch):
    for size, space in (5, spaces.MultiDiscrete([5])), (8, spaces.Box(0, 9, (8,), np.uint8)):
        monkeypatch.setattr(probes.Constant, "observation_space", space)
        assert make_env("probes:Constant-v0").observation_space.shape == (size,)
    assert make_env("probes:DictObservation-v0").reset()[0].shape == (11,)
    monkeypatch.setattr(probes.Constant, "action_space", spaces.Tuple([spaces.Discrete(2)]))
    for name in "Words", "Constant", "ManyActions", "IntegerBox", "HugeBounds", "Target", "NoUpperBound":
        with pytest.raises(ValueError, match=r"observations|images|^a3c\.py needs"):
            make_env(f"probes:{name}-v0")
    env = make_env("CartPole-v1", "rgb_array")
    assert (env.render_mode, "Checker" in str(env)) == ("rgb_array", False)


@pytest.mark.parametrize("space", SPACES)
def test_network_agrees_with_torch_distributions(space):
    model, observations = make_model(space), np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    model.theta.copy_(make_model(space, seed=1).theta)  # reaches act, too
    policy, _ = policy_and_value(model, observations)
    likeliest = policy.logits.argmax(-1) if model.discrete else policy.mean
    actions = np.array([model.act(observation) for observation in observations])
    np.testing.assert_allclose(actions, likeliest.detach(), rtol=1e-5, atol=1e-5)
    actions = policy.sample()
    expected = policy.log_prob(actions), policy.entropy()
    torch.testing.assert_close(model.log_prob_and_entropy(torch.from_numpy(observations), actions), expected)


@pytest.mark.parametrize("space", SPACES)
def test_actions_are_drawn_from_the_policy(space):
    model, rng, observation = make_model(space), np.random.default_rng(0), np.array([0.5, -1, 2], np.float32)
    model.actor[-1].bias.data[2:] -= 4  # makes a Gaussian narrow, and an action rare
    policy, _ = policy_and_value(model, observation)
    draws = np.array([model.act(observation, rng) for _ in range(10_000)])
    if model.discrete:
        np.testing.assert_allclose(np.bincount(draws) / 10_000, policy.probs.detach(), atol=0.02)
    else:
        assert draws.dtype == np.float32  # as the network's outputs, so that the loss is
        draws = (draws - policy.mean.detach().numpy()) / policy.stddev.detach().numpy()
        np.testing.assert_allclose([draws.mean(0), *np.cov(draws.T)], [[0, 0], [1, 0], [0, 1]], atol=0.06)


def test_initial_weights_are_orthogonal():
    model = ActorCritic((3,), SPACES[1])
    layers, gains = [*model.actor[::2], *model.critic[::2]], [sqrt(2), sqrt(2), 0.01, sqrt(2), sqrt(2), 1.0]
    scales = [torch.linalg.svdvals(layer.weight) for layer in layers]
    torch.testing.assert_close(scales, [torch.full_like(s, gain) for s, gain in zip(scales, gains, strict=True)])
    assert not any(layer.bias.any() for layer in layers)


@pytest.mark.parametrize(("n", "gamma"), [(1, 0.9), (2, 0.0), (7, 0.9), (7, 1.0)])
def test_n_step_returns_are_the_discounted_sums(n, gamma):
    r, V = np.random.default_rng(n).normal(size=n).tolist(), 1.7
    expected = [sum(gamma ** (k - i) * r[k] for k in range(i, n)) + gamma ** (n - i) * V for i in range(n)]
    torch.testing.assert_close(n_step_returns(r, V, gamma), torch.tensor(expected))


def pseudo_code(model: ActorCritic, steps: list[tuple], args: Args) -> tuple[torch.Tensor, list[float]]:
    """The lecture's loop over steps like those in `probes.Script.log`: d theta, to be descended, and what is logged."""
    sums = np.zeros(4)
    model.zero_grad()
    R = 0.0 if steps[-1][4] else policy_and_value(model, steps[-1][3])[1].item()
    for observation, action, reward, *_ in reversed(steps):
        R = reward + args.gamma * R
        policy, V = policy_and_value(model, observation)
        log_prob, entropy = policy.log_prob(torch.as_tensor(action)), policy.entropy()
        (-log_prob * (R - V.item()) - args.ent_coef * entropy).backward()  # accumulate gradients
        (args.vf_coef * (R - V) ** 2).backward()
        sums += [-log_prob.item() * (R - V.item()), (R - V.item()) ** 2, entropy.item(), V.item()]
    return torch.cat([p.grad.flatten() for p in model.parameters()]), (sums / len(steps)).tolist()


def test_loss_refuses_shapes_that_would_broadcast():
    for n in (1, 2):  # rewards, for three observations and one action
        with pytest.raises(AssertionError):
            a3c_loss(make_model(SPACES[0]), torch.zeros(3, 3), torch.tensor([0]), [1.0] * n, False, Args())


def test_rmsprop_step_is_the_papers_formula():
    rng, args = np.random.default_rng(0), Args(rmsprop_alpha=0.9, rmsprop_eps=0.1)
    theta, g = rng.normal(size=5), np.zeros(5)
    ours = torch.tensor(theta), torch.tensor(g)
    for eta in (0.1, 0.05, 0.01):
        d = rng.normal(size=5)
        rmsprop_step(*ours, torch.tensor(d), eta, args)
        g = 0.9 * g + 0.1 * d**2
        theta = theta - eta * d / np.sqrt(g + 0.1)
        np.testing.assert_allclose(torch.stack(ours), [theta, g], rtol=1e-12)


def test_shared_keeps_what_workers_tell():
    shared, start = Shared(torch.ones(2), Args(num_workers=3), SimpleQueue), time.monotonic()
    for worker in (1, 2, 2):
        shared.count_step(worker, {"r": 7, "l": shared.T + 1, "t": 0.1})
        shared.log(worker, {name: shared.T * len(name) for name in reversed(a3c.METRICS)})
    assert (shared.T, *shared.steps) == (3, 0, 1, 2)
    assert shared.sums[:, -1].tolist() == [0, 1, 2]  # each worker writes where no other does
    assert shared.means() == {name: 2 * len(name) for name in a3c.METRICS}
    *columns, times = zip(*sorted(shared.reported()), strict=True)
    assert columns == [(1, 2, 3), (1, 2, 2), tuple({"r": 7, "l": number, "t": 0.1} for number in (1, 2, 3))]
    assert start <= times[0] <= times[2] <= time.monotonic()
    assert (list(shared.reported()), shared.means()) == ([], {})  # nothing new since the last call


class Recorder(Shared):
    """Records the updates. Theta moves at every step, and the other worker, 0, has taken 10 steps already."""

    def __init__(self, stop_after: float, *arguments):
        super().__init__(*arguments)
        self.steps[0], self.stop_after, self.start, self.updates = 10, stop_after, self.theta.clone(), []

    def count_step(self, worker, episode=None):
        super().count_step(worker, episode)
        self.theta += 0.01 * torch.randn_like(self.theta)
        self.stop.value = self.T >= self.stop_after

    def update(self, d_theta, learning_rate):
        self.updates.append((self.start, d_theta.clone(), learning_rate))
        super().update(d_theta, learning_rate)
        self.start = self.theta.clone()  # of the next segment


def work(env_id: str, shared_class=Shared, **arguments) -> tuple[ActorCritic, Shared]:
    """Run one worker, the last one, in this thread. Returns the global network and what was shared."""
    args = Args(env_id=f"probes:{env_id}-v0", t_max=5, **arguments)
    env = make_env(args.env_id)
    torch.manual_seed(0)
    model = ActorCritic(env.observation_space.shape, env.action_space)
    shared = shared_class(model.theta, args, SimpleQueue)
    a3c.worker(args.num_workers - 1, args, shared, 3)
    return model, shared


@pytest.mark.parametrize(("env_id", "anneal_lr", "stop_after"), [("Script", True, inf), ("BoundedScript", False, 112)])
def test_worker_follows_the_pseudo_code(env_id, anneal_lr, stop_after):
    settings = {"ent_coef": 0.3, "vf_coef": 0.7, "max_grad_norm": 20.0, "learning_rate": 0.01, "total_timesteps": 153}
    model, shared = work(env_id, partial(Recorder, stop_after), num_workers=2, anneal_lr=anneal_lr, **settings)
    T, rng, ends, reports, norms, logged = 10, seed_everything(shared.args.seed, 3, 1), [], [], [], []
    env = make_env(shared.args.env_id)
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    for theta, d_theta, rate in shared.updates:
        assert rate == pytest.approx(0.01 * (1 - T / 153 if anneal_lr else 1))
        model.theta.copy_(theta)  # theta' = theta, as it was when the segment began
        steps = []
        while not steps or not (any(ends[-1]) or len(steps) == 5 or T == stop_after):
            action = model.act(observation, rng)
            following, reward, *end, info = env.step(action)
            steps.append((observation, action, reward, following, *end))
            ends.append(tuple(end))
            observation, T = following, T + 1
        if any(end):
            reports.append((T, 1, info["episode"]["r"], info["episode"]["l"]))
            observation, _ = env.reset()
        gradient, means = pseudo_code(model, steps, shared.args)
        norms.append(gradient.norm().item())
        logged.append([*means, norms[-1], rate])
        assert (d_theta - min(1, 20 / norms[-1]) * gradient).norm() < 1e-4 * d_theta.norm()
    assert len(set(ends)) == 4  # going on, a terminal state, a time limit, both
    assert T == min(stop_after, 158)
    assert shared.steps[:] == [10, T - 10]
    assert shared.sums[:, -1].tolist() == [0, len(logged)]
    assert min(norms) < 20 < max(norms)
    np.testing.assert_allclose(list(shared.means().values()), np.mean(logged, axis=0), rtol=1e-4)
    assert [(T, worker, score["r"], score["l"]) for T, worker, score, _ in shared.reported()] == reports
    assert shared.done[:] == [0, 1]
    assert [tensor.is_shared() for tensor in (shared.theta, shared.g)] == [True, True]


PROBE = {"total_timesteps": 500, "gamma": 0.5, "learning_rate": 0.01, "rmsprop_eps": 0.01, "ent_coef": 0.0}
KNOWN = {  # observation: (value, best action)
    "ByAction": {(-1,): (1, 0), (1,): (1, 1)},
    "ByEarlierAction": {(0, 0): (0.5, 1), (1, 1): (1, None)},
    "OnlyTruncates": {(0,): (2, None)},  # 1 / (1 - gamma); who takes the time limit for an end learns 1.4
}


def test_the_policy_trains_the_layers_that_it_shares():
    model = ActorCritic((2, 8, 6), SPACES[0])
    batch = torch.randint(256, (3, 2, 8, 6), dtype=torch.uint8), torch.tensor([0, 2]), [1.0, -2.0]
    loss, _ = a3c_loss(model, *batch, True, Args(vf_coef=0.0))
    assert any(gradient.any() for gradient in torch.autograd.grad(loss, list(model.body.parameters())))


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_workers_train_one_network(tmp_path, backend):
    settings = PROBE | {"env_id": "probes:ByAction-v0", "num_workers": 3, "total_timesteps": 1000, "eval_episodes": 0}
    assert a3c.main(Args(backend=backend, log_dir=str(tmp_path), **settings)) == 0
    (folder,) = tmp_path.iterdir()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    episodes = np.genfromtxt(folder / "episodes.csv", delimiter=",", names=True)
    assert checkpoint["step"] == len(episodes) > 1000  # each episode is one step; none is lost
    assert len(set(episodes["worker"])) > 1
    assert (folder / "metrics.csv").read_text().count("\n") > 1  # a row below the header: their metrics arrive
    model = ActorCritic((1,), spaces.Discrete(2))
    model.load_state_dict(checkpoint["model"])
    assert policy_and_value(model, [[-1], [1]])[0].probs.diag().min() > 0.8


@pytest.mark.parametrize("env_id", KNOWN)
def test_probe_is_learned(env_id):
    model, _ = work(env_id, num_workers=1, **PROBE)
    for observation, (value, action) in KNOWN[env_id].items():
        policy, V = policy_and_value(model, observation)
        assert V.item() == pytest.approx(value, abs=0.1)
        assert action is None or policy.probs[action] > 0.9


@pytest.mark.parametrize(
    ("env_id", "best"),
    [("BoundedTarget", {1: (0.4, -0.25), -1: (-0.6, 0.5)}), ("BoundedByLaterAction", {1: (1, -1)})],  # at the bounds
)
def test_probe_with_continuous_actions_is_learned(env_id, best):
    model, _ = work(env_id, num_workers=1, total_timesteps=4000, learning_rate=0.01)
    for observation, action in best.items():
        np.testing.assert_allclose(model.act(np.array([observation], np.float32)), action, atol=0.1)
