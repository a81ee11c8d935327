"""Training in a single process, an iteration at a time."""

import copy
import sys
from collections.abc import Iterator

import numpy as np
import torch

from common.inputs import InputError
from common.run import Run, ctrl_c_ignored, how_it_ended


def train(run: Run, iterations: Iterator, model: torch.nn.Module, optimizers: dict, rng: np.random.Generator) -> int:
    """Log, save and watch while `iterations` trains. One that is interrupted or fails counts as not begun.

    Args:
        run: where to log.
        iterations: trains, and yields after each iteration T, the rows of episodes.csv since the one before, and the
            values of the run's metrics by name, none where there is nothing to tell yet.
        model, optimizers, rng: what it trains and draws from, which with torch's generator is what the checkpoint
            holds and `restore` brings back; the optimisers by name.

    Returns:
        The exit code: 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """

    def snapshot() -> tuple[dict, dict]:
        tensors = {"model": model.state_dict(), "torch_random_state": torch.get_rng_state()}
        tensors |= {f"{name}_optimizer": optimizer.state_dict() for name, optimizer in optimizers.items()}
        return copy.deepcopy(tensors), {0: rng.bit_generator.state}

    exit_code, cause, sums, count = 0, "", dict.fromkeys(run.families, 0.0), 0
    interval, step = run.args.log_interval, run.first_step
    next_log, latest = step // interval + 1, snapshot()

    def log_and_save() -> None:
        nonlocal sums, count
        if count:
            run.log_metrics(step, {name: value / count for name, value in sums.items()})
            sums, count = dict.fromkeys(run.families, 0.0), 0
        run.save(step, *latest)

    try:
        run.start()
        for step, episodes, metrics in iterations:
            latest = snapshot()
            if metrics:
                sums, count = {name: value + metrics[name] for name, value in sums.items()}, count + 1
            run.log_episodes(episodes)
            if step >= next_log * interval:
                log_and_save()
                next_log = step // interval + 1
            run.show_progress(step)
    except BaseException as error:
        exit_code, cause = how_it_ended(error)
    with ctrl_c_ignored():
        run.show_progress(step)
        try:
            log_and_save()
        except FloatingPointError as error:  # the last good checkpoint stays
            exit_code, cause = exit_code or 1, f"{cause}\n{error}".strip()
        run.close()
    if exit_code:
        print(f"{run.script}: {cause}\n{run.script}: stopped at step {step:,}; {run.folder}", file=sys.stderr)
    return exit_code


def restore(checkpoint: dict, model: torch.nn.Module, optimizers: dict, rng: np.random.Generator) -> tuple[int, float]:
    """Bring back what `train` saved; the learning rates stay as they are. Returns the checkpoint's T and seconds.

    Raises:
        InputError: it is of other networks than these.
    """
    try:
        model.load_state_dict(checkpoint["model"])
        for name, optimizer in optimizers.items():
            learning_rate = optimizer.param_groups[0]["lr"]
            optimizer.load_state_dict(checkpoint[f"{name}_optimizer"])
            optimizer.param_groups[0]["lr"] = learning_rate
        rng.bit_generator.state = checkpoint["random_states"][0]
        torch.set_rng_state(checkpoint["torch_random_state"])
        return checkpoint["step"], checkpoint["seconds"]
    except (RuntimeError, LookupError, TypeError, ValueError):
        env_id = checkpoint["args"]["env_id"]
        raise InputError(f"the checkpoint does not fit {env_id} as it is installed here") from None
