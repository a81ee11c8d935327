"""Tiny environments whose values are known, and spaces that a script refuses.

Importing this module registers them; `gymnasium.make("probes:Constant-v0")` does so by itself.
"""

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from threadpoolctl import threadpool_info


class Probe(gym.Env):
    """Observations of one or two numbers in [-1, 1], two actions; what happens is up to `play`."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)
    length = 1  # steps of an episode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.first_action = None
        return self.observe(), {}

    def observe(self):
        return np.zeros(self.observation_space.shape, np.float32)

    def play(self, action) -> float:
        """The reward of one step."""
        return 1.0

    def step(self, action):
        reward = self.play(action)
        self.t += 1
        return self.observe(), reward, self.t == self.length, False, {}


class Constant(Probe):
    """Reward 1, one step: V = 1."""


class ByObservation(Probe):
    """The reward is the observation, -1 or 1, one step: V(s) = s."""

    def observe(self):
        self.sign = float(self.np_random.choice([-1.0, 1.0]))
        return np.array([self.sign], np.float32)

    def play(self, action):
        return self.sign


class ByAction(ByObservation):
    """Reward 1 for action 1 on observation 1 and action 0 on observation -1, otherwise -1."""

    def play(self, action):
        return 1.0 if action == (self.sign > 0) else -1.0


class ByEarlierAction(Probe):
    """Two steps; the second pays 2 a - 1 for the action a of the first. Best: V = gamma at first, 1 after action 1."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    length = 2

    def observe(self):
        return np.array([self.t, self.first_action or 0], np.float32)

    def play(self, action):
        if self.t == 0:
            self.first_action = action
            return 0.0
        return 2.0 * self.first_action - 1.0


class ByLaterAction(Probe):
    """Two steps; the second pays its action, 0 or 1. Of the first, Q = gamma times the value of the second's policy."""

    length = 2

    def observe(self):
        return np.array([self.t], np.float32)

    def play(self, action):
        return float(action) if self.t else 0.0


class OnlyTruncates(Probe):
    """Reward 1 a step in a single state, cut off after three steps and never terminal: V = 1 / (1 - gamma)."""

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, False, self.t == 3, {}


class Target(Probe):
    """Two continuous actions with bounds of every kind; the reward is minus the squared distance from (7, -2)."""

    action_space = spaces.Box(np.array([0, -np.inf], np.float32), np.array([10, 3], np.float32))

    def play(self, action):
        assert self.action_space.contains(action), action
        return -float((((action - np.array([7.0, -2.0])) / np.array([5.0, 1.0])) ** 2).sum())


class Threads(Probe):
    """The reward is the number of threads that numpy's products take."""

    def play(self, action):
        return float(max(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"))


class DrawsFromTorch(Probe):
    """The reward is a random number of torch's."""

    def play(self, action):
        return torch.rand(()).item()


class DrawsFromNumpy(Probe):
    """The reward is a random number of numpy's global generator."""

    def play(self, action):
        return np.random.random()


class Subnormal(Probe):
    """The reward is 1 where numbers below 1e-38 stay what they are, 0 where they are taken for 0."""

    def play(self, action):
        return float(np.float32(1e-39) * np.float32(1) > 0)


class Script(Probe):
    """Random observations and rewards; episodes end by turns in a terminal state, at a time limit and in both.

    `Script.log` holds (observation, action, reward, next observation, terminated, truncated) of every step.
    """

    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    log: list = []  # noqa: RUF012
    episodes = 0

    def observe(self):
        if self.t == 0:
            self.episodes += 1
            self.length = int(self.np_random.integers(3, 9))
        self.observation = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.observation

    def step(self, action):
        observation, reward = self.observation, float(self.np_random.normal())
        self.t += 1
        end, turn = self.t == self.length, self.episodes % 3  # 1: terminal, 2: time limit, 0: both
        terminated, truncated = end and turn != 2, end and turn != 1
        Script.log.append((observation, action, reward, self.observe(), terminated, truncated))
        return self.observation, reward, terminated, truncated, {}


class ScriptBox(Script):
    """`Script` with two continuous actions, without bounds, so that they arrive as they were drawn."""

    action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Counts(Probe):
    """Episodes of 3 steps. The return of the first episode of an environment is 1, of the second 2, ..."""

    length = 3
    episodes = 0

    def observe(self):
        self.episodes += self.t == 0
        return super().observe()

    def play(self, action):
        return float(self.episodes) if self.t == 2 else 0.0


class TellsActions(Probe):
    """The return tells all the 40 actions of an episode."""

    length = 40

    def play(self, action):
        return float(action) * 2.0**self.t


class DictObservation(Probe):
    """Observations that have to be flattened."""

    observation_space = spaces.Dict(
        {
            "a": spaces.Discrete(3, start=1),
            "b": spaces.Tuple([spaces.MultiDiscrete([2, 2]), spaces.Box(-1, 1, (2, 2))]),
        }
    )
    action_space = spaces.Discrete(3, start=-1)

    def observe(self):
        return self.observation_space.sample()

    def play(self, action):
        assert self.action_space.contains(action), action
        return 1.0


class Words(Probe):
    observation_space = spaces.Sequence(spaces.Discrete(3))


class ManyActions(Probe):
    action_space = spaces.MultiDiscrete([2, 2])


class VeryManyActions(Probe):
    """A space that takes several lines to print."""

    action_space = spaces.MultiDiscrete([2] * 100)


class HugeBounds(Probe):
    action_space = spaces.Box(-1e10, 1e10, (1,), np.float64)


class NoUpperBound(Probe):
    action_space = spaces.Box(np.array([0, -1], np.float32), np.array([1, np.inf], np.float32))


class IntegerBox(Probe):
    action_space = spaces.Box(0, 5, (1,), np.int64)


class Endless(Probe):
    """A single episode without an end."""

    length = -1


# Continuous actions between bounds that are finite and not symmetric

BOUNDED = spaces.Box(np.array([0, -5], np.float32), np.array([10, 3], np.float32))


class BoundedScript(Script):
    """`Script` with two continuous actions."""

    action_space = BOUNDED


class BoundedConstant(Constant):
    """Q(s, a) = 1."""

    action_space = BOUNDED


class BoundedOnlyTruncates(OnlyTruncates):
    """Q(s, a) = 1 / (1 - gamma)."""

    action_space = BOUNDED


class BoundedTarget(ByObservation):
    """The reward is 1 minus the squared distance from (7, -2) on observation 1 and from (2, 1) on observation -1."""

    action_space = BOUNDED

    def play(self, action):
        assert self.action_space.contains(action), action
        target = np.array([7, -2] if self.sign > 0 else [2, 1])
        return 1.0 - float((((action - target) / np.array([5, 4])) ** 2).sum())


class BoundedByLaterAction(ByLaterAction):
    """Two steps; the second pays 1 at the bounds (10, -5), less elsewhere. Q of the first is gamma, of the second 1."""

    action_space = BOUNDED

    def play(self, action):
        return float(action[0] / 10 - (action[1] + 5) / 8) if self.t else 0.0


class ReusesItsArray(BoundedScript):
    """`BoundedScript`, but later steps change the observations that it has returned."""

    array = np.zeros(3, np.float32)

    def reset(self, **options):
        self.array[:], info = super().reset(**options)
        return self.array, info

    def step(self, action):
        self.array[:], *others = super().step(action)
        return self.array, *others


for cls in [value for value in globals().values() if isinstance(value, type) and issubclass(value, Probe)]:
    gym.register(f"{cls.__name__}-v0", cls)
