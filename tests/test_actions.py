"""Actions and observations as environments take and give them: Box actions of a3c.py and ddpg.py, all of ddpg.py."""

import math

import numpy as np
import probes
import pytest
from conftest import received
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

import a3c
import ddpg
from ddpg import make_env


@pytest.mark.parametrize("script", [a3c, ddpg], ids=lambda script: script.__name__)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([(), (4,), (2, 2)]),
    st.lists(st.tuples(st.floats(-4e8, 4e8), st.floats(0, 5e8), st.floats(-1.5, 1.5)), min_size=4, max_size=4),
)
def test_box_actions_are_scaled_and_never_outside(script, dtype, shape, numbers):
    low, width, x = np.array(numbers).T[:, : math.prod(shape)].reshape(3, *shape)
    low, high = low.astype(dtype), (low + width).astype(dtype)
    space = spaces.Box(low, high, shape, dtype)
    actions, flat_space = received(script.make_env, space, [x.ravel(), np.full(x.size, -1.0), np.full(x.size, 1.0)])
    assert flat_space == spaces.Box(-1, 1, (x.size,))
    x, tolerance = np.clip(x, -1, 1), 1e-6 * np.abs([low, high]).max()
    np.testing.assert_allclose(actions[0], (1 - x) / 2 * low + (1 + x) / 2 * high, atol=tolerance)
    np.testing.assert_allclose(actions[1:], [low, high], atol=1e-9 * tolerance)


@pytest.mark.parametrize("start", [0, -1, 4])
def test_discrete_actions_count_from_the_spaces_start(start):
    expected = [start, start + 1, start + 2], spaces.Discrete(3)
    assert received(make_env, spaces.Discrete(3, start=start), np.eye(3)) == expected


def test_environments_are_flat_or_refused(monkeypatch):
    for space, size in (spaces.Discrete(5), 5), (spaces.Box(-1, 1, (2, 3)), 6), (spaces.Box(0, 9, (8,), np.uint8), 8):
        monkeypatch.setattr(probes.Constant, "observation_space", space)
        assert make_env("probes:Constant-v0").observation_space.shape == (size,)
    assert make_env("probes:DictObservation-v0").reset()[0].shape == (11,)
    for name in "Words", "ManyActions", "IntegerBox", "HugeBounds", "Target", "NoUpperBound":
        with pytest.raises(ValueError, match=r"^its observations cannot|^ddpg\.py needs"):
            make_env(f"probes:{name}-v0")
    env = make_env("CartPole-v1", "rgb_array")
    assert (env.render_mode, "Checker" in str(env)) == ("rgb_array", False)
