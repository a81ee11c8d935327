"""The branches of ddpg.py: the original DPG, target networks, and target networks with batch normalisation.

    pip install -r experiments/requirements.txt
    python experiments/ddpg_branches.py --parallel 2 --output ddpg_branches.csv

About 12 minutes on two cores; `--repeats 1 --total-timesteps 1500` is a trial of two. It is the figure of Lillicrap et
al. 2016 that shows learning curves with and without target networks and batch normalisation, but for learning from
pixels, on two environments: Pendulum-v1 for 10,000 steps and InvertedPendulum-v5 for 30,000, 3 seeds. Within an
environment the branches differ by one flag alone.

The table has the greedy return, a mean over 20 episodes after training, and the return of training, the mean of the
episodes that end in the last fifth of the steps. The picture, docs/ddpg_branches.png, shows the mean return of the last
10 training episodes, a thin line for each run and the median of the runs thick. A run that fails is left out and
reported, and the exit code is 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tools

# steps, and flags of ddpg.py for all branches; what is not said is its default
ENVIRONMENTS = {"Pendulum-v1": (10_000, ""), "InvertedPendulum-v5": (30_000, "--actor-learning-rate 1e-4")}
BRANCHES = {
    "original DPG": "--no-target-network",
    "target networks": "",
    "target networks, batch normalisation": "--batch-norm",
}
WINDOW = 10  # training episodes whose mean return is a point of a learning curve
TRAINING_RETURN = "training return, last fifth"


@dataclass
class Args:
    repeats: int = 3
    """runs of each branch on each environment, with seeds seed, seed + 1, ..."""
    seed: int = 1
    """seed of the first run"""
    total_timesteps: int | None = None
    """for a trial: steps of each run, in place of those of its environment"""
    parallel: int = 1
    """runs that go at once; their results do not depend on it"""
    output: Path | None = None
    """write every run to this CSV file"""


def main(args: Args) -> int:
    figure, ((*panels,),) = tools.new_figure(1, len(ENVIRONMENTS))
    parts = {}
    for (env_id, (steps, flags)), axes in zip(ENVIRONMENTS.items(), panels, strict=True):
        steps = args.total_timesteps or steps

        def read(folder: Path, steps: int = steps) -> dict:
            episodes = tools.read_table(folder, "episodes")
            returns = tools.read_return(folder) | {TRAINING_RETURN: tools.last_fifth(episodes, steps)}
            return returns | {"episodes": episodes}

        common = f"--env-id={env_id} --total-timesteps={steps} {flags}"
        contestants = {name: tools.script("ddpg.py", f"{common} {branch}") for name, branch in BRANCHES.items()}
        runs = parts[env_id] = tools.play(contestants, range(args.seed, args.seed + args.repeats), read, args.parallel)
        table = tools.spread(runs, tools.RETURN, "worst", "best").add_prefix(f"{tools.RETURN}: ")
        table[f"{TRAINING_RETURN}: median"] = runs.groupby("name")[TRAINING_RETURN].median()
        tools.print_table(f"{env_id}, {steps:,} steps, {args.repeats} runs", table)

        for number, branch in enumerate(BRANCHES):
            tables = runs.loc[runs["name"] == branch, "episodes"].dropna()
            tools.draw_curves(axes, tables, np.linspace(0, steps, 201), WINDOW, f"C{number}", branch)
        axes.set(xlabel="environment steps", ylabel=f"training return, mean of {WINDOW} episodes", title=env_id)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(BRANCHES))
    tools.save_figure(figure, "ddpg_branches.png")
    return tools.finish(pd.concat(parts, names=["env_id"]).reset_index("env_id"), args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
