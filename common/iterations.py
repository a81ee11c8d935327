"""Training in a single process, an iteration at a time."""

import sys
from collections.abc import Callable, Iterator

import numpy as np

from common.run import Run, ctrl_c_ignored, how_it_ended


def train(run: Run, iterations: Iterator, snapshot: Callable, rng: np.random.Generator) -> int:
    """Log, save and watch while `iterations` trains. One that is interrupted or fails counts as not begun.

    Args:
        run: where to log.
        iterations: trains, and yields after each iteration T, the rows of episodes.csv since the one before, and the
            values of the run's metrics by name, none where there is nothing to tell yet.
        snapshot: returns copies of the tensors, by name, that the checkpoint is to hold.
        rng: the random generator of the training.

    Returns:
        The exit code: 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    exit_code, cause, sums, count = 0, "", dict.fromkeys(run.families, 0.0), 0
    interval, step = run.args.log_interval, run.first_step
    next_log, latest = step // interval + 1, (snapshot(), {0: rng.bit_generator.state})

    def log_and_save() -> None:
        nonlocal sums, count
        if count:
            run.log_metrics(step, {name: value / count for name, value in sums.items()})
            sums, count = dict.fromkeys(run.families, 0.0), 0
        run.save(step, *latest)

    try:
        run.start()
        for step, episodes, metrics in iterations:
            latest = snapshot(), {0: rng.bit_generator.state}
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
