"""The lecture's figure "Results of asynchronous methods", on MinAtar: A3C, one-step Q, one-step SARSA, n-step Q.

    pip install -r experiments/requirements.txt
    python experiments/async_methods.py

Five games, 2 million steps, 3 seeds, 8 workers, and beside them Stable-Baselines3's A2C and DQN with the same network
on two of the games: many hours on two cores, so that it is made to be interrupted. `--games Breakout --methods A3C
--steps 100000 --seeds 21` is a trial of two minutes. Each finished run leaves a table in experiments/results/, from
which everything is drawn; one whose table is there is not run again.

These tables have the score of each hundredth of the steps: the mean return of the training episodes that end in it. Of
Q-learning's workers it is that of the first alone, whose epsilon ends at 0.01; the others explore more. Printed are the
greedy policy's mean return over 20 episodes after training, and that of the last 100 of these training episodes: the
mean over the seeds with its 95 % bootstrap interval, and all of them. A random policy plays 300 episodes.

The picture, docs/async_methods.png, shows score over hours and over steps, a thin line for each run and the median of
the runs thick. A run that fails is left out and reported, and the exit code is 1.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import tools
from image_speed import train_a2c, train_dqn

import a3c

GAMES = ("Breakout", "Asterix", "Freeway", "Seaquest", "SpaceInvaders")
A3C = "--t-max=20 --learning-rate=1e-3 --rmsprop-eps=1e-3 --ent-coef=0.02 --max-grad-norm=40"
Q = "--train-frequency=20 --learning-rate=3e-3 --rmsprop-eps=0.1 --max-grad-norm=40 --target-network-frequency=5000"
METHODS = {
    "A3C": ("a3c.py", A3C),
    "one-step Q": ("async_qlearning.py", Q),
    "one-step SARSA": ("async_qlearning.py", f"{Q} --target=sarsa"),
    "n-step Q": ("async_qlearning.py", f"{Q} --n-step=20"),
}
PEERS = {"SB3 A2C": train_a2c, "SB3 DQN": train_dqn}
PEER_GAMES = ("Breakout", "SpaceInvaders")
POINTS = 100  # of a curve
LAST = "last 100 training episodes"
SCORES = tools.RETURN, LAST


@dataclass
class Args:
    games: tuple[str, ...] = GAMES
    """games of MinAtar"""
    methods: tuple[str, ...] = (*METHODS, *PEERS)
    """which of them to run; all that have been run are shown"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """one run of each for every seed"""
    steps: int = 2_000_000
    """environment steps of a run"""
    log_dir: Path = Path("runs/async_methods")
    """where the runs are kept"""


def keep(folder: Path, table: Path, steps: int) -> dict:
    """Write the curve of a run into `table`. Returns its scores."""
    episodes = tools.read_table(folder, "episodes")
    if "worker" in episodes and "async_qlearning" in str(tools.find(folder, "args.json")):
        episodes = episodes[episodes["worker"] == 0]
    scores = tools.read_return(folder) | {LAST: episodes["return"].tail(100).mean()}
    points = np.ceil(episodes["step"] / steps * POINTS).clip(1, POINTS)
    curve = episodes.groupby(points)[["step", "time", "return"]].mean().assign(**scores)
    if curve.empty:
        raise ValueError("no episode has ended")
    table.parent.mkdir(parents=True, exist_ok=True)
    curve.round(3).to_csv(table, index_label="hundredth")
    return scores


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


def table_of(game: str, method: str, steps: int, seed: int | str) -> Path:
    return tools.RESULTS / "async_methods" / f"{game}_{method.replace(' ', '-')}_{steps}_{seed}.csv"


def tables_of(game: str, method: str, steps: int) -> list[pd.DataFrame]:
    pattern = table_of(game, method, steps, "*")
    return [pd.read_csv(path, index_col="hundredth") for path in sorted(pattern.parent.glob(pattern.name))]


def draw(column: np.ndarray, game: str, curves: dict[str, list[pd.DataFrame]]) -> None:
    """Score over hours, and below it over steps."""
    for axes, x, scale, label in zip(column, ("time", "step"), (3600, 1e6), ("hours", "million steps"), strict=True):
        for number, (method, tables) in enumerate(curves.items()):
            for table in tables:
                axes.plot(table[x] / scale, table["return"], color=f"C{number}", linewidth=0.6, alpha=0.5)
            if tables:
                median = pd.concat(tables).groupby(level=0)[[x, "return"]].median()
                axes.plot(median[x] / scale, median["return"], color=f"C{number}", linewidth=2, label=method)
        axes.set(xlabel=label, ylabel="score", title=game)
        axes.grid(alpha=0.3)


def show(args: Args) -> None:
    """The figure, and a table for each kind of score."""
    figure, panels = tools.new_figure(2, len(args.games), width=3 * len(args.games), height=6)
    scores = {kind: pd.DataFrame(index=["random policy"]) for kind in SCORES}
    for game, column in zip(args.games, panels.T, strict=True):
        curves = {method: tables_of(game, method, args.steps) for method in (*METHODS, *PEERS)}
        draw(column, game, curves)
        at_random = tools.cell(random_score(f"MinAtar/{game}-v1"))
        for kind, table in scores.items():
            table.loc["random policy", game] = at_random
            for method, tables in curves.items():
                table.loc[method, game] = tools.with_interval([each[kind].iloc[-1] for each in tables])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
    tools.save_figure(figure, "async_methods.png")
    for kind, table in scores.items():
        tools.print_table(f"{kind}, {args.steps:,} steps", table)


def main(args: Args) -> int:
    parts = []
    for seed in args.seeds:
        for game in args.games:
            for method in args.methods:
                table = table_of(game, method, args.steps, seed)
                if table.exists() or (method in PEERS and game not in PEER_GAMES):
                    continue
                env_id = f"MinAtar/{game}-v1"
                if method in PEERS:
                    command = tools.call(PEERS[method], env_id=env_id, steps=args.steps)
                else:
                    script, flags = METHODS[method]
                    command = tools.script(script, f"--env-id={env_id} --total-timesteps={args.steps} {flags}")
                read = partial(keep, table=table, steps=args.steps)
                parts.append(
                    tools.play({f"{game}, {method}": command}, [seed], read, log_dir=args.log_dir, all_may_fail=True)
                )
    show(args)
    return tools.finish(pd.concat(parts), None) if parts else 0


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
