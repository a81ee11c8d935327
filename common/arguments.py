"""The command line: refusals in one line, and the arguments of an earlier run."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch
import tyro

OF_ONE_CALL = ("resume", "evaluate", "eval_episodes", "capture_video")  # a resumed run does not inherit these


def fail(message: str) -> NoReturn:
    """The user gave something wrong: say so in one line and end with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def failing(what: str):
    """Whatever is raised inside ends in `fail`, with `what` and the error on one line."""
    try:
        yield
    except Exception as error:
        fail(f"{what}: {' '.join(str(error).split()) or type(error).__name__}")


def parse_args(args_class: type, script: str):
    """The command line as an instance of `args_class`, a dataclass; its module's docstring introduces --help.

    With --resume or --evaluate, the arguments of that run take the place of the defaults. Ctrl-C and SIGTERM end the
    process with exit codes 130 and 143 from now on, except while a `Run` handles them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    args = tyro.cli(args_class, description=sys.modules[args_class.__module__].__doc__)
    if checkpoint := load_checkpoint(args, script):
        stored = {k: v for k, v in checkpoint["args"].items() if hasattr(args, k) and k not in OF_ONE_CALL}
        args = tyro.cli(args_class, default=args_class(**stored))
        if args.env_id != stored["env_id"]:
            fail(f"{args.resume or args.evaluate} is a run on {stored['env_id']}, not on {args.env_id}")
    return args


def load_checkpoint(args, script: str) -> dict | None:
    """The checkpoint of the run that --resume or --evaluate names, None without either.

    `fail`s if there is none, if it cannot be read, if it is of another script, or if nothing can be written beside it.
    """
    if args.resume is not None and args.evaluate is not None:
        fail("--resume trains and --evaluate does not: give one of them")
    folder = args.evaluate if args.resume is None else args.resume
    if folder is None:
        return None
    with failing(f"'{folder}' holds no checkpoint.pt of {script}.py, or a damaged one"):
        checkpoint = torch.load(Path(folder) / "checkpoint.pt", weights_only=True, map_location="cpu")
        origin, _ = checkpoint["script"], checkpoint["args"]["env_id"]  # without either it is none
        assert origin == script, f"it is of {origin}.py"
        assert os.access(Path(folder), os.W_OK), "the folder cannot be written to, copy it first"
    return checkpoint
