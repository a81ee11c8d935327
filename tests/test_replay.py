"""ddpg.py's runs: exploration, the loop step by step, resume, probe environments."""

import math
import re
from types import SimpleNamespace

import numpy as np
import probes
import pytest
import torch
from conftest import load, load_rows, tables
from gymnasium import spaces
from torch import nn

import ddpg
from ddpg import DDPG, Args, OrnsteinUhlenbeckNoise

BOX, LOW, HIGH = spaces.Box(-1, 1, (2,)), probes.BOUNDED.low, probes.BOUNDED.high


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(ddpg, "HIDDEN", 16)


# Exploration


def test_random_actions_are_uniform():
    rng, (box, choice) = np.random.default_rng(0), (DDPG((3,), a, Args()).actor for a in (BOX, spaces.Discrete(3)))
    for column in np.transpose([box.random_action(rng) for _ in range(2000)]):  # Kolmogorov-Smirnov, level 0.001
        assert np.abs(np.sort(column) - (2 * (np.arange(2000) + 0.5) / 2000 - 1)).max() / 2 < 1.95 / 2000**0.5
    choices = [choice.random_action(rng) for _ in range(2000)]
    assert (np.sort(choices, 1) == [0, 0, 1]).all()
    np.testing.assert_allclose(np.mean(choices, 0), 1 / 3, atol=4 * (2 / 9 / 2000) ** 0.5)


@pytest.mark.parametrize(("theta", "std"), [(0.15, 0.2), (0.6, 1.0), (1.0, 0.3)])
def test_noise(theta, std):
    """Ornstein-Uhlenbeck noise, which with theta = 1 is Gaussian. Tolerances: five standard errors of 2000 numbers."""
    rng, phi = np.random.default_rng(0), 1 - theta
    noise = OrnsteinUhlenbeckNoise(2000, rng, theta)
    samples = np.array([noise.sample(std) for _ in range(60)])
    for t in 1, 2, 3, 60:  # from 0 on, the variance grows
        variance, x = std**2 * (1 - phi ** (2 * t)) / (1 - phi**2), samples[t - 1]
        assert x.mean() == pytest.approx(0, abs=5 * (variance / 2000) ** 0.5)
        assert (x**2).mean() == pytest.approx(variance, rel=5 * (2 / 2000) ** 0.5)
        assert (x**4).mean() == pytest.approx(3 * variance**2, rel=5 * (96 / 9 / 2000) ** 0.5)  # normal
    for k in 1, 2, 5:
        assert np.corrcoef(samples[-1], samples[-1 - k])[0, 1] == pytest.approx(phi**k, abs=5 / 2000**0.5)
    np.testing.assert_allclose(noise.sample(0.0), phi * samples[-1])
    noise.reset()
    assert not noise.sample(0.0).any()


# The loop


class Play:
    """A run on a `Script` with stand-ins for `update` and the noise, and what happened in it."""

    def __init__(self, monkeypatch, train, env_id="BoundedScript", **arguments):
        self.updates, self.noises, self.samples, self.resets, self.saved = [], [], [], [], []
        monkeypatch.setattr(probes.Script, "log", [])
        save = ddpg.Run.save

        def look_and_save(run, T, **state):
            self.saved.append((T, load_rows(path := run.folder / "replay.npy"), path.stat()))
            save(run, T, **state)

        monkeypatch.setattr(ddpg.Run, "save", look_and_save)
        monkeypatch.setattr(ddpg, "last_layer", lambda inputs, outputs, shape: nn.Linear(inputs, outputs))  # far from 0
        monkeypatch.setattr(ddpg, "update", self.update)
        monkeypatch.setattr(ddpg, "OrnsteinUhlenbeckNoise", self.noise)
        arguments = {"learning_starts": 30, "total_timesteps": 260, "log_interval": 100, "batch_size": 6} | arguments
        self.code, self.folder = train(ddpg, env_id=f"probes:{env_id}-v0", **arguments)
        self.log, self.rows = probes.Script.log, load_rows(self.folder / "replay.npy")

    def update(self, model, optimizers, batch, args) -> dict:
        """The losses are T, -T and 2 T, and the gradients have the norms 5 T and 10 T."""
        T = len(probes.Script.log)
        self.updates.append((T, batch, torch.get_num_threads()))
        for scale, network in (T, model.critic), (2 * T, model.actor):
            network.theta.grad = torch.zeros_like(network.theta)
            network.theta.grad[0], network.theta.grad[-1] = 3.0 * scale, 4.0 * scale
        return {"critic_loss": torch.tensor(1.0 * T), "actor_loss": torch.tensor(-T), "q_values": torch.tensor(2 * T)}

    def noise(self, size, rng, theta) -> SimpleNamespace:
        """-std in one dimension, std in the other."""
        self.noises.append((size, theta))

        def sample(std):
            self.samples.append((len(probes.Script.log), std))
            return std * np.array([-1, 1])

        return SimpleNamespace(sample=sample, reset=lambda: self.resets.append(len(probes.Script.log)))


LOGGED = (100, 75), (200, 175), (260, 250)  # rows of metrics.csv, and the means of T over every 50th update
OU = {"noise": "ou", "noise_std": 2.0, "final_noise_std": 0.1, "ou_theta": 0.4, "num_threads": 2, "learning_rate": 0.1}
OU |= {"reward_scale": 0.5}  # the memory and the tables have rewards as they are


@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        ("ReusesItsArray", {}),
        ("BoundedScript", OU),
        ("BoundedScript", {"noise_std": 2.0, "final_noise_std": 0.0}),
        ("Script", {}),
    ],
)
def test_the_loop(monkeypatch, train, env_id, options):
    play = Play(monkeypatch, train, env_id, **{"noise_std": 1.2} | options)
    observations, actions, rewards, s_next, terminated, truncated = map(np.array, zip(*play.log, strict=True))
    assert (play.code, len(play.log), load(play.folder)["step"]) == (0, 260, 260)
    assert not np.array_equal(observations[0], ddpg.make_env(f"probes:{env_id}-v0").reset(seed=1)[0])
    # transitions: the real last observation, and terminal states apart from time limits
    s, a, others = np.split(play.rows, [3, -5], axis=1)
    np.testing.assert_array_equal(s, observations)
    np.testing.assert_array_equal(others, np.column_stack([rewards, s_next, terminated]).astype(np.float32))
    for T, rows, stat in play.saved:  # before the checkpoint, and with room on the disk for the rest
        assert np.array_equal(rows, np.where(np.arange(260)[:, None] < T, play.rows, 0))
        assert stat.st_blocks * 512 >= stat.st_size
    assert [T for T, *_ in play.saved] == [100, 200, 260]
    ends = np.flatnonzero(terminated | truncated) + 1
    assert play.resets == ends.tolist()
    episodes, metrics = tables(play.folder)
    assert episodes["step"].tolist() == ends.tolist()
    returns = [part.sum() for part in np.split(rewards, ends)[:-1]]
    np.testing.assert_allclose(episodes[["return", "length"]], np.transpose([returns, np.diff([0, *ends])]), rtol=1e-5)
    # actions: random ones, then mu(s) + N within the bounds, or samples of Discrete actions
    args = Args(**load(play.folder)["args"])
    model = DDPG((3,), spaces.Discrete(2) if env_id == "Script" else BOX, args)
    model.load_state_dict(load(play.folder)["model"])
    outputs = model.actor.net(torch.from_numpy(s[30:])).detach().numpy()
    slope = 0 if args.final_noise_std is None else (args.final_noise_std - args.noise_std) / 260
    if env_id == "Script":
        np.testing.assert_array_equal(a, np.eye(2)[actions])
        assert not play.samples
        assert 40 < (actions[30:] != outputs.argmax(1)).sum() < 190
        assert 5 < actions[:30].sum() < 25
    else:
        np.testing.assert_allclose(LOW + (a + 1) / 2 * (HIGH - LOW), actions, atol=1e-5)
        T, stds = np.transpose(play.samples)
        assert T.tolist() == list(range(30, 260))
        np.testing.assert_allclose(stds, args.noise_std + slope * T)
        expected = np.tanh(outputs) + np.column_stack([-stds, stds])
        np.testing.assert_allclose(a[30:], np.clip(expected, -1, 1), atol=1e-5)
        assert {-1, 1} < set(a[30:].ravel())
        assert np.abs(a[:30]).max() > 0.9
        assert play.noises[-1] == (2, 0.4 if args.noise == "ou" else 1.0)
    # minibatches: one for each step, of what is stored by then
    number, drawn = {row.tobytes(): i for i, row in enumerate(play.rows)}, []
    for T, batch, _ in play.updates:
        drawn.append([number[row.tobytes()] for row in np.column_stack([part.numpy() for part in batch])])
        assert max(drawn[-1]) < T
    assert [update[::2] for update in play.updates] == [(T, args.num_threads) for T in range(30, 261)]
    assert np.shape(drawn) == (231, 6)
    assert len(np.unique(drawn)) > 200
    # metrics: means over every 50th update
    columns = ["step", "critic_loss", "actor_loss", "q_values", "critic_grad_norm", "actor_grad_norm", "noise_std"]
    means = [[step, T, -T, 2 * T, 5 * T, 10 * T, args.noise_std + slope * (T - 1)] for step, T in LOGGED]
    np.testing.assert_allclose(metrics[columns], means, rtol=1e-6)
    assert set(metrics["learning_rate"]) == {args.learning_rate}


@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
@pytest.mark.parametrize(
    ("nan", "reward"), [(math.nan, 0.0), (0.0, math.inf), (0.0, 1e39), (0.0, -math.inf), (0.0, -1e39)]
)
def test_what_is_not_finite_is_never_stored(monkeypatch, train, capfd, nan, reward):
    step = probes.Script.step

    def broken(self, action):
        observation, *rest = step(self, action)
        broken = len(probes.Script.log) == 40
        return (np.add(observation, [0, nan, 0]), reward, *rest[1:]) if broken else (observation, *rest)

    monkeypatch.setattr(probes.Script, "step", broken)
    play = Play(monkeypatch, train)
    assert (play.code, load(play.folder)["step"], len(play.updates)) == (1, 39, 10)
    assert not play.rows[39:].any()
    assert re.search("FloatingPointError: .* gave .* at step 40\n", capfd.readouterr().err)


def test_nor_is_an_episode_that_begins_so(monkeypatch, train):
    reset, resets = probes.Script.reset, []

    def broken(self, **options):
        resets.append(len(probes.Script.log))
        observation, info = reset(self, **options)
        return np.add(observation, [0, math.nan if len(resets) == 4 else 0, 0]), info

    monkeypatch.setattr(probes.Script, "reset", broken)
    play = Play(monkeypatch, train)
    assert (play.code, load(play.folder)["step"]) == (1, resets[3])
    assert not play.rows[resets[3] :].any()


# Resume


@pytest.mark.parametrize("buffer_size", [1000, 70])
def test_resume_goes_on_with_the_memory(monkeypatch, train, buffer_size):
    with monkeypatch.context() as patch:
        first = Play(patch, train, total_timesteps=90, buffer_size=buffer_size)
    second = Play(monkeypatch, train, total_timesteps=150, buffer_size=buffer_size, resume=str(first.folder))
    assert len(second.updates) == len(second.samples) == 60
    rows = np.roll(second.rows, -(150 % len(second.rows)), axis=0)  # the oldest first
    np.testing.assert_array_equal(rows[:, :3], [step[0] for step in [*first.log, *second.log]][-buffer_size:])


def test_resume_goes_on_with_the_networks_and_their_optimisers(train):
    """Adam's first step is as long as the learning rate, in every direction with a gradient."""
    checkpoints, options = [], {"env_id": "Pendulum-v1"}
    for total, rate, tau in (19, 1.0, 1.0), (20, 0.01, 0.25), (21, 1e-30, 1e-30):
        rates = {"learning_rate": 2 * rate, "actor_learning_rate": rate, "tau": tau}
        _, folder = train(ddpg, total_timesteps=total, **options, **rates)
        options["resume"] = str(folder)
        checkpoints.append(load(folder))
    first, second, third = (checkpoint["model"] for checkpoint in checkpoints)
    for network, step in ("critic", 0.02), ("actor", 0.01), ("target_critic", 0.005), ("target_actor", 0.0025):
        moved = [(second[name] - first[name]).abs().max() for name in first if name.startswith(f"{network}.")]
        assert max(moved).item() == pytest.approx(step, rel=0.01)
    torch.testing.assert_close(third, second, rtol=0, atol=0)
    assert [checkpoints[2]["adam"][name]["state"][0]["step"] for name in ("actor", "critic")] == [2, 2]


# Probe environments: one thing at a time has to be learned

PROBE = {"total_timesteps": 500, "learning_starts": 100, "batch_size": 32, "noise_std": 0.3, "log_interval": 500}
PROBE |= {"gamma": 0.5, "tau": 0.05, "learning_rate": 0.01, "actor_learning_rate": 2e-3}
MU = None  # the actor's action


@pytest.mark.parametrize(
    ("env_id", "options", "values", "best"),
    [
        ("BoundedConstant", {"target_network": False}, [(0, MU, 1)], {}),  # who overlooks the end learns 2
        ("BoundedOnlyTruncates", {}, [(0, MU, 2)], {}),  # who takes the time limit for an end learns about 1.6
        ("BoundedTarget", {"noise": "ou"}, [(1, MU, 1)], {1: (0.4, -0.25), -1: (-0.6, 0.5)}),
        ("BoundedByLaterAction", {}, [(1, (1, -1), 1), (0, MU, 0.5)], {1: (1, -1)}),
        ("ByAction", {}, [(1, (0, 1), 1), (1, (1, 0), -1), (-1, (1, 0), 1)], {1: (0, 1), -1: (1, 0)}),
    ],
)
def test_probe_is_learned(train, env_id, options, values, best):
    _, folder = train(ddpg, env_id=f"probes:{env_id}-v0", **PROBE | options)
    model = DDPG((1,), ddpg.make_env(f"probes:{env_id}-v0").action_space, Args(**load(folder)["args"]))
    model.load_state_dict(load(folder)["model"])
    actions = {s: model.actor.act(np.array([s], np.float32)) for s in (-1, 0, 1)}
    for s, a, value in values:
        a = torch.tensor(np.array([actions[s] if a is MU else a], np.float32))
        assert model.critic(torch.tensor([[float(s)]]), a).item() == pytest.approx(value, abs=0.15)
    for s, action in best.items():
        np.testing.assert_allclose(actions[s], action, atol=0.3)
