"""The lecture's entropy regularisation: A3C with beta 0, 0.001, 0.01 and 0.1, entropy and return over steps.

    pip install -r experiments/requirements.txt
    python experiments/entropy.py
    python experiments/entropy.py --env-id Acrobot-v1 --total-timesteps 500000

A quarter of an hour on two cores for CartPole-v1; `--seeds 21 --total-timesteps 20000` is a trial. Every run is a3c.py
with 8 workers and its defaults but --ent-coef. The tables have the greedy return, a mean over 20 episodes after
training, and means over 40 parts of the steps, or over the last eight of these: of the policy's entropy and of training
returns. The picture, entropy_CartPole-v1.png, shows these parts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tools

BETAS = (0.0, 0.001, 0.01, 0.1)
PARTS = 40  # of a learning curve
ENTROPY, RETURN = "entropy of the last fifth", "training return"
LATE_RETURN = "training return of the last fifth"


@dataclass
class Args(tools.DrawingOptions):
    env_id: str = "CartPole-v1"
    """environment"""
    total_timesteps: tools.PositiveInt = 200_000
    """steps of each run"""


def main(args: Args) -> int:
    def read(folder: Path) -> dict:
        metrics = tools.read_table(folder, "metrics").rename(columns={"entropy": "return"})
        metrics["step"] -= metrics["step"].diff().fillna(metrics["step"]) / 2  # a row is a mean since the row before
        kinds = {"return": tools.read_table(folder, "episodes"), "entropy": metrics}
        curves = [tools.curve(table, args.total_timesteps, PARTS).assign(kind=kind) for kind, table in kinds.items()]
        return tools.read_return(folder) | {"curve": pd.concat(curves)}

    flags = f"--env-id={args.env_id} --num-workers=8 --total-timesteps={args.total_timesteps}"
    contestants = {f"beta {beta:g}": tools.script("a3c.py", f"{flags} --ent-coef={beta:g}") for beta in BETAS}
    runs = tools.play(contestants, read, args, "entropy")
    learned = tools.succeeded(runs)
    for measure, kind, first in ((ENTROPY, "entropy", 0.8), (RETURN, "return", 0), (LATE_RETURN, "return", 0.8)):
        parts = [curve[(curve["kind"] == kind) & (curve["part"] > first * PARTS)] for curve in learned["curve"]]
        learned = learned.assign(**{measure: [part["return"].mean() for part in parts]})
    tools.show(learned, tools.RETURN, ENTROPY, RETURN, LATE_RETURN, of=args.env_id)
    figure, ((left, right),) = tools.new_figure(1, 2, width=10)
    for number, (name, group) in enumerate(learned.groupby("name", sort=False)):
        for axes, kind in ((left, "entropy"), (right, "return")):
            curves = [curve[curve["kind"] == kind] for curve in group["curve"]]
            tools.draw_curves(axes, curves, f"C{number}", name, scale=1000)
    left.set(xlabel="thousand steps", ylabel="entropy of the policy", title=args.env_id)
    right.set(xlabel="thousand steps", ylabel="training return", title=args.env_id)
    right.legend()
    tools.save_figure(figure, args.pictures / f"entropy_{args.env_id.replace('/', '-')}.png")
    return tools.finish(runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
