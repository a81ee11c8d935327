"""The lecture's "workers may explore differently": one-step Q with the paper's epsilons, and with one for all workers.

    pip install -r experiments/requirements.txt
    python experiments/exploration.py

45 minutes on two cores; `--seeds 21 --total-timesteps 20000` is a trial. Every run is async_qlearning.py on
CartPole-v1 with 8 workers, whose epsilons end at 0.1, 0.01 or 0.5, or all at one of these. All checkpoints are kept,
and after training the greedy policy of each plays 20 episodes: what the workers' own episodes return depends on their
epsilons. The tables have the return of the last checkpoint, the steps until one first reached 475, and the share that
did from that one on, these two also in ratios to the paper's. The picture, exploration.png, shows on the left the
epsilon of each worker over the steps, from the args.json of a run, and on the right the greedy returns.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tools
from greedy import evaluate_copies

import async_qlearning

TARGET, STAYS = 475.0, "share of checkpoints at 475 from then on"
PAPER = "0.1, 0.01, 0.5 (the paper's)"
BRANCHES = {PAPER: ""}
BRANCHES |= {
    f"{epsilon} for all": f"--final-epsilons {epsilon} --final-epsilon-probs 1" for epsilon in (0.1, 0.01, 0.5)
}


@dataclass
class Args(tools.DrawingOptions):
    total_timesteps: tools.PositiveInt = 500_000
    """steps of each run"""


def draw_schedule(axes, epsilons: list[float], args: Args) -> None:
    """The epsilon of each worker over the steps, workers with the same one above each other."""
    script_args = async_qlearning.Args(total_timesteps=args.total_timesteps)
    steps = np.linspace(0, args.total_timesteps, 200)  # the picture counts thousands
    for final in sorted(set(epsilons)):
        line = [async_qlearning.annealed_epsilon(step, final, script_args) for step in steps]
        axes.plot(steps / 1000, line, label=f"{epsilons.count(final)} of {len(epsilons)} workers: {final:g}")
    axes.set(xlabel="thousand steps", ylabel="epsilon", title="the paper's epsilons")
    axes.legend()


def main(args: Args) -> int:
    def read(folder: Path) -> dict:
        copies = evaluate_copies(sorted(folder.glob("*.pt")), "CartPole-v1")
        greedy = pd.DataFrame(copies, columns=["time", "step", "return"])
        reached = greedy["return"] >= TARGET
        first = greedy[reached.cummax()]
        return {
            tools.RETURN: greedy["return"].iloc[-1],
            tools.STEPS_TO_TARGET: float(first["step"].min()) if len(first) else np.inf,
            STAYS: float(reached[first.index].mean()) if len(first) else 0.0,
            "curve": tools.curve(greedy, args.total_timesteps, points=50),
            "epsilons": json.dumps(tools.read_args(folder)["epsilons"]),
        }

    common = f"--num-workers=8 --total-timesteps={args.total_timesteps} --eval-episodes=0"
    contestants = {name: tools.script("async_qlearning.py", f"{common} {flags}") for name, flags in BRANCHES.items()}
    runs = tools.play(contestants, read, args, "exploration", keep_checkpoints=True)
    tools.show(runs, tools.RETURN, tools.STEPS_TO_TARGET, STAYS)
    others = [name for name in BRANCHES if name != PAPER]
    for measure in (tools.STEPS_TO_TARGET, STAYS):
        tools.show_ratios(runs, measure, others, [PAPER])
    figure, ((left, right),) = tools.new_figure(1, 2, width=10)
    learned = tools.succeeded(runs)
    for epsilons in learned.loc[learned["name"] == PAPER, "epsilons"].head(1):
        draw_schedule(left, json.loads(epsilons), args)
    for number, (name, group) in enumerate(learned.groupby("name", sort=False)):
        tools.draw_curves(right, group["curve"].tolist(), f"C{number}", name, scale=1000)
    right.set(xlabel="thousand steps", ylabel="greedy return", title="CartPole-v1")
    right.legend(fontsize="small")
    tools.save_figure(figure, args.pictures / "exploration.png")
    return tools.finish(runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
