"""Learning curves of any runs: a panel for each environment, a colour for each setting.

    pip install -r requirements.txt pandas scipy matplotlib
    python experiments/plot.py runs --output curves.png

Each thin line is a run: the returns of its training episodes. The thick one is the mean over the runs of a setting, its
seeds, with its 95 % bootstrap interval. A setting is a script with whatever of its arguments differs. Episodes of all
workers count; some of async_qlearning.py's go on exploring, so its greedy policy is better than its curve.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import tools
import tyro

from common.arguments import fail
from common.ranges import PositiveInt

# What tells nothing of a setting, in args.json
ASIDE = {
    *("env_id", "seed", "log_dir", "log_interval", "eval_episodes", "capture_video", "evaluate", "resume"),
    *("versions", "cores", "gil", "backend", "backend_used", "epsilons", "script", "address", "cpus_per_worker"),
}


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or folders with such folders inside"""
    x: Literal["step", "time"] = "step"
    """what to draw over: environment steps, or seconds of training"""
    points: PositiveInt = 100
    """points of a curve, each the mean return of the episodes that end in its part of the setting's longest run"""
    output: Path = Path("curves.png")
    """picture to write: .png, .pdf, .svg"""


def read_runs(folders: tuple[Path, ...]) -> pd.DataFrame:
    """A row for each run with at least one episode: `env_id`, `setting`, `episodes`."""
    rows = []
    for file in sorted({file for folder in folders for file in folder.rglob("episodes.csv")}):
        if not (file.parent / "args.json").exists():
            continue  # a run of another program
        args = json.loads((file.parent / "args.json").read_text())
        episodes = tools.read_table(file.parent, "episodes")
        if len(episodes):
            parts = file.parent.name.split("__")
            script = parts[-3] if len(parts) > 3 else file.parent.name  # the folder has been given another name
            rows.append({"env_id": args["env_id"], "script": script, "args": args, "episodes": episodes})
    if not rows:
        fail(f"no run with an episode in {', '.join(map(str, folders)) or 'no folder'}")
    runs = pd.DataFrame(rows)
    runs["setting"] = runs["script"]
    for _, group in runs.groupby(["env_id", "script"]):
        arguments = pd.DataFrame(group["args"].tolist(), index=group.index).drop(columns=ASIDE, errors="ignore")
        for name in arguments.columns[arguments.astype(str).nunique() > 1]:
            runs.loc[group.index, "setting"] += f", {name}=" + arguments[name].astype(str)
    return runs


def main(args: Args) -> int:
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        fail("--output must end in .png, .pdf or .svg")
    runs = read_runs(args.folders)
    environments = runs["env_id"].unique()
    figure, panels = tools.new_figure(len(environments), 1, height=4 * len(environments))
    for axes, env_id in zip(panels.flat, environments, strict=True):
        for number, (setting, group) in enumerate(runs[runs["env_id"] == env_id].groupby("setting", sort=False)):
            end = max(episodes[args.x].max() for episodes in group["episodes"])
            label = f"{setting} ({len(group)} run{'s' * (len(group) > 1)})"
            curves = [tools.curve(episodes, end, args.points, args.x) for episodes in group["episodes"]]
            tools.draw_curves(axes, curves, f"C{number}", label, args.x)
        axes.set(title=env_id, ylabel="training return")
        axes.set_xlabel({"step": "environment steps", "time": "seconds"}[args.x])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(fontsize="small")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=150)
    print(f"{len(runs)} runs: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
