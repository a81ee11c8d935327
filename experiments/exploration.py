"""The lecture's "workers may explore differently": one-step Q with the paper's epsilons, and with one for all workers.

    pip install -r experiments/requirements.txt
    python experiments/exploration.py

Half an hour on two cores; `--seeds 21 --total-timesteps 20000` is a trial. Every run is async_qlearning.py on
CartPole-v1 with 8 workers, whose epsilons end at 0.1, 0.01 or 0.5, or all at one of these. The table has the greedy
return, a mean over 20 episodes after training, and the seconds and steps until the greedy policy first reached 400, by
its checkpoints. The picture, exploration.png, shows on the left the epsilon of each worker over the steps, from
the args.json of a run, and on the right the returns of the first worker's training episodes.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tools
from greedy import read_learning

import async_qlearning

PAPER = "0.1, 0.01, 0.5 (the paper's)"
BRANCHES = {PAPER: ""}
BRANCHES |= {
    f"{epsilon} for all": f"--final-epsilons {epsilon} --final-epsilon-probs 1" for epsilon in (0.1, 0.01, 0.5)
}


@dataclass
class Args(tools.Options):
    total_timesteps: int = 500_000
    """steps of each run"""


def draw_schedule(axes, epsilons: list[float], args: Args) -> None:
    """The epsilon of each worker over the steps, workers with the same one above each other."""
    script_args = async_qlearning.Args(total_timesteps=args.total_timesteps)
    steps = np.linspace(0, args.total_timesteps, 200)
    for final in sorted(set(epsilons)):
        line = [async_qlearning.annealed_epsilon(step, final, script_args) for step in steps]
        axes.plot(steps, line, label=f"{epsilons.count(final)} of {len(epsilons)} workers: {final:g}")
    axes.set(xlabel="environment steps", ylabel="epsilon", title="the paper's epsilons")
    axes.legend()


def main(args: Args) -> int:
    def read(folder: Path) -> dict:
        episodes = tools.read_table(folder, "episodes")
        epsilons = json.dumps(tools.read_args(folder)["epsilons"])
        curve = tools.curve(episodes[episodes["worker"] == 0], args.total_timesteps, points=50)
        return read_learning(folder, target=400.0) | {"curve": curve, "epsilons": epsilons}

    common = f"--num-workers=8 --total-timesteps={args.total_timesteps} --eval-episodes=0"
    contestants = {name: tools.script("async_qlearning.py", f"{common} {flags}") for name, flags in BRANCHES.items()}
    runs = tools.play(contestants, read, args, "exploration", keep_checkpoints=True)
    tools.show(runs, tools.RETURN, tools.SECONDS_TO_TARGET, tools.STEPS_TO_TARGET)
    figure, ((left, right),) = tools.new_figure(1, 2, width=10)
    learned = tools.succeeded(runs)
    for epsilons in learned.loc[learned["name"] == PAPER, "epsilons"].head(1):
        draw_schedule(left, json.loads(epsilons), args)
    for number, (name, group) in enumerate(learned.groupby("name", sort=False)):
        tools.draw_curves(right, group["curve"].tolist(), f"C{number}", name)
    right.set(xlabel="environment steps", ylabel="return of the first worker", title="CartPole-v1")
    right.legend(fontsize="small")
    tools.save_figure(figure, args.pictures / "exploration.png")
    return tools.finish(runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
