"""Environments that fail in one way each. `gymnasium.make("faulty:Failing-v0")` registers them by itself."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np
from probes import Probe

test_is_over = threading.Event()


def hang() -> None:
    """Say so, and do nothing until the test is over. A process never hears of that."""
    print("the probe hangs", flush=True)
    test_is_over.wait()


class Failing(Probe):
    """Episodes of 5 steps; `fail` is called in the 40th step of an environment."""

    steps = 0
    length = 5

    def step(self, action):
        self.steps += 1
        if self.steps == 40:
            self.fail()
        return super().step(action)

    def fail(self):
        raise RuntimeError("the probe broke")


class Waits(Failing):
    """Waits in its 40th step for the file that the environment variable GATE names."""

    def fail(self):
        while not os.path.exists(os.environ["GATE"]):
            time.sleep(0.05)


class FailsAtReset(Probe):
    def reset(self, **kwargs):
        raise RuntimeError("the probe cannot be reset")


class HangsAtReset(Failing):
    """Hangs in the reset that follows on its 40th step."""

    def reset(self, **kwargs):
        if self.steps == 40:
            hang()
        return super().reset(**kwargs)

    def fail(self):
        pass


class HangsAtClose(Probe):
    def reset(self, **kwargs):
        self.is_used = True
        return super().reset(**kwargs)

    def close(self):
        if getattr(self, "is_used", False):
            hang()


class RaisesAtClose(HangsAtClose):
    def close(self):
        if getattr(self, "is_used", False):
            raise RuntimeError("the probe cannot be closed")


class Killed(Failing):
    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Hangs(Failing):
    def fail(self):
        hang()


class OneRaises(Hangs):
    """The first worker of a process that gets to its 40th step raises, the others hang."""

    number = itertools.count()

    def fail(self):
        if next(OneRaises.number) == 0:
            raise RuntimeError("the probe broke")
        super().fail()


class Exits(Failing):
    def fail(self):
        sys.exit(0)


class SignalsItself(Failing):
    """A worker process gets Ctrl-C and SIGTERM in its 40th step, as from a signal to the whole process group."""

    def fail(self):
        if multiprocessing.parent_process():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)


class StartsAProcess(Failing):
    """Starts a process that sends a signal to itself, and expects that it dies of that."""

    def fail(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            assert subprocess.run(["sh", "-c", f"kill -{int(number)} $$"]).returncode == -number


def signal_main(number: int) -> None:
    """Send a signal to the main process, from it or from one of its workers."""
    parent = multiprocessing.parent_process()
    os.kill(parent.pid if parent else os.getpid(), number)


class InterruptsMain(Failing):
    """Ctrl-C in the 40th step of an episode that never ends."""

    length = -1

    def fail(self):
        signal_main(signal.SIGINT)


class TerminatesMain(InterruptsMain):
    def fail(self):
        signal_main(signal.SIGTERM)


class InterruptsAndHangs(Probe):
    def reset(self, **kwargs):
        signal_main(signal.SIGINT)
        hang()


class SlowAtTheEnd(Failing):
    """Takes its time for every step from the 40th on."""

    length = -1

    def step(self, action):
        if self.steps >= 40:
            time.sleep(0.05)
        return super().step(action)

    def fail(self):
        pass


class NotANumber(Failing):
    """Observes NaN from the 40th step on."""

    def observe(self):
        return np.full(1, np.nan if self.steps >= 40 else 0.0, np.float32)

    def fail(self):
        pass


class InfiniteReward(Failing):
    def play(self, action):
        return np.inf if self.steps >= 40 else 1.0

    def fail(self):
        pass


for cls in [value for value in globals().values() if isinstance(value, type) and issubclass(value, Probe)]:
    if cls is not Probe:
        gym.register(f"{cls.__name__}-v0", cls)
