"""Asynchronous one-step Q-learning (Mnih et al. 2016, Asynchronous Methods for Deep Reinforcement Learning).

Several workers, each with an environment and an exploration of its own, update one shared network theta without waiting
for each other, towards targets from a shared target network theta-. --target sarsa makes it the paper's one-step SARSA,
--n-step nearly its n-step Q-learning. To begin with: python async_qlearning.py --num-workers 8
"""

import math
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces, wrappers
from gymnasium.wrappers import TransformAction
from numpy.lib.stride_tricks import sliding_window_view
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.arguments import fail, failing, load_checkpoint, parse_args
from common.evaluation import check_film, evaluate
from common.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, check_args
from common.run import Run, follow_parent, has_gil, seed_everything, signals_blocked

SCRIPT = Path(__file__).stem
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"  # of processes: 8 are up in 2 s, with spawn in 17
PATIENCE_SECONDS = 60.0  # how long a worker may be without progress once the run is ending


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """any id that gymnasium.make takes, with Discrete actions; with images, too: MinAtar/Breakout-v1,
    ale_py:PongNoFrameskip-v4"""
    seed: NonNegativeInt = 1
    """seed of everything random; with one worker, the same seed gives the same run"""
    total_timesteps: PositiveInt = 500_000
    """T_max: environment steps of all workers together, and up to one more of each"""
    num_workers: PositiveInt = 8
    """workers, each with an environment of its own"""
    backend: Literal["auto", "thread", "process"] = "auto"
    """what a worker is; auto: threads for one worker or where Python has no GIL, processes otherwise"""
    target: Literal["q", "sarsa"] = "q"
    """what the target takes of the next state: its largest value (Q-learning), or that of the next action (SARSA)"""
    n_step: PositiveInt = 1
    """rewards in a target before the value is added, fewer for the last steps before an update; with --train-frequency
    or more, each target takes all rewards up to the update"""
    train_frequency: PositiveInt = 32
    """I_AsyncUpdate: steps of a worker between two updates, fewer before and after the end of an episode"""
    target_network_frequency: PositiveInt = 500
    """I_target: steps of all workers together between two updates of the target network"""
    final_epsilons: tuple[Fraction, ...] = (0.1, 0.01, 0.5)
    """the values that the workers' epsilons end at; the first workers get the smallest"""
    final_epsilon_probs: tuple[Fraction, ...] = (0.4, 0.3, 0.3)
    """the share of the workers that each of the --final-epsilons gets: as many numbers, which sum to 1"""
    exploration_fraction: Fraction = 0.3
    """fraction of the total timesteps over which epsilon falls from 1 to its end"""
    learning_rate: PositiveFloat = 6e-3
    """eta, the learning rate at the beginning"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over the total timesteps"""
    gamma: Fraction = 0.99
    """discount factor"""
    max_grad_norm: PositiveFloat = 1000.0
    """clip the gradient norm to this; gradients are sums over a segment, not means"""
    rmsprop_alpha: Fraction = 0.99
    """decay of RMSProp's mean of squared gradients"""
    rmsprop_eps: PositiveFloat = 10.0
    """RMSProp's epsilon, inside the root"""
    screen_size: PositiveInt = 42
    """width and height that Atari's screen is reduced to; the paper's 84 takes longer"""
    log_interval: PositiveInt = 5_000
    """steps between two rows of metrics.csv, and between two checkpoints"""
    log_dir: str = "runs"
    """where run folders go"""
    eval_episodes: NonNegativeInt = 20
    """greedy episodes after training, on a fresh environment; 0: none"""
    capture_video: bool = False
    """film the greedy policy of the evaluation into the run's videos/"""
    evaluate: str | None = None
    """a run's folder: do not train, evaluate its checkpoint"""
    resume: str | None = None
    """a run's folder: go on from its checkpoint, with its arguments, to --total-timesteps (annealing follows that)"""


def is_image(space: spaces.Space) -> bool:
    """Whether observations are images: three dimensions of bytes or of bools."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype in (np.uint8, np.bool_)


class Film(gym.Wrapper):
    """MinAtar renders 10x10 colours from 0 to 1. A film needs bytes: each colour becomes a square of 16x16 pixels."""

    def render(self) -> np.ndarray:
        return np.kron((255 * self.env.render()).astype(np.uint8), np.ones((16, 16, 1), np.uint8))


def make_env(env_id: str, render_mode: str | None = None, screen_size: int = 42) -> gym.Env:
    """The environment, with observations as the network takes them and with Discrete actions that count from 0.

    Images stay bytes or bools, with channels first. (They come last if the first side is not shorter than both others.)
    Atari is played as in the paper: up to 30 no-ops at the start; each action is held for 4 frames; the last two are
    made grey, merged by their maximum and scaled down; four such images are stacked; rewards are clipped to [-1, 1].
    (`ALE/` games also repeat the last action at random.) All other observations become vectors.

    Raises:
        ValueError: the script cannot play it.
    """
    options = {"render_mode": render_mode} if render_mode else {}
    is_atari, is_minatar = env_id.startswith(("ale_py:", "ALE/")), env_id.startswith("MinAtar/")
    if is_atari:
        with failing(f'{env_id} needs pip install "gymnasium[atari]" opencv-python-headless'):
            import ale_py  # noqa: F401
            import cv2  # noqa: F401
        options |= {"frameskip": 1, "obs_type": "grayscale"}  # AtariPreprocessing skips frames
    if is_minatar and env_id not in gym.registry:
        with failing(f"{env_id} needs pip install MinAtar"):
            import minatar.gym
        minatar.gym.register_envs()
    env = gym.make(env_id, disable_env_checker=True, **options)
    env = Film(env) if is_minatar and render_mode else env
    env = wrappers.AtariPreprocessing(env, screen_size=screen_size) if is_atari else env
    env = wrappers.RecordEpisodeStatistics(env)  # the game's own score, before rewards are clipped
    if is_atari:
        env = wrappers.TransformReward(wrappers.FrameStackObservation(env, 4), lambda reward: np.clip(reward, -1, 1))
    space = env.observation_space
    if is_image(space):
        if space.shape[0] >= min(space.shape[1:]) and not is_atari:  # the channels come last
            space = spaces.Box(0, int(space.high.max()), (space.shape[2], *space.shape[:2]), space.dtype)
            env = wrappers.TransformObservation(env, lambda image: image.transpose(2, 0, 1), space)
        if min(space.shape[1:]) < 3:
            raise ValueError(f"its images have a side of less than 3: {space}")
    elif not isinstance(space, spaces.Box) or len(space.shape) != 1:
        if not space.is_np_flattenable or space.dtype == np.uint8:
            raise ValueError(f"its observations cannot be made a vector of numbers, and are no images: {space}")
        env = wrappers.FlattenObservation(env)
    space = env.action_space
    if not isinstance(space, spaces.Discrete):
        raise ValueError(f"Q-learning needs Discrete actions (ddpg.py takes a Box), not {space}")
    return env if space.start == 0 else TransformAction(env, lambda a: space.start + a, spaces.Discrete(space.n))


def orthogonal(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """The layer with orthogonal weights, scaled by `gain`, and biases of 0."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ToFloat(nn.Module):
    """Bytes as numbers from 0 to 1, bools as 0 or 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # channels_last: convolutions are faster on that
        return images.to(torch.float32, memory_format=torch.channels_last) / (255 if images.dtype == torch.uint8 else 1)


def image_layers(shape: tuple[int, ...]) -> nn.Sequential:
    """Layers for images of `shape` (channels, height, width): up to 20x20, as MinAtar's, one convolution and 128 units.

    Larger images get four convolutions and 256 units. On 42x42 pixels these learn Pong; the paper's two, whose filters
    of 8x8 pixels are made for 84x84, do not.
    """
    channels, height, width = shape
    layers, units, activation = [ToFloat(), orthogonal(nn.Conv2d(channels, 16, 3)), nn.ReLU()], 128, nn.ReLU()
    if max(height, width) > 20:
        layers, units, activation = [ToFloat()], 256, nn.ELU(inplace=True)  # in place, for speed
        for inputs in (channels, 32, 32, 32):
            layers += [orthogonal(nn.Conv2d(inputs, 32, 3, stride=2, padding=1)), activation]
    features = nn.Sequential(*layers)(torch.zeros(1, *shape)).numel()
    return nn.Sequential(*layers, nn.Flatten(), orthogonal(nn.Linear(features, units)), activation)


# The activations of the image layers, in numpy
NUMPY_ACTIVATIONS = {nn.ReLU: lambda x: np.maximum(x, 0), nn.ELU: lambda x: np.maximum(x, np.exp(np.minimum(x, 0)) - 1)}


def numpy_convolutions(layers: nn.Sequential, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, ...]]:
    """The convolutions among `layers` as linear layers, for images of `shape`, in the order in which they come.

    Each is (patches, weight, bias): for each place the indices of the pixels that a filter covers, -1 beyond the
    border, and views of the parameters. The output lists all maps of the first place, then those of the next.
    """
    pixels = np.arange(math.prod(shape)).reshape(shape)
    for layer in [each for each in layers if isinstance(each, nn.Conv2d)]:
        pixels = np.pad(pixels, [(0, 0), *((each, each) for each in layer.padding)], constant_values=-1)
        patches = sliding_window_view(pixels, layer.kernel_size, axis=(1, 2))[:, :: layer.stride[0], :: layer.stride[1]]
        shape = (*patches.shape[1:3], layer.out_channels)
        patches = patches.transpose(1, 2, 0, 3, 4).reshape(shape[0] * shape[1], -1)
        yield patches, layer.weight.detach().flatten(1).T.numpy(), layer.bias.detach().numpy()
        pixels = np.arange(math.prod(shape)).reshape(shape).transpose(2, 0, 1)


class QNetwork(nn.Module):
    """Q(s, a; theta) for every action. Vectors pass two hidden layers of 64 tanh units, images `image_layers`.

    The attribute `theta` is one vector. Every parameter is a view of it: writing to it changes the network.
    `act` computes the same as `q`, in numpy: change both, nothing fails if they differ.

    Args:
        observation_shape: of a vector or an image.
        num_actions: number of actions.
        theta: the vector that the parameters become views of; without it, a new one, which processes can share.
    """

    def __init__(self, observation_shape: tuple[int, ...], num_actions: int, theta: torch.Tensor | None = None):
        super().__init__()
        self.num_actions = num_actions
        if len(observation_shape) == 3:
            body = image_layers(observation_shape)
            self.q = nn.Sequential(*body, orthogonal(nn.Linear(body[-2].out_features, num_actions), 1.0))
            layers, self.activation = [body[-2], self.q[-1]], NUMPY_ACTIVATIONS[type(body[-1])]
        else:
            first, second, last = nn.Linear(observation_shape[0], 64), nn.Linear(64, 64), nn.Linear(64, num_actions)
            self.q = nn.Sequential(orthogonal(first), nn.Tanh(), orthogonal(second), nn.Tanh(), orthogonal(last, 1.0))
            layers, self.activation = [first, second, last], np.tanh
        # self.q is Q(s, .; theta), shape (n, actions), of n observations
        self.theta = parameters_to_vector(self.parameters()).detach().share_memory_() if theta is None else theta
        vector_to_parameters(self.theta, self.parameters())
        # The same as numpy views of the same memory: for one observation they are faster than torch, many times so
        # for a small one.
        self.numpy_layers = [(layer.weight.detach().T.numpy(), layer.bias.detach().numpy()) for layer in layers]
        self.convolutions = list(numpy_convolutions(self.q, observation_shape))

    def act(self, observation: np.ndarray, epsilon: float = 0.0, rng: np.random.Generator | None = None) -> int:
        """The index of an epsilon-greedy action for one observation, a vector or an image."""
        if epsilon and rng.random() < epsilon:
            return int(rng.random() * self.num_actions)  # faster than rng.integers
        x = observation / np.float32(255) if observation.dtype == np.uint8 else observation
        for patches, weight, bias in self.convolutions:  # the 0 at the end is pixel -1, beyond the border
            x = self.activation(np.append(x, np.float32(0)).take(patches, mode="wrap") @ weight + bias)
        x = x.T.ravel()  # one map after the other, as nn.Flatten has them
        for weight, bias in self.numpy_layers[:-1]:
            x = self.activation(x @ weight + bias)
        weight, bias = self.numpy_layers[-1]
        return int((x @ weight + bias).argmax())


def td_targets(rewards: torch.Tensor, next_values: torch.Tensor, gamma: float, n_step: int) -> torch.Tensor:
    """The targets y of a segment (Mnih et al. 2016, algorithm 1; with n_step >= n those of algorithm S2).

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


def q_loss(model: QNetwork, target_model: QNetwork, observations, actions, rewards, terminated: bool, args: Args):
    """The loss of a segment of n steps, whose gradient is what the lecture accumulates: d sum (y - Q(s, a; theta))^2.

    Args:
        model, target_model: theta and theta-.
        observations: s of each step and s' of the last one, shape (n + 1, observation_size) or (n + 1, *image).
        actions: a of each step, shape (n,); for SARSA also a' of the last s', shape (n + 1,).
        rewards: shape (n,).
        terminated: whether the last s' is terminal; at a time limit it is not.
        args: gamma, target, n_step.

    Returns:
        The loss, a scalar tensor, and the means over the steps of squared error and of Q(s, a; theta), by name.
    """
    n = len(rewards)
    with torch.no_grad():
        next_q = target_model.q(observations[1:])  # Q(s', .; theta-)
        next_actions = next_q.argmax(-1) if args.target == "q" else actions[1:]  # Q-learning: the best a'; SARSA: taken
        next_values = next_q.gather(-1, next_actions.unsqueeze(-1)).squeeze(-1)  # Q(s', a'; theta-)
        if terminated:
            next_values[-1] = 0.0
        y = td_targets(rewards, next_values, args.gamma, args.n_step)
    q = model.q(observations[:-1]).gather(-1, actions[:n].unsqueeze(-1)).squeeze(-1)  # Q(s, a; theta)
    assert y.shape == q.shape == (n,), (y.shape, q.shape)
    loss = (y - q).square().sum()  # d theta <- d theta + d (y - Q(s, a; theta))^2 / d theta
    return loss, {"td_loss": loss.item() / n, "q_values": q.mean().item()}


def rmsprop_step(theta: torch.Tensor, g: torch.Tensor, d_theta: torch.Tensor, learning_rate: float, args: Args) -> None:
    """One step of RMSProp on theta and g, in place; all shapes are those of theta (Mnih et al. 2016, section 4):

        g <- alpha g + (1 - alpha) d^2          theta <- theta - eta d / sqrt(g + epsilon)

    All workers share g, as they share theta. No lock is taken: of two workers that update at the same time, one may
    overwrite parts of the other's step.
    """
    g.mul_(args.rmsprop_alpha).addcmul_(d_theta, d_theta, value=1 - args.rmsprop_alpha)
    theta.addcdiv_(d_theta, (g + args.rmsprop_eps).sqrt_(), value=-learning_rate)


def final_epsilons(args: Args) -> np.ndarray:
    """What each worker's epsilon ends at, in ascending order, shape (num_workers,) (Mnih et al. 2016, supplement).

    The paper draws each one from a distribution. Here worker i gets its quantile (i + 1/2) / num_workers: the share of
    workers with each epsilon is right to within one worker. `fail`s if the arguments are no distribution.
    """
    if len(args.final_epsilons) != len(args.final_epsilon_probs) or abs(sum(args.final_epsilon_probs) - 1) > 1e-6:
        fail(f"--final-epsilon-probs must be {len(args.final_epsilons)} numbers that sum to 1")
    order = np.argsort(args.final_epsilons)
    cumulative = np.cumsum(np.array(args.final_epsilon_probs)[order])
    quantiles = (np.arange(args.num_workers) + 0.5) / args.num_workers
    return np.array(args.final_epsilons)[order][np.searchsorted(cumulative, quantiles)]


def annealed_epsilon(T: int, final_epsilon: float, args: Args) -> float:
    """epsilon at step T: from 1 linearly to `final_epsilon` over the exploration fraction, then `final_epsilon`."""
    left = max(0.0, 1 - T / (args.exploration_fraction * args.total_timesteps)) if args.exploration_fraction else 0.0
    return final_epsilon + (1 - final_epsilon) * left


# Columns of metrics.csv, with their families in TensorBoard
METRICS = dict.fromkeys(("td_loss", "q_values", "grad_norm"), "losses")
METRICS |= dict.fromkeys(("learning_rate", "epsilon"), "charts")


class Shared:
    """All that workers share, and their only way to it: memory that threads and processes see alike, without locks.

    Counts and sums have a row for each worker, so that none is lost; theta, theta- and g are written by all. On
    processors that reorder writes, a row of metrics may include an update a moment before T includes its steps.

    Args:
        theta: the global parameters, in shared memory.
        args: num_workers, target_network_frequency and RMSProp's arguments.
        new_queue: makes the queues for episodes, one for each worker: one killed while writing blocks no other.
    """

    def __init__(self, theta: torch.Tensor, args: Args, new_queue: Callable):
        self.theta, self.args = theta, args
        self.g = torch.zeros_like(theta).share_memory_()  # RMSProp's mean of squared gradients
        self.theta_target = theta.clone().share_memory_()  # theta-
        self.target_updates = multiprocessing.RawValue("q")  # multiples of I_target passed at the last update
        self.steps = multiprocessing.RawArray("q", args.num_workers)  # of each worker; T is their sum
        # A row for each worker: the sum of each metric and, last, the number of updates
        self.sums = torch.zeros(args.num_workers, len(METRICS) + 1, dtype=torch.float64).share_memory_()
        self.done = multiprocessing.RawArray("b", args.num_workers)
        self.stop = multiprocessing.RawValue("b")
        self.episodes = [new_queue() for _ in range(args.num_workers)]
        self.known_sums = np.zeros(1 + len(METRICS))  # at the last call of `means`, which only the main process makes

    @property
    def T(self) -> int:
        """The global step counter: the sum of the workers' own."""
        return sum(self.steps[:])

    def count_step(self, worker: int, episode: dict | None = None) -> None:
        """T <- T + 1, in the worker's own count.

        `episode` is what `RecordEpisodeStatistics` tells of one that ends with this step. It is reported first: whoever
        reads T, and then the reports, gets every episode whose last step is in T.
        """
        if episode:
            self.episodes[worker].put((self.T + 1, worker, episode, time.monotonic()))
        self.steps[worker] += 1

    def update_target(self) -> None:
        """theta- <- theta if T has passed another multiple of I_target. Two workers may do it at the same time."""
        updates = self.T // self.args.target_network_frequency
        if updates > self.target_updates.value:
            self.target_updates.value = updates
            self.theta_target.copy_(self.theta)

    def update(self, d_theta: torch.Tensor, learning_rate: float) -> None:
        """Asynchronous update of theta using d theta."""
        rmsprop_step(self.theta, self.g, d_theta, learning_rate, self.args)

    def log(self, worker: int, metrics: dict[str, float]) -> None:
        """Add the metrics of one update."""
        # in one piece, so that `means` hardly ever finds a half; the rest would count in the next row
        self.sums.numpy()[worker] += [*(metrics[name] for name in METRICS), 1.0]

    def reported(self) -> Iterator[tuple]:
        """The episodes reported since the last call, as arguments of `Run.log_episode`."""
        for episodes in self.episodes:
            while not episodes.empty():
                yield episodes.get()

    def means(self) -> dict[str, float]:
        """The metrics, means over all updates since the last call; none without an update."""
        sums = self.sums.sum(0).numpy()
        *totals, updates = sums - self.known_sums
        self.known_sums = sums
        return {name: total / updates for name, total in zip(METRICS, totals, strict=True)} if updates else {}


def worker(index: int, args: Args, shared: Shared, first_step: int) -> None:
    """One worker of algorithm 1, a thread or a process. Its random numbers are those of `first_step`, T at the start.

    It acts and learns on the shared theta itself. At an update it computes the targets y and the gradients of all steps
    since the last one at once, with theta- and theta as they are then; the lecture does so at each step. (The paper's
    n-step method acts on a copy theta', as A3C does, and counts t_max from each segment's start. Here t runs on from
    one episode to the next, as in algorithm 1, so an episode's first segment may be shorter.)

    Raises:
        FloatingPointError: a gradient is not finite; theta is left as it was.
    """
    follow_parent()
    rng = seed_everything(args.seed, first_step, index)
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's threads: those of several workers would fight for the cores
    torch.set_flush_denormal(True)  # numbers below 1e-38, which g falls to where gradients are 0, take long to compute
    env = make_env(args.env_id, screen_size=args.screen_size)
    space = env.observation_space
    sizes = space.shape, int(env.action_space.n)
    model, target_model = QNetwork(*sizes, shared.theta), QNetwork(*sizes, shared.theta_target)  # on theta, theta-
    parameters = list(model.parameters())
    final_epsilon = final_epsilons(args)[index]
    observations = np.empty((args.train_frequency + 1, *space.shape), space.dtype if is_image(space) else np.float32)
    observations[0], _ = env.reset(seed=int(rng.integers(2**31)))
    actions, rewards, t = [], [], 0

    # Once `shared.stop` is set, the steps since the last update are learned, and the loop ends. At T_max the last few,
    # fewer than I_AsyncUpdate, are not learned, as on the slide.
    stopped = False
    while (T := shared.T) <= args.total_timesteps and not stopped:  # until T > T_max
        n = len(rewards)  # steps since the last update; s is observations[n]
        # Take action a with epsilon-greedy policy based on Q(s, a; theta)
        epsilon = annealed_epsilon(T, final_epsilon, args)
        if len(actions) == n:  # or else it is SARSA's a' of the last update
            actions.append(model.act(observations[n], epsilon, rng))
        # Receive new state s' and reward r
        observations[n + 1], reward, terminated, truncated, info = env.step(actions[n])
        rewards.append(float(reward))
        n += 1  # s = s', observations[n]
        shared.count_step(index, info.get("episode"))  # T <- T + 1
        t += 1  # t <- t + 1
        shared.update_target()  # if T mod I_target == 0: theta- <- theta
        stopped = bool(shared.stop.value)
        # if t mod I_AsyncUpdate == 0 or s is terminal
        if t % args.train_frequency == 0 or terminated or truncated or stopped:
            if args.target == "sarsa":  # a', which it takes next if the episode goes on
                actions.append(model.act(observations[n], epsilon, rng))
            batch = torch.from_numpy(observations[: n + 1]), torch.tensor(actions), torch.tensor(rewards)
            loss, metrics = q_loss(model, target_model, *batch, terminated, args)
            d_theta = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
            norm = d_theta.norm().item()
            if not math.isfinite(norm):
                raise FloatingPointError(f"the gradient is {norm} at step {T + 1:,}: check --learning-rate and rewards")
            d_theta *= args.max_grad_norm / max(norm, args.max_grad_norm)  # by 1 if the norm is no larger
            learning_rate = args.learning_rate * (1 - T / args.total_timesteps if args.anneal_lr else 1.0)
            shared.update(d_theta, learning_rate)  # asynchronous update of theta using d theta
            shared.log(index, metrics | {"grad_norm": norm, "learning_rate": learning_rate, "epsilon": epsilon})
            observations[0] = observations[n]
            actions, rewards = actions[n:], []  # the next segment, with SARSA's a' (d theta <- 0: nothing to do)
        if terminated or truncated:
            observations[0], _ = env.reset()
            actions = []
    env.close()
    shared.done[index] = True


def main(args: Args) -> int:
    """Train, go on training or only evaluate, as `args` says. Returns the exit code."""
    check_args(args)
    checkpoint = load_checkpoint(args, SCRIPT)
    with failing(f"{args.env_id} cannot be used"):
        eval_env = make_env(args.env_id, "rgb_array" if args.capture_video else None, args.screen_size)
    if args.capture_video:
        check_film(eval_env)
    threadpool_limits(1)  # as in the workers
    seed_everything(args.seed, 0)
    model = QNetwork(eval_env.observation_space.shape, int(eval_env.action_space.n))  # the shared network theta
    auto = "process" if has_gil() and args.num_workers > 1 else "thread"
    backend = auto if args.backend == "auto" else args.backend
    context = multiprocessing.get_context(START_METHOD)
    games = [name for name in ("ale_py", "cv2", "minatar.gym") if name in sys.modules]
    context.set_forkserver_preload(["torch", "gymnasium", "tyro", "tqdm", *games])
    # `list` in place of queues that an evaluation does not need: each takes two of the files that may be open
    shared = Shared(model.theta, args, context.SimpleQueue if args.evaluate is None else list)
    if checkpoint:
        with failing(f"the checkpoint does not fit {args.env_id} (as installed here; --screen-size?)"):
            model.load_state_dict(checkpoint["model"])
            shared.g.copy_(checkpoint["g"])
            shared.theta_target.copy_(checkpoint["theta_target"])
            shared.steps[0] = checkpoint["step"]  # T is the sum of all
            shared.target_updates.value = checkpoint["step"] // args.target_network_frequency
    if args.evaluate is not None:
        print(f"{SCRIPT}: {evaluate(model.act, eval_env, args, Path(args.evaluate))[0]}; {args.evaluate}")
        return 0
    T = shared.T
    if T > args.total_timesteps:
        fail(f"{args.resume} has done {T:,} steps already: give more with --total-timesteps")

    run = Run(SCRIPT, args, METRICS, {"backend_used": backend, "epsilons": final_epsilons(args).tolist()}, checkpoint)
    print(f"{SCRIPT}: {args.env_id}, {args.num_workers} {backend} workers (GIL: {has_gil()}), {run.folder}", flush=True)
    # Thread and Process share constructor, start and is_alive, so one list serves both.
    new_worker = context.Process if backend == "process" else threading.Thread
    workers = [new_worker(target=worker, args=(i, args, shared, T), daemon=True) for i in range(args.num_workers)]

    def write(with_checkpoint: bool) -> None:
        # In this order: T counts the steps of all updates in the means, and all episodes up to T have been reported.
        means = shared.means() if with_checkpoint else {}
        T = shared.T
        for episode in sorted(shared.reported()):
            run.log_episode(*episode)
        if means and T > run.last_step:
            run.log_metrics(T, means)
        if with_checkpoint:
            run.save(T, model=model.state_dict(), g=shared.g, theta_target=shared.theta_target)

    alive = [True]
    with run:  # an error inside is printed, and the run goes on after the block, where it is saved
        with signals_blocked():  # workers inherit that: Ctrl-C and SIGTERM reach the main process alone
            for each in workers:
                each.start()
        run.start()
        last_progress = time.monotonic()
        while any(alive):
            next_log = (T // args.log_interval + 1) * args.log_interval
            alive = [each.is_alive() for each in workers]  # first: a worker that ends later is seen next time
            time.sleep(0.05)  # rather than wake up for every single episode
            if shared.T == run.first_step:  # no step yet: the clock starts anew
                run.start()
            # A worker that has ended without being done has raised (see the terminal), has exited or was killed.
            failed = [index for index, is_alive in enumerate(alive) if not is_alive and not shared.done[index]]
            if failed and run.exit_code != 1:
                run.fail(f"worker {failed[0]} has failed or was killed: {workers[failed[0]]}")
            shared.stop.value = run.stopped
            if shared.T > T or not (run.stopped or T > args.total_timesteps):  # progress, or not ending yet
                T = shared.T
                last_progress = time.monotonic()
            elif time.monotonic() - last_progress > PATIENCE_SECONDS:
                run.fail("a worker makes no progress and does not end")
                alive = []
            write(with_checkpoint=next_log <= T <= args.total_timesteps)
            run.progress(T)
    with run:
        shared.stop.value = True
        for each in set(workers) & set(multiprocessing.active_children()):  # processes that still live
            each.kill()  # threads end with this process
        write(with_checkpoint=True)
    run.close(shared.T)
    if run.exit_code == 0:
        with run:
            run.finish(*evaluate(model.act, eval_env, args, run.folder))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main(parse_args(Args, SCRIPT)))
