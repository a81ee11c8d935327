"""The speed of this checkout beside that of another one: steps per second of each script, and the time to begin.

    git worktree add ../old-checkout main~10
    python experiments/compare_checkouts.py --other ../old-checkout

About 80 s a pair on two idle cores, 12 minutes in all. The two checkouts take turns, this, other, this, other, and a
ratio is of the two runs of a pair, so a machine that is slow for a while is slow for both. Both run under the Python
that runs this script, each in its own directory.

Steps per second are taken from episodes.csv, the same way for both: from the moment when a tenth of the steps is over
and every worker has ended an episode, to the last episode that ends. So the start does not count. wall_seconds is the
time of the whole process: in the second table, of a run of a single step, which is over after its first update. No run
evaluates. All ratios say how many times as fast this checkout is: above 1 it is the faster one.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tools

from common.arguments import fail

# Script, number of workers (None: it has none) and steps, which make all runs of a pair take about 80 s together.
SPEEDS = (
    ("a3c.py", 2, 60_000),
    ("a3c.py", 8, 100_000),
    ("async_qlearning.py", 2, 60_000),
    ("async_qlearning.py", 8, 100_000),
    ("gae.py", None, 40_000),
    ("ddpg.py", None, 2_000),
)
STARTS = (("a3c.py", 8, 1), ("async_qlearning.py", 8, 1))
WALL = "wall_seconds"


@dataclass
class Args:
    other: Path
    """directory of the other checkout"""
    pairs: tools.PositiveInt = 9
    """runs of each checkout"""
    scale: float = 1.0
    """for a trial: multiply all steps by this"""


def measure(what: tuple, read: Callable, args: Args) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run everything in `what` on both checkouts. Returns the runs, and how many times as fast this one is."""
    contestants, names = {}, []
    for script, workers, steps in what:
        names.append(script if workers is None else f"{script}, {workers} workers")
        flags = f"--total-timesteps={max(1, int(steps * args.scale))} --eval-episodes=0"
        flags += f" --num-workers={workers}" if workers else ""
        flags += f" --learning-starts={int(steps * args.scale / 10)}" if script == "ddpg.py" else ""
        for side, root in (("this", tools.ROOT), ("other", args.other.resolve())):
            contestants[f"{names[-1]}: {side}"] = tools.script(script, flags, root)
    with tempfile.TemporaryDirectory() as folder:  # nothing is kept: checkouts change
        options = tools.Options(seeds=tuple(range(1, args.pairs + 1)), results=Path(folder), log_dir=Path(folder))
        runs = tools.play(contestants, read, options, "compare_checkouts")
    tables = []
    for name in names:
        this, other = f"{name}: this", f"{name}: other"
        for kind, faster, slower in ((tools.SPEED, this, other), (WALL, other, this)):
            medians = tools.spread(runs, kind)["median"]
            table = tools.ratios(runs, kind, [faster], [slower])
            table.index = [f"{name}: {kind}"] * len(table)  # without runs it is empty
            table.insert(0, "this", medians.get(this))
            tables.append(table.assign(other=medians.get(other)))
    return runs, pd.concat(tables)


def main(args: Args) -> int:
    if not (args.other / "a3c.py").exists():
        fail(f"--other: there is no a3c.py in {args.other}")
    parts = []
    for title, what, read in (("steps", SPEEDS, tools.read_speed), ("start", STARTS, lambda folder: {})):
        runs, table = measure(what, read, args)
        tools.print_table(f"{title}, times as fast", table)
        parts.append(runs)
    return tools.finish(*parts)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
