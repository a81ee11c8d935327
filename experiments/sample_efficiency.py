"""Sample efficiency: how many environment steps ddpg.py and a3c.py need on Pendulum-v1.

    pip install -r experiments/requirements.txt
    python experiments/sample_efficiency.py

20 to 45 minutes on two idle cores; `--seeds 21 --ddpg-steps 5000 --a3c-steps 50000` is a trial of one. ddpg.py, which
is off-policy and learns from each transition many times, has its defaults and 10,000 steps. a3c.py, which is on-policy
and throws each away after one update, has 8 workers, 1,500,000 steps, and settings that suit Pendulum-v1.

The measure is the mean return of the last 20 training episodes, exploration included: the steps of all workers and the
seconds of training until it is at least -300 and -200. Beside that stands the greedy return, a mean over 20 episodes
after training. Runs go one after the other, so that seconds can be compared.

The picture, sample_efficiency.png, shows the returns of training episodes over the steps, on a logarithmic scale.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tools

FLAGS = {
    "ddpg.py": "",
    "a3c.py": "--num-workers 8 --t-max 16 --learning-rate 1e-3 --gamma 0.95 --ent-coef 0.1",
}
TARGETS = (-300, -200)  # mean returns of 20 training episodes


@dataclass
class Args(tools.DrawingOptions):
    ddpg_steps: tools.PositiveInt = 10_000
    """steps of each run of ddpg.py"""
    a3c_steps: tools.PositiveInt = 1_500_000
    """steps of each run of a3c.py, its workers together"""


def main(args: Args) -> int:
    steps = {"ddpg.py": args.ddpg_steps, "a3c.py": args.a3c_steps}

    def read(folder: Path) -> dict:
        episodes = tools.read_table(folder, "episodes")
        results = tools.read_return(folder)
        for target in TARGETS:
            times = tools.read_time_to_target(folder, target, window=20)
            results |= {f"{measure} {target}": value for measure, value in times.items()}
        return results | {"curve": tools.curve(episodes, tools.read_args(folder)["total_timesteps"], points=200)}

    contestants = {
        name: tools.script(name, f"{flags} --env-id=Pendulum-v1 --total-timesteps={steps[name]}")
        for name, flags in FLAGS.items()
    }
    all_runs = tools.play(contestants, read, args, "sample_efficiency")
    runs = tools.succeeded(all_runs)
    for target in TARGETS:
        tools.show(runs, f"{tools.STEPS_TO_TARGET} {target}", f"{tools.SECONDS_TO_TARGET} {target}")
        tools.show_ratios(runs, f"{tools.STEPS_TO_TARGET} {target}", ["a3c.py"], ["ddpg.py"])
        tools.show_ratios(runs, f"{tools.SECONDS_TO_TARGET} {target}", ["ddpg.py"], ["a3c.py"])
    tools.show(runs, tools.RETURN)

    figure, ((axes,),) = tools.new_figure(1, 1, height=5)
    for number, (name, group) in enumerate(runs.groupby("name", sort=False)):
        tools.draw_curves(axes, group["curve"].tolist(), f"C{number}", f"{name}, {steps[name]:,} steps")
    for target in TARGETS:
        axes.axhline(target, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="environment steps", ylabel="training return", title="Pendulum-v1")
    axes.legend(loc="lower right")
    tools.save_figure(figure, args.pictures / "sample_efficiency.png")
    return tools.finish(all_runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
