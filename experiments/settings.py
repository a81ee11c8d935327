"""Settings of the scripts for several tasks: greedy returns over seeds, each with the command that gives them.

    pip install -r experiments/requirements.txt
    python experiments/settings.py --only a3c.py

Some hours on two cores in all; `--only async_qlearning.py --seeds 21 --total-timesteps 5000` is a trial. Each return is
the mean over 20 greedy episodes after training. MuJoCo's tasks take the first 5 seeds. The settings were chosen on
other seeds. learning_curves.py measures the defaults, and a3c.py with 16 workers; sample_efficiency.py measures a3c.py
on Pendulum-v1.
"""

import sys
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import tools

SETTINGS = {
    "a3c.py": [
        "--num-workers 2",
        "--env-id Acrobot-v1 --total-timesteps 500000 --ent-coef 0.01",
        "--env-id InvertedPendulum-v5 --total-timesteps 500000 --learning-rate 1e-3 --ent-coef 0.01",
        "--env-id InvertedDoublePendulum-v5 --total-timesteps 500000 --learning-rate 1e-3 --ent-coef 0.01 --gamma 0.95",
    ],
    "async_qlearning.py": [
        "--num-workers 2",
        "--num-workers 16",
        "--num-workers 8 --target sarsa",
        "--num-workers 8 --n-step 32",
        "--env-id Acrobot-v1 --total-timesteps 1000000 --target-network-frequency 2000 --max-grad-norm 1e5",
        "--env-id Acrobot-v1 --total-timesteps 1000000 --target-network-frequency 2000 --max-grad-norm 1e5 --n-step 32",
    ],
    "gae.py": [
        "--env-id Acrobot-v1 --total-timesteps 300000",
    ],
    "ddpg.py": [
        "--env-id InvertedPendulum-v5 --total-timesteps 50000 --actor-learning-rate 1e-4",
        "--env-id CartPole-v1 --total-timesteps 50000 --actor-learning-rate 3e-4 --tau 0.01 --batch-size 128",
    ],
}


@dataclass
class Args(tools.ParallelOptions):
    only: Literal[*SETTINGS] | None = None
    """this script alone"""
    total_timesteps: tools.PositiveInt | None = None
    """for a trial: steps of each run"""


def main(args: Args) -> int:
    trial, parts = "" if args.total_timesteps is None else f" --total-timesteps={args.total_timesteps}", []
    for script, settings in SETTINGS.items():
        if args.only not in (None, script):
            continue
        parallel = args.parallel if script in ("gae.py", "ddpg.py") else 1  # the others have workers
        runs = []
        for flags in settings:
            options = replace(args, seeds=args.seeds[:5]) if "-v5" in flags else args
            contestant = {f"`python {script} {flags}`": tools.script(script, flags + trial)}
            runs.append(tools.play(contestant, tools.read_return, options, "settings", parallel))
        tools.show(pd.concat(runs), tools.RETURN)
        parts += runs
    return tools.finish(*parts)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
