"""ddpg.py beside the DDPG of Stable-Baselines3 and that of SBX, its version in JAX: returns, and steps per second.

    pip install -r experiments/requirements.txt
    python experiments/ddpg_vs_peers.py --only pendulum --parallel 2
    python experiments/ddpg_vs_peers.py --only speed

On two idle cores these take 10 and 45 minutes, and "halfcheetah" with `--parallel 2` two hours, half of that with five
`--seeds`; without `--only` all parts run, one after the other. `--seeds 21 --steps 600 --speed-steps 1000` is a trial.

"pendulum", "halfcheetah": mean return of the greedy policy over 20 episodes after 10,000 steps of Pendulum-v1 and
after 100,000 of HalfCheetah-v5; all contestants are evaluated by the same function and from the same initial states.
The peers take their settings out of the flags that ddpg.py is called with. ddpg.py gets their networks: the action
enters its critic at the first layer, and first weights are as torch makes them (SBX's are flax's). It also runs with
SB3's noise on the random actions at the beginning, and as it is.

"updates", half a minute: how far the parameters of ddpg.py are from those of SB3 after 100 updates that begin with the
same weights and learn from the same minibatches. (Later, what is rounded differently grows.)

"speed": environment steps per second on HalfCheetah-v5 while there is an update at each of them, with minibatches of
256 and of 64. The first 2,000 steps do not count: 1,000 are random, and during the next 1,000 everyone warms up (SBX
compiles). What a run of ddpg.py writes while it trains does count. All run with one thread and, with the first seed,
with two (the peers: with their default number), too; the faster goes on and is compared.

Every run has a process of its own. `--parallel` of them go at once, each with one torch thread, but where speed is
measured, which is one after the other.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import pandas as pd
import peers
import tools
import torch
import tyro
from torch import nn

import ddpg

HALFCHEETAH_FLAGS = "--learning-starts 10000 --learning-rate 3e-4 --actor-learning-rate 3e-4"
OURS, NOISY_START, AS_IT_IS = "ddpg.py", "ddpg.py, noise on random actions", "ddpg.py, as it is"
SB3, SBX = "SB3 DDPG", "SBX DDPG"
THREADS = {"": 1, ", default threads": 0}  # by the end of a peer's name; 0 is its default
OURS_2 = "ddpg.py, 2 threads"
LEARNING = {  # part: environment, steps, flags of ddpg.py
    "pendulum": ("Pendulum-v1", 10_000, ""),
    "halfcheetah": ("HalfCheetah-v5", 100_000, HALFCHEETAH_FLAGS),
}
BATCH_SIZES = (256, 64)  # minibatches of "speed"
RANDOM_STEPS = 1_000  # of "speed": an episode, and another one follows before the steps count


@dataclass
class Args(tools.ParallelOptions):
    only: Literal["pendulum", "speed", "updates", "halfcheetah"] | None = None
    """run this part alone"""
    steps: tools.PositiveInt | None = None
    """for a trial: steps of each run that is not timed; half of them are random"""
    speed_steps: tools.PositiveInt = 2_000
    """timed steps of a run; an episode has 1,000"""


class PeerCritic(nn.Module):
    """Q(s, a) as SB3 has it: the action enters at the first layer."""

    def __init__(self, shape: tuple[int, ...], action_space, args: ddpg.Args):
        super().__init__()
        first = ddpg.layer(shape[0] + action_space.shape[0], ddpg.HIDDEN, args.batch_norm)
        second = ddpg.layer(ddpg.HIDDEN, ddpg.HIDDEN, args.batch_norm)
        self.q = nn.Sequential(*first, *second, ddpg.last_layer(ddpg.HIDDEN, 1, shape))

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.q(torch.cat([observations, actions], dim=1)).squeeze(-1)


def parse(flags: str) -> ddpg.Args:
    return tyro.cli(ddpg.Args, args=flags.split())


def take_peer_networks() -> None:
    """Give ddpg.py the networks of SB3."""
    ddpg.Critic = PeerCritic
    ddpg.last_layer = lambda inputs, outputs, shape: nn.Linear(inputs, outputs)  # with torch's first weights


def train_ours(flags: str, seed: int, folder: Path, noisy_start: bool = False) -> None:
    """ddpg.py with SB3's networks. `noisy_start` adds the noise to the random actions at the beginning, as SB3 does."""
    take_peer_networks()
    if noisy_start:
        std, size = parse(flags).noise_std, ddpg.make_env(parse(flags).env_id).action_space.shape
        ddpg.Actor.random_action = lambda _, rng: (rng.uniform(-1, 1, size) + rng.normal(0, std, size)).clip(-1, 1)
    sys.exit(ddpg.main(replace(parse(flags), seed=seed, log_dir=str(folder))))


def sb3_settings(args: ddpg.Args) -> dict:
    """The arguments of `peers.train_sb3` for the same run. AssertionError: SB3 has no such setting."""
    assert args.learning_rate == args.actor_learning_rate, "SB3 has one learning rate for both networks"
    assert args.target_network, "SB3's DDPG has target networks"
    assert not args.batch_norm, "SB3's DDPG has no batch normalisation"
    assert args.noise == "gaussian", "SB3 is to have Gaussian noise"
    assert args.final_noise_std is None, "the scale of SB3's noise is constant"
    names = ("env_id", "buffer_size", "learning_starts", "batch_size", "learning_rate", "gamma", "tau", "noise_std")
    settings = {name: getattr(args, name) for name in (*names, "eval_episodes")} | {"steps": args.total_timesteps}
    settings |= {"train_freq": (1, "step"), "gradient_steps": 1, "policy_kwargs": {"net_arch": [ddpg.HIDDEN] * 2}}
    return settings


def new_contestants(flags: str, threads: dict[str, int]) -> dict[str, tools.Command]:
    """ddpg.py and its peers, each with all these numbers of threads."""
    peer = partial(tools.call, peers.train_sb3, **sb3_settings(parse(flags)))
    rate = parse(flags).learning_rate  # SBX has one for each network
    contestants = {OURS: tools.call(train_ours, flags=flags)}
    for end, number in threads.items():
        contestants[SB3 + end] = peer(algorithm="DDPG", threads=number)
        contestants[SBX + end] = peer(algorithm="SBX DDPG", threads=number, qf_learning_rate=rate)
    return contestants


def compare_learning(part: str, args: Args) -> pd.DataFrame:
    """Greedy returns on a part's environment. Prints a table and returns the runs."""
    env_id, steps, flags = LEARNING[part]
    flags += f" --env-id={env_id} --total-timesteps={args.steps or steps}"
    flags += f" --learning-starts={args.steps // 2}" if args.steps else ""
    contestants = new_contestants(flags, {"": 1})
    contestants[NOISY_START] = tools.call(train_ours, flags=flags, noisy_start=True)
    contestants[AS_IT_IS] = tools.script("ddpg.py", flags)
    runs = tools.play(contestants, tools.read_return, args, "ddpg_returns", args.parallel)
    title = f"{env_id}, {args.steps or steps:,} steps,"
    tools.show(runs, tools.RETURN, of=title)
    tools.show_differences(runs, tools.RETURN, product([OURS, NOISY_START, AS_IT_IS], [SB3, SBX]), of=title)
    return runs


def compare_updates(updates: int = 100) -> None:
    """How far the parameters of ddpg.py and of SB3 are apart after the same updates. Prints it."""
    from stable_baselines3 import DDPG
    from stable_baselines3.common.buffers import ReplayBufferSamples
    from stable_baselines3.common.logger import Logger

    take_peer_networks()
    args, env = parse(HALFCHEETAH_FLAGS), ddpg.make_env("HalfCheetah-v5")
    torch.manual_seed(0)
    ours = ddpg.DDPG(env.observation_space.shape, env.action_space, args)
    settings = {"learning_rate": args.learning_rate, "gamma": args.gamma, "tau": args.tau}
    theirs = DDPG("MlpPolicy", env, buffer_size=1, policy_kwargs={"net_arch": [ddpg.HIDDEN] * 2}, **settings)
    theirs.set_logger(Logger(None, []))
    pairs = [(ours.actor, theirs.actor), (ours.target_actor, theirs.actor_target)]
    pairs += [(ours.critic, theirs.critic), (ours.target_critic, theirs.critic_target)]
    for mine, peer in pairs:
        peer.load_state_dict(dict(zip(peer.state_dict(), mine.state_dict().values(), strict=True)))
    rates = {"actor": args.actor_learning_rate, "critic": args.learning_rate}
    optimizers = {name: torch.optim.Adam([getattr(ours, name).theta], rate, fused=True) for name, rate in rates.items()}
    n, size, actions = args.batch_size, env.observation_space.shape[0], env.action_space.shape[0]
    for _ in range(updates):
        s, s_next, a, r = torch.randn(n, size), torch.randn(n, size), 2 * torch.rand(n, actions) - 1, torch.randn(n)
        terminated = (torch.rand(n) < 0.05).float()
        ddpg.update(ours, optimizers, [s, a, r, s_next, terminated], args)
        batch = ReplayBufferSamples(s, a, s_next, terminated[:, None], r[:, None])
        theirs.replay_buffer.sample = lambda *_, batch=batch, **__: batch
        theirs.train(gradient_steps=1, batch_size=n)
    apart = [(x - y).abs().max() for pair in pairs for x, y in zip(*map(nn.Module.parameters, pair), strict=True)]
    print(f"after {updates} updates, no parameter of ddpg.py is further than {max(apart):.1e} from SB3's\n")


def compare_speed(args: Args) -> pd.DataFrame:
    """Steps per second on HalfCheetah-v5. Prints tables and returns the runs."""
    parts = []
    flags = f"{HALFCHEETAH_FLAGS} --env-id=HalfCheetah-v5 --total-timesteps={2 * RANDOM_STEPS + args.speed_steps}"
    flags += f" --learning-starts={RANDOM_STEPS} --eval-episodes=0"
    read = partial(tools.read_speed, after=2 * RANDOM_STEPS)
    rivals = [[OURS, OURS_2], *([peer + end for end in THREADS] for peer in (SB3, SBX))]
    for batch_size in BATCH_SIZES:
        settings = f"{flags} --batch-size={batch_size}"
        contestants = {OURS_2: tools.call(train_ours, flags=f"{settings} --num-threads=2")}
        contestants |= new_contestants(settings, THREADS)
        runs, (ours, *chosen) = tools.play_with_rivals(contestants, read, args, "ddpg_speed", rivals)
        title = f"minibatches of {batch_size}:"
        tools.show(runs, tools.SPEED, of=title)
        tools.show_ratios(runs, tools.SPEED, [ours], chosen, of=title)
        parts.append(runs)
    return pd.concat(parts)


def main(args: Args) -> int:
    runs = []
    if args.only == "updates" or (args.only is None and not args.draw_only):
        compare_updates()
    for part in ("pendulum", "speed", "halfcheetah"):
        if args.only in (None, part):
            runs.append(compare_speed(args) if part == "speed" else compare_learning(part, args))
    return tools.finish(*runs) if runs else 0


if __name__ == "__main__":
    sys.exit(main(tools.parse_args(Args)))
