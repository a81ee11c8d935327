"""async_qlearning.py against the definitions, on probe environments, and with every option."""

import csv
import inspect
import json
from collections import Counter
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces

import a3c
import async_qlearning
from async_qlearning import Args, QNetwork, annealed_epsilon, draw_final_epsilons, q_loss, td_targets

METHODS = pytest.mark.parametrize(("target", "n_step"), [("q", 1), ("sarsa", 1), ("q", 3), ("q", 5), ("sarsa", 3)])


def make_model(num_actions=2, observation_size=3, seed=0) -> QNetwork:
    torch.manual_seed(seed)
    return QNetwork(observation_size, spaces.Discrete(num_actions))


def train(tmp_path, **arguments):
    """Run async_qlearning.py's main in this process. Returns the run's folder and its checkpoint."""
    args = Args(**{"log_dir": str(tmp_path / "runs"), "eval_episodes": 0, "num_workers": 1} | arguments)
    assert async_qlearning.main(args) == 0
    folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return folder, torch.load(folder / "checkpoint.pt", weights_only=True)


def q_values(checkpoint, env_id, *observation) -> list[float]:
    env = gym.make(env_id)
    model = QNetwork(spaces.flatdim(env.observation_space), env.action_space)
    model.load_state_dict(checkpoint["model"])
    return model(torch.tensor([observation], dtype=torch.float32))[0].tolist()


def read(table) -> list[dict]:
    with open(table) as file:
        return list(csv.DictReader(file))


# Oracles: the network and the exploration


def test_numpy_network_equals_torch():
    model = make_model(num_actions=5)
    for seed in range(3):  # what is written to theta must reach both
        model.theta.copy_(make_model(num_actions=5, seed=seed).theta)
        observations = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
        best = model(torch.from_numpy(observations)).argmax(-1).tolist()
        assert [model.act(observation) for observation in observations] == best
        assert len(set(best)) > 2


def test_a_network_on_a_given_theta_follows_it():
    model = make_model()
    view = QNetwork(3, spaces.Discrete(2), model.theta)
    model.theta.mul_(2)
    observations = torch.randn(5, 3)
    torch.testing.assert_close(view(observations), model(observations))
    assert view.theta is model.theta


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_actions_are_epsilon_greedy(epsilon):
    model, rng = make_model(num_actions=3), np.random.default_rng(0)
    observation = rng.normal(size=3).astype(np.float32)
    draws = np.bincount([model.act(observation, epsilon, rng) for _ in range(20_000)], minlength=3) / 20_000
    expected = np.full(3, epsilon / 3)
    expected[model.act(observation)] += 1 - epsilon
    np.testing.assert_allclose(draws, expected, atol=0.015)  # four standard errors


def test_actions_begin_at_the_spaces_start():
    model = QNetwork(3, spaces.Discrete(3, start=-1))
    assert [model.to_env(index) for index in range(3)] == [-1, 0, 1]


def test_epsilon_falls_linearly_from_1_to_its_end():
    args = Args(total_timesteps=1000, exploration_fraction=0.4)
    assert annealed_epsilon(0, 0.1, args) == 1.0
    assert annealed_epsilon(200, 0.1, args) == pytest.approx(0.55)
    assert annealed_epsilon(100, 0.5, args) == pytest.approx(0.875)
    assert annealed_epsilon(400, 0.1, args) == annealed_epsilon(999, 0.1, args) == 0.1
    np.testing.assert_allclose(annealed_epsilon(200, np.array([0.1, 0.5]), args), [0.55, 0.75])
    assert annealed_epsilon(0, 0.1, Args(exploration_fraction=0.0)) == 0.1


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8, 16])
def test_final_epsilons_are_drawn_with_their_probabilities(num_workers):
    args, rng = Args(num_workers=num_workers), np.random.default_rng(0)
    draws = [draw_final_epsilons(args, rng) for _ in range(4000)]
    shares = {epsilon: np.mean([draw == epsilon for draw in draws], axis=0) for epsilon in args.final_epsilons}
    for draw in draws:
        assert draw.shape == (num_workers,)
        assert draw.min() < 0.5  # never does everyone explore at 0.5
        for epsilon, p in zip(args.final_epsilons, args.final_epsilon_probs, strict=True):
            assert num_workers == 1 or abs((draw == epsilon).sum() - num_workers * p) < 1
    expected = (0.4, 0.3, 0.3) if num_workers > 1 else (4 / 7, 3 / 7, 0)
    for epsilon, p in zip(args.final_epsilons, expected, strict=True):
        np.testing.assert_allclose(shares[epsilon], p, atol=0.032)  # four standard errors, for each worker


def test_final_epsilons_of_one_kind():
    rng = np.random.default_rng(0)
    only = Args(num_workers=3, final_epsilons=(0.5,), final_epsilon_probs=(1.0,))
    assert draw_final_epsilons(only, rng).tolist() == [0.5] * 3
    certain = Args(num_workers=3, final_epsilons=(0.1, 0.5), final_epsilon_probs=(0.0, 1.0))
    assert draw_final_epsilons(certain, rng).tolist() == [0.5] * 3


# Oracles: the targets and their gradients


def slow_target(i, rewards, values, n_step, gamma):
    """y of step i: at most n_step rewards, not beyond the segment, and the value of the state that they lead to."""
    end = min(i + n_step, len(rewards))
    return sum(gamma ** (k - i) * rewards[k] for k in range(i, end)) + gamma ** (end - i) * values[end - 1]


@pytest.mark.parametrize("n_step", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_td_targets_are_the_definition(n, n_step):
    rewards, values = torch.randn(2, n, dtype=torch.float64)
    expected = [slow_target(i, rewards, values, n_step, 0.9) for i in range(n)]
    np.testing.assert_allclose(td_targets(rewards, values, 0.9, n_step), expected)


def test_one_step_targets():
    y = td_targets(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 0.0]), gamma=0.5)
    assert y.tolist() == [6.0, 12.0, 3.0]  # r + gamma Q twice, and r alone after a terminal state
    assert td_targets(torch.tensor([1.0, 2.0]), torch.tensor([9.0, 8.0]), 0.5, n_step=2).tolist() == [4.0, 6.0]


def pseudo_code_gradient(model, theta_target, steps, next_actions, args):
    """d theta of one segment, the lecture's loop step by step.

    `steps` are of `probes.Script.log`, `next_actions` what SARSA takes in each next state.
    """
    target = QNetwork(3, model.space, theta_target)
    rewards, values = [step[2] for step in steps], []
    for (_, _, _, next_observation, terminated, _), next_action in zip(steps, next_actions, strict=True):
        next_q = target(torch.from_numpy(next_observation)).tolist()
        value = max(next_q) if args.target == "q" else next_q[next_action]
        values.append(0.0 if terminated else value)
    d_theta = torch.zeros_like(model.theta)
    for i, (observation, action, *_) in enumerate(steps):
        y = slow_target(i, rewards, values, args.n_step, args.gamma)
        error = (y - model(torch.from_numpy(observation))[action]) ** 2
        d_theta += torch.cat([g.flatten() for g in torch.autograd.grad(error, list(model.parameters()))])
    return d_theta


class RecordingOptimizer:
    """In the place of SharedRMSProp: keeps every gradient beside theta and theta-, then moves theta elsewhere."""

    def __init__(self, shared):
        self.shared, self.theta, self.updates = shared, shared.optimizer.theta, []

    def step(self, d_theta, learning_rate):
        record = {"theta": self.theta.clone(), "theta_target": self.shared.theta_target.clone()}
        self.updates.append(record | {"d_theta": d_theta.clone(), "learning_rate": learning_rate, "T": self.shared.T()})
        self.theta.add_(0.1 * torch.randn_like(self.theta))


def record_worker(monkeypatch, args, stop_after=None, index=0, final_epsilons=(0.5,)):
    """Run one worker on `Script` in this thread. Returns the shared state, its messages, and what `act` was asked."""
    probes.Script.log.clear()
    choices, act, messages = [], QNetwork.act, []

    def recording_act(self, observation, epsilon=0.0, rng=None):
        choices.append((observation.tobytes(), epsilon, act(self, observation, epsilon, rng)))
        return choices[-1][-1]

    def send(message):
        messages.append(message)
        shared.stop.fill_(len(messages) == stop_after)

    monkeypatch.setattr(QNetwork, "act", recording_act)
    num_metrics = len(async_qlearning.METRICS) + len(final_epsilons)
    shared = async_qlearning.Shared(make_model().theta.clone(), num_metrics, args)
    shared.theta_target.copy_(make_model(seed=1).theta)
    shared.optimizer = RecordingOptimizer(shared)
    channel = SimpleNamespace(wait_for_start=lambda: 0.0, send=send)
    async_qlearning.worker(channel, index, args, shared, np.array(final_epsilons), np.random.default_rng(3))
    assert messages.pop()[0] is None
    return shared, messages, choices


def segments_of(log, args) -> list[list]:
    """The steps between updates: t mod I_AsyncUpdate == 0, or the end of an episode. The last may have had none."""
    segments = [[]]
    for t, step in enumerate(log, start=1):
        segments[-1].append(step)
        if t % args.train_frequency == 0 or step[-2] or step[-1]:
            segments.append([])
    return segments[:-1]


@METHODS
def test_worker_computes_the_gradients_of_the_pseudo_code(monkeypatch, target, n_step):
    args = Args(
        env_id="Script-v0",
        train_frequency=5,
        target_network_frequency=23,
        total_timesteps=80,
        target=target,
        n_step=n_step,
        max_grad_norm=1e9,
        num_workers=1,
        gamma=0.9,
    )
    shared, _, choices = record_worker(monkeypatch, args)
    log, updates = list(probes.Script.log), shared.optimizer.updates
    segments = segments_of(log, args)
    kinds = {"terminated" if s[-1][-2] else "truncated" if s[-1][-1] else "cut off" for s in segments}
    assert kinds == {"terminated", "truncated", "cut off"}
    assert len(updates) == len(segments) > 10
    chosen = {observation: action for observation, _, action in choices}
    assert len(chosen) == len(choices)  # a worker chooses once in each state
    assert all(chosen[step[0].tobytes()] == step[1] for step in log)  # and does what it chose
    model, T = make_model(), 0
    theta_target = make_model(seed=1).theta
    for update, segment in zip(updates, segments, strict=True):
        before, T = T, T + len(segment)
        assert update["T"] == T
        model.theta.copy_(update["theta"])
        if before // 23 < T // 23:  # theta- <- theta, before theta is updated
            theta_target = update["theta"]
        torch.testing.assert_close(update["theta_target"], theta_target)
        next_actions = [chosen.get(step[3].tobytes()) for step in segment]  # None after a terminal state
        expected = pseudo_code_gradient(model, theta_target, segment, next_actions, args)
        assert (update["d_theta"] - expected).norm() < 1e-4 * expected.norm()


def test_n_step_with_one_reward_is_the_one_step_method():
    args, observations, actions, rewards = Args(), torch.randn(7, 3), torch.randint(2, (6,)), torch.randn(6)
    model, target = make_model(), make_model(seed=1)
    with torch.no_grad():
        y = rewards + args.gamma * target(observations[1:]).max(-1).values
        expected = (y - model(observations[:-1])[torch.arange(6), actions]).square()
    loss, (td_loss, q) = q_loss(model, target, observations, actions, rewards, False, args)
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert td_loss == pytest.approx(expected.mean().item(), rel=1e-5)
    assert q == pytest.approx(model(observations[:-1])[torch.arange(6), actions].mean().item(), rel=1e-5)


def test_nothing_flows_into_the_target():
    model, target = make_model(), make_model(seed=1)
    loss, _ = q_loss(model, target, torch.randn(4, 3), torch.randint(2, (3,)), torch.randn(3), False, Args())
    assert torch.autograd.grad(loss, list(target.parameters()), allow_unused=True) == (None,) * 6


def test_worker_anneals_clips_and_counts(monkeypatch):
    args = Args(
        env_id="Script-v0",
        train_frequency=5,
        total_timesteps=60,
        max_grad_norm=0.5,
        learning_rate=0.01,
        num_workers=1,
        exploration_fraction=0.5,
    )
    shared, messages, choices = record_worker(monkeypatch, args)
    log, updates = list(probes.Script.log), shared.optimizer.updates
    assert shared.T() == len(log) == 61  # until T > T_max
    assert all(update["d_theta"].norm() <= 0.5001 for update in updates)
    assert any(update["d_theta"].norm() > 0.4999 for update in updates)
    np.testing.assert_allclose(
        [update["learning_rate"] for update in updates], [0.01 * max(0, 1 - update["T"] / 60) for update in updates]
    )
    epsilons = [1 - 0.5 * min(1, T / 30) for T in range(61)]  # of worker 0 it ends at 0.5
    np.testing.assert_allclose([epsilon for _, epsilon, _ in choices], epsilons)
    ends = [i + 1 for i, step in enumerate(log) if step[-2] or step[-1]]
    assert [message[0][0] for message in messages] == ends  # T at the end of each episode
    assert [message[0][3] for message in messages] == np.diff([0, *ends]).tolist()
    returns = [sum(step[2] for step in log[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    np.testing.assert_allclose([message[0][2] for message in messages], returns)
    monkeypatch.undo()
    args.anneal_lr = False
    assert {update["learning_rate"] for update in record_worker(monkeypatch, args)[0].optimizer.updates} == {0.01}


def test_worker_logs_what_it_computed(monkeypatch):
    args = Args(
        env_id="Script-v0",
        train_frequency=3,
        total_timesteps=2,
        max_grad_norm=1e-3,
        num_workers=1,
        exploration_fraction=3.0,
        target_network_frequency=10**9,
        learning_rate=0.01,
        anneal_lr=False,
    )
    shared, _, _ = record_worker(monkeypatch, args)
    (update,), log = shared.optimizer.updates, list(probes.Script.log)  # one segment
    model, target = make_model(), make_model(seed=1)
    observations = torch.tensor(np.array([step[0] for step in log] + [log[-1][3]]))
    actions, rewards = torch.tensor([step[1] for step in log]), torch.tensor([step[2] for step in log])
    _, means = q_loss(model, target, observations, actions, rewards, log[-1][-2], args)
    norm = pseudo_code_gradient(model, target.theta, log, [None] * len(log), args).norm().item()
    assert norm > 10 * update["d_theta"].norm()  # logged before clipping
    assert list(async_qlearning.METRICS) == ["td_loss", "q_values", "grad_norm", "learning_rate"]
    np.testing.assert_allclose(shared.sums[0], [1, *means, norm, 0.01, 0.75], rtol=1e-4)  # epsilon: half-way to 0.5


def test_a_worker_has_an_epsilon_and_counters_of_its_own(monkeypatch):
    args = Args(env_id="Script-v0", total_timesteps=60, num_workers=3, exploration_fraction=0.0)
    shared, _, choices = record_worker(monkeypatch, args, index=1, final_epsilons=(0.1, 0.9, 0.3))
    assert {epsilon for _, epsilon, _ in choices} == {0.9}
    assert shared.steps.tolist() == [0, 61, 0]
    assert shared.sums.any(1).tolist() == [False, True, False]
    np.testing.assert_allclose(shared.sums[1, -3:] / shared.sums[1, 0], [0.1, 0.9, 0.3])


def test_worker_stops_when_told(monkeypatch):
    args = Args(env_id="Script-v0", total_timesteps=10**9, num_workers=1)
    shared, messages, _ = record_worker(monkeypatch, args, stop_after=3)
    assert len(messages) == 3
    assert shared.T() == len(probes.Script.log) == sum(message[0][3] for message in messages)


def test_worker_leaves_theta_alone_when_the_gradient_is_not_finite():
    args = Args(env_id="NotANumber-v0", total_timesteps=10**9, num_workers=1)
    model = make_model(observation_size=1)
    shared = async_qlearning.Shared(model.theta.clone(), len(async_qlearning.METRICS) + 1, args)
    channel = SimpleNamespace(wait_for_start=lambda: 0.0, send=lambda message: None)
    with pytest.raises(FloatingPointError):
        async_qlearning.worker(channel, 0, args, shared, np.array([0.1]), np.random.default_rng(0))
    assert shared.T() >= 40
    assert shared.optimizer.theta.isfinite().all()
    assert shared.optimizer.g.isfinite().all()
    assert (shared.optimizer.theta != model.theta).any()


def test_the_optimiser_is_the_one_of_a3c():
    """Repeated in both scripts, tested in test_a3c.py."""
    for name in ("__init__", "step"):
        ours, other = (getattr(script.SharedRMSProp, name) for script in (async_qlearning, a3c))
        assert inspect.getsource(ours) == inspect.getsource(other)


# Oracles: the workers together


@pytest.fixture
def shared_of_run(monkeypatch) -> list:
    """The `Shared` of every run that the test makes."""
    made, init = [], async_qlearning.Shared.__init__

    def recording_init(self, *arguments):
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(async_qlearning.Shared, "__init__", recording_init)
    return made


@pytest.mark.parametrize("backend", ["thread", "process"])
@pytest.mark.parametrize("frequency", [10, 300])
def test_the_target_is_updated_once_for_each_multiple(tmp_path, backend, frequency, shared_of_run):
    folder, checkpoint = train(
        tmp_path,
        env_id="probes:Constant-v0",
        num_workers=8,
        total_timesteps=3000,
        backend=backend,
        target_network_frequency=frequency,
    )
    assert shared_of_run[0].target_updates == 3000 // frequency
    rows = read(folder / "episodes.csv")  # every episode has one step, so every step is a row
    assert 3000 < checkpoint["step"] == len(rows) <= 3008
    assert len({row["worker"] for row in rows}) > 1


def test_the_target_is_theta_of_the_last_multiple(tmp_path):
    """With a single multiple, early on, theta- stays behind; with one at every step it is theta but for an update."""
    short = {"env_id": "probes:Constant-v0", "total_timesteps": 500, "train_frequency": 1}
    _, checkpoint = train(tmp_path, **short, target_network_frequency=400)
    late = (checkpoint["theta_target"] - torch.cat([p.flatten() for p in checkpoint["model"].values()])).norm()
    _, checkpoint = train(tmp_path, **short, target_network_frequency=1, seed=2)
    fresh = (checkpoint["theta_target"] - torch.cat([p.flatten() for p in checkpoint["model"].values()])).norm()
    assert fresh < 0.1 * late


def test_one_at_a_time_updates_the_target():
    shared = async_qlearning.Shared(torch.zeros(3), 4, Args())
    shared.optimizer.theta.fill_(1.0)
    with shared.target_lock:  # another worker is at it
        shared.update_target(1)
    assert shared.target_updates == 0
    assert not shared.theta_target.any()
    shared.update_target(3)
    assert shared.target_updates == 3
    assert shared.theta_target.tolist() == [1.0] * 3
    shared.optimizer.theta.fill_(2.0)
    shared.update_target(3)  # a latecomer
    assert shared.theta_target.tolist() == [1.0] * 3


def test_one_worker_and_one_seed_repeat_a_run_on_both_backends(tmp_path):
    def episodes(**arguments):
        folder, _ = train(tmp_path, total_timesteps=3000, **arguments)
        return [[v for k, v in row.items() if k != "time"] for row in read(folder / "episodes.csv")]

    by_thread = episodes(backend="thread")
    assert len(by_thread) > 20
    assert episodes(backend="process") == by_thread
    assert episodes(backend="thread", seed=2) != by_thread


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_workers_train_one_network_and_it_is_evaluated(tmp_path, backend):
    folder, checkpoint = train(
        tmp_path,
        env_id="probes:ByAction-v0",
        num_workers=4,
        backend=backend,
        total_timesteps=8000,
        eval_episodes=50,
        log_interval=1000,
    )
    for observation in (-1.0, 1.0):
        values = q_values(checkpoint, "ByAction-v0", observation)
        assert values == pytest.approx([-observation, observation], abs=0.2)
    assert json.loads((folder / "evaluation.json").read_text())["returns"] == [1.0] * 50  # greedy: no mistakes
    final, last = json.loads((folder / "args.json").read_text())["final_epsilons_drawn"], read(folder / "metrics.csv")
    assert Counter(final) <= Counter({0.1: 2, 0.01: 2, 0.5: 2})
    assert [float(last[-1][f"epsilon_{index}"]) for index in range(4)] == final
    assert float(last[0]["epsilon_0"]) > float(last[1]["epsilon_0"])


def test_workers_differ(tmp_path):
    """Environments and generators of their own: not all first episodes are alike."""
    everyone = {"final_epsilons": (0.5,), "final_epsilon_probs": (1.0,), "learning_rate": 1e-30}
    folder, _ = train(tmp_path, num_workers=4, backend="process", total_timesteps=2000, **everyone)
    first = {int(row["worker"]): row["length"] for row in reversed(read(folder / "episodes.csv"))}
    assert len(first) == 4
    assert len(set(first.values())) > 1


# Probe environments: one thing at a time has to be learned

PROBE = {
    "total_timesteps": 4000,
    "train_frequency": 5,
    "target_network_frequency": 50,
    "gamma": 0.5,
    "learning_rate": 0.01,
    "rmsprop_eps": 0.01,
}
HALF_RANDOM = {"final_epsilons": (0.5,), "final_epsilon_probs": (1.0,), "exploration_fraction": 0.0}


def test_probe_constant_reward(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:Constant-v0", **PROBE)
    assert q_values(checkpoint, "Constant-v0", 0) == pytest.approx([1, 1], abs=0.05)


def test_probe_reward_by_observation(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByObservation-v0", **PROBE)
    assert q_values(checkpoint, "ByObservation-v0", 1) == pytest.approx([1, 1], abs=0.05)
    assert q_values(checkpoint, "ByObservation-v0", -1) == pytest.approx([-1, -1], abs=0.05)


def test_probe_reward_by_action(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByAction-v0", **PROBE)
    assert q_values(checkpoint, "ByAction-v0", 1) == pytest.approx([-1, 1], abs=0.1)
    assert q_values(checkpoint, "ByAction-v0", -1) == pytest.approx([1, -1], abs=0.1)


def test_probe_reward_by_earlier_action(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByEarlierAction-v0", **PROBE, **HALF_RANDOM)
    assert q_values(checkpoint, "ByEarlierAction-v0", 1, 1) == pytest.approx([1, 1], abs=0.1)
    assert q_values(checkpoint, "ByEarlierAction-v0", 0, 0) == pytest.approx([-0.5, 0.5], abs=0.1)  # gamma


def test_probe_that_only_truncates(tmp_path):
    """1 / (1 - 0.5) = 2; who takes the time limit for a terminal state learns the mean of 1, 1.5 and 1.75."""
    _, checkpoint = train(tmp_path, env_id="probes:OnlyTruncates-v0", **PROBE)
    assert q_values(checkpoint, "OnlyTruncates-v0", 0) == pytest.approx([2, 2], abs=0.1)


@pytest.mark.parametrize(("target", "n_step", "value"), [("q", 1, 0.5), ("sarsa", 1, 0.375), ("q", 2, 0.375)])
def test_probe_reward_by_later_action(tmp_path, target, n_step, value):
    """Half of the actions are drawn, a quarter is not the best. Q-learning looks at the best: gamma times 1. SARSA, and
    two steps of rewards, look at what is done: gamma times 3 / 4."""
    arguments = PROBE | HALF_RANDOM | {"target": target, "n_step": n_step, "learning_rate": 0.005}
    _, checkpoint = train(tmp_path, env_id="probes:ByLaterAction-v0", **arguments)
    assert q_values(checkpoint, "ByLaterAction-v0", 1) == pytest.approx([0, 1], abs=0.05)
    assert q_values(checkpoint, "ByLaterAction-v0", 0) == pytest.approx([value, value], abs=0.06)


# Smoke: every option, short


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "FrozenLake-v1", "Blackjack-v1", "probes:DictObservation-v0"])
@pytest.mark.parametrize("target", ["q", "sarsa"])
def test_smoke_environments(tmp_path, env_id, target):
    folder, checkpoint = train(
        tmp_path,
        env_id=env_id,
        target=target,
        n_step=3,
        num_workers=2,
        total_timesteps=400,
        log_interval=100,
        eval_episodes=1,
    )
    assert checkpoint["step"] > 400
    assert json.loads((folder / "evaluation.json").read_text())["episodes"] == 1


def test_smoke_spawned_processes(tmp_path, monkeypatch):
    """Where there is no fork server (Windows), workers are spawned."""
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    _, checkpoint = train(tmp_path, num_workers=2, backend="process", total_timesteps=200)
    assert checkpoint["step"] > 200


def test_smoke_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, checkpoint = train(tmp_path, total_timesteps=1000, log_interval=200, eval_episodes=1)
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tags = {"charts/episodic_return", "charts/SPS", "charts/learning_rate", "charts/epsilon_0", "losses/td_loss"}
    assert tags | {"losses/q_values", "losses/grad_norm", "eval/mean_return"} <= set(events.Tags()["scalars"])
    rows = read(folder / "metrics.csv")
    np.testing.assert_allclose(
        [event.value for event in events.Scalars("charts/epsilon_0")],
        [float(row["epsilon_0"]) for row in rows],
        rtol=1e-5,
    )
    assert int(rows[-1]["step"]) == checkpoint["step"]


def test_smoke_options(tmp_path):
    folder, _ = train(
        tmp_path,
        total_timesteps=500,
        anneal_lr=False,
        train_frequency=1,
        target_network_frequency=1,
        gamma=1.0,
        log_interval=100,
        seed=7,
        **HALF_RANDOM,
    )
    rows = read(folder / "metrics.csv")
    assert {row["learning_rate"] for row in rows} == {f"{Args().learning_rate:.6g}"}
    assert {row["epsilon_0"] for row in rows} == {"0.5"}
    assert not (folder / "evaluation.json").exists()
