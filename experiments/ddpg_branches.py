"""The branches of ddpg.py: the original DPG, target networks, these with batch normalisation, and from pixels.

    pip install -r experiments/requirements.txt
    python experiments/ddpg_branches.py --parallel 2

It is the figure of Lillicrap et al. 2016 that shows learning curves with and without target networks and batch
normalisation, and from pixels, on two environments, with 3 seeds: Pendulum-v1 for 10,000 steps, InvertedPendulum-v5 for
30,000, and Pendulum-v1 from pixels for 20,000 steps of three simulator steps each. Within an environment the branches
differ by one flag alone; from pixels it needs settings of its own. 12 minutes on two cores for the first two, an hour
for the third (`--panels` leaves some out). `--seeds 21 --total-timesteps 1500` is a trial.

Each finished run leaves its training episodes in experiments/results/, from which everything is drawn; one whose table
is there is not run again. The table that is printed has the greedy return, a mean over 20 episodes after training, and
the return of training, the mean of the episodes that end in the last fifth of the steps, for each seed. The picture,
docs/ddpg_branches.png, shows the mean return of the last 10 training episodes, a thin line for each run and the mean of
the runs thick, with its 95 % bootstrap interval. A run that fails is left out and reported, and the exit code is 1.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tools

ORIGINAL, TARGETS, BATCH_NORM = "original DPG", "target networks", "target networks, batch normalisation"
BRANCHES = {ORIGINAL: "--no-target-network", TARGETS: "", BATCH_NORM: "--batch-norm"}
PIXELS = "--pixels --batch-size=16 --reward-scale=0.1 --actor-learning-rate=1e-4 --logit-penalty=0.01"
PIXELS += " --noise-std=0.3 --final-noise-std=0.1"
WINDOW = 10  # training episodes whose mean return is a point of a learning curve
TRAINING_RETURN = "training return, last fifth"
SCORES = tools.RETURN, TRAINING_RETURN


class Panel(NamedTuple):
    """Steps, flags for all branches (what is not said is the default), and the flags of each branch."""

    steps: int
    flags: str
    branches: dict[str, str]


PANELS = {
    "Pendulum-v1": Panel(10_000, "--env-id=Pendulum-v1", BRANCHES),
    "InvertedPendulum-v5": Panel(30_000, "--env-id=InvertedPendulum-v5 --actor-learning-rate=1e-4", BRANCHES),
    "Pendulum-v1 from pixels": Panel(20_000, f"--env-id=Pendulum-v1 {PIXELS}", {BATCH_NORM: "--batch-norm"}),
}


@dataclass
class Args:
    panels: tuple[str, ...] = tuple(PANELS)
    """which of them to run and to draw"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """one run of each branch for every seed"""
    total_timesteps: int | None = None
    """for a trial: steps of each run"""
    parallel: int = 1
    """runs that go at once; their results do not depend on it"""
    log_dir: Path = Path("runs/ddpg_branches")
    """where the runs are kept"""


def table_of(panel: str, branch: str, steps: int, seed: int) -> Path:
    return tools.RESULTS / "ddpg_branches" / f"{panel}_{branch}_{steps}_{seed}.csv.gz".replace(" ", "-")


def keep(folder: Path, panel: str, branch: str, steps: int) -> dict:
    """Write the training episodes of a run into its table. Returns what it has reached."""
    seed = json.loads(tools.find(folder, "args.json").read_text())["seed"]
    episodes, table = tools.read_table(folder, "episodes"), table_of(panel, branch, steps, seed)
    scores = tools.read_return(folder) | {TRAINING_RETURN: tools.last_fifth(episodes, steps)}
    table.parent.mkdir(parents=True, exist_ok=True)
    episodes[["step", "time", "return"]].round(3).assign(**scores).to_csv(table, index=False)
    return scores


def main(args: Args) -> int:
    figure, panels = tools.new_figure(1, len(args.panels), width=4.5 * len(args.panels))
    parts = []
    for panel, axes in zip(args.panels, panels[0], strict=True):
        steps, flags, branches = PANELS[panel]
        steps = args.total_timesteps or steps
        rows = {}
        for branch, flag in branches.items():
            paths = {seed: table_of(panel, branch, steps, seed) for seed in args.seeds}
            if missing := [seed for seed, path in paths.items() if not path.exists()]:
                command = tools.script("ddpg.py", f"{flags} --total-timesteps={steps} {flag}")
                read = partial(keep, panel=panel, branch=branch, steps=steps)
                options = {"log_dir": args.log_dir, "all_may_fail": True}
                parts.append(tools.play({f"{panel}, {branch}": command}, missing, read, args.parallel, **options))
            tables = [pd.read_csv(path) for path in paths.values() if path.exists()]
            color = f"C{list(BRANCHES).index(branch)}"
            tools.draw_curves(axes, tables, np.linspace(0, steps, 201), WINDOW, color, branch)
            rows[branch] = {kind: tools.with_interval([each[kind].iloc[-1] for each in tables]) for kind in SCORES}
        axes.set(xlabel="steps", ylabel=f"training return, mean of {WINDOW} episodes", title=panel)
        tools.print_table(f"{panel}, {steps:,} steps", pd.DataFrame(rows).T)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(BRANCHES))
    tools.save_figure(figure, "ddpg_branches.png")
    return tools.finish(pd.concat(parts), None) if parts else 0


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
