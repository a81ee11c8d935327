"""What the scripts are without arguments: the results in docs/ are of these defaults, networks and constants."""

from dataclasses import fields
from typing import get_type_hints

import numpy as np
import pytest
import torch
from conftest import WITH_WORKERS, each_script
from gymnasium import spaces

import a3c
import async_qlearning
import ddpg
import gae
from common.ranges import _ranges

COUNT, NATURAL, FRACTION = "at least 1", "at least 0", "between 0 and 1"
POSITIVE, NOT_NEGATIVE = "above 0 and finite", "at least 0 and finite"
CHOICE = None  # no number
EVERYWHERE = {
    "seed": (1, NATURAL),
    "gamma": (0.99, FRACTION),
    "log_interval": (5000, COUNT),
    "log_dir": ("runs", CHOICE),
    "eval_episodes": (20, NATURAL),
    "capture_video": (False, CHOICE),
    "evaluate": (None, CHOICE),
    "resume": (None, CHOICE),
}
ASYNCHRONOUS = EVERYWHERE | {
    "env_id": ("CartPole-v1", CHOICE),
    "num_workers": (8, COUNT),
    "backend": ("auto", CHOICE),
    "anneal_lr": (True, CHOICE),
    "max_grad_norm": (1000.0, POSITIVE),
    "rmsprop_alpha": (0.99, FRACTION),
    "screen_size": (42, COUNT),
}
ARGUMENTS = {
    a3c: ASYNCHRONOUS
    | {
        "total_timesteps": (200_000, COUNT),
        "t_max": (32, COUNT),
        "learning_rate": (3e-3, POSITIVE),
        "ent_coef": (0.001, NOT_NEGATIVE),
        "vf_coef": (0.5, NOT_NEGATIVE),
        "rmsprop_eps": (0.1, POSITIVE),
    },
    async_qlearning: ASYNCHRONOUS
    | {
        "total_timesteps": (500_000, COUNT),
        "target": ("q", CHOICE),
        "n_step": (1, COUNT),
        "train_frequency": (32, COUNT),
        "target_network_frequency": (500, COUNT),
        "final_epsilons": ((0.1, 0.01, 0.5), FRACTION),
        "final_epsilon_probs": ((0.4, 0.3, 0.3), FRACTION),
        "exploration_fraction": (0.3, FRACTION),
        "learning_rate": (6e-3, POSITIVE),
        "rmsprop_eps": (10.0, POSITIVE),
    },
    gae: EVERYWHERE
    | {
        "env_id": ("CartPole-v1", CHOICE),
        "total_timesteps": (150_000, COUNT),
        "num_envs": (8, COUNT),
        "batch_size": (2_000, COUNT),
        "gae_lambda": (0.95, FRACTION),
        "trust_region": (True, CHOICE),
        "max_kl": (0.02, POSITIVE),
        "cg_damping": (0.1, NOT_NEGATIVE),
        "initial_std": (1.0, POSITIVE),
        "learning_rate": (3e-3, POSITIVE),
        "vf_epochs": (5, COUNT),
        "minibatch_size": (250, COUNT),
        "norm_obs": (True, CHOICE),
        "norm_returns": (True, CHOICE),
    },
    ddpg: EVERYWHERE
    | {
        "env_id": ("Pendulum-v1", CHOICE),
        "total_timesteps": (10_000, COUNT),
        "learning_starts": (1_000, NATURAL),
        "buffer_size": (1_000_000, COUNT),
        "batch_size": (64, COUNT),
        "learning_rate": (1e-3, POSITIVE),
        "actor_learning_rate": (1e-3, POSITIVE),
        "reward_scale": (1.0, POSITIVE),
        "tau": (0.005, "above 0 and at most 1"),
        "target_network": (True, CHOICE),
        "batch_norm": (False, CHOICE),
        "noise": ("gaussian", CHOICE),
        "noise_std": (0.1, NOT_NEGATIVE),
        "final_noise_std": (None, NOT_NEGATIVE),
        "ou_theta": (0.15, FRACTION),
        "gumbel_temperature": (1.0, POSITIVE),
        "logit_penalty": (1e-3, NOT_NEGATIVE),
        "pixels": (False, CHOICE),
        "num_threads": (1, COUNT),
        "log_interval": (1_000, COUNT),
    },
}
CONSTANTS = (gae.CG_ITERATIONS, ddpg.HIDDEN, a3c.PATIENCE_SECONDS, async_qlearning.PATIENCE_SECONDS)
CONSTANTS += (a3c.START_METHOD == async_qlearning.START_METHOD,)  # as they are before a test sets others


@each_script()
def test_arguments_and_their_ranges(script):
    hints = get_type_hints(script.Args, include_extras=True)
    ranges = {name: " or ".join(each.text for each in _ranges(hint)) or CHOICE for name, hint in hints.items()}
    assert {f.name: (f.default, ranges[f.name]) for f in fields(script.Args)} == ARGUMENTS[script]


def test_constants():
    assert CONSTANTS == (10, 256, 60, 60, True)


@pytest.mark.parametrize(
    "layers",
    [
        a3c.ActorCritic((3,), spaces.Discrete(2)).actor,
        async_qlearning.QNetwork((3,), 2).q,
        gae.ActorCritic(3, spaces.Discrete(2)).actor,
    ],
    ids=["a3c", "async_qlearning", "gae"],
)
def test_networks_for_vectors_have_two_layers_of_64(layers):
    assert [tuple(layer.weight.shape) for layer in layers[::2]] == [(64, 3), (64, 64), (2, 64)]


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize("shape", [(4, 10, 10), (4, 42, 42)])
def test_networks_for_images_begin_orthogonal(script, shape):
    if script is a3c:
        network = a3c.ActorCritic(shape, spaces.Discrete(3))
        last = {network.actor: 0.01, network.critic: 1.0}
    else:
        network = async_qlearning.QNetwork(shape, 3)
        last = {network.q[-1]: 1.0}
    layers = [each for each in network.modules() if isinstance(each, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) > 2
    for layer in layers:
        scales = torch.linalg.svdvals(layer.weight.flatten(1))
        torch.testing.assert_close(scales, torch.full_like(scales, last.get(layer, 2**0.5)))
        assert not layer.bias.any()


@each_script()
def test_the_seed_decides_how_networks_begin(train, script):
    runs = [train(script, total_timesteps=10, learning_rate=1e-30, seed=seed)[1] for seed in (1, 2)]
    first, second = (torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in runs)
    weights = [name for name in first if name.endswith("weight")]
    assert np.mean([torch.allclose(first[name], second[name], atol=1e-3) for name in weights]) == 0


@each_script()
def test_all_random_numbers_are_of_the_seed(train, monkeypatch, script):
    seeds, seed = [], script.seed_everything
    monkeypatch.setattr(script, "seed_everything", lambda *which: seeds.append(which[0]) or seed(*which))
    train(script, seed=7, total_timesteps=10)
    assert len(seeds) == (2 if script in WITH_WORKERS else 1)
    assert set(seeds) == {7}
