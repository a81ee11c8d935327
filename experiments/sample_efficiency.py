"""Sample efficiency: how many environment steps ddpg.py and a3c.py need on Pendulum-v1.

    pip install -r experiments/requirements.txt
    python experiments/sample_efficiency.py --output sample_efficiency.csv

About 5 minutes on two idle cores; `--repeats 1 --ddpg-steps 5000 --a3c-steps 50000` is a trial of one. ddpg.py, which
is off-policy and learns from each transition many times, has its defaults and 10,000 steps. a3c.py, which is on-policy
and throws each away after one update, has 8 workers, 1,500,000 steps, and settings that suit Pendulum-v1.

The measure is the mean return of the last 20 training episodes, exploration included: the steps of all workers and the
seconds of training until it is at least -300 and -200, and what it is at the end. Beside that stands the greedy return,
a mean over 20 episodes after training. Runs go one after the other, so that seconds can be compared; with `--parallel`
so many of ddpg.py go at once, each on a single core, while one of a3c.py, which keeps both cores busy, is always alone.

The picture, docs/sample_efficiency.png, shows the measure over the steps, on a logarithmic scale: a thin line for each
run, and the mean of the runs thick, with its 95 % bootstrap interval. A run that fails is left out and reported, and
the exit code is 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tools

ENVIRONMENT = "Pendulum-v1"
FLAGS = {
    "ddpg.py": "",
    "a3c.py": "--num-workers 8 --t-max 16 --learning-rate 1e-3 --gamma 0.9 --ent-coef 0.1",
}
TARGETS = (-300, -200)  # mean returns
WINDOW = 20  # training episodes that they are means of
TRAINING_RETURN = "training return"


@dataclass
class Args:
    repeats: int = 3
    """runs of each algorithm, with seeds seed, seed + 1, ..."""
    seed: int = 1
    """seed of the first run"""
    ddpg_steps: int = 10_000
    """steps of each run of ddpg.py"""
    a3c_steps: int = 1_500_000
    """steps of each run of a3c.py, its workers together"""
    parallel: int = 1
    """runs of ddpg.py that go at once; more than 1 makes seconds incomparable, and changes nothing else"""
    output: Path | None = None
    """write every run to this CSV file"""


def read(folder: Path) -> dict:
    """What a run has reached, and its episodes."""
    episodes = tools.read_table(folder, "episodes")
    results = tools.read_return(folder) | {TRAINING_RETURN: float(episodes["return"].tail(WINDOW).mean())}
    for target in TARGETS:
        times = tools.read_time_to_target(folder, target, WINDOW)
        results |= {f"{title} {target}": value for title, value in times.items()}
    return results | {"episodes": episodes}


def main(args: Args) -> int:
    steps, parallel = {"ddpg.py": args.ddpg_steps, "a3c.py": args.a3c_steps}, {"ddpg.py": args.parallel, "a3c.py": 1}
    seeds, parts = range(args.seed, args.seed + args.repeats), []
    figure, ((axes,),) = tools.new_figure(1, 1, height=5)
    for number, (name, flags) in enumerate(FLAGS.items()):
        command = tools.script(name, f"{flags} --env-id={ENVIRONMENT} --total-timesteps={steps[name]}")
        parts.append(tools.play({name: command}, seeds, read, parallel[name]))
        grid = np.geomspace(min(1_000, steps[name] / 2), steps[name], 400)
        tables = parts[-1]["episodes"].dropna()
        tools.draw_curves(axes, tables, grid, WINDOW, f"C{number}", f"{name}, {steps[name]:,} steps")
    runs = pd.concat(parts)

    print(f"{ENVIRONMENT}, {args.repeats} runs. Target: a mean return of {WINDOW} training episodes.\n")
    for target in TARGETS:
        for title in (tools.STEPS_TO_TARGET, tools.SECONDS_TO_TARGET):
            table = tools.spread(runs, f"{title} {target}")
            tools.print_table(f"{title} {target}", table)
            if title == tools.STEPS_TO_TARGET:
                times_as_many = table["median"]["a3c.py"] / table["median"]["ddpg.py"]
                print(f"a3c.py / ddpg.py, ratio of medians: {tools.cell(times_as_many)}\n")
    for title in (TRAINING_RETURN, tools.RETURN):
        tools.print_table(f"{title} at the end", tools.spread(runs, title, "worst", "best"))

    for target in TARGETS:
        axes.axhline(target, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="environment steps", ylabel=f"training return, mean of {WINDOW} episodes")
    axes.set_title(f"{ENVIRONMENT}, {args.repeats} runs")
    axes.legend(loc="lower right")
    tools.save_figure(figure, "sample_efficiency.png")
    return tools.finish(runs, args.output)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
