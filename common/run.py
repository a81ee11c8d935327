"""One run: its random numbers, its folder, its tables, its checkpoint, its line on the terminal, and how it stops."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from common.arguments import failing

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def seed_everything(seed: int, step: int, worker: int = 0) -> np.random.Generator:
    """The random numbers of one worker from one step on; seeds torch's and numpy's global generators, too.

    A run that goes on at another step draws other numbers, so no state of a generator has to be stored.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(step, worker))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
    np.random.seed(sequence.generate_state(4))  # an environment may draw from it, and processes inherit its state
    return np.random.default_rng(sequence)


def has_gil() -> bool:
    """Whether this interpreter has a global lock that lets one thread run Python at a time."""
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def signals_blocked() -> contextlib.ExitStack:
    """Processes that start inside get no Ctrl-C and no SIGTERM until `follow_parent`; this one gets them afterwards."""
    _mask_signals("SIG_BLOCK")
    block = contextlib.ExitStack()
    block.callback(_mask_signals, "SIG_UNBLOCK")
    return block


def follow_parent() -> None:
    """In a process of its own, a worker leaves Ctrl-C and SIGTERM to its parent, and ends when that has ended."""
    if (parent := multiprocessing.parent_process()) and threading.current_thread() is threading.main_thread():
        threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
    _mask_signals("SIG_UNBLOCK")  # neither blocked nor ignored: what an environment starts would inherit that


def _mask_signals(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(getattr(signal, how), STOP_SIGNALS)


class Run:
    """The folder of one run, everything that is written into it, and the reason to stop.

    A `with run:` block guards a part of the run. Inside, the first Ctrl-C or SIGTERM sets `stopped`, and one that comes
    later ends the process at once. An error ends the block; it is printed, sets `stopped` and makes the exit code 1.

    Args:
        script: the script's name, without .py.
        args: its arguments; `resume` names the folder to go on in, otherwise a new one is made.
        metrics: the columns of metrics.csv beside `step`, `time` and `steps_per_second`, each with its family in
            TensorBoard (`{"policy_loss": "losses", ...}`).
        facts: what args.json holds besides the arguments and the versions.
        checkpoint: of the run to go on with. Rows beyond its step are taken out: those steps are taken again.
    """

    def __init__(self, script: str, args, metrics: dict[str, str], facts: dict, checkpoint: dict | None):
        self.script, self.args, self.families = script, args, metrics
        self.stopped, self.exit_code, self.signalled = False, 0, 0.0
        self.folder = _new_folder(args, script) if args.resume is None else Path(args.resume)
        (self.folder / "evaluation.json").unlink(missing_ok=True)  # of a policy that is about to change
        versions = {name: version(name) for name in ("torch", "gymnasium", "numpy")}
        facts |= {"versions": versions | {"python": sys.version.split()[0]}, "cores": os.cpu_count(), "gil": has_gil()}
        (self.folder / "args.json").write_text(json.dumps(vars(args) | facts, indent=2) + "\n")
        step = self.first_step = self.last_step = checkpoint["step"] if checkpoint else 0
        self.first_seconds = self.last_seconds = checkpoint["seconds"] if checkpoint else 0.0
        self.episodes = _Table(self.folder / "episodes.csv", step, "step", "time", "worker", "return", "length")
        self.metrics = _Table(self.folder / "metrics.csv", step, "step", "time", *metrics, "steps_per_second")
        self.recent = []  # return and length of the last 50 episodes
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.folder, purge_step=step + 1 if checkpoint else None, flush_secs=10)
        except ImportError:
            self.tensorboard = None
            print("tensorboard is not installed: only the CSV files are written")
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", file=sys.stdout, disable=None, delay=1)
        self.start()

    def start(self) -> None:
        """Training begins now."""
        self.last_line = time.monotonic()
        self.zero = self.last_line - self.first_seconds

    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self.zero

    def __enter__(self) -> None:
        self.handlers = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}

    def __exit__(self, kind, error, _) -> bool:
        if error is not None:
            self.fail("".join(traceback.format_exception(error)))
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        return True

    def _stop(self, number: int, _) -> None:
        # Already stopped, by an earlier signal or an error: now at once. But `timeout` sends each signal twice.
        if self.stopped and time.monotonic() > self.signalled + 0.5:
            os._exit(128 + number)
        self.stopped, self.exit_code, self.signalled = True, 128 + number, self.signalled or time.monotonic()

    def fail(self, cause: str) -> None:
        """Print `cause` and stop the run with exit code 1."""
        self.stopped, self.exit_code = True, 1
        with contextlib.suppress(OSError):  # nobody may be reading any more
            print(f"{self.script}: {cause.strip()}", file=sys.stderr, flush=True)

    def log_episode(self, step: int, worker: int, episode: dict, now: float | None = None) -> None:
        """A row of episodes.csv; the episode ended at `now`, a reading of `time.monotonic`, or just now.

        `episode` is what the wrapper `RecordEpisodeStatistics` puts into `info` at the end of an episode.
        """
        # An episode that has ended before `start` counts as ending then.
        seconds, score = max(self.first_seconds, (now or time.monotonic()) - self.zero), float(episode["r"])
        self.episodes.write({"step": step, "time": seconds, "worker": worker, "return": score, "length": episode["l"]})
        self.recent = [*self.recent[-49:], (score, episode["l"])]

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """A row of metrics.csv, with `metrics` by column, and the same for TensorBoard."""
        seconds = self.seconds()
        speed = (step - self.last_step) / max(seconds - self.last_seconds, 1e-9)
        self.last_step, self.last_seconds = step, seconds
        self.metrics.write({"step": step, "time": seconds} | metrics | {"steps_per_second": speed})
        scalars = {f"{family}/{name}": metrics[name] for name, family in self.families.items()} | {"charts/SPS": speed}
        if self.recent:
            scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(self.recent, axis=0)
        for tag, value in scalars.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(tag, value, step)

    def progress(self, step: int) -> None:
        """The progress bar, or a plain line every few seconds where there is no terminal."""
        mean = f"{np.mean(self.recent, axis=0)[0]:.1f}" if self.recent else "-"
        self.bar.set_postfix_str(f"return {mean}", refresh=False)
        self.bar.update(min(step, self.bar.total) - self.bar.n)
        if self.bar.disable and time.monotonic() - self.last_line > 5:  # no terminal: a line every 5 seconds
            self.last_line = time.monotonic()
            speed = (step - self.first_step) / (self.seconds() - self.first_seconds)
            left = max(0, self.args.total_timesteps - step) / max(speed, 1e-9)
            print(f"step {step:,}: return {mean}, {speed:,.0f} steps per second, {left:.0f} s left", flush=True)

    def save(self, step: int, **state) -> None:
        """Write checkpoint.pt: under another name first, so that a crash leaves the old one whole.

        Args:
            step: T.
            state: tensors and `state_dict`s by name, which `load_checkpoint` returns beside `step`.

        Raises:
            FloatingPointError: a tensor is not finite. The old checkpoint stays.
        """
        # By numpy, because workers may be writing: torch compares each number with itself, and would find it changed.
        if not all(np.isfinite(leaf.cpu().numpy()).all() for leaf in tree_leaves(state) if torch.is_tensor(leaf)):
            raise FloatingPointError(f"a parameter is not finite at step {step:,}: no checkpoint is written")
        about = {"script": self.script, "args": vars(self.args), "step": step, "seconds": self.seconds()}
        torch.save(about | state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def close(self, step: int) -> None:
        """Training has ended at `step`, for whatever reason."""
        self.last_step, self.last_seconds = step, self.seconds()
        self.stopped = True  # from now on, a signal ends the process at once
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.flush()
        if self.exit_code:
            print(f"{self.script}: stopped at step {step:,}; {self.folder}", file=sys.stderr)

    def finish(self, evaluation: str, mean_return: float | None) -> None:
        """The last line on the terminal, and the evaluation for TensorBoard; takes what `evaluate` returns."""
        steps, seconds = self.last_step - self.first_step, self.last_seconds - self.first_seconds
        speed = f"{steps:,} steps in {seconds:.1f} s, {steps / seconds:,.0f} steps per second"
        print(f"{self.script}: {speed}; {evaluation}; {self.folder}")
        if self.tensorboard and mean_return is not None:
            self.tensorboard.add_scalar("eval/mean_return", mean_return, self.last_step)
            self.tensorboard.close()


class _Table:
    """A CSV file of numbers. A row is safe from kill -9 when `write` returns; where the disk is full, none is torn.

    Rows that are there already stay if they are whole and not beyond `last_step`, and so do their columns.
    """

    def __init__(self, path: Path, last_step: int, *columns: str):
        header, *lines = path.read_text().split("\n")[:-1] if path.exists() else [",".join(columns)]
        self.columns = list(dict.fromkeys([*header.split(","), *columns]))
        kept = [line for line in lines if float(line.split(",")[0]) <= last_step]
        path.with_suffix(".tmp").write_text("\n".join([",".join(self.columns), *kept, ""]))
        os.replace(path.with_suffix(".tmp"), path)
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, row: dict) -> None:
        """Add a row, given by column; what it lacks stays empty."""
        cells = [row.get(name, "") for name in self.columns]
        line = ",".join(f"{cell:.8g}" if isinstance(cell, float) else str(cell) for cell in cells) + "\n"
        end = self.file.seek(0, os.SEEK_END)
        if self.file.write(line.encode()) < len(line):
            self.file.truncate(end)
            raise OSError(f"no space left on the disk for {self.file.name}")


def _new_folder(args, script: str) -> Path:
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{script}__{args.seed}"
    with failing("--log-dir: no folder can be made there"):
        while (folder := Path(args.log_dir) / f"{name}__{time.time():.0f}").exists():
            time.sleep(0.1)  # another run has the name of this second
        folder.mkdir(parents=True)
    return folder
