"""Pong from its screen: a3c.py with two workers, 5 million steps of 4 frames each, score over hours.

    pip install -r experiments/requirements.txt
    python experiments/pong.py

One run of about two hours on two cores. Ctrl-C or SIGTERM saves it, and the same command goes on with it. When it has
ended, experiments/results/pong/ has its curve, its args.json, its evaluation and its checkpoint; give another seed, or
a trial, --results and --log-dir of its own. The picture, pong.png, is drawn from the curve: the mean score of the last
20 training games, exploration included. It can be drawn while the run goes on, too (`--draw-only`).
"""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tools
import torch

from common.arguments import fail

SETTINGS = "--env-id=ale_py:PongNoFrameskip-v4 --num-workers=2 --t-max=20 --learning-rate=2e-4 --rmsprop-eps=1e-5"
SETTINGS += " --ent-coef=0.01 --max-grad-norm=40 --log-interval=20000"


@dataclass
class Args:
    seed: tools.NonNegativeInt = 1
    """seed of the run"""
    steps: tools.PositiveInt = 5_000_000
    """environment steps of 4 frames each"""
    draw_only: bool = False
    """draw what there is of the run, and do not go on with it"""
    log_dir: Path = Path("runs/pong")
    """where the run is"""
    results: Path = tools.RESULTS / "pong"
    """where it is kept when it has ended"""
    pictures: Path = Path("runs/experiments")
    """where the picture goes"""


def keep(run: Path, results: Path) -> None:
    """Write the curve of a run that has ended, a row for each game, and what else there is to keep."""
    results.mkdir(parents=True, exist_ok=True)
    tools.read_table(run, "episodes").drop(columns="worker").round(1).to_csv(results / "games.csv.gz", index=False)
    for name in ("evaluation.json", "checkpoint.pt", "args.json"):
        shutil.copy(run / name, results)


def is_kept(args: Args) -> bool:
    """Whether this run is among the results."""
    file = args.results / "args.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    return (kept.get("seed"), kept.get("total_timesteps")) == (args.seed, args.steps)


def draw(games: pd.DataFrame, picture: Path) -> None:
    figure, ((over_hours, over_steps),) = tools.new_figure(1, 2)
    for axes, x, label in (
        (over_hours, games["time"] / 3600, "hours"),
        (over_steps, games["step"] / 1e6, "million steps"),
    ):
        axes.plot(x, games["return"], ".", markersize=2, alpha=0.3)
        axes.plot(x, games["return"].rolling(20).mean(), linewidth=2)
        axes.set(xlabel=label, ylabel="score", title="a3c.py, Pong")
        axes.grid(alpha=0.3)
    tools.save_figure(figure, picture)
    last = games["return"].tail(20).mean()
    reached = games[games["return"].rolling(20).mean() >= 18]
    first = f"{reached['step'].iloc[0]:,} steps" if len(reached) else "not reached"
    print(f"{games['step'].max():,} steps, last 20 training games {last:.1f}; mean of 20 training games at 18: {first}")


def main(args: Args) -> int:
    picture = args.pictures / "pong.png"
    if is_kept(args):
        draw(pd.read_csv(args.results / "games.csv.gz"), picture)
        return 0
    if (args.results / "args.json").exists():
        fail(f"{args.results} has another run: give --results and --log-dir of its own")
    pattern, code = f"*__a3c__{args.seed}__*/checkpoint.pt", 0
    runs = sorted(args.log_dir.glob(pattern))
    if not args.draw_only:
        flags = [*SETTINGS.split(), f"--seed={args.seed}"]
        if runs:  # go on with it; if it was interrupted while it was evaluated, the evaluation is left
            is_over = torch.load(runs[-1], weights_only=True)["step"] > args.steps
            flags = [f"--{'evaluate' if is_over else 'resume'}={runs[-1].parent}"]
        command = [sys.executable, str(tools.ROOT / "a3c.py"), *flags, f"--log-dir={args.log_dir}"]
        process = subprocess.Popen([*command, f"--total-timesteps={args.steps}"])
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the run as well, which saves
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        code = process.wait()
        runs = sorted(args.log_dir.glob(pattern))
    if not runs:
        print("There is no run yet.")
        return code or 1
    if code == 0 and not args.draw_only:
        keep(runs[-1].parent, args.results)
    draw(tools.read_table(runs[-1].parent, "episodes"), picture)
    return code


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
