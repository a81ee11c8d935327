"""Workers as threads or as processes: one worker function serves both and cannot tell which it is.

Every worker has a pipe of its own to the main thread. It carries what the worker reports, its exception if it fails, and, by
closing without a word, the news that it was killed. There is no lock and no shared queue, so a worker that dies at any
moment leaves nothing behind that the others could wait for.

`concurrent.futures` was considered: it reports that a process was killed, but not which one, and before Python 3.14 it cannot
end one that hangs. `torch.multiprocessing.start_processes` does both, but knows neither threads nor messages.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection

import torch.multiprocessing

from common.run import Run, has_gil

GRACE_SECONDS = 2.0  # how long workers may take to stop before they are made to
MESSAGES_AT_ONCE = 500  # of one worker, before the next one's turn


class WorkerError(Exception):
    """A worker failed or was killed; the text says which and why."""


def choose_backend(backend: str, num_workers: int) -> tuple[str, str]:
    """Resolve `auto` into `thread` or `process`. Returns the backend and the reason in a few words."""
    if backend != "auto":
        return backend, "as asked"
    if num_workers == 1:
        return "thread", "a single worker"
    if has_gil():
        return "process", "this Python has a GIL: its threads take turns"
    return "thread", "this Python has no GIL"


def train(run: Run, target: Callable, arguments: list[tuple], backend: str, shared, snapshot: Callable) -> int:
    """Start the workers; log, save and watch while they train, until all are done or one fails.

    Args:
        run: where to log. Its metrics are the columns of `shared.sums`, behind the number of updates.
        target, arguments, backend: as for `Workers`. A worker's first message says that it is ready; the answer is the time at
            which training begins. Every other one is an episode: (T, seconds, return, length) and the state of the
            worker's random generator.
        shared: has `T()`, `sums`, shape (workers, 1 + metrics), and `stop`, which the workers obey.
        snapshot: returns the tensors, by name, that the checkpoint is to hold.

    Returns:
        The exit code: 0, 1 if a worker failed, 130 after Ctrl-C.
    """
    workers, exit_code, random_states = Workers(target, arguments, backend), 0, {}
    logged, interval = shared.sums.sum(0), run.args.log_interval

    def log_episodes(messages: Iterator) -> None:
        rows = []
        try:
            for index, ((step, seconds, *rest), random_state) in messages:
                rows.append((step, seconds, index, *rest))
                random_states[index] = random_state
        finally:
            for row in sorted(rows):
                run.log_episode(*row)

    def log_and_save() -> None:
        nonlocal logged
        step, sums = shared.T(), shared.sums.sum(0)
        updates, *metrics = (sums - logged).tolist()
        if updates:
            run.log_metrics(step, dict(zip(run.families, (m / updates for m in metrics), strict=True)))
            logged = sums
        run.save(step, snapshot(), random_states)

    try:
        workers.wait_until_ready()
        workers.broadcast(run.start())
        next_log = shared.T() // interval + 1
        while workers.channels:
            log_episodes(workers.messages(timeout=0.1))
            if shared.T() >= next_log * interval:
                log_and_save()
                next_log = shared.T() // interval + 1
            run.show_progress(shared.T())
    except KeyboardInterrupt:
        exit_code, message = 130, "interrupted"
    except WorkerError as error:
        exit_code, message = 1, str(error)
    finally:  # also on SIGTERM, whose SystemExit goes on from here
        shared.stop.fill_(True)
        log_episodes(workers.join())
        run.show_progress(shared.T())
        try:
            log_and_save()
        except FloatingPointError as error:
            print(error, file=sys.stderr)
        run.close()
    if exit_code:
        print(f"{run.script}: {message}\n{run.script}: stopped at step {shared.T():,}, {run.folder}", file=sys.stderr)
    return exit_code


class Workers:
    """One worker for each entry of `arguments`, started as `target(channel, index, *arguments[index])`.

    `channel.send` takes what the worker reports, `channel.recv` returns what `broadcast` sends.

    Args:
        target: the worker function, importable by name.
        arguments: one tuple for each worker; tensors in shared memory stay shared.
        backend: "thread" or "process".
    """

    def __init__(self, target: Callable, arguments: list[tuple], backend: str):
        self.channels, self.workers = {}, []
        self.is_process = backend == "process"
        context = _process_context() if self.is_process else None
        for index, own_arguments in enumerate(arguments):
            ours, theirs = connection.Pipe()
            args = (target, theirs, index, *own_arguments)
            if self.is_process:
                worker = context.Process(target=_run_in_process, args=args, daemon=True)
            else:
                worker = threading.Thread(target=_run, args=args, daemon=True)
            worker.start()
            if self.is_process:
                theirs.close()  # so that ours ends when the process does
            self.channels[ours] = index
            self.workers.append(worker)

    def wait_until_ready(self) -> None:
        """Return when each worker has sent its first message, or raise WorkerError."""
        waiting = set(range(len(self.workers)))
        while waiting:
            waiting -= {index for index, _ in self.messages(timeout=1.0)}

    def broadcast(self, message: object) -> None:
        """Send the same to every worker."""
        for channel in self.channels:
            with contextlib.suppress(OSError):  # one that has died is found out by `messages`
                channel.send(message)

    def messages(self, timeout: float) -> Iterator[tuple[int, object]]:
        """Yield (worker, message) for all that has arrived, after waiting at most `timeout` seconds for the first.

        Raises:
            WorkerError: a worker failed or was killed.
        """
        for channel in connection.wait(list(self.channels), timeout):
            index = self.channels[channel]
            for _ in range(MESSAGES_AT_ONCE):
                try:
                    kind, content = channel.recv()
                except (EOFError, OSError):  # closed without a word
                    kind, content = "killed", self._cause_of_death(index)
                if kind == "message":
                    yield index, content
                else:
                    del self.channels[channel]
                if kind in ("failed", "killed"):
                    raise WorkerError(content)
                if kind != "message" or not channel.poll():
                    break

    def join(self) -> Iterator[tuple[int, object]]:
        """Wait for the workers to stop, yielding what they still report; then end those that have not stopped."""
        self.broadcast(None)  # to those that have not started yet
        deadline = time.monotonic() + GRACE_SECONDS
        while self.channels and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(WorkerError):  # the first failure is the one that is told
                yield from self.messages(left)
        if self.is_process:
            for worker in self.workers:
                if self.channels:
                    worker.kill()
                worker.join()

    def _cause_of_death(self, index: int) -> str:
        worker = self.workers[index]
        worker.join(1.0)
        code = worker.exitcode if self.is_process else None
        cause = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        return f"worker {index} {cause}"


class _Channel:
    """The worker's end of its pipe."""

    def __init__(self, pipe):
        self.pipe, self.recv = pipe, pipe.recv

    def send(self, content: object) -> None:
        self.pipe.send(("message", content))


def _run(target: Callable, pipe, index: int, *args) -> None:
    """Call the worker function and report how it ended."""
    try:
        target(_Channel(pipe), index, *args)
        last_words = ("done", None)
    except BaseException as error:
        last_words = ("failed", f"worker {index} failed\n{traceback.format_exc()}{error}")
    with contextlib.suppress(OSError):  # nobody may be listening any more
        pipe.send(last_words)
    pipe.close()


def _run_in_process(*args) -> None:
    """`_run`, in a process that leaves Ctrl-C to the main process and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run(*args)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _process_context():
    """A fork server that has imported torch and gymnasium forks a worker in milliseconds; where there is none, spawn."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return torch.multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gymnasium", "tyro", "tqdm"])
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    forkserver.ensure_running()  # it inherits that Ctrl-C is ignored, and so do the workers that it forks
    if in_main_thread:
        signal.signal(signal.SIGINT, handler)
    return context
