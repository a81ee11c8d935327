"""Many runs of the scripts on a Ray cluster: every seed with every setting.

    pip install -r requirements.txt -r experiments/requirements-ray.txt
    python experiments/sweep.py a3c.py gae.py --seeds 1-10 --env-ids CartPole-v1 Acrobot-v1 \\
        --grid learning_rate=1e-3,3e-3

Without --address and RAY_ADDRESS, Ray is started on this machine alone. On a cluster, the project and --log-dir lie on
a path that all machines share. In --log-dir, sweep.csv has a row for each run; the table on the terminal has one for
each setting. The same command skips what is finished and starts the rest again, from its last checkpoints.
"""

import contextlib
import ctypes
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import ray
import tools
import tyro
from ray.exceptions import RayError
from tqdm import tqdm

from common.arguments import fail, failing
from common.ranges import PositiveFloat, check_args

RESERVED = {"script", "env_id", "seed", "log_dir", "resume", "evaluate"}  # what --grid cannot set
ROOT = tools.ROOT  # where the scripts are
STOPPED = {130, 143, -signal.SIGINT, -signal.SIGTERM}  # exit codes


@dataclass
class Args:
    scripts: tyro.conf.Positional[tuple[Literal["a3c.py", "async_qlearning.py", "gae.py", "ddpg.py"], ...]]
    """what to run"""
    seeds: str = "1-5"
    """seeds of each setting, as 1-10 or 1,3,8"""
    env_ids: tuple[str, ...] = ()
    """environments; by default that of each script"""
    grid: tuple[str, ...] = ()
    """arguments with their values, as learning_rate=1e-3,3e-3 total_timesteps=50000; each combination is a setting"""
    cpus_per_run: PositiveFloat | None = None
    """CPUs that a run claims; by default one for each of its workers or threads, but no more than a machine has"""
    address: str | None = None
    """of the cluster, or `auto`; by default RAY_ADDRESS, and without it Ray starts on this machine"""
    log_dir: Path = Path("runs/sweep")
    """where run folders and sweep.csv go"""


def parse_seeds(text: str) -> list[int]:
    """The numbers in `1-3,8`: 1, 2, 3 and 8."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        fail(f"--seeds must be as 1-10 or 1,3,8, not {text}")
    bounds = [part.split("-") for part in text.split(",")]
    return [seed for part in bounds for seed in range(int(part[0]), int(part[-1]) + 1)]


def all_runs(args: Args) -> pd.DataFrame:
    """A row for each run: `script`, `env_id`, a column for each argument of the grid, `seed`."""
    pairs = [text.lstrip("-").partition("=") for text in args.grid]
    grid = {name.replace("-", "_"): values.split(",") for name, _, values in pairs}
    if len(grid) < len(pairs) or grid.keys() & RESERVED:
        fail(f"--grid takes every argument once, and none of {', '.join(sorted(RESERVED))}")
    rows = []
    for script in args.scripts:
        environments = args.env_ids or (importlib.import_module(Path(script).stem).Args.env_id,)
        for setting in itertools.product(environments, *grid.values(), parse_seeds(args.seeds)):
            rows.append(dict(zip(("script", "env_id", *grid, "seed"), (script, *setting), strict=True)))
    if not rows:
        fail("nothing to run: give a script and --seeds")
    return pd.DataFrame(rows).drop_duplicates(ignore_index=True)


def to_flags(run: dict) -> list[str]:
    """The command line of a run, without the script's name."""
    flags = []
    for name, value in run.items():
        option = name.replace("_", "-")
        if value in ("True", "False"):
            flags.append(f"--{option}" if value == "True" else f"--no-{option}")
        elif name != "script":
            flags.append(f"--{option}={value}")
    return flags


def folder_name(command: str) -> str:
    """A run's folder: its command, or the start of it and a checksum, as a name has 255 bytes at most."""
    name = re.sub(r"[^\w.=-]+", "_", command)
    return name if len(name) <= 200 else f"{name[:200]}_{zlib.crc32(command.encode()):08x}"


def parse_run(script: str, flags: list[str]):
    """The arguments of a run as the script has them; `fail`s where it does not take them."""
    args = tyro.cli(importlib.import_module(Path(script).stem).Args, args=flags)
    check_args(args)
    if args.eval_episodes == 0:
        fail("the result of a run is its evaluation: give --grid eval_episodes=1 or more")
    return args


def cpus_of(args) -> int:
    """How many CPUs a run with these arguments of its script uses."""
    return getattr(args, "num_workers", getattr(args, "num_threads", 1))


def is_finished(folder: Path) -> bool:
    """Whether the run has ended with an evaluation. One that was being written when its machine was lost is none."""
    for path in folder.rglob("evaluation.json"):
        with contextlib.suppress(ValueError):
            return bool(json.loads(path.read_text()))
    return False


def play(script: str, flags: list[str], folder: Path) -> str:
    """One run, which goes on where an earlier one has ended. Returns why it failed, or nothing."""
    for run in [path.parent for path in folder.rglob("args.json")]:
        if not (run / "checkpoint.pt").exists():
            shutil.rmtree(run)  # it was lost before there was anything to go on with
            continue
        import torch  # which takes seconds, and most runs are new

        checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
        is_over = checkpoint["step"] >= checkpoint["args"]["total_timesteps"]
        flags = [*flags, f"--{'evaluate' if is_over else 'resume'}={run}"]
    command = [sys.executable, script, *flags, f"--log-dir={folder}"]
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    with open(folder / "output.txt", "a") as output:
        options = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": ROOT}
        # PR_SET_PDEATHSIG: it dies with its task, because another one may be about to go on with the run
        code = subprocess.call(command, preexec_fn=lambda: prctl(1, signal.SIGKILL), **options)
    if code in STOPPED:
        os._exit(1)  # as this machine is going to, perhaps: Ray starts the run again
    if not code:
        return ""
    for evaluation in folder.rglob("evaluation.json"):
        evaluation.unlink()  # with it the run would be taken for finished next time
    last = (folder / "output.txt").read_text().splitlines()[-3:]
    return f"exit code {code}: {' | '.join(last)}"


def task(script: str, flags: list[str], folder: Path) -> Iterator[str | None]:
    """`play` as a task of Ray. It yields None when it has found room, and then what `play` returns."""
    yield None
    yield "" if is_finished(folder) else play(script, flags, folder)  # it may have ended when its task was lost


def result(folder: Path) -> dict:
    """What a run has reached."""
    run = tools.find(folder, "evaluation.json").parent
    row = tools.read_return(run) | {"folder": str(run), "failed": ""}
    metrics = tools.read_table(run, "metrics")
    if len(metrics):  # there may have been no update yet
        end = metrics.iloc[-1]
        row |= {tools.SPEED: end["step"] / end["time"], "seconds": end["time"]}
    return row


def main(args: Args) -> int:
    runs = all_runs(args)
    commands = [(run["script"], to_flags(run)) for run in runs.to_dict("records")]
    parsed = [parse_run(*command) for command in commands]
    words = [runs["script"], runs["env_id"]]
    words += [f"{name}=" + runs[name] for name in runs.columns[2:-1] if runs[name].nunique() > 1]
    runs["name"] = [" ".join(setting) for setting in zip(*words, strict=True)]
    names = runs["name"] + " seed " + runs["seed"].astype(str)
    with failing("no cluster"):
        tools.start_ray(args.address)
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    if largest < (args.cpus_per_run or 1):
        fail(f"a machine of the cluster has {largest:g} CPUs at most, less than a run claims (--cpus-per-run)")
    new_task = ray.remote(max_retries=100)(task)  # if its machine is lost
    with failing("--cpus-per-run"):
        tasks = [new_task.options(num_cpus=float(min(args.cpus_per_run or cpus_of(each), largest))) for each in parsed]
    log_dir = args.log_dir.absolute()
    folders = [log_dir / folder_name(" ".join([script, *flags])) for script, flags in commands]
    with failing("--log-dir"):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        lock = open(log_dir / "lock", "w")  # noqa: SIM115
    with failing(f"{log_dir} cannot be locked (is another sweep at work there?)"):
        import fcntl  # not on Windows

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until `lock` is closed, at the end of this function
    missing = [index for index, folder in enumerate(folders) if not is_finished(folder)]
    left, begun, failed = {}, set(), {}  # index of each task; tasks that have begun; causes by index
    code = 0
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit=" runs", file=sys.stdout, disable=None) as bar:
        try:
            left = {tasks[index].remote(*commands[index], folders[index]): index for index in missing}
            while left:
                for each in ray.wait([*left], timeout=1.0)[0]:
                    try:
                        cause = ray.get(next(each))
                    except RayError as error:
                        cause = str(error).strip().splitlines()[-1]
                    if cause is None:
                        begun.add(each)
                        continue
                    index = left.pop(each)
                    if cause:
                        failed[index] = cause
                    bar.write(f"{names[index]}: {cause or 'finished'}; {len(left)} are left")
                    bar.update()
                    sys.stdout.flush()
                at_work = [names[index] for each, index in left.items() if each in begun]
                bar.set_postfix_str(f"{len(at_work)} at work: {', '.join(at_work)}")
        except (KeyboardInterrupt, SystemExit) as end:
            ray.shutdown()
            bar.write("stopped; the same command goes on with what is left")
            code = 130 if isinstance(end, KeyboardInterrupt) else 143
    rows = []
    for index, folder in enumerate(folders):
        rows.append({"folder": str(folder), "failed": failed.get(index, "not finished")})
        if index not in failed:  # one may fail after its evaluation
            with contextlib.suppress(ValueError):
                rows[-1] = result(folder)
    runs = runs.join(pd.DataFrame(rows, columns=[tools.RETURN, tools.SPEED, "seconds", "folder", "failed"]))
    runs.drop(columns="name").to_csv(log_dir / "sweep.csv", index=False)
    tools.show(runs, tools.RETURN)
    print(f"{len(runs)} runs, of which {len(failed)} have failed: {log_dir / 'sweep.csv'}")
    return code or int((runs["failed"] != "").any())


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
