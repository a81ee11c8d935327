"""Environments for inject_faults.py. Importing this module registers them: `--env-id failing_env:Failing-v0`."""

import os
import sys
import threading

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv


class Failing(CartPoleEnv):
    """CartPole that fails as the variable FAULT says, `"what where after marker"`, and is whole without it.

    `what` is raise, exit, hang, nan or inf; `where` is step or reset (for nan and inf: observation or reward). An
    instance fails from its step number `after` on, and first creates the file `marker`. With "-once" behind `what`,
    only the instance that gets there first fails.
    """

    steps, fails = 0, None

    def is_due(self, where: str) -> bool:
        self.what, self.where, after, marker = os.environ.get("FAULT", "none none 0 none").split()
        if self.what == "none" or where != self.where or self.steps < int(after):
            return False
        if self.fails is None:
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                self.fails = True
            except FileExistsError:
                self.fails = "-once" not in self.what
        return self.fails

    def fail(self) -> None:
        if "raise" in self.what:
            raise RuntimeError("the environment broke")
        if "exit" in self.what:
            sys.exit(0)
        if "hang" in self.what:
            threading.Event().wait()

    def reset(self, **kwargs):
        if self.is_due("reset"):
            self.fail()
        return super().reset(**kwargs)

    def step(self, action):
        self.steps += 1
        if self.is_due("step"):
            self.fail()
        observation, reward, *rest = super().step(action)
        if self.is_due("observation"):
            observation = np.full_like(observation, float(self.what))
        if self.is_due("reward"):
            reward = float(self.what)
        return observation, reward, *rest


class OneStep(CartPoleEnv):
    """Every episode is over after one step, so that workers report all the time."""

    def step(self, action):
        observation, reward, *_ = super().step(action)
        return observation, reward, True, False, {}


gym.register("Failing-v0", Failing, max_episode_steps=200)
gym.register("OneStep-v0", OneStep)
