"""Asynchronous one-step Q-learning (Mnih et al. 2016, Asynchronous Methods for Deep Reinforcement Learning).

Several workers, each with an environment and an exploration of its own, update one shared network theta without waiting
for each other, towards targets from a shared target network theta-. With --target sarsa and with --n-step it is the
paper's other two value-based methods. To begin with: python async_qlearning.py --num-workers 8
"""

import math
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.evaluation import evaluate
from common.inputs import InputError, check_args, check_env, command_line, make_env, read_checkpoint
from common.run import Run
from common.seeding import seed_everything
from common.workers import choose_backend, train

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """environment: any id that gymnasium.make takes, `module:Env-v0` included"""
    seed: int = 1
    """seed of everything random; with one worker, the same seed gives the same run"""
    total_timesteps: int = 500_000
    """T_max: environment steps of all workers together"""
    num_workers: int = 8
    """workers, each with an environment of its own"""
    backend: Literal["auto", "thread", "process"] = "auto"
    """what a worker is; auto: threads for one worker or where Python has no GIL, processes otherwise"""
    target: Literal["q", "sarsa"] = "q"
    """what the target takes of the next state: its largest value (Q-learning), or that of the next action (SARSA)"""
    n_step: int = 1
    """rewards in a target, fewer at the end of a segment; from --train-frequency on it is the paper's n-step method"""
    train_frequency: int = 32
    """I_AsyncUpdate: steps of a worker between two updates, fewer at the end of an episode"""
    target_network_frequency: int = 500
    """I_target: steps of all workers together between two updates of the target network"""
    final_epsilons: tuple[float, ...] = (0.1, 0.01, 0.5)
    """what a worker's epsilon ends at: one of these"""
    final_epsilon_probs: tuple[float, ...] = (0.4, 0.3, 0.3)
    """with these probabilities"""
    exploration_fraction: float = 0.3
    """fraction of the total timesteps over which epsilon falls from 1 to its end"""
    learning_rate: float = 6e-3
    """eta at the beginning"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over the total timesteps"""
    gamma: float = 0.99
    """discount factor"""
    max_grad_norm: float = 1000.0
    """longer gradients are shortened to this; mind that they are sums over a segment, not means"""
    rmsprop_alpha: float = 0.99
    """decay of RMSProp's mean of squared gradients"""
    rmsprop_eps: float = 10.0
    """RMSProp's epsilon, inside of the root"""
    log_interval: int = 5_000
    """steps between two rows of metrics.csv; the checkpoint is renewed as often"""
    log_dir: str = "runs"
    """where run folders go"""
    eval_episodes: int = 20
    """greedy episodes after training, on a fresh environment; 0: none"""
    capture_video: bool = False
    """film the greedy policy of the evaluation into the run's videos/"""
    evaluate: str | None = None
    """a run's folder: do not train, evaluate its checkpoint"""
    resume: str | None = None
    """a run's folder: go on from its checkpoint, with its arguments, to --total-timesteps (annealing follows that)"""


class QNetwork(nn.Module):
    """The action values Q(s, a; theta): two hidden layers of 64 units, an output for each action.

    The attribute `theta` is one vector of which every parameter is a view: to write to it is to change the network.

    Args:
        observation_size: numbers in an observation.
        action_space: the environment's.
        theta: the vector to be a view of, such as one in shared memory; without it, a new one with initial weights.
    """

    def __init__(self, observation_size: int, action_space: spaces.Discrete, theta: torch.Tensor | None = None):
        super().__init__()
        self.space = action_space
        linear = [nn.Linear(observation_size, 64), nn.Linear(64, 64), nn.Linear(64, int(action_space.n))]
        for layer, gain in zip(linear, (math.sqrt(2), math.sqrt(2), 1.0), strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        self.q = nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), linear[2])
        self.theta = parameters_to_vector(self.parameters()).detach() if theta is None else theta
        vector_to_parameters(self.theta, self.parameters())
        # The same as numpy views of the same memory: for a single observation that takes a sixth of torch's time.
        self.layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Q(s, .; theta), shape (n, actions), of observations of shape (n, observation_size)."""
        return self.q(observations)

    def act(self, observation: np.ndarray, epsilon: float = 0.0, rng: np.random.Generator | None = None) -> int:
        """The index of an epsilon-greedy action for one observation, shape (observation_size,)."""
        if epsilon and rng.random() < epsilon:
            return int(rng.random() * self.space.n)
        x = observation
        for weight, bias in self.layers[:-1]:
            x = np.tanh(weight @ x + bias)
        weight, bias = self.layers[-1]
        return int((weight @ x + bias).argmax())

    def to_env(self, action: int) -> int:
        """The environment's action for an index."""
        return int(self.space.start) + action


def td_targets(rewards: torch.Tensor, next_values: torch.Tensor, gamma: float, n_step: int = 1) -> torch.Tensor:
    """The targets y of a segment (Mnih et al. 2016, algorithm 1; with n_step > 1 algorithm S2).

    Each is the discounted sum of the next n_step rewards, fewer where the segment ends, and of the value after them.

    Args:
        rewards: r of each step, shape (n,).
        next_values: the value of the state after each step, 0 for a terminal one, shape (n,).
        gamma: discount factor.
        n_step: rewards in a target.

    Returns:
        Shape (n,).
    """
    y = rewards + gamma * next_values  # y = r for terminal s', r + gamma max_a' Q(s', a'; theta-) otherwise
    for _ in range(min(n_step, len(y)) - 1):  # each turn puts one reward more before the value
        y = torch.cat([rewards[:-1] + gamma * y[1:], y[-1:]])
    return y


def q_loss(model: QNetwork, target: QNetwork, observations, actions, rewards, terminated: bool, args: Args):
    """The loss of a segment of n steps, whose gradient is what the lecture accumulates: d sum (y - Q(s, a; theta))^2.

    Args:
        model, target: theta and theta-.
        observations: s of each step and s' of the last one, shape (n + 1, observation_size).
        actions: a of each step, shape (n,); for SARSA also a' of the last s', shape (n + 1,).
        rewards: shape (n,).
        terminated: whether the last s' is terminal; at a time limit it is not.
        args: gamma, target, n_step.

    Returns:
        The loss, a scalar tensor, and the means over the steps of squared error and of Q(s, a; theta).
    """
    n = len(rewards)
    with torch.no_grad():
        next_q = target(observations[1:])  # Q(s', .; theta-)
        if args.target == "q":
            next_values = next_q.amax(-1)  # max_a' Q(s', a'; theta-)
        else:
            next_values = next_q.gather(-1, actions[1:].unsqueeze(-1)).squeeze(-1)  # Q(s', a'; theta-)
        if terminated:
            next_values[-1] = 0.0
        y = td_targets(rewards, next_values, args.gamma, args.n_step)
    q = model(observations[:-1]).gather(-1, actions[:n].unsqueeze(-1)).squeeze(-1)  # Q(s, a; theta)
    assert y.shape == q.shape == (n,), (y.shape, q.shape)
    loss = (y - q).square().sum()  # d theta <- d theta + d (y - Q(s, a; theta))^2 / d theta
    return loss, (loss.item() / n, q.mean().item())


class SharedRMSProp:
    """RMSProp whose statistics g all workers share, as they share theta (Mnih et al. 2016, section 4):

        g <- alpha g + (1 - alpha) d^2          theta <- theta - eta d / sqrt(g + epsilon)

    No lock is taken: of two workers that update at the same time, one may overwrite parts of the other's step.

    Why not Adam: the numerator of its step, the momentum, is shared as well, and a worker that loses its core between
    computing the denominator and dividing, as happens when workers are more than cores, divides a momentum of now by a
    denominator of long ago, with no bound on the quotient. Here the numerator is the worker's own d, which g has just
    taken in, so that but for a write that another worker overwrites no step exceeds eta / sqrt(1 - alpha).
    """

    def __init__(self, theta: torch.Tensor, alpha: float, eps: float):
        self.theta, self.alpha, self.eps = theta.share_memory_(), alpha, eps
        self.g = torch.zeros_like(theta).share_memory_()

    def step(self, d_theta: torch.Tensor, learning_rate: float) -> None:
        """Update theta in place by the gradient `d_theta`, of the same shape."""
        self.g.mul_(self.alpha).addcmul_(d_theta, d_theta, value=1 - self.alpha)
        self.theta.addcdiv_(d_theta, (self.g + self.eps).sqrt_(), value=-learning_rate)


def draw_final_epsilons(args: Args, rng: np.random.Generator) -> np.ndarray:
    """Draw each worker's final epsilon, shape (num_workers,) (Mnih et al. 2016, section 5.1).

    The draw is systematic: the workers sit at equal distances on a circle on which every epsilon has an arc as long as
    its probability p, and the circle is turned at random. So each worker has every epsilon with its probability, and of
    W workers W p, rounded down or up, have it. A draw that gives everyone the largest epsilon, which with the default
    probabilities happens to a single worker only, is made again.
    """
    epsilons, ends = np.array(args.final_epsilons), np.cumsum(args.final_epsilon_probs)
    possible = epsilons[np.array(args.final_epsilon_probs) > 0]
    while True:
        positions = (rng.random() + np.arange(args.num_workers) / args.num_workers) % 1
        drawn = epsilons[np.searchsorted(ends[:-1], positions, side="right")]
        if drawn.min() < possible.max() or possible.min() == possible.max():
            return drawn


def annealed_epsilon(T: int, final_epsilon, args: Args):
    """epsilon at step T: from 1 linearly to `final_epsilon`, a number or an array, over the exploration fraction."""
    left = max(0.0, 1 - T / (args.exploration_fraction * args.total_timesteps)) if args.exploration_fraction else 0.0
    return final_epsilon + (1 - final_epsilon) * left


METRICS = {  # columns of metrics.csv, with their families in TensorBoard; behind them the epsilon of each worker
    "td_loss": "losses",
    "q_values": "losses",
    "grad_norm": "losses",
    "learning_rate": "charts",
}


class Shared:
    """What all workers share. Each writes its own row of `steps` and `sums` alone: no count is lost, without a lock."""

    def __init__(self, theta: torch.Tensor, num_metrics: int, args: Args):
        self.optimizer = SharedRMSProp(theta, args.rmsprop_alpha, args.rmsprop_eps)
        self.theta_target = theta.clone().share_memory_()  # theta-
        self.target_updates = torch.zeros((), dtype=torch.int64).share_memory_()
        self.target_lock = multiprocessing.get_context("spawn").Lock()  # of this kind, processes can be given it
        self.steps = torch.zeros(args.num_workers, dtype=torch.int64).share_memory_()  # t of each
        self.sums = torch.zeros(args.num_workers, 1 + num_metrics, dtype=torch.float64).share_memory_()
        self.stop = torch.zeros((), dtype=torch.bool).share_memory_()

    def T(self) -> int:
        """The global step counter: the sum of the workers' own."""
        return int(self.steps.sum())

    def update_target(self, multiple: int) -> None:
        """theta- <- theta for every multiple of I_target up to the given one that has not had its turn yet.

        One worker at a time; who comes while another is at it goes on, so that nobody waits for one that has died.
        """
        if self.target_lock.acquire(block=False):
            while self.target_updates < multiple:
                self.theta_target.copy_(self.optimizer.theta)
                self.target_updates += 1
            self.target_lock.release()


def worker(channel, index: int, args: Args, shared: Shared, final_epsilons, rng: np.random.Generator) -> None:
    """One worker of algorithm 1, a thread or a process. It reports every episode through `channel`.

    Raises:
        FloatingPointError: a gradient is not finite; theta is left as it was.
    """
    torch.set_num_threads(1)
    env, optimizer = make_env(args.env_id), shared.optimizer
    network = env.observation_space.shape[0], env.action_space
    model, target = QNetwork(*network), QNetwork(*network, shared.theta_target)
    parameters = list(model.parameters())
    all_t, t, sums = shared.steps.numpy(), shared.steps[index : index + 1].numpy(), shared.sums[index].numpy()
    target_updates, stop = shared.target_updates.numpy(), shared.stop.numpy()
    observations = np.empty((args.train_frequency + 1, *env.observation_space.shape), np.float32)
    observations[0], _ = env.reset(seed=int(rng.integers(2**31)))
    model.theta.copy_(optimizer.theta)
    actions, rewards, next_action = [], [], None
    episode_return, episode_length = 0.0, 0
    start_time = channel.wait_for_start()
    T = shared.T()

    while T <= args.total_timesteps and not stop:  # until T > T_max
        n = len(rewards)  # steps since the last update; s is observations[n]
        # Take action a with epsilon-greedy policy based on Q(s, a; theta)
        epsilon = annealed_epsilon(T, final_epsilons[index], args)
        action = model.act(observations[n], epsilon, rng) if next_action is None else next_action
        # Receive new state s' and reward r
        observations[n + 1], reward, terminated, truncated, _ = env.step(model.to_env(action))
        actions.append(action)
        rewards.append(float(reward))
        next_action = None
        t += 1  # T <- T + 1 and t <- t + 1
        T = int(all_t.sum())
        if T // args.target_network_frequency > target_updates:  # if T mod I_target == 0
            shared.update_target(T // args.target_network_frequency)  # theta- <- theta
        n += 1  # s = s', observations[n]
        if t[0] % args.train_frequency == 0 or terminated or truncated:  # t mod I_AsyncUpdate == 0, or s is terminal
            if args.target == "sarsa":  # a', which it takes next if the episode goes on
                next_action = model.act(observations[n], epsilon, rng)
                actions.append(next_action)
            batch = torch.from_numpy(observations[: n + 1]), torch.tensor(actions), torch.tensor(rewards)
            loss, means = q_loss(model, target, *batch, terminated, args)
            d_theta = parameters_to_vector(torch.autograd.grad(loss, parameters))
            norm = d_theta.norm().item()
            if not math.isfinite(norm):
                healthy = np.isfinite(observations[: n + 1]).all() and np.isfinite(rewards).all()
                hint = "a lower --learning-rate may help" if healthy else "so is what the environment returned"
                raise FloatingPointError(f"the gradient is {norm} at step {T:,}; {hint}")
            if norm > args.max_grad_norm:
                d_theta *= args.max_grad_norm / norm
            learning_rate = args.learning_rate * max(0.0, 1 - T / args.total_timesteps if args.anneal_lr else 1.0)
            optimizer.step(d_theta, learning_rate)  # asynchronous update of theta using d theta
            sums += (1, *means, norm, learning_rate, *annealed_epsilon(T, final_epsilons, args))
            model.theta.copy_(optimizer.theta)
            episode_return, episode_length = episode_return + sum(rewards), episode_length + n
            observations[0] = observations[n]
            actions, rewards = [], []  # d theta <- 0
        if terminated or truncated:
            channel.send(((T, time.monotonic() - start_time, episode_return, episode_length), rng.bit_generator.state))
            observations[0], _ = env.reset()
            episode_return, episode_length, next_action = 0.0, 0, None
    channel.send((None, rng.bit_generator.state))
    env.close()


def main(args: Args) -> int:
    """Train, go on training or only evaluate, as `args` says. Returns the exit code."""
    check_args(args)
    if len(args.final_epsilons) != len(args.final_epsilon_probs):
        counts = f"{len(args.final_epsilons)} and {len(args.final_epsilon_probs)}"
        raise InputError(f"--final-epsilons and --final-epsilon-probs must have equally many numbers, not {counts}")
    if not math.isclose(sum(args.final_epsilon_probs), 1, abs_tol=1e-6):
        raise InputError(f"--final-epsilon-probs must sum to 1, not to {sum(args.final_epsilon_probs):g}")
    checkpoint = read_checkpoint(args, SCRIPT)
    observation_size, space = check_env(args, checkpoint)
    if not isinstance(space, spaces.Discrete):
        hint = "; ddpg.py is for those" if isinstance(space, spaces.Box) else ""
        actions = " ".join(str(space).split())
        raise InputError(f"{args.env_id} takes actions {actions}: Q-learning needs Discrete ones{hint}")
    *generators, rng = seed_everything(args.seed, args.num_workers + 1)
    final_epsilons = draw_final_epsilons(args, rng)
    metrics = METRICS | {f"epsilon_{index}": "charts" for index in range(args.num_workers)}
    model = QNetwork(observation_size, space)
    shared, seconds = Shared(model.theta.clone(), len(metrics), args), 0.0
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
            shared.optimizer.theta.copy_(model.theta)
            shared.theta_target.copy_(checkpoint["theta_target"])
            shared.optimizer.g.copy_(checkpoint["g"])
            shared.steps[0], seconds = checkpoint["step"], checkpoint["seconds"]
            shared.target_updates.fill_(checkpoint["step"] // args.target_network_frequency)
            for index, state in checkpoint["random_states"].items():
                if index < args.num_workers:
                    generators[index].bit_generator.state = state
        except (RuntimeError, LookupError, TypeError, ValueError):
            raise InputError(f"the checkpoint does not fit {args.env_id} as it is installed here") from None

    def greedy_policy(observation: np.ndarray):
        return model.to_env(model.act(observation))

    if args.evaluate:
        print(f"{SCRIPT}: {evaluate(greedy_policy, args, Path(args.evaluate))[0]}; {args.evaluate}")
        return 0
    if shared.T() > args.total_timesteps:
        raise InputError(f"{args.resume} has done {shared.T():,} steps already: give more with --total-timesteps")

    def snapshot() -> dict:
        model.theta.copy_(shared.optimizer.theta)
        tensors = {"theta_target": shared.theta_target.clone(), "g": shared.optimizer.g.clone()}
        return {"model": model.state_dict()} | tensors

    backend, reason = choose_backend(args.backend, args.num_workers)
    facts = {"backend_used": backend, "final_epsilons_drawn": final_epsilons.tolist()}
    run = Run(SCRIPT, args, metrics, facts, shared.T(), seconds)
    print(
        f"{SCRIPT}: {args.env_id}, {args.num_workers} workers, backend {backend} ({reason}), {run.folder}", flush=True
    )
    arguments = [(args, shared, final_epsilons, rng) for rng in generators]
    exit_code = train(run, worker, arguments, backend, shared, snapshot)
    if exit_code == 0:
        model.theta.copy_(shared.optimizer.theta)
        run.finish(*evaluate(greedy_policy, args, run.folder))
    return exit_code


if __name__ == "__main__":
    command_line(main, Args)
