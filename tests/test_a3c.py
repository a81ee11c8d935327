"""a3c.py against the definitions, on probe environments, and with every option."""

import csv
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Categorical, Normal

import a3c
from a3c import ActorCritic, Args, SharedRMSProp, a3c_loss, n_step_returns
from common.seeding import seed_everything
from common.workers import choose_backend

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


def gaussian_variance(raw_variance: torch.Tensor) -> torch.Tensor:
    return torch.log1p(raw_variance.exp()) + 0.01


def train(tmp_path, **arguments):
    """Run a3c.py's main in this process. Returns the run's folder and its checkpoint."""
    args = Args(**{"log_dir": str(tmp_path / "runs"), "eval_episodes": 0, "num_workers": 1} | arguments)
    assert a3c.main(args) == 0
    folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return folder, torch.load(folder / "checkpoint.pt", weights_only=True)


def load_model(checkpoint, env_id) -> ActorCritic:
    env = gym.make(env_id)
    model = ActorCritic(spaces.flatdim(env.observation_space), env.action_space)
    model.load_state_dict(checkpoint["model"])
    return model


def value(model, *observation) -> float:
    return model.critic(torch.tensor([observation], dtype=torch.float32)).item()


def read(table) -> list[dict]:
    with open(table) as file:
        return list(csv.DictReader(file))


# Oracles: the networks


@pytest.mark.parametrize("space", SPACES)
def test_numpy_policy_equals_torch(space):
    model = make_model(space)
    for seed in range(3):  # what is written to theta must reach both
        model.theta.copy_(make_model(space, seed=seed).theta)
        observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
        outputs = model.actor(torch.from_numpy(observations)).detach().numpy()
        for observation, output in zip(observations, outputs, strict=True):
            action = model.act(observation)
            if model.discrete:
                assert action == output.argmax()
            else:
                np.testing.assert_allclose(action, output[:5], rtol=1e-5, atol=1e-5)


def test_discrete_actions_are_drawn_from_the_softmax():
    model, rng = make_model(spaces.Discrete(3)), np.random.default_rng(0)
    observation = rng.normal(size=4).astype(np.float32)
    draws = np.bincount([model.act(observation, rng) for _ in range(20_000)], minlength=3) / 20_000
    probabilities = torch.softmax(model.actor(torch.from_numpy(observation)), 0).detach().numpy()
    np.testing.assert_allclose(draws, probabilities, atol=0.015)  # four standard errors


def test_box_actions_are_drawn_from_the_gaussian():
    model, rng = make_model(SPACES[1]), np.random.default_rng(0)
    observation = rng.normal(size=4).astype(np.float32)
    draws = np.array([model.act(observation, rng) for _ in range(20_000)])
    mean, raw_variance = model.actor(torch.from_numpy(observation)).detach().chunk(2)
    variance = gaussian_variance(raw_variance).numpy()
    np.testing.assert_allclose(draws.mean(0), mean.numpy(), atol=4 * (variance.max() / 20_000) ** 0.5)
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.05)


@pytest.mark.parametrize("space", SPACES)
def test_log_prob_and_entropy_equal_torch_distributions(space):
    model, observations = make_model(space), torch.randn(7, 4)
    outputs = model.actor(observations)
    if model.discrete:
        policy, actions = Categorical(logits=outputs), torch.randint(3, (7,))
        expected = policy.log_prob(actions), policy.entropy()
    else:
        mean, raw_variance = outputs.chunk(2, -1)
        policy, actions = Normal(mean, gaussian_variance(raw_variance).sqrt()), torch.randn(7, 5)
        expected = policy.log_prob(actions).sum(-1), policy.entropy().sum(-1)
    torch.testing.assert_close(model.log_prob_and_entropy(observations, actions), expected)


def test_actions_stay_within_bounds_and_reach_them():
    model = make_model(SPACES[1])
    low, high = BOUNDS
    middle = model.to_env(np.zeros(5))
    np.testing.assert_allclose(middle, [0, 5, 2, 6, 0])  # between finite bounds, one unit from a bound that is alone
    np.testing.assert_array_equal(model.to_env(np.full(5, 1e6))[:3], high[:3])
    np.testing.assert_array_equal(model.to_env(np.full(5, -1e6))[[0, 1, 3]], low[[0, 1, 3]])
    np.testing.assert_allclose(model.to_env(np.full(5, 1.0))[:2], high[:2])
    assert model.space.contains(model.to_env(np.random.default_rng(0).normal(size=5) * 100))


def test_discrete_actions_begin_at_the_spaces_start():
    model = make_model(spaces.Discrete(3, start=-1))
    assert [model.to_env(index) for index in range(3)] == [-1, 0, 1]


# Oracles: the algorithm


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_n_step_returns_are_the_discounted_sums(gamma, n):
    rewards, bootstrap = np.random.default_rng(n).normal(size=n).tolist(), 1.7
    expected = [
        sum(gamma ** (k - i) * rewards[k] for k in range(i, n)) + gamma ** (n - i) * bootstrap for i in range(n)
    ]
    returns = n_step_returns(rewards, bootstrap, gamma)
    assert returns.shape == (n,)
    np.testing.assert_allclose(returns, expected, rtol=1e-5)


def pseudo_code_gradient(model, steps, args):
    """d theta and d theta_v of one segment, the lecture's loop step by step; positive: to be descended.

    `steps` are the entries of `probes.Script.log`. Every step is its own forward pass and its own backward pass.
    """
    parameters = list(model.parameters())
    gradient = torch.zeros_like(model.theta)
    _, _, _, last_observation, terminated, _ = steps[-1]
    R = 0.0 if terminated else model.critic(torch.tensor(last_observation)).item()
    for observation, action, reward, *_ in reversed(steps):
        R = reward + args.gamma * R
        output, V = model.actor(torch.tensor(observation)), model.critic(torch.tensor(observation)).squeeze()
        if model.discrete:
            policy = Categorical(logits=output)
            log_prob, entropy = policy.log_prob(torch.tensor(action)), policy.entropy()
        else:
            mean, raw_variance = output.chunk(2)
            policy = Normal(mean, gaussian_variance(raw_variance).sqrt())
            log_prob, entropy = policy.log_prob(torch.tensor(action)).sum(), policy.entropy().sum()
        objective = log_prob * (R - V.item()) + args.ent_coef * entropy  # ascended
        error = (R - V) ** 2  # descended
        for sign, part in ((-1.0, objective), (args.vf_coef, error)):
            grads = torch.autograd.grad(part, parameters, allow_unused=True)
            gradient += sign * torch.cat(
                [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)]
            )
    return gradient


class RecordingOptimizer:
    """In the place of SharedRMSProp: keeps every gradient beside theta, then moves theta somewhere else."""

    def __init__(self, theta):
        self.theta, self.updates = theta, []

    def step(self, d_theta, learning_rate):
        self.updates.append((self.theta.clone(), d_theta.clone(), learning_rate))
        self.theta.add_(0.02 * torch.randn_like(self.theta))


def record_worker(env_id, args, stop_after=None):
    """Run one worker in this thread with a RecordingOptimizer. Returns the shared state and the worker's messages."""
    env = gym.make(env_id)
    model = make_model(env.action_space, spaces.flatdim(env.observation_space))
    probes.Script.log.clear()
    shared = a3c.Shared(model.theta.clone(), args)
    shared.optimizer = RecordingOptimizer(model.theta.clone())
    messages = []

    def send(message):
        messages.append(message)
        shared.stop.fill_(len(messages) == stop_after)

    channel = SimpleNamespace(wait_for_start=lambda: 0.0, send=send)
    a3c.worker(channel, 0, args, shared, np.random.default_rng(3))
    assert messages.pop()[0] is None
    return shared, messages


@pytest.mark.parametrize("env_id", ["Script-v0", "ScriptBox-v0"])
def test_worker_computes_the_gradients_of_the_pseudo_code(env_id):
    args = Args(env_id=env_id, t_max=5, total_timesteps=60, ent_coef=0.3, vf_coef=0.7, max_grad_norm=1e9, num_workers=1)
    shared, _ = record_worker(env_id, args)
    segments, kinds = [[]], set()
    for step in probes.Script.log:
        segments[-1].append(step)
        if len(segments[-1]) == args.t_max or step[-2] or step[-1]:
            kinds.add("terminated" if step[-2] else "truncated" if step[-1] else "cut off")
            segments.append([])
    assert kinds == {"terminated", "truncated", "cut off"}
    segments.pop()
    updates = shared.optimizer.updates
    assert len(updates) == len(segments)
    env = gym.make(env_id)
    model = make_model(env.action_space, 3)
    for (theta, d_theta, _), segment in zip(updates, segments, strict=True):
        model.theta.copy_(theta)  # of this very update: theta' = theta at the start of every segment
        expected = pseudo_code_gradient(model, segment, args)
        assert (d_theta - expected).norm() < 1e-4 * expected.norm()


def test_worker_anneals_clips_and_counts():
    args = Args(env_id="Script-v0", t_max=5, total_timesteps=60, max_grad_norm=0.5, learning_rate=0.01, num_workers=1)
    shared, messages = record_worker("Script-v0", args)
    steps = len(probes.Script.log)
    assert shared.T() == steps > 60  # until T > T_max
    assert all(d_theta.norm() <= 0.5001 for _, d_theta, _ in shared.optimizer.updates)
    assert any(d_theta.norm() > 0.4999 for _, d_theta, _ in shared.optimizer.updates)
    starts, n = [0], 0  # of the segments
    for i, step in enumerate(probes.Script.log):
        n += 1
        if n == 5 or step[-2] or step[-1]:
            starts.append(i + 1)
            n = 0
    rates = [rate for _, _, rate in shared.optimizer.updates]
    np.testing.assert_allclose(rates, [0.01 * (1 - start / 60) for start in starts[:-1]])
    ends = [i + 1 for i, step in enumerate(probes.Script.log) if step[-2] or step[-1]]
    assert [message[0][0] for message in messages] == ends  # T at the end of each episode
    assert [message[0][3] for message in messages] == np.diff([0, *ends]).tolist()
    rewards = [step[2] for step in probes.Script.log]
    returns = [sum(rewards[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    np.testing.assert_allclose([message[0][2] for message in messages], returns)
    constant = record_worker("Script-v0", replace(args, anneal_lr=False))[0]
    assert {rate for _, _, rate in constant.optimizer.updates} == {0.01}


def test_worker_logs_what_it_computed():
    args = Args(env_id="Script-v0", t_max=5, total_timesteps=1, max_grad_norm=1e-3, learning_rate=0.01, num_workers=1)
    shared, _ = record_worker("Script-v0", args)
    ((theta, d_theta, _),) = shared.optimizer.updates  # one segment
    log = probes.Script.log
    model = make_model(gym.make("Script-v0").action_space, 3)
    model.theta.copy_(theta)
    observations = torch.tensor(np.array([step[0] for step in log] + [log[-1][3]]))
    actions, rewards = torch.tensor([step[1] for step in log]), [step[2] for step in log]
    _, means = a3c_loss(model, observations, actions, rewards, log[-1][-2], args)
    norm = pseudo_code_gradient(model, log, args).norm().item()
    assert norm > 10 * d_theta.norm()  # logged before clipping
    assert list(a3c.METRICS) == ["policy_loss", "value_loss", "entropy", "value", "grad_norm", "learning_rate"]
    np.testing.assert_allclose(shared.sums[0], [1, *means, norm, 0.01], rtol=1e-4)


def test_worker_stops_when_told():
    shared, messages = record_worker("Script-v0", Args(env_id="Script-v0", total_timesteps=10**9), stop_after=3)
    assert len(messages) == 3
    assert shared.T() == len(probes.Script.log) == sum(message[0][3] for message in messages)


def test_worker_leaves_theta_alone_when_the_gradient_is_not_finite():
    args = Args(env_id="NotANumber-v0", total_timesteps=10**9, num_workers=1)
    model = make_model(spaces.Discrete(2), 1)
    shared = a3c.Shared(model.theta.clone(), args)
    channel = SimpleNamespace(wait_for_start=lambda: 0.0, send=lambda message: None)
    with pytest.raises(FloatingPointError):
        a3c.worker(channel, 0, args, shared, np.random.default_rng(0))
    assert shared.T() >= 40
    assert shared.optimizer.theta.isfinite().all()
    assert shared.optimizer.g.isfinite().all()
    assert (shared.optimizer.theta != model.theta).any()


def test_advantage_is_a_constant_in_the_policy_gradient():
    """With vf_coef 0 nothing reaches the critic."""
    model, args = make_model(spaces.Discrete(3)), Args(vf_coef=0.0)
    loss, _ = a3c_loss(model, torch.randn(6, 4), torch.randint(3, (5,)), [1.0] * 5, False, args)
    grads = torch.autograd.grad(loss, list(model.critic.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_losses_are_logged_as_means_over_the_steps():
    model, args = make_model(spaces.Discrete(3)), Args(ent_coef=0.0, vf_coef=1.0)
    observations, actions = torch.randn(6, 4), torch.randint(3, (5,))
    loss, (policy_loss, value_loss, entropy, mean_value) = a3c_loss(model, observations, actions, [1.0] * 5, True, args)
    assert loss.item() == pytest.approx(5 * (policy_loss + value_loss), rel=1e-4)
    errors = n_step_returns([1.0] * 5, 0.0, args.gamma) - model.critic(observations[:5]).squeeze(-1)
    assert value_loss == pytest.approx(errors.square().mean().item(), rel=1e-4)
    assert entropy == pytest.approx(model.log_prob_and_entropy(observations[:5], actions)[1].mean().item(), rel=1e-5)
    assert mean_value == pytest.approx(model.critic(observations[:5]).mean().item(), rel=1e-4)


def test_shared_rmsprop_is_the_papers_formula():
    rng = np.random.default_rng(0)
    theta, alpha, eps = rng.normal(size=5), 0.9, 0.1
    optimizer, g = SharedRMSProp(torch.tensor(theta), alpha, eps), np.zeros(5)
    for learning_rate in (0.1, 0.05, 0.01):
        d = rng.normal(size=5)
        optimizer.step(torch.tensor(d), learning_rate)
        for j in range(5):
            g[j] = alpha * g[j] + (1 - alpha) * d[j] ** 2
            theta[j] = theta[j] - learning_rate * d[j] / math.sqrt(g[j] + eps)
        np.testing.assert_allclose(optimizer.theta.numpy(), theta, rtol=1e-12)
        np.testing.assert_allclose(optimizer.g.numpy(), g, rtol=1e-12)


def test_shared_rmsprop_equals_torch_optim_without_epsilon():
    """torch adds epsilon outside of the root, the paper inside; without any the two are the same."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    ours = SharedRMSProp(parameter.detach().clone(), alpha=0.99, eps=0.0)
    torchs = torch.optim.RMSprop([parameter], lr=0.01, alpha=0.99, eps=0.0)
    for _ in range(20):
        parameter.grad = torch.randn(5, dtype=torch.float64)
        ours.step(parameter.grad, 0.01)
        torchs.step()
    torch.testing.assert_close(ours.theta, parameter.detach())


# Oracles: the workers together


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_T_is_exact_with_16_workers(tmp_path, backend):
    folder, checkpoint = train(
        tmp_path, env_id="probes:Constant-v0", num_workers=16, total_timesteps=2000, backend=backend
    )
    rows = read(folder / "episodes.csv")  # every episode has one step, so every step is a row
    assert checkpoint["step"] == len(rows) == sum(int(row["length"]) for row in rows) > 2000
    assert len({row["worker"] for row in rows}) > 1
    assert json.loads((folder / "args.json").read_text())["backend_used"] == backend


def test_one_worker_and_one_seed_repeat_a_run_on_both_backends(tmp_path):
    def episodes(**arguments):
        folder, _ = train(tmp_path, total_timesteps=3000, **arguments)
        return [[v for k, v in row.items() if k != "time"] for row in read(folder / "episodes.csv")]

    by_thread = episodes(backend="thread")
    assert len(by_thread) > 20
    assert episodes(backend="thread") == by_thread
    assert episodes(backend="process") == by_thread
    assert episodes(backend="thread", seed=2) != by_thread


def test_seeding_gives_independent_generators():
    draws = [generator.random() for generator in seed_everything(1, 4)]
    assert len(set(draws)) == 4
    assert draws[:2] == [generator.random() for generator in seed_everything(1, 2)]
    assert draws[0] != seed_everything(2, 1)[0].random()


@pytest.mark.parametrize(
    ("backend", "num_workers", "gil", "expected"),
    [
        ("auto", 8, True, "process"),
        ("auto", 8, False, "thread"),
        ("auto", 1, True, "thread"),
        ("thread", 8, True, "thread"),
    ],
)
def test_backend_by_interpreter(monkeypatch, backend, num_workers, gil, expected):
    monkeypatch.setattr("common.workers.has_gil", lambda: gil)
    assert choose_backend(backend, num_workers)[0] == expected


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_workers_train_one_network_and_it_is_evaluated(tmp_path, backend):
    folder, checkpoint = train(
        tmp_path, env_id="probes:ByAction-v0", num_workers=4, backend=backend, total_timesteps=8000, eval_episodes=50
    )
    probability = torch.softmax(load_model(checkpoint, "ByAction-v0").actor(torch.tensor([[-1.0], [1.0]])), -1)
    assert probability[0, 0] > 0.8
    assert probability[1, 1] > 0.8
    assert json.loads((folder / "evaluation.json").read_text())["returns"] == [1.0] * 50  # greedy: no mistakes


def test_the_evaluation_is_greedy(tmp_path):
    """With a policy that has learned nothing: one that is drawn from would have other returns."""
    folder, checkpoint = train(tmp_path, total_timesteps=1, learning_rate=1e-30, eval_episodes=5, seed=3)
    model, env, returns = load_model(checkpoint, "CartPole-v1"), gym.make("CartPole-v1"), []
    for seed in (2**31 + 3, None, None, None, None):
        observation, _ = env.reset(seed=seed)
        returns.append(0.0)
        over = False
        while not over:
            action = model.actor(torch.from_numpy(observation)).argmax().item()
            observation, reward, terminated, truncated, _ = env.step(action)
            returns[-1] += reward
            over = terminated or truncated
    assert json.loads((folder / "evaluation.json").read_text())["returns"] == returns


def test_workers_differ(tmp_path):
    frozen = {"learning_rate": 1e-30, "num_workers": 4, "backend": "process", "total_timesteps": 4000}
    folder, _ = train(tmp_path, env_id="CartPole-v1", **frozen)
    first = {int(row["worker"]): row["length"] for row in reversed(read(folder / "episodes.csv"))}
    assert len(set(first.values())) > 1  # environments and generators of their own: not all first episodes are alike


# Probe environments: one thing at a time has to be learned

PROBE = {"total_timesteps": 3000, "t_max": 5, "gamma": 0.5, "learning_rate": 0.01, "rmsprop_eps": 0.01, "ent_coef": 0.0}


def test_probe_constant_reward(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:Constant-v0", **PROBE)
    assert value(load_model(checkpoint, "Constant-v0"), 0) == pytest.approx(1, abs=0.05)


def test_probe_reward_by_observation(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByObservation-v0", **PROBE)
    model = load_model(checkpoint, "ByObservation-v0")
    assert value(model, 1) == pytest.approx(1, abs=0.05)
    assert value(model, -1) == pytest.approx(-1, abs=0.05)


def test_probe_reward_by_action(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByAction-v0", **PROBE)
    model = load_model(checkpoint, "ByAction-v0")
    for observation in (-1.0, 1.0):
        probability = torch.softmax(model.actor(torch.tensor([observation])), 0)[int(observation > 0)].item()
        assert probability > 0.9


def test_probe_reward_by_earlier_action(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:ByEarlierAction-v0", **PROBE)
    model = load_model(checkpoint, "ByEarlierAction-v0")
    assert torch.softmax(model.actor(torch.tensor([0.0, 0.0])), 0)[1].item() > 0.9
    assert value(model, 1, 1) == pytest.approx(1, abs=0.1)
    assert value(model, 0, 0) == pytest.approx(0.5, abs=0.1)  # gamma


def test_probe_that_only_truncates(tmp_path):
    """1 / (1 - 0.5) = 2; who takes the time limit for a terminal state learns the mean of 1, 1.5 and 1.75."""
    _, checkpoint = train(tmp_path, env_id="probes:OnlyTruncates-v0", **PROBE)
    assert value(load_model(checkpoint, "OnlyTruncates-v0"), 0) == pytest.approx(2, abs=0.1)


def test_probe_continuous_target(tmp_path):
    _, checkpoint = train(tmp_path, env_id="probes:Target-v0", t_max=5, total_timesteps=4000)
    model = load_model(checkpoint, "Target-v0")
    np.testing.assert_allclose(model.to_env(model.act(np.zeros(1, np.float32))), [7, -2], atol=0.4)


# Smoke: every option, short


@pytest.mark.parametrize(
    "env_id", ["Acrobot-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1", "probes:DictObservation-v0"]
)
@pytest.mark.parametrize("backend", ["thread", "process"])
def test_smoke_environments(tmp_path, env_id, backend):
    folder, checkpoint = train(
        tmp_path, env_id=env_id, backend=backend, num_workers=2, total_timesteps=400, log_interval=100, eval_episodes=1
    )
    assert checkpoint["step"] > 400
    assert json.loads((folder / "evaluation.json").read_text())["episodes"] == 1
    assert "/" not in folder.name
    assert ":" not in folder.name


def test_smoke_spawned_processes(tmp_path, monkeypatch):
    """Where there is no fork server (Windows), workers are spawned."""
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    _, checkpoint = train(tmp_path, num_workers=2, backend="process", total_timesteps=200)
    assert checkpoint["step"] > 200


def test_smoke_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.run.PLAIN_LINE_SECONDS", 0)
    train(tmp_path, total_timesteps=1000, eval_episodes=1)
    lines = capsys.readouterr().out.splitlines()
    progress = [line for line in lines if line.startswith("step ")]
    assert progress
    assert all(", " in line and " steps per second, " in line and " s left" in line for line in progress)
    assert lines[-1].startswith("a3c: 1,0")
    assert "greedy return" in lines[-1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    train(tmp_path, total_timesteps=1000, seed=2)
    bar = capsys.readouterr().out
    assert "1000/1000" in bar
    assert "return " in bar


def test_smoke_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, checkpoint = train(tmp_path, total_timesteps=1000, log_interval=200, eval_episodes=1)
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate"} <= tags
    assert {"losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/grad_norm", "eval/mean_return"} <= tags
    rows = read(folder / "metrics.csv")
    logged = events.Scalars("losses/entropy")
    assert [event.step for event in logged] == [int(row["step"]) for row in rows]
    np.testing.assert_allclose([event.value for event in logged], [float(row["entropy"]) for row in rows], rtol=1e-5)
    assert int(rows[-1]["step"]) == checkpoint["step"]


def test_smoke_options(tmp_path):
    folder, _ = train(tmp_path, total_timesteps=500, anneal_lr=False, t_max=1, gamma=1.0, log_interval=100, seed=7)
    rates = {row["learning_rate"] for row in read(folder / "metrics.csv")}
    assert rates == {f"{Args().learning_rate:.6g}"}
    assert not (folder / "evaluation.json").exists()
