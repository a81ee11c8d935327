"""Faults at random moments, over all four scripts: is every promise kept?

    python experiments/inject_faults.py --parallel 2

100 faults take about 15 minutes on two cores. Workers and whole runs are killed, interrupted twice or while they start
and evaluate, get environments that fail, damaged checkpoints and full disks (these need root, to mount a small one).
After each fault the run must have ended with the right exit code and left no process behind, the tables must be whole,
no checkpoint lost or damaged, and in many cases the run is resumed, which must work. There is a line for each fault and
for each broken promise. The exit code is 1 if there is one.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import psutil
import tools
import torch

from common.arguments import fail

ROOT = Path(__file__).resolve().parents[1]
EPISODES = 60  # of the evaluation, so that it takes long enough to be hit
PHASES = ("start-up", "folder made", "checkpoint saved", "training over")
FLAGS = {  # of tiny runs; each has a few seconds of start-up, a second or two of training, and an evaluation
    "a3c": "--total-timesteps 20000 --log-interval 500 --num-workers 3",
    "async_qlearning": "--total-timesteps 20000 --log-interval 500 --num-workers 3",
    "gae": "--total-timesteps 6000 --log-interval 500 --batch-size 400 --num-envs 4",
    "ddpg": "--total-timesteps 1500 --log-interval 100 --learning-starts 200 --batch-size 16 --buffer-size 2000",
}
# Steps that a run may take beyond its total, and steps that may be in a checkpoint without a row of metrics.csv
SLACK = {"a3c": (100, 100), "async_qlearning": (100, 100), "gae": (4, 400), "ddpg": (0, 250)}


@dataclass
class Args:
    faults: tools.PositiveInt = 100
    """how many, of all kinds and scripts; or how many of the kind of --only"""
    seed: int = 1
    """the same seed gives the same faults (the machine's own timing apart)"""
    only: str | None = None
    """faults of this kind alone"""
    number: int | None = None
    """the fault of this number alone"""
    scripts: tuple[Literal[*FLAGS], ...] = tuple(FLAGS)
    """scripts to try"""
    parallel: tools.PositiveInt = 2
    """faults at the same time"""
    keep: bool = False
    """leave the folders of runs with a broken promise, in the system's folder for temporary files"""
    deadline: float = 90.0
    """seconds that a run has to end after its fault; a worker that hangs is given up after 60"""


class Trial:
    """A run of `script` in a folder of its own, the fault that it meets, and what is found broken afterwards."""

    def __init__(self, kind: str, script: str, seed: str, deadline: float, folder: Path):
        self.kind, self.script, self.deadline, self.folder = kind, script, deadline, folder
        self.random = random.Random(seed)
        self.total = int(FLAGS[script].split()[1])
        self.log_dir = folder / "runs"
        self.moment, self.codes, self.broken, self.seen = "", [], [], -1
        self.process = None

    def start(self, *flags: object, **variables: str) -> None:
        """Start the script, in a session of its own. Later flags replace earlier ones."""
        paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "experiments"))
        command = [sys.executable, ROOT / f"{self.script}.py", *FLAGS[self.script].split()]
        command += ["--eval-episodes", EPISODES, "--log-dir", self.log_dir, *flags]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdout=(self.folder / "stdout").open("w"),
            stderr=(self.folder / "stderr").open("w"),
            env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(self.folder)} | variables,
            start_new_session=True,
        )

    def backend(self) -> tuple[str, ...]:
        """Flags for either kind of workers."""
        workers = self.script in ("a3c", "async_qlearning")
        return ("--backend", self.random.choice(["thread", "process"])) if workers else ()

    def run(self) -> Path | None:
        """The run's folder."""
        return next(self.log_dir.glob("*__*"), None)

    def phase(self) -> int:
        """How far the run has come, an index of PHASES."""
        if (run := self.run()) is None:
            return 0
        lines = (run / "metrics.csv").read_text().split("\n") if (run / "metrics.csv").exists() else []
        if len(lines) > 2 and int(lines[-2].split(",")[0]) >= self.total:
            return 3
        return 2 if (run / "checkpoint.pt").exists() else 1

    def is_unguarded(self) -> bool:
        """Whether a signal may find Python's own handlers: not yet replaced, or already gone at the very end."""
        return (run := self.run()) is None or (run / "evaluation.json").exists()

    def wait(self, *phases: int, longest: float = 1.0) -> bool:
        """Wait until a random moment in one of the phases. Is the run still going on then?"""
        phase = self.random.choice(phases or range(4))
        delay = self.random.uniform(0, 4.0 if phase == 0 else longest)
        end = time.monotonic() + self.deadline
        while self.phase() < phase and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(delay)
        self.moment += f"{PHASES[phase]} + {delay:.2f} s "
        if (run := self.run()) and (run / "checkpoint.pt").exists():
            self.seen = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
        return self.process.poll() is None

    def workers(self) -> list[psutil.Process]:
        """The worker processes: children of the fork server, itself a child."""
        if self.process.poll() is not None:
            return []
        return [p for p in psutil.Process(self.process.pid).children(True) if p.ppid() != self.process.pid]

    def send(self, number: int, to_group: bool = False) -> None:
        """A signal to the process, or to all of its group, if it is still there."""
        if self.process.poll() is None:
            (os.killpg if to_group else os.kill)(self.process.pid, number)

    def error(self) -> str:
        """Standard error without the warnings of libraries."""
        lines = (self.folder / "stderr").read_text().splitlines()
        return "\n".join(line for line in lines if "Warning" not in line and not line.startswith("  warnings.warn"))

    def expect(self, holds: bool, promise: str) -> None:
        if not holds:
            self.broken.append(promise)

    def end(self, *allowed: int, saved: bool = True, within: float | None = None) -> int:
        """Wait for the run's end and check it: one of the exit codes `allowed`, its processes gone, its files whole.

        With `saved`, the checkpoint must have the last row's step.
        """
        try:
            code = self.process.wait(within or self.deadline)
        except subprocess.TimeoutExpired:
            code = None
        end = time.monotonic() + 20  # a fork server that is still importing torch looks around only afterwards
        while left := _in_session(self.process.pid):
            if code is None or time.monotonic() > end:
                self.broken.append(f"still there: {[process.cmdline()[:3] for process in left]}")
                os.killpg(self.process.pid, signal.SIGKILL)
                break
            time.sleep(0.05)
        self.codes.append(code)
        self.expect(code in allowed, f"exit code {code}, not one of {allowed}: {self.error()[-600:]}")
        run = self.run()
        if run is None:
            self.expect(code != 0, "exit code 0 without a folder")
            return code
        steps = [_check_table(self, run / name) for name in ("episodes.csv", "metrics.csv")]
        rows = steps[1][-1] if steps[1] else -1  # the step of the last row
        self.expect(all(a < b for a, b in itertools.pairwise(steps[1])), "the step of metrics.csv does not increase")
        step = _check_checkpoint(self, run / "checkpoint.pt") if (run / "checkpoint.pt").exists() else -1
        self.expect(step >= self.seen, f"checkpoint of step {self.seen} lost, now {step}")
        beyond, without_row = SLACK[self.script]
        self.expect(step <= self.total + beyond, f"checkpoint of step {step}, beyond {self.total}")
        self.expect(step <= rows + without_row, f"checkpoint of step {step}, but the last row has {rows}")
        if saved and code != 2:
            self.expect(step >= rows, f"checkpoint of step {step}, older than the last row's {rows}")
            episodes = max(steps[0], default=-1)
            unfinished = 400 if self.script == "gae" else 0  # a batch counts when whole
            self.expect(step >= episodes - unfinished, f"checkpoint of step {step}, an episode is of {episodes}")
        if code == 0:
            self.expect(step >= self.total, f"exit code 0 at step {step} of {self.total}")
            self.expect((run / "evaluation.json").exists(), "exit code 0 without an evaluation")
        if (run / "evaluation.json").exists() and code != 1:
            returns = json.loads((run / "evaluation.json").read_text())["returns"]
            self.expect(len(returns) == EPISODES, f"an evaluation of {len(returns)} episodes")
        return code

    def resume(self, *allowed: int) -> int:
        """Go on with the run from its checkpoint, to a larger total."""
        before = self.seen = _check_checkpoint(self, self.run() / "checkpoint.pt")
        self.total = max(self.total, before) + self.total // 4
        self.start("--resume", self.run(), "--total-timesteps", self.total)
        self.moment += "resume "
        return self.end(*(allowed or (0,)))

    def can_resume(self) -> bool:
        return (run := self.run()) is not None and (run / "checkpoint.pt").exists()


def _in_session(pid: int) -> list[psutil.Process]:
    """What lives of the session that `pid` leads."""
    left = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return left


def _check_table(trial: Trial, path: Path) -> list[int]:
    """The steps in a table, which must be whole. An empty list if there is none yet."""
    if not path.exists():
        return []
    header, *lines, end = path.read_text().split("\n")
    trial.expect(end == "", f"{path.name} has a torn row: {end}")
    whole = all(line.count(",") == header.count(",") for line in lines)
    trial.expect(whole, f"{path.name} has rows of other lengths than its header")
    if not whole:
        return []
    table = pd.read_csv(path)
    trial.expect(not table.isna().any(axis=None), f"{path.name} has empty or NaN cells")
    trial.expect(all(dtype.kind in "if" for dtype in table.dtypes) or not lines, f"{path.name} has cells of text")
    return table["step"].tolist()


def _check_checkpoint(trial: Trial, path: Path) -> int:
    """The checkpoint's step. It must load, and its tensors must be finite."""

    def tensors(part):
        values = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
        return [part] if isinstance(part, torch.Tensor) else [t for value in values for t in tensors(value)]

    try:
        checkpoint = torch.load(path, weights_only=True)
    except Exception as error:
        trial.broken.append(f"checkpoint.pt does not load: {error}")
        return -1
    trial.expect(all(tensor.isfinite().all() for tensor in tensors(checkpoint)), "checkpoint.pt is not finite")
    return checkpoint["step"]


# The kinds of faults. Each function starts a run, puts it in its way, and calls `end`.


def worker_killed(trial: Trial) -> None:
    """SIGKILL to one or several workers, in half of the cases while they report episodes all the time."""
    env_id = trial.random.choice(["CartPole-v1", "failing_env:OneStep-v0"])
    endless = trial.random.random() < 0.7
    if endless:
        trial.total = 10**9
    trial.start("--env-id", env_id, "--backend", "process", "--total-timesteps", trial.total)
    while not trial.workers() and trial.process.poll() is None:
        time.sleep(0.02)
    trial.wait(1, 2, longest=2.0)
    workers = trial.workers()
    number = trial.random.randint(1, 3)
    trial.moment += f"{env_id} {number} of {len(workers)} "
    for process in trial.random.sample(workers, min(number, len(workers))):
        process.kill()
        time.sleep(trial.random.choice([0.0, 0.01]))
    trial.end(1, *([] if endless and workers else [0]))


def one_signal(trial: Trial) -> None:
    trial.start(*trial.backend())
    number, to_group = trial.random.choice([signal.SIGINT, signal.SIGTERM]), trial.random.random() < 0.5
    going_on = trial.wait()
    unguarded = trial.is_unguarded()
    trial.moment += f"{number.name}{' to the group' if to_group else ''} "
    trial.send(number, to_group)
    code = trial.end(
        128 + number, *([] if going_on and trial.phase() < 2 else [0]), *([-number] * unguarded), within=15
    )
    if code == 128 + number and trial.can_resume() and trial.random.random() < 0.5:
        trial.resume()


def two_signals(trial: Trial) -> None:
    trial.start(*trial.backend())
    pause = trial.random.choice([0.0, trial.random.uniform(0, 0.01), trial.random.uniform(0, 1.0)])
    trial.wait()
    allowed = [0]
    for _ in range(2):
        number, to_group = trial.random.choice([signal.SIGINT, signal.SIGTERM]), trial.random.random() < 0.5
        trial.moment += f"{number.name}{' to the group' if to_group else ''} "
        allowed += [128 + number, -number]  # the latter, the same to a shell, while Python itself ends
        trial.send(number, to_group)
        time.sleep(pause)
    trial.moment += f"{pause:.3f} s apart "
    trial.end(*allowed, saved=False, within=15)


def killed(trial: Trial) -> None:
    """kill -9, once or twice, then --resume; before there is a checkpoint, that is refused."""
    trial.start(*trial.backend())
    trial.wait()
    trial.send(signal.SIGKILL)
    trial.end(-signal.SIGKILL, 0, saved=False)
    if trial.can_resume() and trial.random.random() < 0.5:
        trial.total += trial.total // 4
        trial.start("--resume", trial.run(), "--total-timesteps", trial.total)
        time.sleep(delay := trial.random.uniform(1, 5))
        trial.moment += f"resumed, killed again after {delay:.2f} s "
        trial.send(signal.SIGKILL)
        trial.end(-signal.SIGKILL, 0, saved=False)
    if trial.can_resume():
        trial.resume()
    elif trial.run():
        refused(trial, "--resume", trial.run())


def environment(trial: Trial) -> None:
    what = trial.random.choice(["raise", "exit", "hang", "nan", "inf"])
    if what in ("nan", "inf"):
        where = trial.random.choice(["observation", "reward"])
    else:
        where = trial.random.choice(["step", "reset"])
        what += trial.random.choice(["", "-once"])
    asynchronous = trial.script in ("a3c", "async_qlearning")
    # An instance of an environment takes its share of the steps; later than that, the evaluation or nothing fails.
    after = int(trial.random.uniform(0, 1.2) * trial.total / (3 if asynchronous else 4 if trial.script == "gae" else 1))
    if asynchronous and "hang" in what:
        after //= 4
    marker = trial.folder / "marker"
    fault = f"{what} {where} {after} {marker}"
    trial.moment = f"{what} in {where} after {after} "
    trial.start("--env-id", "failing_env:Failing-v0", *trial.backend(), FAULT=fault)
    if "hang" in what and (what == "hang" or not asynchronous):
        while not marker.exists() and trial.process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)
        trial.send(signal.SIGINT)
        if not asynchronous:  # the environment does not come back, so a second signal is needed
            time.sleep(1)
            trial.send(signal.SIGINT)
            trial.end(130, -signal.SIGINT, *([] if marker.exists() else [0]), saved=False)
            return
    trial.process.wait(trial.deadline + 30)
    run = trial.run()
    in_training = marker.exists() and not (
        run and (run / "checkpoint.pt").exists() and marker.stat().st_mtime > (run / "checkpoint.pt").stat().st_mtime
    )
    trial.moment += "in training " if in_training else "in evaluation " if marker.exists() else "not reached "
    if not marker.exists():
        trial.end(0)
    else:
        trial.end(1, *([0] if not in_training and what in ("nan", "inf") else []))
    if trial.can_resume() and trial.random.random() < 0.5:
        trial.resume()


def refused(trial: Trial, *flags: object, allowed: tuple[int, ...] = (2,)) -> None:
    """The command must end with exit code 2 and one line, and change nothing; or with another one of `allowed`."""
    files = lambda: {path: path.stat().st_mtime_ns for path in sorted(trial.folder.rglob("runs/**/*"))}  # noqa: E731
    before = files()
    trial.start(*flags)
    code = trial.process.wait(trial.deadline)
    trial.codes.append(code)
    lines = trial.error().splitlines()
    if 0 in allowed and "FloatingPointError" in trial.error():  # flipped bytes made numbers of any size
        allowed += (1,)
    trial.expect(code in allowed, f"exit code {code}, not one of {allowed}: {trial.error()[-600:]}")
    if code == 2:
        trial.expect(len(lines) == 1 and lines[0].startswith("error: "), f"more than one line: {trial.error()}")
        trial.expect(files() == before, "it was refused, but files have changed")


def _damage(trial: Trial, path: Path) -> tuple[int, ...]:
    """Cut the file off somewhere, or flip bytes in it. The exit codes that may follow."""
    content = bytearray(path.read_bytes())
    if trial.random.random() < 0.5:
        size = trial.random.choice([0, trial.random.randrange(len(content)), len(content) - 1])
        trial.moment = f"{path.name} cut off at {size} of {len(content)} "
        path.write_bytes(content[:size])
        return (2,)
    where = [trial.random.randrange(len(content)) for _ in range(trial.random.choice([1, 10, 100]))]
    for index in where:
        content[index] ^= trial.random.randrange(1, 256)
    path.write_bytes(content)
    trial.moment = f"{len(where)} bytes of {path.name} flipped "
    return (0, 2)


def damaged_checkpoint(trial: Trial) -> None:
    trial.start("--eval-episodes", 0)
    trial.process.wait(trial.deadline)
    allowed = _damage(trial, trial.run() / "checkpoint.pt")
    refused(trial, "--resume", trial.run(), "--total-timesteps", trial.total * 5 // 4, allowed=allowed)


def damaged_replay(trial: Trial) -> None:
    trial.start("--eval-episodes", 0)
    trial.process.wait(trial.deadline)
    path, allowed = trial.run() / "replay.npy", (2,)
    if trial.random.random() < 0.4:
        trial.moment = "replay.npy of another shape "
        memory = np.load(path)
        np.save(path, trial.random.choice([memory.view(np.float32), memory[["observation", "action"]]]))
    else:
        allowed = _damage(trial, path)
    refused(trial, "--resume", trial.run(), "--total-timesteps", trial.total * 5 // 4, allowed=allowed)


def _mount(trial: Trial) -> bool:
    """Make the log folder a file system of 8 MB."""
    trial.log_dir.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(trial.log_dir)]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        trial.moment = "SKIPPED: a tmpfs cannot be mounted "
        return False
    return True


def full_disk(trial: Trial) -> None:
    """All but a random amount of the disk is taken away at a random moment; when there is room again, it resumes."""
    if not _mount(trial):
        return
    leave = int(2 ** trial.random.uniform(8, 22 if trial.script == "ddpg" else 18))
    filler = trial.log_dir / "filler"
    before = trial.random.random() < 0.5

    def fill() -> None:
        with filler.open("wb") as file:
            file.truncate(0)
            disk = os.statvfs(trial.log_dir)
            os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - leave))

    if before:
        fill()
    trial.start(*trial.backend())
    if not before:
        trial.wait(0, 1, 2)
        fill()
    trial.moment += f"{leave:,} bytes left "
    trial.end(0, 1, 2, saved=False)
    filler.unlink()
    if trial.can_resume() and trial.random.random() < 0.7:
        trial.resume()


def replay_too_large(trial: Trial) -> None:
    if not _mount(trial):
        return
    size = int(10 ** trial.random.uniform(6, 12))
    trial.moment = f"{size:,} transitions "
    refused(trial, "--buffer-size", size, "--total-timesteps", size)
    trial.expect(not list(trial.log_dir.iterdir()), "something was written")


WORKERS, ALL = ("a3c", "async_qlearning"), tuple(FLAGS)
KINDS = {
    worker_killed: WORKERS,
    one_signal: ALL,
    two_signals: ALL,
    killed: ALL,
    environment: ALL,
    damaged_checkpoint: ALL,
    full_disk: ALL,
    damaged_replay: ("ddpg",),
    replay_too_large: ("ddpg",),
}


def run_trial(number: int, function, script: str, args: Args) -> list[str]:
    """One fault, from its preparation to its line on the terminal. Returns the broken promises."""
    folder = Path(tempfile.mkdtemp(prefix=f"fault-{number}-"))
    trial = Trial(function.__name__, script, f"{args.seed} {number}", args.deadline, folder)
    begin = time.monotonic()
    try:
        function(trial)
    except Exception as error:
        trial.broken.append(f"{type(error).__name__}: {error}")
    finally:
        if trial.process and trial.process.poll() is None:
            os.killpg(trial.process.pid, signal.SIGKILL)
        if not (args.keep and trial.broken):
            subprocess.run(["umount", "-l", trial.log_dir], stderr=subprocess.DEVNULL)
            shutil.rmtree(folder, ignore_errors=True)
    codes, verdict = " ".join(map(str, trial.codes)), "BROKEN" if trial.broken else "ok"
    seconds = time.monotonic() - begin
    lines = [f"{number:3} {trial.kind:18} {script:15} {verdict:6} exit {codes:9} {seconds:4.0f} s  {trial.moment}"]
    lines += ["      broken: " + promise.replace("\n", "\n      ") for promise in trial.broken]
    print("\n".join(lines), flush=True)
    return trial.broken


def main(args: Args) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it, and children inherit that
    faults = []
    numbers = range(args.faults * (1 if args.only is None else len(KINDS)))
    for number in numbers if args.number is None else [args.number]:
        function, scripts = list(KINDS.items())[number % len(KINDS)]
        script = scripts[number // len(KINDS) % len(scripts)]
        if args.only in (None, function.__name__) and script in args.scripts:
            faults.append((number, function, script, args))
    if not faults:
        fail(f"no such faults; --only takes {', '.join(kind.__name__ for kind in KINDS)}")
    with ThreadPoolExecutor(args.parallel) as pool:
        results = list(pool.map(lambda fault: run_trial(*fault), faults))
    bad = sum(map(bool, results))
    print(f"{len(results)} faults, {bad} of them with a broken promise")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
