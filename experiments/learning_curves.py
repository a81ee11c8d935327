"""Learning curves: what the four scripts learn with their defaults, over several seeds.

    pip install -r experiments/requirements.txt
    python experiments/learning_curves.py --parallel 2

About 10 minutes on two cores. The table has the mean return over 20 greedy episodes after training: median, worst and
best of the seeds, and how many runs reach 475 on CartPole-v1 or -200 on Pendulum-v1. The picture,
docs/learning_curves.png, shows the return of training episodes, exploration included, over the environment steps of all
workers: a thin line for each seed, and their mean thick with its interval.

The runs stay in `--log-dir`. What is there already is not run again, so an experiment that was interrupted goes on
where it stopped. Workers are processes, so runs of a3c.py and async_qlearning.py go one after the other; of gae.py and
ddpg.py `--parallel` go at once. A run that fails is left out and reported, and the exit code is 1.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tools

PANELS = {  # runs by script, each with its label and flags
    "a3c.py": {"8 workers": "--num-workers=8", "16 workers": "--num-workers=16"},
    "async_qlearning.py": {"8 workers": "--num-workers=8"},
    "gae.py": {"8 environments": ""},
    "ddpg.py": {"1 environment": ""},
}
GOALS = {"CartPole-v1": 475.0, "Pendulum-v1": -200.0}
WINDOWS = {"CartPole-v1": 50, "Pendulum-v1": 10}  # training episodes whose mean return is a point of a curve


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """one run of each for every seed"""
    parallel: int = 1
    """runs of gae.py and of ddpg.py that go at once"""
    total_timesteps: int | None = None
    """for a trial: steps of each run, in place of the script's default"""
    log_dir: Path = Path("runs/learning_curves")
    """where the runs are kept"""
    output: Path | None = None
    """write every run to this CSV file"""


def read(folder: Path) -> dict:
    """The greedy return of a run, whether it reaches its goal, its environment, and its training episodes."""
    env_id = json.loads(tools.find(folder, "args.json").read_text())["env_id"]
    result = tools.read_return(folder) | {"env_id": env_id, "episodes": tools.read_table(folder, "episodes")}
    return result | {"reaches": int(result[tools.RETURN] >= GOALS[env_id])}


def draw(axes, script: str, runs: pd.DataFrame) -> None:
    """The learning curves of a script, a colour for each of its labels."""
    (env_id,) = runs["env_id"].unique()
    grid = np.linspace(0, max(episodes["step"].max() for episodes in runs["episodes"]), 301)
    axes.axhline(GOALS[env_id], color="grey", linewidth=0.8, linestyle=":")
    for number, (label, group) in enumerate(runs.groupby("label", sort=False)):
        tools.draw_curves(axes, group["episodes"], grid, WINDOWS[env_id], f"C{number}", label)
    axes.set(title=f"{script}, {env_id}", xlabel="environment steps", ylabel="training return")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if runs["label"].nunique() > 1:
        axes.legend(loc="lower right")


def main(args: Args) -> int:
    trial = "" if args.total_timesteps is None else f" --total-timesteps={args.total_timesteps}"
    figure, panels = tools.new_figure(2, 2, height=6)
    parts = []
    for axes, (script, labels) in zip(panels.flat, PANELS.items(), strict=True):
        parallel = args.parallel if script in ("gae.py", "ddpg.py") else 1
        contestants = {f"{script}, {label}": tools.script(script, flags + trial) for label, flags in labels.items()}
        runs = tools.play(contestants, args.seeds, read, parallel, log_dir=args.log_dir)
        runs["label"] = runs["name"].str.removeprefix(f"{script}, ")
        draw(axes, script, runs[runs["failed"] == ""])
        parts.append(runs)
    tools.save_figure(figure, "learning_curves.png")

    runs = pd.concat(parts)
    table = tools.spread(runs, tools.RETURN, "worst", "best").add_prefix(f"{tools.RETURN}: ")
    groups = runs.groupby("name")
    reach = [f"{groups['reaches'].sum()[name]:.0f} of {groups.size()[name]}" for name in table.index]
    tools.print_table("defaults of", table.assign(**{"runs that reach 475 or -200": reach}))
    return tools.finish(runs, args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
