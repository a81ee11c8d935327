"""What the experiments share: runs in processes of their own, what these have written, tables and learning curves.

`import tools` also puts the project's directory on the path, so that an experiment can import a script.
"""

import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT))

from common.ranges import check_args  # noqa: E402

POLL_SECONDS = 0.02  # between two looks at a run
WINDOW = 50  # episodes whose mean return has to reach a target
SPEED, RETURN = "steps per second", "greedy return"
SECONDS_TO_TARGET, STEPS_TO_TARGET = "seconds to target", "steps to target"
PACKAGES = ("torch", "gymnasium", "numpy", "stable-baselines3", "sb3-contrib", "pfrl", "mujoco")


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
    options = {"include_dashboard": False, "object_store_memory": 2**28} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.chdir(ROOT):  # from where all of Ray's processes import
        ray.init(address, logging_level="error", **options)
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own in place


# ---------------------------------------------------------------------------------------------------------------- runs


class Command(NamedTuple):
    """Arguments of Python, where {seed} and {folder} stand for those of the run, and the directory to start it in."""

    arguments: list[str]
    directory: Path


def script(name: str, flags: str = "", root: Path = ROOT) -> Command:
    """One of the scripts, of this checkout or of another one."""
    return Command([name, *flags.split(), "--seed={seed}", "--log-dir={folder}"], root)


def call(function: Callable, **arguments) -> Command:
    """A function of an experiment, called with these arguments, with `seed`, and with `folder`, to write into."""
    file = Path(inspect.getfile(function))
    parameters = f"seed={{seed}}, folder=Path('{{folder}}'), **{arguments!r}"
    code = f"from pathlib import Path; import {file.stem}; {file.stem}.{function.__name__}({parameters})"
    return Command(["-c", code], file.parent)


def play(
    contestants: dict,
    seeds: Iterable[int],
    read: Callable[[Path], dict],
    parallel: int = 1,
    time_limit: float = 7200.0,
    log_dir: Path | None = None,
    keep_checkpoints: bool = False,
    all_may_fail: bool = False,
) -> pd.DataFrame:
    """Run every contestant with every seed, each run in a process of its own.

    The contestants take turns, so a machine that slows down slows all of them down.

    Args:
        contestants: a `Command` for each name.
        seeds: one for each repeat.
        read: takes a run's folder and returns what it has reached, by column. A ValueError says why there is nothing.
        parallel: runs that go at once.
        time_limit: seconds after which a run is killed and counts as failed.
        log_dir: keep the runs there. One of a script that is there already and has its evaluation is not run again.
        all_may_fail: go on even if not a single run ends well.
        keep_checkpoints: give each checkpoint a name that stays: 00000.pt, 00001.pt, ... in the run's folder.

    Returns:
        A row for each run: name, seed, wall_seconds of the whole process, the cause if it failed, what `read` returns.
    """
    stop = threading.Event()

    def run(name, seed: int, folder: Path, command: Command, arguments: list[str]) -> dict:
        row = {"name": name, "seed": seed, "wall_seconds": np.nan, "failed": ""}
        try:
            if not list(folder.glob("*/evaluation.json")):
                folder.mkdir(parents=True, exist_ok=True)
                row["wall_seconds"] = wait_for(arguments, command.directory, folder)
            row |= read(folder)
            words = ", ".join(f"{key} {cell(value)}" for key, value in row.items() if isinstance(value, float))
        except (ValueError, LookupError) as error:
            row["failed"] = words = f"FAILED: {error}"
        print(f"{name}, seed {seed}: {words}", file=sys.stderr, flush=True)
        return row

    def wait_for(arguments: list[str], directory: Path, folder: Path) -> float:
        begun = time.monotonic()
        with open(folder / "output.txt", "w") as output:
            options = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": directory}
            # Of a session of its own, so that its workers die with it.
            process = subprocess.Popen([sys.executable, *arguments], start_new_session=True, **options)
        try:
            while process.poll() is None and not stop.is_set():
                if time.monotonic() > begun + time_limit:
                    raise ValueError(f"killed after {time_limit:g} seconds")
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

    jobs = []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(max(1, parallel)) as pool:
        for seed in seeds:
            for name, command in contestants.items():
                arguments = [part.replace("{seed}", str(seed)) for part in command.arguments]
                if log_dir is None:
                    folder = Path(tempfile.mkdtemp(dir=temporary))
                else:
                    folder = log_dir.absolute() / re.sub(r"[^\w.=-]+", "_", " ".join(arguments).replace("{folder}", ""))
                arguments = [part.replace("{folder}", str(folder)) for part in arguments]
                jobs.append((name, seed, folder, command, arguments))
        try:
            rows = list(pool.map(run, *zip(*jobs, strict=True)))
        finally:
            stop.set()
    runs = pd.DataFrame(rows)
    if runs["failed"].all() and not all_may_fail:
        sys.exit("Every run has failed.")
    return runs


def play_with_rivals(
    contestants: dict, seeds: range, rivals: list[list], measure: str, *args, **options
) -> tuple[pd.DataFrame, list]:
    """`play`, where of each group of rivals only the one with the higher `measure` in the first repeat goes on.

    Returns the runs, and the rival of each group that went on.
    """
    first = play(contestants, seeds[:1], *args, **options)
    speeds = first.set_index("name")[measure].fillna(0)
    chosen = [max(group, key=speeds.get) for group in rivals]
    slow = [name for group in rivals for name in group if name not in chosen]
    left = {name: command for name, command in contestants.items() if name not in slow}
    return pd.concat([first, *([play(left, seeds[1:], *args, **options)] if seeds[1:] else [])]), chosen


def keep_checkpoint(folder: Path) -> None:
    """Give checkpoint.pt of the run in `folder` a name that stays, 00000.pt, 00001.pt, ..., if it has been renewed."""
    kept = sorted(folder.glob("*.pt"))
    for checkpoint in folder.glob("*/checkpoint.pt"):  # one at most
        if not kept or not kept[-1].samefile(checkpoint):
            os.link(checkpoint, folder / f"{len(kept):05}.pt")


def learn(model, steps: int, folder: Path, stop_at: float | None = None) -> None:
    """Train a model of Stable-Baselines3. Writes episodes.csv, and metrics.csv with a single row, the end.

    `stop_at` is the mean return of the last WINDOW episodes that ends the training.
    """

    def log_episodes(variables: dict, _) -> bool:
        # put there by the Monitor that SB3 wraps around each environment
        ended = [info["episode"]["r"] for info in variables["infos"] if "episode" in info]
        for score in ended:
            episodes.append((model.num_timesteps, time.perf_counter() - start, score))
        if stop_at is None or not ended or len(episodes) < WINDOW:
            return True
        return np.mean([score for *_, score in episodes[-WINDOW:]]) < stop_at  # False ends the training

    episodes, start = [], time.perf_counter()
    model.learn(steps, callback=log_episodes)
    end = model.num_timesteps, time.perf_counter() - start
    pd.DataFrame(episodes, columns=["step", "time", "return"]).to_csv(folder / "episodes.csv", index=False)
    pd.DataFrame([end], columns=["step", "time"]).to_csv(folder / "metrics.csv", index=False)


# ------------------------------------------------------------------------------------------------- what a run has left


def find(folder: Path, name: str) -> Path:
    """The newest file of that name in `folder`, at any depth. ValueError: there is none."""
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime)


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """episodes.csv or metrics.csv, in the order of time."""
    return pd.read_csv(find(folder, f"{name}.csv")).sort_values("time", kind="stable", ignore_index=True)


def read_return(folder: Path) -> dict[str, float]:
    """The mean return of the greedy policy after training."""
    return {RETURN: json.loads(find(folder, "evaluation.json").read_text())["mean_return"]}


def read_speed(folder: Path) -> dict[str, float]:
    """Steps per second of all workers together, from the first episode that counts to the last one that ends.

    Those before a tenth of the steps do not count, and those before every worker has ended one: workers begin as each
    of them is ready.
    """
    episodes = read_table(folder, "episodes")
    late = episodes["step"] >= episodes["step"].max() / 10
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


def last_fifth(episodes: pd.DataFrame, steps: int) -> float:
    """Mean return of the training episodes that end in the last fifth of the steps. ValueError: there is none."""
    last = episodes[episodes["step"] > 0.8 * steps]
    if last.empty:
        raise ValueError("no episode has ended in the last fifth of the steps")
    return float(last["return"].mean())


# -------------------------------------------------------------------------------------------------------------- tables


def spread(runs: pd.DataFrame, measure: str, lowest: str = "min", highest: str = "max") -> pd.DataFrame:
    """Median, minimum and maximum of a column of runs for each contestant."""
    table = runs.groupby("name", sort=False)[measure].agg(["median", "min", "max"])
    return table.set_axis(["median", lowest, highest], axis=1)


def compare_returns(name: str, parts: dict, args) -> list[pd.DataFrame]:
    """Run a script with several flags, print what it has learned and how fast, return the runs.

    Args:
        name: of the script.
        parts: for each part of the experiment the flags of its commands, and the number of seeds.
        args: `only` names a part, None stands for all; `seed` is the first; `total_timesteps` may shorten the runs.
    """
    results = []
    trial = "" if args.total_timesteps is None else f" --total-timesteps={args.total_timesteps}"
    for part, (commands, seeds) in parts.items():
        if args.only not in (None, part):
            continue
        contestants = {f"`{flags}`": script(name, flags + trial) for flags in commands}
        seeds = range(args.seed, args.seed + seeds)
        runs = play(contestants, seeds, lambda folder: read_return(folder) | read_speed(folder))
        groups = runs[runs["failed"] == ""].groupby("name", sort=False)
        table = (
            spread(runs, RETURN, "worst", "best").add_prefix(f"{RETURN}: ").assign(**{SPEED: groups[SPEED].median()})
        )
        table.insert(0, "runs", groups.size())
        print_table(f"`python {name}` with", table)
        results.append(runs)
    return results


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean; NaN where it cannot be known."""
    if len(values) < 2 or np.ptp(values) == 0:
        return np.nan, np.nan
    return tuple(stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval)


def with_interval(values: list[float]) -> str:
    """The mean, its 95 % bootstrap interval, and all values."""
    text, (low, high) = ", ".join(map(cell, values)), interval(values)
    return text if np.isnan(low) else f"{cell(np.mean(values))} ({cell(low)} to {cell(high)}): {text}"


def ratio(runs: pd.DataFrame, measure: str, above, below) -> pd.Series:
    """Median, minimum and maximum of the ratios of two contestants' runs with the same seed."""
    table = runs.pivot(index="seed", columns="name", values=measure)
    return (table[above] / table[below]).agg(["median", "min", "max"])


def cell(value: float | str) -> str:
    """A number with as many digits as are of interest."""
    if isinstance(value, str):
        return value
    if not np.isfinite(value):
        return "no figure" if np.isnan(value) else "not reached"
    digits = 0 if abs(value) >= 1000 or float(value).is_integer() else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def print_table(title: str, table: pd.DataFrame) -> None:
    """A Markdown table whose first column, under `title`, is the index."""
    lines = [f"| {title} | {' | '.join(map(str, table.columns))} |", "|---" + "|---:" * len(table.columns) + "|"]
    columns = [table[name].tolist() for name in table]  # so that whole numbers stay whole
    lines += [f"| {' | '.join(map(cell, row))} |" for row in zip(map(str, table.index), *columns, strict=True)]
    print("\n".join(lines) + "\n", flush=True)


def finish(runs: pd.DataFrame, output: Path | None) -> int:
    """Write the runs to `output`, a CSV file, and say where they ran and which have failed. Returns the exit code."""
    if output is not None:
        runs.drop(columns="episodes", errors="ignore").to_csv(output, index=False)
    versions = []
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    print(f"Python {sys.version.split()[0]}, {', '.join(versions)}; {os.cpu_count()} cores.")
    failed = runs[runs["failed"] != ""]
    for name, seed, cause in failed[["name", "seed", "failed"]].itertuples(index=False):
        print(f"{name}, seed {seed}: {cause}")
    print(f"{len(failed)} of {len(runs)} runs have failed.")
    return int(len(failed) > 0)


# ------------------------------------------------------------------------------------------------------------ pictures


def new_figure(rows: int, columns: int, width: float = 9.0, height: float = 4.0):
    """A figure and an array of its panels. Its width of 9 inches is 900 pixels."""
    import matplotlib

    matplotlib.use("agg")  # no display is needed
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def draw_curves(
    axes, tables: Iterable[pd.DataFrame], grid: np.ndarray, window: int, color: str, label: str, x: str = "step"
) -> None:
    """Learning curves: the mean return of the last `window` training episodes, fewer at the beginning.

    A thin line is a run, the thick one their mean with its 95 % bootstrap interval, as far as all of them go. `tables`
    are the runs' episodes, `grid` the values of their column `x` to draw at.
    """
    curves = []
    for episodes in tables:
        episodes = episodes.sort_values(x, kind="stable")
        means = episodes["return"].rolling(window, min_periods=1).mean()
        ended = np.searchsorted(episodes[x], grid, side="right")
        curve = np.concatenate(([np.nan], means))[ended]  # no number before the end of the first episode
        curve[grid > episodes[x].iloc[-1] * 1.02] = np.nan  # nor after the end of the run
        curves.append(curve)
        axes.plot(grid, curve, color=color, linewidth=0.6, alpha=0.5)
    if curves:
        whole = ~np.isnan(curves).any(axis=0)
        axes.plot(grid[whole], np.mean(curves, axis=0)[whole], color=color, linewidth=2, label=label)
        if len(curves) > 1:
            options = {"method": "percentile", "n_resamples": 1000, "rng": 0, "axis": 0}
            bounds = stats.bootstrap((np.array(curves)[:, whole],), np.mean, **options).confidence_interval
            axes.fill_between(grid[whole], bounds.low, bounds.high, color=color, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)


def save_figure(figure, name: str) -> None:
    """Write the picture into docs/, with few colours so that the file is small."""
    from PIL import Image

    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(ROOT / "docs" / name, optimize=True)
