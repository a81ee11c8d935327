"""One run: its folder, its tables, its TensorBoard events, its checkpoint and its line on the terminal."""

import contextlib
import csv
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from common.inputs import InputError

EPISODE_COLUMNS = ("step", "time", "worker", "return", "length")
PLAIN_LINE_SECONDS = 5.0  # without a terminal: one line of progress this often


class RunError(Exception):
    """What ended a run, told in one line."""


def has_gil() -> bool:
    """Whether this interpreter has a global lock that lets one thread run Python at a time."""
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def how_it_ended(error: BaseException) -> tuple[int, str]:
    """The exit code of a run that `error` ended, and what to say of it."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, SystemExit):  # SIGTERM
        return error.code, "terminated"
    if isinstance(error, RunError | FloatingPointError):
        return 1, str(error)
    return 1, "".join(traceback.format_exception(error))


@contextlib.contextmanager
def ctrl_c_ignored():
    """For what takes a moment only and must not be cut short."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may change, or gets, signals
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


class Run:
    """The folder of one run and everything that is written into it while it lasts.

    Args:
        script: the script's name, without .py.
        args: its arguments; `resume` names the folder to go on in, otherwise a new one is made.
        metrics: the columns of metrics.csv beside `step` and `time`, each with its family in TensorBoard
            (`{"policy_loss": "losses", ...}`).
        facts: what args.json holds besides the arguments and the versions.
        step, seconds: where the checkpoint stands from which the run goes on. Rows beyond `step` belong to episodes
            that the checkpoint does not know; they are taken out, because they are about to be played again.
    """

    def __init__(self, script, args, metrics, facts, step=0, seconds=0.0):
        self.script, self.args, self.families = script, args, metrics
        name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{script}__{args.seed}__{int(time.time())}"
        self.folder = Path(args.resume) if args.resume else _new_folder(Path(args.log_dir) / name)
        (self.folder / "evaluation.json").unlink(missing_ok=True)  # of a policy that is about to change
        self.first_step, self.last_step, self.last_seconds, self.saved_step = step, step, seconds, step
        self.bar = None
        self.start()
        self.returns = deque(maxlen=50)
        self.interval_returns, self.interval_lengths = [], []
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
            "numpy": np.__version__,
        }
        facts = facts | {"versions": versions, "cores": os.cpu_count(), "gil": has_gil()}
        _write_json(self.folder / "args.json", asdict(args) | facts)
        self.episodes = _Table(self.folder / "episodes.csv", EPISODE_COLUMNS, step)
        self.metrics = _Table(self.folder / "metrics.csv", ("step", "time", *metrics, "steps_per_second"), step)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.folder, purge_step=step + 1 if args.resume else None, flush_secs=10)
        except ImportError:
            self.tensorboard = None
            print("tensorboard is not installed: only the CSV files are written")

    def start(self) -> float:
        """Training begins now. Returns the reading of `time.monotonic` that counts as 0 seconds."""
        self.begun = self.last_line = time.monotonic()
        self.started = self.begun - self.last_seconds
        return self.started

    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self.started

    def log_episodes(self, episodes: list[tuple[int, float, int, float, int]]) -> None:
        """Rows of episodes.csv, (step, seconds, worker, return, length) each."""
        for step, seconds, worker, episode_return, length in episodes:
            self.episodes.writerow((step, f"{seconds:.3f}", worker, f"{episode_return:.6g}", length))
            self.returns.append(episode_return)
            self.interval_returns.append(episode_return)
            self.interval_lengths.append(length)
        self.episodes.flush()

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """One row of metrics.csv, with `values` by column, and the same for TensorBoard."""
        seconds = self.seconds()
        speed = (step - self.last_step) / max(seconds - self.last_seconds, 1e-9)
        self.last_step, self.last_seconds = step, seconds
        row = [f"{values[name]:.6g}" for name in self.families]
        self.metrics.writerow((step, f"{seconds:.3f}", *row, f"{speed:.0f}"))
        self.metrics.flush()
        if self.tensorboard:
            scalars = {f"{family}/{name}": values[name] for name, family in self.families.items()}
            scalars["charts/SPS"] = speed
            if self.interval_returns:
                scalars["charts/episodic_return"] = np.mean(self.interval_returns)
                scalars["charts/episodic_length"] = np.mean(self.interval_lengths)
            for tag, value in scalars.items():
                self.tensorboard.add_scalar(tag, value, step)
        self.interval_returns, self.interval_lengths = [], []

    def show_progress(self, step: int) -> None:
        """The progress bar, or now and then a plain line where there is no terminal."""
        mean = f"{np.mean(self.returns):.1f}" if self.returns else "-"
        if sys.stdout.isatty():
            total = self.args.total_timesteps
            if self.bar is None:
                self.bar = tqdm(total=total, initial=self.first_step, unit=" steps", file=sys.stdout)
            self.bar.set_postfix_str(f"return {mean}", refresh=False)
            self.bar.update(min(step, total) - self.bar.n)
        elif time.monotonic() - self.last_line >= PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            speed = (step - self.first_step) / (time.monotonic() - self.begun)
            left = max(0, self.args.total_timesteps - step) / max(speed, 1e-9)
            print(f"step {step:,}: return {mean}, {speed:,.0f} steps per second, {left:.0f} s left", flush=True)

    def save(self, step: int, tensors: dict, random_states: dict) -> None:
        """Write checkpoint.pt: under another name first, so that a crash leaves the old one whole.

        Args:
            step: T.
            tensors: networks and optimiser, by name: a tensor or a state_dict each.
            random_states: the state of each worker's random generator, by number.

        Raises:
            FloatingPointError: a number in `tensors` is not finite; the old checkpoint stays.
        """
        for name, content in tensors.items():
            for tensor in _tensors(content):
                if not tensor.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite at step {step:,}: the checkpoint before it is kept")
        about = {"script": self.script, "args": asdict(self.args), "step": step, "seconds": self.seconds()}
        temporary = self.folder / "checkpoint.tmp"
        torch.save(about | tensors | {"random_states": random_states}, temporary)
        os.replace(temporary, self.folder / "checkpoint.pt")
        self.saved_step = step

    def finish(self, evaluation: str, mean_return: float | None) -> None:
        """The last line on the terminal, and the evaluation for TensorBoard; takes what `evaluate` returns."""
        steps, seconds = self.saved_step - self.first_step, self.trained_seconds
        speed = f"{steps:,} steps in {seconds:.1f} s, {steps / seconds:,.0f} steps per second"
        print(f"{self.script}: {speed}; {evaluation}; {self.folder}")
        if self.tensorboard:
            if mean_return is not None:
                self.tensorboard.add_scalar("eval/mean_return", mean_return, self.saved_step)
            self.tensorboard.close()

    def close(self) -> None:
        """Training is over: close tables and bar. What has been logged is on disk before this, too."""
        self.trained_seconds = time.monotonic() - self.begun
        if self.bar is not None:
            self.bar.close()
        self.episodes.close()
        self.metrics.close()
        if self.tensorboard:
            self.tensorboard.flush()


class _Table:
    """A CSV file for rows of `columns`. What has been flushed is safe from kill -9.

    Rows that are there already stay if they are whole and not beyond `step`. Where a run goes on with other columns, as
    with another number of workers, none is lost: what a row has no value for is empty.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], step: int):
        self.columns, known, kept = columns, [], []
        if path.exists():
            reader = csv.DictReader(path.read_text().split("\n")[:-1])  # without what follows the last end of line
            kept = [row for row in reader if float(row["step"]) <= step]
            known = [name for name in reader.fieldnames or () if name not in columns]
        header, temporary = (*columns, *known), path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, header, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(temporary, path)
        file = open(path, "a", newline="")  # noqa: SIM115
        self.writer = csv.DictWriter(file, header, lineterminator="\n")
        self.flush, self.close = file.flush, file.close

    def writerow(self, row: tuple) -> None:
        self.writer.writerow(dict(zip(self.columns, row, strict=True)))


def _tensors(content: object) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)


def _new_folder(path: Path) -> Path:
    """`path`, or the same with a number behind it where another run of this second has taken it."""
    for number in range(1, 1000):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            if not candidate.exists():
                break
        except OSError:
            break
    raise InputError(f"--log-dir: the folder {path} cannot be made")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
