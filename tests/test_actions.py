"""Actions as environments take them, and what ddpg.py makes of observations."""

from math import inf, prod

import numpy as np
import probes
import pytest
from conftest import received
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

import a3c
import ddpg
import gae

SCRIPTS = a3c, ddpg, gae


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([(), (4,), (2, 2)]),
    st.lists(st.tuples(st.floats(-4e8, 4e8), st.floats(0, 5e8), st.floats(-1.5, 1.5)), min_size=4, max_size=4),
)
def test_box_actions_are_scaled_and_never_outside(script, dtype, shape, numbers):
    low, width, x = np.array(numbers).T[:, : prod(shape)].reshape(3, *shape)
    low, high = low.astype(dtype), (low + width).astype(dtype)
    space = spaces.Box(low, high, shape, dtype)
    actions, flat_space = received(script.make_env, space, [x.ravel(), np.full(x.size, -1.0), np.full(x.size, 1.0)])
    assert flat_space == (spaces.Box(-inf, inf, (x.size,)) if script is gae else spaces.Box(-1, 1, (x.size,)))
    x, tolerance = np.clip(x, -1, 1), 1e-6 * np.abs([low, high]).max()
    np.testing.assert_allclose(actions[0], (1 - x) / 2 * low + (1 + x) / 2 * high, atol=tolerance)
    np.testing.assert_allclose(actions[1:], [low, high], atol=1e-9 * tolerance)


BOUNDS = [  # 0.1 and 0.7 are no binary fractions; 1e10 counts as no bound
    [0, -2, 0.1, -1e8, -inf, -inf, -0.5, -1e10, -1e10, -0.5, -inf, 5],  # low
    [10, 2, 0.7, 0, inf, 0.5, inf, 1e10, 0.5, 1e10, -3, 1e10],  # high
    [0, -2, 0.1, -1e8, -1, -1, -0.5, -1, -1, -0.5, -4, 5],  # what -1 stands for,
    [5, 0, 0.4, -5e7, 0, 0, 0, 0, 0, 0, -3, 5],  # what 0,
    [10, 2, 0.7, 0, 1, 0.5, 1, 1, 0.5, 1, -3, 6],  # and what 1
]


@pytest.mark.parametrize(("shape", "dtype"), [((), np.float32), ((12,), np.float64), ((2, 6), np.float32)])
def test_gae_takes_actions_without_bounds(shape, dtype):
    size = prod(shape)
    low, high, *expected = np.array(BOUNDS, dtype)[:, :size].reshape(5, *shape)
    expected += [np.maximum(low, -1e20), np.minimum(high, 1e20)]
    actions = [np.full(size, x) for x in (-1.0, 0.0, 1.0, -1e20, 1e20)]
    result, _ = received(gae.make_env, spaces.Box(low, high, shape, dtype), actions)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert {(action.shape, action.dtype) for action in result} == {(shape, np.dtype(dtype))}


@pytest.mark.parametrize("start", [0, -1, 4])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_discrete_actions_count_from_the_spaces_start(script, start):
    expected = [start, start + 1, start + 2], spaces.Discrete(3)
    actions = np.eye(3) if script is ddpg else range(3)
    assert received(script.make_env, spaces.Discrete(3, start=start), actions) == expected


def test_environments_are_flat_or_refused(monkeypatch):
    for space, size in (spaces.Discrete(5), 5), (spaces.Box(-1, 1, (2, 3)), 6), (spaces.Box(0, 9, (8,), np.uint8), 8):
        monkeypatch.setattr(probes.Constant, "observation_space", space)
        assert ddpg.make_env("probes:Constant-v0").observation_space.shape == (size,)
    assert ddpg.make_env("probes:DictObservation-v0").reset()[0].shape == (11,)
    for name in "Words", "ManyActions", "IntegerBox", "HugeBounds", "Target", "NoUpperBound":
        with pytest.raises(ValueError, match=r"^its observations cannot|^ddpg\.py needs"):
            ddpg.make_env(f"probes:{name}-v0")
    env = ddpg.make_env("CartPole-v1", "rgb_array")
    assert (env.render_mode, "Checker" in str(env)) == ("rgb_array", False)


@pytest.mark.parametrize("name", ["ManyActions", "IntegerBox"])
def test_gae_refuses_other_actions(name):
    with pytest.raises(ValueError, match=r"^gae\.py needs"):
        gae.make_env(f"probes:{name}-v0")
