"""The branches of ddpg.py: the original DPG, target networks, these with batch normalisation, and from pixels.

    pip install -r experiments/requirements.txt
    python experiments/ddpg_branches.py --parallel 2

It is the figure of Lillicrap et al. 2016 that shows learning curves with and without target networks and batch
normalisation, and from pixels, on two environments: Pendulum-v1 for 10,000 steps and InvertedPendulum-v5 for 30,000
with 10 seeds, and Pendulum-v1 from pixels for 20,000 steps of three simulator steps each with 3. The third kind of
panel is the noise: Gaussian, Ornstein-Uhlenbeck, and none. Within an environment the branches differ by one flag alone;
from pixels it needs settings of its own. Two hours on two cores, and for each run from pixels 40 minutes (`--panels`
leaves some out). `--seeds 21 --total-timesteps 1500` is a trial.

The tables have the greedy return, a mean over 20 episodes after training, and the return of training, the mean of the
episodes that end in the last fifth of the steps: mean over the seeds with its 95 % bootstrap interval, and all of them.
The picture, ddpg_branches.png, shows the returns of training episodes.
"""

import sys
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import tools

BATCH_NORM = "target networks, batch normalisation"
BRANCHES = {"original DPG": "--no-target-network", "target networks": "", BATCH_NORM: "--batch-norm"}
NOISES = {"Gaussian noise": "", "Ornstein-Uhlenbeck": "--noise=ou", "no noise": "--noise-std=0"}
PIXELS = "--pixels --batch-size=16 --reward-scale=0.1 --actor-learning-rate=1e-4 --logit-penalty=0.01"
PIXELS += " --noise-std=0.3 --final-noise-std=0.1"
TRAINING_RETURN = "training return, last fifth"
COLORS = dict(zip([*BRANCHES, *NOISES], ("C0", "C1", "C2", "C1", "C4", "C7"), strict=True))


class Panel(NamedTuple):
    """Steps, the greatest number of seeds, flags for all branches, and the flags of each branch."""

    steps: int
    seeds: int
    flags: str
    branches: dict[str, str]


PANELS = {
    "Pendulum-v1": Panel(10_000, 10, "--env-id=Pendulum-v1", BRANCHES),
    "InvertedPendulum-v5": Panel(30_000, 10, "--env-id=InvertedPendulum-v5 --actor-learning-rate=1e-4", BRANCHES),
    "Pendulum-v1 from pixels": Panel(20_000, 3, f"--env-id=Pendulum-v1 {PIXELS}", {BATCH_NORM: "--batch-norm"}),
    "Pendulum-v1, noise": Panel(10_000, 10, "--env-id=Pendulum-v1", NOISES),
}


@dataclass
class Args(tools.DrawingOptions, tools.ParallelOptions):
    panels: tuple[Literal[*PANELS], ...] = tuple(PANELS)
    """which of them to run and to draw"""
    total_timesteps: tools.PositiveInt | None = None
    """for a trial: steps of each run"""


def main(args: Args) -> int:
    figure, panels = tools.new_figure(1, len(args.panels), width=4.5 * len(args.panels), height=4.5)
    parts, labels = [], {}
    for title, axes in zip(args.panels, panels[0], strict=True):
        panel = PANELS[title]
        steps = args.total_timesteps or panel.steps

        def read(folder: Path, steps: int = steps) -> dict:
            episodes = tools.read_table(folder, "episodes")
            scores = {TRAINING_RETURN: tools.last_fifth(episodes, steps)}
            return tools.read_return(folder) | scores | {"curve": tools.curve(episodes, steps, points=25)}

        contestants = {
            f"{title}, {branch}": tools.script("ddpg.py", f"{panel.flags} --total-timesteps={steps} {flag}")
            for branch, flag in panel.branches.items()
        }
        options = replace(args, seeds=args.seeds[: panel.seeds])
        runs = tools.play(contestants, read, options, "ddpg_branches", args.parallel)
        tools.show(runs, tools.RETURN, TRAINING_RETURN, of=f"{steps:,} steps:")
        for measure in (tools.RETURN, TRAINING_RETURN):
            tools.show_differences(runs, measure, combinations(contestants, 2), of=f"{steps:,} steps:")
        for branch in panel.branches:
            group = runs[(runs["name"] == f"{title}, {branch}") & (runs["failed"] == "")]
            if len(group):
                tools.draw_curves(axes, group["curve"].tolist(), COLORS[branch], branch)
        axes.set(xlabel="steps", ylabel="training return", title=title)
        labels |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        parts.append(runs)
    tools.succeeded(pd.concat(parts))
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=min(3, len(args.panels)))
    tools.save_figure(figure, args.pictures / "ddpg_branches.png")
    return tools.finish(*parts)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
