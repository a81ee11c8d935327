"""The lecture's figure "Results of asynchronous methods", on MinAtar: A3C, one-step Q, one-step SARSA, n-step Q.

    pip install -r experiments/requirements.txt
    python experiments/async_methods.py

Five games, 2 million steps, 3 seeds, 8 workers, and beside them Stable-Baselines3's A2C and DQN with the same network
on two of the games: many hours on two cores, so that it is made to be interrupted. Our settings were chosen for
Breakout, on other seeds; SB3's are its zoo's for Atari.
`--games Breakout --methods A3C --steps 100000 --seeds 21` is a trial of two minutes.

Scores are the mean returns of the training episodes that end in each hundredth of the steps. Of Q-learning's workers
only the first counts, whose epsilon ends at 0.01; the others explore more. Printed are the greedy policy's mean return
over 20 episodes after training, the mean of the last ten scores, and that of the last 100 episodes that count (on
Freeway, where episodes are long, a worker has no more than that): the mean over the seeds with its 95 % bootstrap
interval, and all of them. A random policy plays 300 episodes.

The picture, async_methods.png, shows score over hours and over steps; over hours without SB3's, which were measured
on another machine.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import peers
import tools

import a3c
from common.arguments import fail

GAMES = ("Breakout", "Asterix", "Freeway", "Seaquest", "SpaceInvaders")
A3C = {"t_max": 20, "learning_rate": 6e-3, "gamma": 0.97, "ent_coef": 0.02, "max_grad_norm": 40}
Q = {"train_frequency": 20, "learning_rate": 3e-3, "rmsprop_eps": 0.1, "max_grad_norm": 40}
Q |= {"gamma": 0.97, "target_network_frequency": 5000}
METHODS = {
    "A3C": ("a3c.py", tools.flags(**A3C)),
    "one-step Q": ("async_qlearning.py", tools.flags(**Q)),
    "one-step SARSA": ("async_qlearning.py", tools.flags(**Q, target="sarsa")),
    "n-step Q": ("async_qlearning.py", tools.flags(**Q, n_step=20)),
}
PEERS = {"SB3 A2C": {"algorithm": "A2C", "num_envs": 16}, "SB3 DQN": {"algorithm": "DQN"}}
PEER_GAMES = ("Breakout", "SpaceInvaders")
LAST, TENTH = "last 100 training episodes", "last tenth of training"


@dataclass
class Args(tools.DrawingOptions):
    seeds: tuple[tools.NonNegativeInt, ...] = (1, 2, 3)
    """one run of each for every seed"""
    games: tuple[Literal[*GAMES], ...] = GAMES
    """games of MinAtar"""
    methods: tuple[Literal[*METHODS, *PEERS], ...] = (*METHODS, *PEERS)
    """which of them to run and to show"""
    steps: tools.PositiveInt = 2_000_000
    """environment steps of a run"""


def command(game: str, method: str, steps: int) -> tools.Command:
    if method in PEERS:
        return tools.call(peers.train_sb3, env_id=f"MinAtar/{game}-v1", steps=steps, eval_episodes=20, **PEERS[method])
    script, flags = METHODS[method]
    return tools.script(script, f"--env-id=MinAtar/{game}-v1 --total-timesteps={steps} {flags}")


def random_score(env_id: str, episodes: int = 300) -> float:
    """The mean return of a policy that takes every action with the same probability."""
    env, rng, returns = a3c.make_env(env_id), np.random.default_rng(0), []
    for seed in range(episodes):
        env.reset(seed=seed)
        info = {}
        while "episode" not in info:
            *_, info = env.step(rng.integers(env.action_space.n))
        returns.append(info["episode"]["r"])
    return float(np.mean(returns))


def show(runs: pd.DataFrame, args: Args) -> None:
    """The figure, and a table for each kind of score."""
    figure, panels = tools.new_figure(2, len(args.games), width=3 * len(args.games), height=6)
    tenths = [curve[curve["part"] > 90]["return"].mean() for curve in runs["curve"]]
    runs = runs.assign(**{TENTH: tenths})
    scores = {kind: pd.DataFrame() for kind in (tools.RETURN, TENTH, LAST)}
    for game, column in zip(args.games, panels.T, strict=True):
        score = tools.cell(random_score(f"MinAtar/{game}-v1"))
        for table in scores.values():
            table.loc["random policy", game] = score
        for (_, method), group in runs[runs["game"] == game].groupby("name", sort=False):
            for kind, table in scores.items():
                table.loc[method, game] = tools.with_interval(group[kind].tolist())
            hours, steps = (column[0], "time", 3600), (column[1], "step", 1e6)
            for axes, x, scale in [steps] if method in PEERS else [hours, steps]:
                tools.draw_curves(axes, group["curve"].tolist(), f"C{args.methods.index(method)}", method, x, scale)
        column[0].set(xlabel="hours", ylabel="score", title=game)
        column[1].set(xlabel="million steps", ylabel="score", title=game)
    labels = {label: line for axes in panels[1] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=len(args.methods))
    tools.save_figure(figure, args.pictures / "async_methods.png")
    for kind, table in scores.items():
        tools.print_table(f"{kind}, {args.steps:,} steps", table)


def main(args: Args) -> int:
    def read(folder: Path) -> dict:
        episodes = tools.read_table(folder, "episodes")
        if "epsilon" in tools.read_table(folder, "metrics"):  # Q-learning
            episodes = episodes[episodes["worker"] == 0]
        scores = {LAST: float(episodes["return"].tail(100).mean())}
        return tools.read_return(folder) | scores | {"curve": tools.curve(episodes, args.steps)}

    contestants = {
        (game, method): command(game, method, args.steps)
        for game, method in product(args.games, args.methods)
        if method in METHODS or game in PEER_GAMES
    }
    if not contestants:
        fail(f"the peers play {', '.join(PEER_GAMES)} alone")
    runs = tools.play(contestants, read, args, "async_methods")
    runs["game"] = [game for game, _ in runs["name"]]
    show(tools.succeeded(runs), args)
    return tools.finish(runs)


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
