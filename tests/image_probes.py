"""Tiny environments of images, whose values are known, as `probes` has them for vectors."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from probes import Probe


class Images(Probe):
    """Reward 1 for the number of the brighter half, left or right, otherwise -1. With gamma = 0, V = 1."""

    observation_space = spaces.Box(0, 255, (8, 6, 2), np.uint8)
    length = 5

    def observe(self):
        self.side = int(self.np_random.integers(2))
        image = self.np_random.integers(0, 100, (8, 6, 2), np.uint8)
        image[:, 3 * self.side : 3 * self.side + 3] += 100
        return image

    def play(self, action):
        return 1.0 if action == self.side else -1.0


class ImagesWithChannelsFirst(Images):
    observation_space = spaces.Box(0, 255, (2, 8, 6), np.uint8)

    def observe(self):
        return np.moveaxis(super().observe(), -1, 0)


class WideImages(Images):
    observation_space = spaces.Box(0, 255, (6, 8, 2), np.uint8)

    def observe(self):
        return np.swapaxes(super().observe(), 0, 1)


class LargeImages(Images):
    """Each pixel has become 8 x 8."""

    observation_space = spaces.Box(0, 255, (64, 48, 2), np.uint8)

    def observe(self):
        return np.kron(super().observe(), np.ones((8, 8, 1), np.uint8))


class BoolImages(Images):
    """More pixels are lit in the brighter half."""

    observation_space = spaces.Box(0, 1, (8, 6, 2), np.bool_)

    def observe(self):
        return super().observe() > 80


class NarrowImages(Probe):
    observation_space = spaces.Box(0, 255, (8, 2, 1), np.uint8)


class Painted(Probe):
    """Renders its state: red tells the step, green 200 the left half, blue 200 the right one, of which one is drawn.

    The reward is (1 - (a / 5 - 1 - m)^2) / 3, where m is -0.5 if the left half is green and 0.5 if the right is blue.
    An episode has 7 steps. It ends by turns in a terminal state and at a time limit.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    action_space = spaces.Box(0, 10, (1,), np.float32)
    length = 7
    episodes = 0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, **options):
        observation, info = super().reset(**options)
        self.episodes += 1
        self.side = int(self.np_random.integers(2))
        return observation, info

    def step(self, action):
        self.t += 1
        reward = (1 - (action[0] / 5 - 1.5 + (self.side == 0)) ** 2) / 3
        end, by_limit = self.t == self.length, self.episodes % 2 == 0
        return self.observe(), float(reward), end and not by_limit, end and by_limit, {}

    def render(self):
        image = np.zeros((128, 128, 3), np.uint8)
        image[:, :, 0] = 10 * self.t
        image[:, 64 * self.side : 64 * self.side + 64, 1 + self.side] = 200
        return image


class PaintedInGrey(Painted):
    def render(self):
        return super().render()[:, :, 0]


class PaintedInFloats(Painted):
    def render(self):
        return super().render() / 255


class PaintedForTwoActions(Painted):
    action_space = spaces.Discrete(2)


for cls in [value for value in globals().values() if getattr(value, "__module__", None) == __name__]:
    gym.register(f"{cls.__name__}-v0", cls)
