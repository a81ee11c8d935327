"""What the experiments share: runs in processes of their own, what these have written, tables and learning curves.

`import tools` also puts the project's directory on the path, so that an experiment can import a script.
"""

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tyro

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT))

from common.arguments import fail  # noqa: E402
from common.ranges import NonNegativeInt, PositiveInt, check_args  # noqa: E402

POLL_SECONDS = 0.02  # between two looks at a run
TIME_LIMIT = 6 * 3600.0  # seconds after which a run is killed and counts as failed
WINDOW = 50  # episodes whose mean return has to reach a target
SPEED, RETURN = "steps per second", "greedy return"
SECONDS_TO_TARGET, STEPS_TO_TARGET = "seconds to target", "steps to target"
INTERVAL = ["95 % from", "to"]  # columns of tables
NOT_RUN = "not run yet"
PACKAGES = ("torch", "gymnasium", "numpy", "stable-baselines3", "sb3-contrib", "sbx-rl", "jax", "pfrl", "mujoco", "ray")


def parse_args(args_class: type):
    """The command line of an experiment, whose docstring introduces --help. SIGTERM takes its runs along."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = tyro.cli(args_class, description=sys.modules["__main__"].__doc__)
    check_args(args)
    return args


def start_ray(address: str | None) -> None:
    """Connect to the Ray cluster at `address`, by default RAY_ADDRESS, or start Ray on this machine alone."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options = {}
    if address == "local":
        options = {"include_dashboard": False, "object_store_memory": 2**28}
        os.environ.setdefault("RAY_max_direct_call_object_size", "1000000")  # bytes that a call carries by itself
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.chdir(ROOT):  # from where all of Ray's processes import
        ray.init(address, logging_level="error", **options)
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own in place


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Options:
    """Arguments of every experiment."""

    seeds: tuple[NonNegativeInt, ...] = tuple(range(1, 11))
    """one run of each for every seed"""
    draw_only: bool = False
    """run nothing, show what is kept"""
    results: Path = RESULTS
    """where what each run has reached is kept; a run that is kept there is not run again"""
    log_dir: Path = Path("runs/experiments")
    """where run folders go"""

    def __post_init__(self):
        """What is listed twice counts once. `fail`s if nothing is listed."""
        for name, value in vars(self).items():
            if value == ():
                fail(f"--{name} needs a value")
            setattr(self, name, tuple(dict.fromkeys(value)) if isinstance(value, tuple) else value)


@dataclass
class DrawingOptions(Options):
    """Arguments of an experiment that draws."""

    pictures: Path = Path("runs/experiments")
    """where pictures go"""


@dataclass
class ParallelOptions(Options):
    """Arguments of an experiment with runs that can go at once: each is one process, and no time is measured."""

    parallel: PositiveInt = 1
    """runs that go at once, of those without workers whose time is not measured"""


class Command(NamedTuple):
    """Arguments of Python, where {seed} and {folder} stand for those of the run, and the directory to start it in."""

    arguments: list[str]
    directory: Path


def script(name: str, flags: str = "", root: Path = ROOT) -> Command:
    """One of the scripts, of this checkout or of another one."""
    return Command([name, *flags.split(), "--seed={seed}", "--log-dir={folder}"], root)


def flags(**settings) -> str:
    """Arguments of a script as they stand on its command line."""
    return " ".join(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())


def call(function: Callable, **arguments) -> Command:
    """A function of an experiment, called with these arguments, with `seed`, and with `folder`, to write into."""
    file = Path(inspect.getfile(function))
    parameters = f"seed={{seed}}, folder=Path('{{folder}}'), **{arguments!r}"
    code = f"from pathlib import Path; import {file.stem}; {file.stem}.{function.__name__}({parameters})"
    return Command(["-c", code], file.parent)


def play(
    contestants: dict,
    read: Callable[[Path], dict],
    options: Options,
    name: str,
    parallel: int = 1,
    keep_checkpoints: bool = False,
) -> pd.DataFrame:
    """Run every contestant with every seed, each run in a process of its own.

    The contestants take turns, so a machine that slows down slows all of them down.

    Args:
        contestants: a `Command` for each name.
        read: takes a run's folder and returns what it has reached, by column; "curve" is a table of its own. A
            ValueError says why there is nothing.
        options: of the experiment.
        name: of the folder in `options.results` where that is kept.
        parallel: runs that go at once.
        keep_checkpoints: give each checkpoint a name that stays: 00000.pt, 00001.pt, ... in the run's folder.

    Returns:
        A row for each run: name, seed, the cause if it failed, where it ran, wall_seconds of the whole process, what
        `read` returns.
    """
    stop = threading.Event()
    kept = options.results / name

    def run(contestant, command: Command, seed: int) -> dict:
        title = ", ".join(map(str, contestant)) if isinstance(contestant, tuple) else str(contestant)
        key = {"name": title, "seed": seed, "command": " ".join(command.arguments)}
        folder = options.log_dir.absolute() / name / slug(key)
        arguments = [part.replace("{seed}", str(seed)).replace("{folder}", str(folder)) for part in command.arguments]
        row = {"name": contestant, "seed": seed, "failed": ""}
        if known := find_kept(kept, key):
            return row | known
        if options.draw_only:
            return row | {"failed": NOT_RUN}
        try:
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has left
            folder.mkdir(parents=True)
            reached = {"where": where(command.directory)}
            reached |= {"wall_seconds": wait_for(arguments, command.directory, folder)} | read(folder)
            words = ", ".join(f"{key} {cell(value)}" for key, value in reached.items() if isinstance(value, float))
            row |= reached
            keep(kept, key, reached)
        except Exception as error:  # the other runs go on
            row["failed"] = words = f"FAILED: {error or type(error).__name__}"
        print(f"{title}, seed {seed}: {words}", file=sys.stderr, flush=True)
        return row

    def wait_for(arguments: list[str], directory: Path, folder: Path) -> float:
        begun = time.monotonic()
        with open(folder / "output.txt", "w") as output:
            options = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": directory}
            # Of a session of its own, so that its workers die with it.
            process = subprocess.Popen([sys.executable, *arguments], start_new_session=True, **options)
        try:
            while process.poll() is None and not stop.is_set():
                if time.monotonic() > begun + TIME_LIMIT:
                    raise ValueError(f"killed after {TIME_LIMIT:g} seconds")
                if keep_checkpoints:
                    keep_checkpoint(folder)
                time.sleep(POLL_SECONDS)
            seconds = time.monotonic() - begun
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of the session is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            lines = (folder / "output.txt").read_text().splitlines()[-5:]
            raise ValueError(f"exit code {process.returncode}: {' | '.join(line.strip() for line in lines)}")
        if keep_checkpoints:
            keep_checkpoint(folder)
        return seconds

    jobs = [(contestant, command, seed) for seed in options.seeds for contestant, command in contestants.items()]
    with ThreadPoolExecutor(parallel) as pool:
        try:
            return pd.DataFrame(list(pool.map(run, *zip(*jobs, strict=True))))
        finally:
            stop.set()


def succeeded(runs: pd.DataFrame) -> pd.DataFrame:
    """Those that have not failed. SystemExit: there are none."""
    if (runs["failed"] != "").all():
        finish(runs)
        sys.exit(1)
    return runs[runs["failed"] == ""]


def slug(key: dict) -> str:
    """A name for the file or folder of the run with this name, seed and command."""
    words = re.sub(r"[^\w.=-]+", "-", f"{key['name']}_{key['seed']}")
    return f"{words}_{zlib.crc32(key['command'].encode()):08x}"


def find_kept(folder: Path, key: dict) -> dict:
    """What `keep` has kept there of a run with this name, seed and command; empty if there is none."""
    if not (folder / "runs.csv").exists():
        return {}
    runs = pd.read_csv(folder / "runs.csv")
    found = runs[(runs[list(key)] == pd.Series(key)).all(axis=1)].drop(columns=list(key)).dropna(axis=1)
    reached = found.iloc[-1].to_dict() if len(found) else {}
    if "curve" in reached:
        reached["curve"] = pd.read_csv(folder / reached["curve"])
    return reached


def keep(folder: Path, key: dict, reached: dict) -> None:
    """Add a row to runs.csv in `folder`. A curve goes into a file of its own, whose name takes its place."""
    row, table = key | reached, folder / "runs.csv"
    folder.mkdir(parents=True, exist_ok=True)
    if "curve" in row:
        row["curve"] = f"{slug(key)}.csv"
        reached["curve"].round(3).to_csv(folder / row["curve"], index=False)
    import fcntl  # Windows has none; there, plot.py does without

    directory = os.open(folder, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)  # others may add rows, too
    try:
        runs = [pd.read_csv(table)] if table.exists() else []
        pd.concat([*runs, pd.DataFrame([row])]).to_csv(f"{table}.tmp", index=False)
        os.replace(f"{table}.tmp", table)  # a crash leaves the old one whole
    finally:
        os.close(directory)


def play_with_rivals(
    contestants: dict, read: Callable, options: Options, name: str, rivals: list[list], **more
) -> tuple[pd.DataFrame, list]:
    """`play`, where of each group of rivals only the one with the higher speed with the first seed goes on.

    Returns the runs, and the rival of each group that went on.
    """
    runs = [play(contestants, read, replace(options, seeds=options.seeds[:1]), name, **more)]
    speeds = spread(runs[0], SPEED)["median"]
    chosen = [max(group, key=lambda name: speeds.get(name, 0)) for group in rivals]
    slow = [rival for group in rivals for rival in group if rival not in chosen]
    if options.seeds[1:]:
        left = {name: command for name, command in contestants.items() if name not in slow}
        runs.append(play(left, read, replace(options, seeds=options.seeds[1:]), name, **more))
    return pd.concat(runs), chosen


def keep_checkpoint(folder: Path) -> None:
    """Give checkpoint.pt of the run in `folder` a name that stays, 00000.pt, 00001.pt, ..., if it has been renewed."""
    kept = sorted(folder.glob("*.pt"))
    for checkpoint in folder.glob("*/checkpoint.pt"):  # one at most
        if not kept or not kept[-1].samefile(checkpoint):
            os.link(checkpoint, folder / f"{len(kept):05}.pt")


# ------------------------------------------------------------------------------------------------- what a run has left


def find(folder: Path, name: str) -> Path:
    """The newest file of that name in `folder`, at any depth. ValueError: there is none."""
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime)


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """episodes.csv or metrics.csv, in the order of time."""
    return pd.read_csv(find(folder, f"{name}.csv")).sort_values("time", kind="stable", ignore_index=True)


def read_args(folder: Path) -> dict:
    """What args.json says of the run in `folder`."""
    return json.loads(find(folder, "args.json").read_text())


def read_return(folder: Path) -> dict[str, float]:
    """The mean return of the greedy policy after training."""
    return {RETURN: json.loads(find(folder, "evaluation.json").read_text())["mean_return"]}


def read_speed(folder: Path, after: int = 0) -> dict[str, float]:
    """Steps per second of all workers together, from the first episode that counts to the last one that ends.

    Those before step `after` or a tenth of the steps do not count, nor those before every worker has ended one: workers
    begin as each of them is ready. ValueError: there are too few.
    """
    episodes = read_table(folder, "episodes")
    late = episodes["step"] >= max(after, episodes["step"].max() / 10)
    if "worker" in episodes:
        late &= episodes["time"] >= episodes.groupby("worker")["time"].min().max()
    late = episodes[late]
    if late["time"].nunique() < 2:
        raise ValueError("too few episodes to measure a speed")
    return {SPEED: float(np.ptp(late["step"]) / np.ptp(late["time"]))}


def read_time_to_target(folder: Path, target: float, window: int = WINDOW) -> dict[str, float]:
    """Seconds and steps until the last `window` training episodes have the mean return `target`; inf: never."""
    episodes = read_table(folder, "episodes")
    reached = episodes[episodes["return"].rolling(window).mean() >= target]
    seconds, steps = reached[["time", "step"]].iloc[0] if len(reached) else (np.inf, np.inf)
    return {SECONDS_TO_TARGET: float(seconds), STEPS_TO_TARGET: float(steps)}


def curve(episodes: pd.DataFrame, end: float, points: int = 100, x: str = "step") -> pd.DataFrame:
    """A learning curve: mean step, time and return of the episodes that end in each of so many parts.

    Parts are of the column `x`, from 0 to `end`; the column `part` counts them. ValueError: there is no episode.
    """
    if episodes.empty:
        raise ValueError("no episode has ended")
    parts = np.ceil(episodes[x] / end * points).clip(1, points).rename("part")
    return episodes.groupby(parts)[["step", "time", "return"]].mean().reset_index()


def last_fifth(episodes: pd.DataFrame, steps: int) -> float:
    """Mean return of the training episodes that end in the last fifth of the steps. ValueError: there is none."""
    last = episodes[episodes["step"] > 0.8 * steps]
    if last.empty:
        raise ValueError("no episode has ended in the last fifth of the steps")
    return float(last["return"].mean())


# -------------------------------------------------------------------------------------------------------------- tables


def spread(runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A column of runs for each contestant: number of runs, median, lowest, highest, mean with its interval, and each.

    The table is empty if no run has this column.
    """
    groups = runs.reindex(columns=["name", measure]).dropna().groupby("name", sort=False)[measure]
    table = groups.agg(["size", "median", "min", "max", "mean"]).rename(columns={"size": "runs"})
    table = table.join(pd.DataFrame([interval(values.tolist()) for _, values in groups], table.index, INTERVAL))
    return table.assign(**{"each run": [", ".join(map(cell, values)) for _, values in groups]})


def bootstrap(values: np.ndarray, resamples: int = 9999):
    """The 95 % bootstrap interval of the mean over the first axis, from `low` to `high`."""
    from scipy import stats  # which takes seconds

    options = {"method": "percentile", "n_resamples": resamples, "rng": 0, "axis": 0}
    return stats.bootstrap((values,), np.mean, **options).confidence_interval


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean; NaN where it cannot be known: of equal or infinite values."""
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        return np.nan, np.nan
    return tuple(bootstrap(np.array(values)))


def with_interval(values: list[float]) -> str:
    """The mean, its 95 % bootstrap interval, and all values."""
    text, (low, high) = ", ".join(map(cell, values)), interval(values)
    return text if np.isnan(low) else f"{cell(np.mean(values))} ({cell(low)} to {cell(high)}): {text}"


def ratios(runs: pd.DataFrame, measure: str, above: list[str], below: list[str]) -> pd.DataFrame:
    """Ratios of the runs of each contestant in `above` to those with the same seed of each in `below`.

    It is a table of `spread`, but with the geometric mean: of 2 and 1/2, which cancel, it is 1.
    """
    values = runs.reindex(columns=["name", "seed", measure]).pivot(index="seed", columns="name", values=measure)
    rows = pd.concat(
        pd.DataFrame({"name": f"{one} / {other}", measure: values[one] / values[other]})
        for one, other in product(above, below)
    )
    table, mean = spread(rows, measure), ["mean", *INTERVAL]
    with np.errstate(divide="ignore", invalid="ignore"):  # of ratios to what was not reached, which are 0
        logs = rows.assign(**{measure: np.log(rows[measure])})
        table[mean] = np.exp(spread(logs, measure)[mean])
    return table.rename(columns={"mean": "geometric mean"})


def differences(runs: pd.DataFrame, measure: str, pairs: Iterable[tuple]) -> pd.DataFrame:
    """A table of `spread` for each pair of contestants: the first one's runs less the other's with the same seed."""
    values = runs.reindex(columns=["name", "seed", measure]).set_index("seed")
    values = {name: group[measure] for name, group in values.groupby("name")}
    rows = [pd.DataFrame({"name": f"{one} - {other}", measure: values[one] - values[other]}) for one, other in pairs]
    return spread(pd.concat([runs.head(0), *rows]), measure)


def cell(value: float | str) -> str:
    """A number with as many digits as are of interest."""
    if isinstance(value, str):
        return value
    if not np.isfinite(value):
        return "" if np.isnan(value) else "not reached"
    digits = 0 if abs(value) >= 1000 or float(value).is_integer() else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def print_table(title: str, table: pd.DataFrame) -> None:
    """A Markdown table whose first column, under `title`, is the index."""
    lines = [f"| {title} | {' | '.join(map(str, table.columns))} |", "|---" + "|---:" * len(table.columns) + "|"]
    columns = [table[name].tolist() for name in table]  # so that whole numbers stay whole
    lines += [f"| {' | '.join(map(cell, row))} |" for row in zip(map(str, table.index), *columns, strict=True)]
    print("\n".join(lines) + "\n", flush=True)


def show(runs: pd.DataFrame, *measures: str, of: str = "") -> None:
    """Print a table of `spread` for each measure; `of` says what the runs have in common."""
    for measure in measures:
        print_table(f"{of} {measure}".strip(), spread(runs, measure))


def show_ratios(runs: pd.DataFrame, measure: str, above: list[str], below: list[str], of: str = "") -> None:
    """Print the table of `ratios`."""
    print_table(f"{of} {measure}, ratio".strip(), ratios(runs, measure, above, below))


def show_differences(runs: pd.DataFrame, measure: str, pairs: Iterable[tuple], of: str = "") -> None:
    """Print the table of `differences`."""
    print_table(f"{of} {measure}, difference".strip(), differences(runs, measure, pairs))


def where(directory: Path) -> str:
    """The commit that `directory` has checked out (changes since then do not show), versions and cores."""
    versions = []
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.check_output(git, cwd=directory, stderr=subprocess.DEVNULL, text=True)
        versions.append(f"commit {commit.strip()}")
    versions += [f"Python {sys.version.split()[0]}"]
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return f"{', '.join(versions)}; {os.cpu_count()} cores"


def finish(*parts: pd.DataFrame) -> int:
    """Say where the runs ran, which have failed and how many are missing. Returns the exit code."""
    runs = pd.concat(parts)
    for place in runs.get("where", pd.Series()).dropna().unique():
        print(place)
    missing, failed = runs[runs["failed"] == NOT_RUN], runs[~runs["failed"].isin(["", NOT_RUN])]
    for name, seed, cause in failed[["name", "seed", "failed"]].itertuples(index=False):
        print(f"{name}, seed {seed}: {cause}")
    print(f"{len(failed)} of {len(runs)} runs have failed.")
    if len(missing):
        print(f"{len(missing)} have not been run yet.")
    return int(len(failed) > 0)


# ------------------------------------------------------------------------------------------------------------ pictures


def new_figure(rows: int, columns: int, width: float = 9.0, height: float = 4.0):
    """A figure and an array of its panels. Its width of 9 inches is 900 pixels."""
    import matplotlib

    matplotlib.use("agg")  # no display is needed
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def draw_curves(axes, curves: list[pd.DataFrame], color: str, label: str, x: str = "step", scale: float = 1.0) -> None:
    """Learning curves as `curve` gives them, over the column `x`, divided by `scale`.

    A thin line is a run, the thick one their mean with its 95 % bootstrap interval, where all of them have a value.
    """
    for one in curves:
        axes.plot(one[x] / scale, one["return"], color=color, linewidth=0.6, alpha=0.5)
    if not curves:
        return
    together = pd.concat([one.set_index("part")[[x, "return"]] for one in curves], axis=1).sort_index()
    together = together.interpolate("index", limit_area="inside").dropna()  # a part in which no episode of a run ends
    position, returns = together[[x]].mean(axis=1) / scale, together[["return"]].to_numpy().T
    axes.plot(position, returns.mean(axis=0), color=color, linewidth=2, label=label)
    if len(curves) > 1:
        bounds = bootstrap(returns, resamples=1000)
        axes.fill_between(position, bounds.low, bounds.high, color=color, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)


def save_figure(figure, path: Path) -> None:
    """Write the picture, with few colours so that the file is small, and say where it is."""
    from PIL import Image

    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path} has been drawn")
