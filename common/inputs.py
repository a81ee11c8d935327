"""Command line and environments: what can be wrong with them is said in one line, before anything is written."""

import dataclasses
import difflib
import math
import sys
from collections.abc import Callable
from typing import NoReturn

import gymnasium as gym
import numpy as np
import tyro
from gymnasium import spaces

from common.run import load_checkpoint


class InputError(Exception):
    """A wrong argument. `command_line` prints it as one line and ends with exit code 2."""


def command_line(main: Callable, arguments_class: type, script: str) -> NoReturn:
    """Parse the command line into `arguments_class`, call `main` with it, and exit with the code that it returns.

    With --resume or --evaluate the arguments of that run take the place of the defaults, and what else is given on the
    command line still wins. An `InputError` becomes one line on standard error and exit code 2.
    """
    try:
        args = tyro.cli(arguments_class, description=sys.modules["__main__"].__doc__)
        if args.resume and args.evaluate:
            raise InputError("--resume and --evaluate exclude each other: the first trains, the second does not")
        if folder := args.resume or args.evaluate:
            stored = stored_arguments(folder, script, arguments_class)
            args = tyro.cli(arguments_class, default=stored)
            if args.env_id != stored.env_id:
                raise InputError(f"{folder} was trained on {stored.env_id}, not on {args.env_id}: leave --env-id out")
        sys.exit(main(args))
    except InputError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)


def stored_arguments(folder: str, script: str, arguments_class: type):
    """The arguments of the run in `folder`, but for those that speak of one call alone."""
    stored = checkpoint_of(folder, script)["args"]
    defaults = dataclasses.asdict(arguments_class())
    one_call = ("resume", "evaluate", "eval_episodes", "capture_video")
    return arguments_class(**{k: v if k in one_call else stored.get(k, v) for k, v in defaults.items()})


def checkpoint_of(folder: str, script: str) -> dict:
    """`load_checkpoint`, with its errors as InputError."""
    try:
        return load_checkpoint(folder, script)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None


def check_at_least(args, minimum: float, *names: str) -> None:
    """Raise InputError unless each named argument is finite and at least `minimum`."""
    for name in names:
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= minimum):
            raise InputError(f"{_flag(name)} must be at least {minimum:g}, not {value:g}")


def check_positive(args, *names: str) -> None:
    """Raise InputError unless each named argument is finite and above 0."""
    for name in names:
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{_flag(name)} must be a number above 0, not {value:g}")


def check_fraction(args, *names: str) -> None:
    """Raise InputError unless each named argument lies in [0, 1]."""
    for name in names:
        value = getattr(args, name)
        if not 0 <= value <= 1:
            raise InputError(f"{_flag(name)} must lie between 0 and 1, not {value:g}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def make_env(env_id: str, **kwargs) -> gym.Env:
    """`gymnasium.make`, with observations flattened to a vector where they are not one already."""
    env = gym.make(env_id, disable_env_checker=True, **kwargs)
    space = env.observation_space
    is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    return env if is_vector else gym.wrappers.FlattenObservation(env)


def check_env(env_id: str, film: bool = False) -> gym.Env:
    """Make `env_id` as `make_env` does, or raise InputError with the reason in one line.

    Refused are unknown ids (the nearest known ones are named), environments whose packages are missing, observations that
    do not flatten to a vector of fixed length, and images. With `film`, also environments that cannot be filmed here.
    """
    try:
        space = gym.make(env_id, disable_env_checker=True).observation_space
    except gym.error.UnregisteredEnv:
        near = _nearest(env_id)
        hint = f"did you mean {' or '.join(near)}?" if near else "gymnasium.registry lists the known ones"
        raise InputError(f"there is no environment {env_id!r}: {hint}") from None
    except Exception as error:
        raise InputError(f"{env_id} cannot be made: {type(error).__name__}: {_first_line(error)}") from None
    if isinstance(space, spaces.Box) and len(space.shape) >= 2 and space.dtype == np.uint8:
        raise InputError(
            f"{env_id} observes images {space.shape}; only what flattens to a vector of numbers is supported"
        )
    if not space.is_np_flattenable:
        raise InputError(f"{env_id} observes {_first_line(space)}, which does not flatten to a vector of fixed length")
    if film:
        try:
            import moviepy  # noqa: F401

            env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
            env.reset(seed=0)
            env.render()
            env.close()
        except Exception as error:
            raise InputError(
                f"--capture-video needs moviepy and what renders {env_id} "
                f'(pip install moviepy "gymnasium[classic-control]"): {_first_line(error)}'
            ) from None
    return make_env(env_id)


def _nearest(env_id: str) -> list[str]:
    known = {name.lower(): name for name in gym.registry}
    return [known[name] for name in difflib.get_close_matches(env_id.lower(), known, n=3, cutoff=0.6)]


def _first_line(message: object) -> str:
    return str(message).strip().split("\n")[0]
