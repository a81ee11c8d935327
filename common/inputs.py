"""Command line and environments: what is wrong with them is said in one line, before anything is written."""

import difflib
import importlib.util
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces

AT_LEAST_1 = (
    "total_timesteps",
    "num_envs",
    "batch_size",
    "minibatch_size",
    "num_threads",
    "buffer_size",
    "cg_iterations",
    "fisher_stride",
    "line_search_steps",
    "num_workers",
    "t_max",
    "n_step",
    "train_frequency",
    "target_network_frequency",
    "log_interval",
)
AT_LEAST_0 = (
    "eval_episodes",
    "vf_epochs",
    "cg_damping",
    "ent_coef",
    "vf_coef",
    "learning_starts",
    "noise_std",
    "final_noise_std",
    "logit_penalty",
)
ABOVE_0 = (
    "learning_rate",
    "actor_learning_rate",
    "max_kl",
    "max_grad_norm",
    "rmsprop_eps",
    "gumbel_temperature",
)
FRACTIONS = (
    "gamma",
    "gae_lambda",
    "rmsprop_alpha",
    "exploration_fraction",
    "final_epsilons",
    "final_epsilon_probs",
    "ou_theta",
)
FRACTIONS_ABOVE_0 = ("tau",)
OF_ONE_CALL = ("resume", "evaluate", "eval_episodes", "capture_video")  # arguments that a resumed run does not inherit


class InputError(Exception):
    """A wrong argument. `command_line` prints it as one line and ends with exit code 2."""


def command_line(main: Callable, arguments_class: type) -> NoReturn:
    """Parse the command line into `arguments_class`, call `main` with it, and exit with the code that it returns.

    With --resume or --evaluate the arguments of that run take the place of the defaults; what else is given on the
    command line still wins. SIGTERM ends a run in good order, as Ctrl-C does.
    """
    script = Path(sys.modules[main.__module__].__file__).stem
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        args = tyro.cli(arguments_class, description=sys.modules[main.__module__].__doc__)
        if checkpoint := read_checkpoint(args, script):
            defaults, stored = asdict(arguments_class()), checkpoint["args"]
            inherited = {
                name: stored.get(name, default) for name, default in defaults.items() if name not in OF_ONE_CALL
            }
            args = tyro.cli(arguments_class, default=arguments_class(**inherited))
        sys.exit(main(args))
    except InputError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before or after the training, which has its own way to end
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)


def check_args(args) -> None:
    """Raise InputError for an argument out of range. NaN is out of every range."""
    rules = (
        (AT_LEAST_1, lambda value: 1 <= value < math.inf, "at least 1"),
        (AT_LEAST_0, lambda value: 0 <= value < math.inf, "at least 0"),
        (ABOVE_0, lambda value: 0 < value < math.inf, "above 0"),
        (FRACTIONS, lambda value: 0 <= value <= 1, "between 0 and 1"),
        (FRACTIONS_ABOVE_0, lambda value: 0 < value <= 1, "above 0 and at most 1"),
        (("seed",), lambda value: 0 <= value < 2**32, "between 0 and 2^32 - 1"),
    )
    for names, accepts, description in rules:
        for name in names:
            values = getattr(args, name, None)
            for value in values if isinstance(values, tuple) else () if values is None else (values,):
                if not accepts(value):
                    raise InputError(f"--{name.replace('_', '-')} must be {description}, not {value:g}")
    if (args.capture_video or args.evaluate) and not args.eval_episodes:
        flag = "--evaluate" if args.evaluate else "--capture-video"
        raise InputError(f"{flag} needs an evaluation: give --eval-episodes 1 or more")


def read_checkpoint(args, script: str) -> dict | None:
    """The checkpoint of the run that --resume or --evaluate names; None without either.

    Raises:
        InputError: there is none, it cannot be read, or it is of another script or environment.
    """
    if args.resume is None and args.evaluate is None:
        return None
    if args.resume is not None and args.evaluate is not None:
        raise InputError("--resume trains and --evaluate does not: give one of them")
    folder = args.evaluate if args.resume is None else args.resume
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise InputError(
            f"there is no checkpoint.pt in {folder or 'an empty name'}: give a run's folder, as its last line names it"
        )
    try:
        checkpoint = torch.load(path, weights_only=True)
        origin, _ = checkpoint["script"], checkpoint["args"]["env_id"]
    except Exception as error:  # a truncated or foreign file fails in more ways than can be listed
        raise InputError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if origin != script:
        raise InputError(f"{folder} is a run of {origin}.py, not of {script}.py")
    return checkpoint


def make_env(env_id: str, **kwargs) -> gym.Env:
    """`gymnasium.make`, with observations flattened to a vector where they are not one already."""
    env = gym.make(env_id, disable_env_checker=True, **kwargs)
    space = env.observation_space
    is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    return env if is_vector else gym.wrappers.FlattenObservation(env)


def check_env(args, checkpoint: dict | None) -> tuple[int, spaces.Space]:
    """Make `args.env_id` once. Returns the length of its flattened observations and its action space.

    Raises:
        InputError: there is no such environment (the nearest names are given), it cannot be made or filmed here, it is
            not the checkpoint's, or its observations do not flatten to a vector of fixed length or are images.
    """
    if checkpoint and args.env_id != (trained := checkpoint["args"]["env_id"]):
        raise InputError(f"{args.resume or args.evaluate} is a run on {trained}, not on {args.env_id}")
    try:
        raw = gym.make(args.env_id, disable_env_checker=True)
    except gym.error.UnregisteredEnv as error:
        names = {name.lower(): name for name in gym.registry}
        near = [names[name] for name in difflib.get_close_matches(args.env_id.lower(), names, n=3)]
        hint = f"did you mean {' or '.join(near)}?" if near else _first_line(error)
        raise InputError(f"there is no environment {args.env_id}: {hint}") from None
    except Exception as error:
        raise InputError(f"{args.env_id} cannot be made: {type(error).__name__}: {_first_line(error)}") from None
    space, action_space = raw.observation_space, raw.action_space
    raw.close()
    if isinstance(space, spaces.Box) and len(space.shape) > 1 and space.dtype.kind == "u":
        raise InputError(f"{args.env_id} observes images, {space.shape}: only what flattens to a vector is supported")
    if not space.is_np_flattenable:
        raise InputError(f"{args.env_id} observes {_first_line(space)}: that is no vector of fixed length")
    if args.capture_video:
        _check_film(args.env_id)
    return spaces.flatdim(space), action_space


def check_memory(flag: str, count: int, size: int) -> None:
    """Raise InputError if `count` things of `size` bytes, as many as `flag` asks for, do not fit into free memory."""
    import psutil  # here: who has no replay memory needs no psutil

    free = psutil.virtual_memory().available
    if count * size > free:
        needed = f"{flag} {count:,} needs {count * size / 2**20:,.0f} MiB of memory, and {free / 2**20:,.0f} are free"
        raise InputError(f"{needed}: give {free // size:,} at most")


def _check_film(env_id: str) -> None:
    try:
        if importlib.util.find_spec("moviepy") is None:
            raise ModuleNotFoundError("moviepy is not installed")
        env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
        env.reset(seed=0)
        if env.render_mode != "rgb_array" or not isinstance(env.render(), np.ndarray):
            raise ValueError("it renders no rgb_array")
        env.close()
    except Exception as error:
        packages = 'pip install moviepy "gymnasium[classic-control]"'
        raise InputError(f"--capture-video cannot film {env_id}: {_first_line(error)} ({packages})") from None


def _first_line(message: object) -> str:
    return str(message).strip().split("\n")[0]
