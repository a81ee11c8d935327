"""async_qlearning.py: its parts against their definitions, one worker step by step, workers together, and probes."""

import inspect
from math import inf, sqrt
from queue import SimpleQueue

import numpy as np
import probes
import pytest
import torch
from conftest import load
from gymnasium import spaces

import a3c
import async_qlearning
from async_qlearning import Args, QNetwork, Run, Shared, annealed_epsilon, final_epsilons, make_env, q_loss, td_targets
from common.run import seed_everything


def make_model(seed: int = 0) -> QNetwork:
    torch.manual_seed(seed)
    return QNetwork((3,), 3)


def q_of(model: QNetwork, observation) -> torch.Tensor:
    return model.q(torch.as_tensor(observation, dtype=torch.float32))


@pytest.mark.parametrize("start", [0, -1, 4])
@pytest.mark.parametrize(("shape", "dtype"), [((8,), np.float32), ((2, 4), np.float32), ((8,), np.uint8)])
def test_observations_are_flat_and_actions_count_from_0(monkeypatch, shape, dtype, start):
    received = []
    monkeypatch.setattr(probes.Endless, "observation_space", spaces.Box(0, 1, shape, dtype))
    monkeypatch.setattr(probes.Endless, "action_space", spaces.Discrete(3, start=start))
    monkeypatch.setattr(probes.Endless, "play", lambda self, action: received.append(action) or 1.0)
    env = make_env("probes:Endless-v0")
    assert (env.reset()[0].shape, env.observation_space.shape, env.action_space) == ((8,), (8,), spaces.Discrete(3))
    assert [env.step(action)[0].shape for action in range(3)] == [(8,)] * 3
    assert received == [start, start + 1, start + 2]
    assert "EnvChecker" not in str(env)
    assert make_env("CartPole-v1", "rgb_array").render_mode == "rgb_array"
    for refused in ("Words", "ManyActions", "IntegerBox"):
        with pytest.raises(ValueError, match=r"^(its (observations|images) |Q-learning needs Discrete)"):
            make_env(f"probes:{refused}-v0")


def test_network_begins_orthogonal_follows_theta_and_is_the_same_in_numpy():
    model, observations = make_model(), np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    for layer, gain in zip(model.q[::2], (sqrt(2), sqrt(2), 1.0), strict=True):
        scales = torch.linalg.svdvals(layer.weight)
        torch.testing.assert_close(scales, torch.full_like(scales, gain))
        assert not layer.bias.any()
    view = QNetwork((3,), 3, model.theta)  # another network on the same theta
    assert model.theta.is_shared()
    model.load_state_dict(make_model(4).state_dict())
    view.theta += 0.3
    assert torch.equal(model.theta, make_model(4).theta + 0.3)
    best = q_of(view, observations).argmax(-1).tolist()
    assert [[each.act(observation) for observation in observations] for each in (model, view)] == [best, best]
    assert len(set(best)) > 1


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_actions_are_epsilon_greedy(epsilon):
    model, rng = make_model(), np.random.default_rng(0)
    observation = rng.normal(size=3).astype(np.float32)
    draws = np.bincount([model.act(observation, epsilon, rng) for _ in range(20_000)], minlength=3) / 20_000
    expected = np.full(3, epsilon / 3)
    expected[q_of(model, observation).argmax()] += 1 - epsilon
    np.testing.assert_allclose(draws, expected, atol=0.015)  # four standard errors


def test_epsilon_falls_linearly_from_1_to_its_end():
    args = Args(total_timesteps=1000, exploration_fraction=0.4)
    for T, epsilon in ((0, 1.0), (100, 0.775), (200, 0.55), (400, 0.1), (401, 0.1), (999, 0.1)):
        assert annealed_epsilon(T, 0.1, args) == pytest.approx(epsilon)
    assert annealed_epsilon(0, 0.1, Args(exploration_fraction=0.0)) == 0.1


@pytest.mark.parametrize("num_workers", [1, 2, 8, 17, 1000])
@pytest.mark.parametrize("p", [{0.1: 0.4, 0.01: 0.3, 0.5: 0.3}, {0.3: 0, 0.2: 1}, {0.2: 1e-9, 0.5: 1, 0.1: 1e-9}])
def test_final_epsilons_are_quantiles(p, num_workers):
    args = Args(num_workers=num_workers, final_epsilons=tuple(p), final_epsilon_probs=tuple(p.values()))
    finals = final_epsilons(args).tolist()
    for i, final in enumerate(finals):  # P(epsilon < final) < (i + 1/2) / num_workers <= P(epsilon <= final)
        below, up_to = sum(p[e] for e in p if e < final), sum(p[e] for e in p if e <= final)
        assert below < (i + 0.5) / num_workers <= up_to
    assert (len(finals), finals) == (num_workers, sorted(finals))


def slow_target(i: int, rewards, values, args: Args) -> float:
    """y of step i: at most n_step rewards, not beyond the segment, and the value of the state that they lead to."""
    end = min(i + args.n_step, len(rewards))
    y = sum(args.gamma ** (k - i) * rewards[k] for k in range(i, end))
    return y + args.gamma ** (end - i) * values[end - 1]


@pytest.mark.parametrize("n_step", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_td_targets_are_the_definition(n, n_step):
    rewards, values = torch.from_numpy(np.random.default_rng(0).normal(size=(2, n)))
    expected = [slow_target(i, rewards, values, Args(n_step=n_step, gamma=0.9)) for i in range(n)]
    np.testing.assert_allclose(td_targets(rewards, values, 0.9, n_step), expected)


def pseudo_code(model, target, steps: list[tuple], last_action: int | None, args: Args) -> tuple[torch.Tensor, dict]:
    """The lecture's loop over steps (s, a, r, s', s' is terminal): d theta, and what is logged."""
    values, next_actions = [], [action for _, action, *_ in steps[1:]] + [last_action]
    for (*_, next_observation, terminal), next_action in zip(steps, next_actions, strict=True):
        next_q = q_of(target, next_observation).tolist()
        values.append(0.0 if terminal else max(next_q) if args.target == "q" else next_q[next_action])
    d_theta, errors, qs = torch.zeros_like(model.theta), [], []
    for i, (observation, action, *_) in enumerate(steps):
        y = slow_target(i, [reward for _, _, reward, *_ in steps], values, args)  # a number: nothing flows into it
        qs.append(q_of(model, observation)[action])
        errors.append((y - qs[-1]) ** 2)
        d_theta += torch.cat([g.flatten() for g in torch.autograd.grad(errors[-1], [*model.parameters()])])
    return d_theta, {"td_loss": sum(errors).item() / len(steps), "q_values": sum(qs).item() / len(steps)}


@pytest.mark.parametrize(("target", "n_step"), [("q", 1), ("sarsa", 1), ("q", 3), ("sarsa", 5)])
@pytest.mark.parametrize("terminated", [False, True])
def test_loss_has_the_gradient_of_the_pseudo_code(target, n_step, terminated):
    args, model, theta_minus = Args(target=target, n_step=n_step), make_model(), make_model(1)
    observations, actions, rewards = torch.randn(6, 3), torch.randint(3, (6,)), torch.randn(5)
    batch = observations, actions[: 6 if target == "sarsa" else 5], rewards
    loss, means = q_loss(model, theta_minus, *batch, terminated, args)
    steps = zip(observations, actions, rewards.tolist(), observations[1:], [False] * 4 + [terminated], strict=False)
    expected, expected_means = pseudo_code(model, theta_minus, list(steps), actions[-1], args)
    assert means == pytest.approx(expected_means, rel=1e-5)
    loss.backward()
    d_theta = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (d_theta - expected).norm() < 1e-5 * expected.norm()
    assert all(p.grad is None for p in theta_minus.parameters())
    with pytest.raises(AssertionError):  # shapes that would broadcast
        q_loss(model, theta_minus, observations[:3], actions[:2], rewards[:1], terminated, Args())


@pytest.mark.parametrize("name", ["rmsprop_step", "T", "count_step", "update", "log", "reported", "means"])
def test_what_a3c_has_too_is_the_same(name):  # test_a3c.py holds it to its definition
    ours, other = ((vars(script) | vars(script.Shared))[name] for script in (async_qlearning, a3c))
    assert inspect.getsource(getattr(ours, "fget", ours)) == inspect.getsource(getattr(other, "fget", other))


@pytest.mark.parametrize("first", [0, 7 * 2**40])
def test_shared_updates_the_target_at_the_first_T_from_a_multiple_on(first):
    shared = Shared(torch.ones(1), Args(num_workers=3, target_network_frequency=7), SimpleQueue)
    assert [shared.T, shared.stop.value, *shared.done, shared.means()] == [0, 0, 0, 0, 0, {}]
    assert len(set(shared.episodes)) == 3
    assert (shared.theta_target, shared.theta_target.is_shared(), shared.g, shared.g.is_shared()) == (1, True, 0, True)
    shared.target_updates.value, targets = first // 7, []
    for T in (3, 6, 8, 20, 19, 21, 22, 13, 28, 50, 51):  # some come late, some pass several multiples
        shared.theta.fill_(T)
        shared.steps[0] = first + T
        shared.update_target()
        targets.append(shared.theta_target.item())
    assert targets == [1, 1, 8, 20, 20, 21, 21, 21, 28, 50, 50]


@pytest.mark.parametrize(("frequency", "train_frequency"), [(1, 1), (7, 1), (500, 5)])
def test_target_is_theta_of_the_last_multiple_also_after_resume(train, monkeypatch, frequency, train_frequency):
    count_step, thetas, resume = Shared.count_step, {}, {}
    remember = lambda self, *step: count_step(self, *step) or thetas.update({self.T: self.theta.clone()})  # noqa: E731
    monkeypatch.setattr(Shared, "count_step", remember)
    options = {"env_id": "probes:Endless-v0", "target_network_frequency": frequency, "train_frequency": train_frequency}
    for T_max in (frequency + 1, frequency + 3, 3 * frequency + 5):
        _, folder = train(async_qlearning, total_timesteps=T_max, **options, **resume)
        target, resume = load(folder)["theta_target"], {"resume": str(folder)}
        last = (T_max + 1) // frequency * frequency
        assert not torch.equal(target, thetas[max(1, last - train_frequency)])
        assert torch.equal(target, thetas[last])


class Recorder(Shared):
    """Keeps what a worker does. The other worker, 0, has taken 6 steps already; it moves theta all the time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.steps[0], self.initial, self.updates, self.counted, self.acting = 6, self.theta.clone(), [], {}, {}
        self.move()

    def move(self):
        self.theta.copy_(self.initial + 0.3 * torch.randn_like(self.theta))
        self.acting[self.T] = self.theta.clone()

    def count_step(self, worker, episode=None):
        super().count_step(worker, episode)
        self.move()
        self.counted[self.T] = self.theta.clone()
        self.stop.value = self.T >= self.stop_after

    def update(self, d_theta, learning_rate):
        self.updates.append((d_theta.clone(), learning_rate))
        super().update(d_theta, learning_rate)
        self.move()


def work(env_id: str, shared_class=Shared, **arguments) -> tuple[QNetwork, Shared]:
    """Run one worker, the last one, in this thread. Returns the global network and what was shared."""
    args = Args(env_id=f"probes:{env_id}-v0", **arguments)
    env = make_env(args.env_id)
    torch.manual_seed(0)
    model = QNetwork(env.observation_space.shape, int(env.action_space.n))
    shared = shared_class(model.theta, args, SimpleQueue)
    async_qlearning.worker(args.num_workers - 1, args, shared, 3)
    return model, shared


SETTINGS = {"num_workers": 2, "train_frequency": 5, "max_grad_norm": 20.0, "learning_rate": 0.01, "gamma": 0.9}
SETTINGS |= {"final_epsilons": (0.0, 0.2), "final_epsilon_probs": (0.5, 0.5), "exploration_fraction": 0.5}


@pytest.mark.parametrize(
    ("target", "n_step", "anneal_lr", "I_target", "T_max", "stop_after"),
    [
        ("q", 1, True, 7, 150, inf),
        ("q", 5, False, 1, 150, 113),
        ("sarsa", 1, True, 7, 150, 113),
        ("sarsa", 3, True, 1, 150, inf),
    ],
)
def test_worker_follows_the_pseudo_code(monkeypatch, target, n_step, anneal_lr, I_target, T_max, stop_after):
    monkeypatch.setattr(Recorder, "stop_after", stop_after, raising=False)
    method = {"target": target, "n_step": n_step, "anneal_lr": anneal_lr, "target_network_frequency": I_target}
    _, shared = work("Script", Recorder, total_timesteps=T_max, **method, **SETTINGS)
    args, T, t, next_action, logged, reports, ends = shared.args, 6, 0, None, [], [], []
    rng = seed_everything(args.seed, 3, 1)
    model, theta_minus, env = QNetwork((3,), 2), QNetwork((3,), 2, shared.initial), make_env(shared.args.env_id)
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    for d_theta, rate in shared.updates:
        steps = []
        while not steps or not (any(ends[-1]) or t % 5 == 0 or T == stop_after):
            model.theta.copy_(shared.acting[T])  # what the other worker has written counts at once
            epsilon = annealed_epsilon(T, 0.2, args)
            action = model.act(observation, epsilon, rng) if next_action is None else next_action
            following, reward, *end, info = env.step(action)
            steps.append((observation, action, reward, following, end[0]))
            observation, T, t, next_action = following, T + 1, t + 1, None
            ends.append(tuple(end))
            if T % I_target == 0:
                theta_minus.theta.copy_(shared.counted[T])
        model.theta.copy_(shared.counted[T])
        next_action = model.act(observation, epsilon, rng) if target == "sarsa" else None  # whatever becomes of theta
        gradient, means = pseudo_code(model, theta_minus, steps, next_action, args)
        norm = gradient.norm().item()
        assert (d_theta - gradient * min(1, 20 / norm)).norm() < 1e-4 * min(20, norm)
        assert rate == pytest.approx(0.01 * (1 - (T - 1) / T_max if anneal_lr else 1))
        logged.append([*means.values(), norm, rate, epsilon])
        if any(end):
            reports.append((T, 1, info["episode"]["r"], info["episode"]["l"]))
            (observation, _), next_action = env.reset(), None
    assert len(set(ends)) == 4  # going on, a terminal state, a time limit, both
    assert {norm > 20 for _, _, norm, *_ in logged} == {True, False}
    assert shared.T == T or (shared.T - T < 5 and stop_after == inf)  # a rest is learned only when told to stop
    np.testing.assert_allclose(list(shared.means().values()), np.mean(logged, axis=0), rtol=1e-4)
    assert [(T, worker, score["r"], score["l"]) for T, worker, score, _ in shared.reported()] == reports
    assert (shared.T, shared.done[:], shared.steps[0]) == (min(stop_after, T_max + 1), [0, 1], 6)


PROBE = {"target_network_frequency": 50, "gamma": 0.5, "learning_rate": 0.01, "rmsprop_eps": 0.01}


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_workers_differ_and_train_one_network(train, monkeypatch, backend):
    log_episode, played = Run.log_episode, [0] * 4

    def stop_when_all_have_played(run, step, worker, *episode):
        log_episode(run, step, worker, *episode)
        played[worker] += 1
        run.stopped |= min(played) >= 200

    monkeypatch.setattr(Run, "log_episode", stop_when_all_have_played)
    options = {"num_workers": 4, "backend": backend, "total_timesteps": 10**9, "log_interval": 10**9}  # epsilon stays 1
    code, folder = train(async_qlearning, env_id="probes:ByAction-v0", **options, **PROBE)
    rows = np.genfromtxt(folder / "episodes.csv", delimiter=",", names=True)
    assert (code, load(folder)["step"]) == (0, len(rows))  # each episode is one step; none is lost
    assert len({tuple(rows["return_"][rows["worker"] == worker][:40]) for worker in range(4)}) == 4
    model = QNetwork((1,), 2)
    model.load_state_dict(load(folder)["model"])
    assert q_of(model, [[-1], [1]]).flatten().tolist() == pytest.approx([1, -1, -1, 1], abs=0.6)


@pytest.mark.parametrize(
    ("env_id", "target", "n_step", "values"),
    [
        ("ByObservation", "q", 1, {(-1,): (-1, -1), (1,): (1, 1)}),
        ("ByAction", "q", 1, {(-1,): (1, -1), (1,): (-1, 1)}),
        ("ByEarlierAction", "q", 1, {(0, 0): (-0.5, 0.5), (1, 1): (1, 1)}),
        ("OnlyTruncates", "q", 1, {(0,): (2, 2)}),  # 1 / (1 - gamma); who takes the time limit for an end learns 1.4
        # Q-learning looks at the best action. SARSA and a second reward look at what is done, a quarter of it not best.
        ("ByLaterAction", "q", 1, {(0,): (0.5, 0.5), (1,): (0, 1)}),
        ("ByLaterAction", "sarsa", 1, {(0,): (0.375, 0.375), (1,): (0, 1)}),
        ("ByLaterAction", "q", 2, {(0,): (0.375, 0.375), (1,): (0, 1)}),
    ],
)
def test_probe_is_learned(env_id, target, n_step, values):
    half = {"final_epsilons": (0.5,), "final_epsilon_probs": (1.0,), "exploration_fraction": 0.0}
    method = {"target": target, "n_step": n_step, "num_workers": 1, "train_frequency": 5, "total_timesteps": 800}
    model, _ = work(env_id, **method, **half, **PROBE)
    for observation, expected in values.items():
        assert q_of(model, observation).tolist() == pytest.approx(expected, abs=0.1)
