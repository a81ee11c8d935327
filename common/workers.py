"""Workers as threads or as processes: one worker function serves both and cannot tell which it is.

Every worker has a pipe of its own to the main thread. It carries what the worker reports, its exception if it fails,
and, by closing without a word, the news that it was killed. There is no lock and no shared queue, so a worker that dies
at any moment leaves nothing behind that the others could wait for.

Why not what exists: `concurrent.futures` reports that a process was killed, but not which one, and before Python 3.14
it cannot end one that hangs; `torch.multiprocessing.start_processes` does both, but has neither threads nor messages.
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

from common.run import Run, RunError, ctrl_c_ignored, has_gil, how_it_ended

POLL_SECONDS = 0.05  # between two looks at what the workers have sent
OVERTIME_SECONDS = 60.0  # how long a worker may take for its last segment and closing its environment
GRACE_SECONDS = 2.0  # how long workers may take to stop before they are made to
MESSAGES_AT_ONCE = 500  # of one worker, before the next one's turn


class WorkerError(RunError):
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
        target, arguments, backend: as for `Workers`; the last argument of a worker is its random generator. Its
            messages are an episode's row, (T, seconds, return, length), or None at its end, and the generator's state.
        shared: has `T()`, `sums`, shape (workers, 1 + metrics), and `stop`, which the workers obey.
        snapshot: returns the tensors, by name, that the checkpoint is to hold.

    Returns:
        The exit code: 0, 1 if a worker failed, 130 after Ctrl-C, 143 after SIGTERM.
    """
    workers, exit_code, cause, overtime = Workers(backend), 0, "", 0.0
    random_states = {index: rng.bit_generator.state for index, (*_, rng) in enumerate(arguments)}
    logged, interval = shared.sums.sum(0), run.args.log_interval

    def log_episodes(messages: Iterator) -> None:
        rows = []
        try:
            for index, (row, random_state) in messages:
                random_states[index] = random_state
                if row:
                    step, seconds, *rest = row
                    rows.append((step, seconds, index, *rest))
        finally:
            run.log_episodes(sorted(rows))

    def progress() -> tuple:
        """Sums and T, read in this order: the steps of every update that the sums know are counted in T."""
        return shared.sums.sum(0), shared.T()

    def log_and_save(sums, step: int) -> None:
        nonlocal logged
        updates, *metrics = (sums - logged).tolist()
        if updates:
            run.log_metrics(step, dict(zip(run.families, (m / updates for m in metrics), strict=True)))
            logged = sums
        run.save(step, snapshot(), random_states)

    try:
        workers.launch(target, arguments)
        workers.start(run.start())
        next_log = shared.T() // interval + 1
        while workers.channels:
            time.sleep(POLL_SECONDS)  # rather than wake up for every single message
            log_episodes(workers.messages(timeout=0))
            sums, step = progress()
            if step > run.args.total_timesteps:
                overtime += POLL_SECONDS
                if overtime > OVERTIME_SECONDS:
                    raise WorkerError(f"{len(workers.channels)} workers have not ended after the last step")
            if next_log * interval <= step <= run.args.total_timesteps:
                log_and_save(sums, step)
                next_log = step // interval + 1
            run.show_progress(step)
    except BaseException as error:
        exit_code, cause = how_it_ended(error)
    with ctrl_c_ignored():  # the rest takes a moment only and must not be cut short
        shared.stop.fill_(True)
        log_episodes(iter(list(workers.join())))  # the list: first of all, every worker ends
        run.show_progress(shared.T())
        try:
            log_and_save(*progress())
        except FloatingPointError as error:  # the last good checkpoint stays
            exit_code, cause = exit_code or 1, f"{cause}\n{error}".strip()
        run.close()
    if exit_code:
        print(f"{run.script}: {cause}\n{run.script}: stopped at step {shared.T():,}; {run.folder}", file=sys.stderr)
    return exit_code


class Workers:
    """A worker function running as several threads or processes.

    Args:
        backend: "thread" or "process".
    """

    def __init__(self, backend: str):
        self.is_process = backend == "process"
        self.workers, self.waiting = [], set()
        self.channels = {}  # of the workers that have not ended yet, each with its worker's number

    def launch(self, target: Callable, arguments: list[tuple]) -> None:
        """Start a worker for each entry of `arguments` and wait until all of them are ready.

        Args:
            target: called as `target(channel, index, *arguments[index])`, importable by name. It calls
                `channel.wait_for_start()` when it is ready, and `channel.send` with what it reports.
            arguments: tensors in shared memory stay shared.

        Raises:
            WorkerError: a worker failed or was killed.
        """
        context = _process_context() if self.is_process else None
        for index, own_arguments in enumerate(arguments):
            ours, theirs = connection.Pipe()
            args = (target, theirs, index, *own_arguments)
            if self.is_process:
                # daemon: whatever happens, it cannot keep the main process from ending; it may have no processes itself
                worker = context.Process(target=_run_in_process, args=args, daemon=True)
            else:
                worker = threading.Thread(target=_run, args=args, daemon=True)
            worker.start()
            if self.is_process:
                theirs.close()  # so that ours ends when the process does
            self.channels[ours] = index
            self.waiting.add(index)
            self.workers.append(worker)
        while self.waiting:
            for _ in self.messages(timeout=1.0):
                pass

    def start(self, message: object) -> None:
        """Let `wait_for_start` of every worker return `message`."""
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
                    kind, content = "failed", self._cause_of_death(index)
                if kind == "message":
                    yield index, content
                elif kind == "ready":
                    self.waiting.discard(index)
                else:
                    del self.channels[channel]
                    if kind == "failed":
                        raise WorkerError(content)
                    break
                if not channel.poll():
                    break

    def join(self) -> Iterator[tuple[int, object]]:
        """Wait for the workers to stop, yielding what they still report; then end those that have not stopped."""
        self.start(None)  # for those that have not started yet
        deadline = time.monotonic() + GRACE_SECONDS
        while self.channels and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(WorkerError):  # the first failure is the one that is told
                yield from self.messages(left)
        for worker in self.workers if self.is_process else ():
            worker.join(max(0.0, deadline - time.monotonic()))
            worker.kill()  # does nothing to one that has ended
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
        self._pipe = pipe

    def wait_for_start(self) -> object:
        """Report that this worker is ready and wait for all others. Returns what `Workers.start` was given."""
        self._pipe.send(("ready", None))
        return self._pipe.recv()

    def send(self, content: object) -> None:
        """Report `content` to the main thread."""
        self._pipe.send(("message", content))


def _run(target: Callable, pipe, index: int, *args) -> None:
    """Call the worker function and report how it ended."""
    try:
        target(_Channel(pipe), index, *args)
        last_words = ("done", None)
    except BaseException:  # SystemExit and all: whatever it is, the main thread has to know
        last_words = ("failed", f"worker {index} failed\n{traceback.format_exc()}".strip())
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
    """A fork server with torch and gymnasium imported forks a worker in milliseconds; where there is none, spawn."""
    if sys.platform == "darwin" or "forkserver" not in multiprocessing.get_all_start_methods():
        return torch.multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gymnasium", "tyro", "tqdm"])
    with ctrl_c_ignored():
        forkserver.ensure_running()  # it inherits that Ctrl-C is ignored, and so do the workers that it forks
    return context
