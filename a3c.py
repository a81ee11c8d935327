"""A3C, asynchronous advantage actor-critic (Mnih et al. 2016, Asynchronous Methods for Deep Reinforcement Learning).

Several workers, each with an environment and parameters theta' of its own, update one shared network theta without
waiting for each other. To begin with: python a3c.py --num-workers 8
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
import torch.nn.functional as F
from gymnasium import spaces, wrappers
from gymnasium.wrappers import TransformAction
from numpy.lib.stride_tricks import sliding_window_view
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.arguments import fail, failing, load_checkpoint, parse_args
from common.evaluation import check_film, evaluate
from common.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_args
from common.run import Run, follow_parent, has_gil, seed_everything, signals_blocked

SCRIPT = Path(__file__).stem
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"  # of processes: 8 are up in 2 s, with spawn in 17
PATIENCE_SECONDS = 60.0  # how long a worker may be without progress once the run is ending
MIN_VARIANCE = 0.01  # of a Gaussian policy: as the variance shrinks, its gradients grow without bound


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """any id that gymnasium.make takes, with Discrete actions or a Box with bounds; with images, too:
    MinAtar/Breakout-v1, ale_py:PongNoFrameskip-v4"""
    seed: NonNegativeInt = 1
    """seed of everything random; with one worker, the same seed gives the same run"""
    total_timesteps: PositiveInt = 200_000
    """T_max: environment steps of all workers together; each then ends its segment"""
    num_workers: PositiveInt = 8
    """workers, each with an environment of its own"""
    backend: Literal["auto", "thread", "process"] = "auto"
    """what a worker is; auto: threads for one worker or where Python has no GIL, processes otherwise"""
    t_max: PositiveInt = 32
    """steps of a worker between two updates, fewer at the end of an episode"""
    learning_rate: PositiveFloat = 3e-3
    """eta, the learning rate at the beginning"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over the total timesteps"""
    gamma: Fraction = 0.99
    """discount factor"""
    ent_coef: NonNegativeFloat = 0.001
    """beta: weight of the entropy bonus"""
    vf_coef: NonNegativeFloat = 0.5
    """weight of the squared value error"""
    max_grad_norm: PositiveFloat = 1000.0
    """clip the gradient norm to this; gradients are sums over a segment, not means"""
    rmsprop_alpha: Fraction = 0.99
    """decay of RMSProp's mean of squared gradients"""
    rmsprop_eps: PositiveFloat = 0.1
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
    """The environment, with observations and actions as the network takes and gives them.

    Images stay bytes or bools, with channels first. (They come last if the first side is not shorter than both others.)
    Atari is played as in the paper: up to 30 no-ops at the start; each action is held for 4 frames; the last two are
    made grey, merged by their maximum and scaled down; four such images are stacked; rewards are clipped to [-1, 1].
    (`ALE/` games also repeat the last action at random.) All other observations become vectors.

    A Box of actions, which needs bounds, becomes flat, too, and -1 and 1 stand for them; actions beyond are clipped.
    Discrete actions count from 0.

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
    if isinstance(space, spaces.Discrete):
        return env if space.start == 0 else TransformAction(env, lambda a: space.start + a, spaces.Discrete(space.n))
    is_box = isinstance(space, spaces.Box) and space.dtype.kind == "f"
    if not is_box or not (np.abs([space.low, space.high]) < 1e9).all():  # beyond that, no bound is meant
        raise ValueError(f"{SCRIPT}.py needs Discrete actions or a Box of real numbers with bounds, not {space}")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    scale = high / 2 - low / 2
    center = low + scale

    def to_bounds(action: np.ndarray) -> np.ndarray:
        action = center + scale * action.reshape(space.shape)
        return np.minimum(np.maximum(action, low), high).astype(space.dtype)

    return TransformAction(env, to_bounds, spaces.Box(-1, 1, (center.size,)))


def orthogonal(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """The layer with orthogonal weights, scaled by `gain`, and biases of 0."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units; the weights of the last layer are scaled by `gain`.

    `ActorCritic.outputs` computes the same in numpy: change both, nothing fails if they differ.
    """
    first, second, last = nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)
    return nn.Sequential(orthogonal(first), nn.Tanh(), orthogonal(second), nn.Tanh(), orthogonal(last, gain))


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


class ActorCritic(nn.Module):
    """The policy pi(a|s; theta) and the value function V(s; theta_v).

    A Discrete policy is a softmax. A Box policy is a Gaussian whose mean (through a tanh) and variances (a softplus,
    plus MIN_VARIANCE) are outputs of the network. The paper's mean is linear: it may run so far beyond a bound that all
    draws are clipped to it, and none is better than another. At a bound, half of the draws lie inside. Where
    observations are images, policy and value share all but the last layer.

    The attribute `theta` is one vector with the lecture's theta and theta_v. Every parameter is a view of it: writing
    to it changes the networks. Processes can share it.
    """

    def __init__(self, observation_shape: tuple[int, ...], action_space: spaces.Space):
        super().__init__()
        self.discrete = isinstance(action_space, spaces.Discrete)
        outputs = int(action_space.n) if self.discrete else 2 * action_space.shape[0]
        if len(observation_shape) == 3:
            self.body = image_layers(observation_shape)
            units = self.body[-2].out_features
            self.actor, self.critic = orthogonal(nn.Linear(units, outputs), 0.01), orthogonal(nn.Linear(units, 1), 1.0)
            layers, self.activation = [self.body[-2], self.actor], NUMPY_ACTIVATIONS[type(self.body[-1])]
        else:
            self.body = nn.Sequential()
            self.actor, self.critic = mlp(observation_shape[0], outputs, 0.01), mlp(observation_shape[0], 1, 1.0)
            layers, self.activation = self.actor[::2], np.tanh
        self.theta = parameters_to_vector(self.parameters()).detach().share_memory_()
        vector_to_parameters(self.theta, self.parameters())
        # The actor again, as numpy views of the same memory: for one observation it is faster than torch, many
        # times so for a small one.
        self.numpy_layers = [(layer.weight.detach().T.numpy(), layer.bias.detach().numpy()) for layer in layers]
        self.convolutions = list(numpy_convolutions(self.body, observation_shape))

    def outputs(self, observation: np.ndarray) -> np.ndarray:
        """The actor's outputs for one observation."""
        x = observation / np.float32(255) if observation.dtype == np.uint8 else observation
        for patches, weight, bias in self.convolutions:  # the 0 at the end is pixel -1, beyond the border
            x = self.activation(np.append(x, np.float32(0)).take(patches, mode="wrap") @ weight + bias)
        x = x.T.ravel()  # one map after the other, as nn.Flatten has them
        for weight, bias in self.numpy_layers[:-1]:
            x = self.activation(x @ weight + bias)
        weight, bias = self.numpy_layers[-1]
        return x @ weight + bias

    def act(self, observation: np.ndarray, rng: np.random.Generator | None = None):
        """Draw a ~ pi(a|s; theta) for one observation, a vector or an image; without `rng` take the likeliest.

        Returns an index, or the Gaussian's draw, shape (action_size,). It may lie beyond -1 and 1: the environment then
        clips it; log pi is that of the draw as it is.
        """
        x = self.outputs(observation)
        if self.discrete:  # argmax of the logits plus Gumbel noise (minus the log of an exponential variable): a draw
            return int((x if rng is None else x - np.log(rng.standard_exponential(len(x)))).argmax())
        mean, raw_variance = np.tanh(x[: len(x) // 2]), x[len(x) // 2 :]  # logaddexp(0, x) is softplus
        if rng is None:
            return mean
        return mean + np.sqrt(np.logaddexp(0, raw_variance) + MIN_VARIANCE) * rng.standard_normal(len(mean), np.float32)

    def log_prob_and_entropy(self, features: torch.Tensor, actions: torch.Tensor):
        """log pi(a|s; theta) and the entropy H[pi(.|s; theta)], two tensors of shape (n,).

        `features` has shape (n, features); `actions` (n,), int64, or (n, action_size).
        """
        outputs = self.actor(features)
        if self.discrete:
            log_probs = F.log_softmax(outputs, dim=-1)
            log_prob = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return log_prob, -(log_probs.exp() * log_probs).sum(-1)
        raw_mean, raw_variance = outputs.chunk(2, dim=-1)
        mean, variance = raw_mean.tanh(), F.softplus(raw_variance) + MIN_VARIANCE
        log_normalizer = 0.5 * torch.log(2 * math.pi * variance)
        return -(0.5 * (actions - mean).square() / variance + log_normalizer).sum(-1), (0.5 + log_normalizer).sum(-1)


def n_step_returns(rewards: list[float], bootstrap: float, gamma: float) -> torch.Tensor:
    """The return R of every step of a segment, from the last step back to the first (Mnih et al. 2016, algorithm S3).

    Args:
        rewards: r_i for i in t_start, ..., t - 1.
        bootstrap: what R begins with: 0 for a terminal s_t, V(s_t) otherwise.
        gamma: discount factor.

    Returns:
        Shape (n,), float32.
    """
    returns, R = [], bootstrap
    for reward in reversed(rewards):  # for i in {t - 1, ..., t_start}
        R = reward + gamma * R  # R <- r_i + gamma R
        returns.append(R)
    return torch.tensor(returns[::-1], dtype=torch.float32)


def a3c_loss(model: ActorCritic, observations, actions, rewards: list[float], terminated: bool, args: Args):
    """The loss of a segment of n steps (Mnih et al. 2016, algorithm S3, with the entropy bonus of section 4).

    Its gradient is what the lecture accumulates: minus d theta, with the entropy bonus, and vf_coef times d theta_v.

    Args:
        model: theta' and theta'_v.
        observations: s_{t_start}, ..., s_t, shape (n + 1, observation_size) or (n + 1, *image).
        actions: a_{t_start}, ..., a_{t - 1} as `ActorCritic.act` returns them, shape (n,) or (n, action_size).
        rewards: r_{t_start}, ..., r_{t - 1}.
        terminated: whether s_t is terminal; at a time limit it is not.
        args: gamma, ent_coef, vf_coef.

    Returns:
        The loss, a scalar tensor, and the means over the steps of policy loss, value loss, entropy and value, by name.
    """
    features = model.body(observations)
    values = model.critic(features).squeeze(-1)
    # R = 0 for terminal s_t, V(s_t; theta'_v) for non-terminal s_t
    returns = n_step_returns(rewards, 0.0 if terminated else values[-1].item(), args.gamma)
    log_prob, entropy = model.log_prob_and_entropy(features[:-1], actions)
    advantages = returns - values[:-1]
    assert advantages.shape == log_prob.shape == entropy.shape == (len(rewards),), (advantages.shape, log_prob.shape)
    # d theta <- d theta + grad log pi(a_i|s_i; theta') (R - V(s_i; theta'_v)); minus: a loss; R - V is a constant here
    policy_loss = -(log_prob * advantages.detach()).sum()
    # d theta_v <- d theta_v + d (R - V(s_i; theta'_v))^2 / d theta'_v
    value_loss = advantages.square().sum()
    # L_actor = -(R - V(s)) log pi(a|s) - beta H[pi(a|s)], and the critic's loss
    loss = policy_loss - args.ent_coef * entropy.sum() + args.vf_coef * value_loss
    means = (torch.stack([policy_loss, value_loss, entropy.sum(), values[:-1].sum()]) / len(rewards)).tolist()
    return loss, dict(zip(("policy_loss", "value_loss", "entropy", "value"), means, strict=True))


def rmsprop_step(theta: torch.Tensor, g: torch.Tensor, d_theta: torch.Tensor, learning_rate: float, args: Args) -> None:
    """One step of RMSProp on theta and g, in place; all shapes are those of theta (Mnih et al. 2016, section 4):

        g <- alpha g + (1 - alpha) d^2          theta <- theta - eta d / sqrt(g + epsilon)

    All workers share g, as they share theta. No lock is taken: of two workers that update at the same time, one may
    overwrite parts of the other's step.
    """
    g.mul_(args.rmsprop_alpha).addcmul_(d_theta, d_theta, value=1 - args.rmsprop_alpha)
    theta.addcdiv_(d_theta, (g + args.rmsprop_eps).sqrt_(), value=-learning_rate)


# Columns of metrics.csv, with their families in TensorBoard
METRICS = dict.fromkeys(("policy_loss", "value_loss", "entropy", "value", "grad_norm"), "losses")
METRICS |= {"learning_rate": "charts"}


class Shared:
    """All that workers share, and their only way to it: memory that threads and processes see alike, without locks.

    Counts and sums have a row for each worker, so that none is lost; theta and g are written by all. On processors that
    reorder writes, a row of metrics may include an update a moment before T includes its steps.

    Args:
        theta: the global parameters, in shared memory.
        args: num_workers and RMSProp's arguments.
        new_queue: makes the queues for episodes, one for each worker: one killed while writing blocks no other.
    """

    def __init__(self, theta: torch.Tensor, args: Args, new_queue: Callable):
        self.theta, self.args = theta, args
        self.g = torch.zeros_like(theta).share_memory_()  # RMSProp's mean of squared gradients
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
    """One worker of algorithm S3, a thread or a process. Its random numbers are those of `first_step`, T at the start.

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
    model = ActorCritic(space.shape, env.action_space)  # theta' and theta'_v
    parameters = list(model.parameters())
    observations = np.empty((args.t_max + 1, *space.shape), space.dtype if is_image(space) else np.float32)
    observations[0], _ = env.reset(seed=int(rng.integers(2**31)))

    while (T := shared.T) <= args.total_timesteps and not shared.stop.value:  # until T > T_max; T is that of t_start
        # d theta <- 0 and d theta_v <- 0: nothing to do, the gradients of a segment are taken at once below
        model.theta.copy_(shared.theta)  # theta' = theta and theta'_v = theta_v
        actions, rewards, n = [], [], 0  # n is t - t_start; s_t is observations[n]
        while True:  # repeat
            action = model.act(observations[n], rng)  # perform a_t according to pi(a_t|s_t; theta')
            # receive reward r_t and new state s_{t+1}
            observations[n + 1], reward, terminated, truncated, info = env.step(action)
            actions.append(action)
            rewards.append(float(reward))
            n += 1
            shared.count_step(index, info.get("episode"))  # t <- t + 1 and T <- T + 1
            if terminated or truncated or n == args.t_max or shared.stop.value:
                break  # until terminal s_t (or time limit) or t - t_start == t_max

        # R, and for i in {t - 1, ..., t_start} the gradients
        batch = torch.from_numpy(observations[: n + 1]), torch.from_numpy(np.array(actions))
        loss, metrics = a3c_loss(model, *batch, rewards, terminated, args)
        # d_theta is the gradient of the loss: minus the slide's d theta, and vf_coef times its d theta_v. For vectors
        # each has a network of its own; in the layers that they share for images, the two add up.
        d_theta = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
        norm = d_theta.norm().item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is {norm} at step {T + n:,}: check --learning-rate and rewards")
        d_theta *= args.max_grad_norm / max(norm, args.max_grad_norm)  # by 1 if the norm is no larger
        learning_rate = args.learning_rate * (1 - T / args.total_timesteps if args.anneal_lr else 1.0)
        shared.update(d_theta, learning_rate)  # asynchronous update of theta using d theta, of theta_v using d theta_v
        shared.log(index, metrics | {"grad_norm": norm, "learning_rate": learning_rate})
        observations[0] = observations[n]
        if terminated or truncated:
            observations[0], _ = env.reset()
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
    model = ActorCritic(eval_env.observation_space.shape, eval_env.action_space)  # the global theta and theta_v
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
            shared.steps[0] = checkpoint["step"]  # T is the sum of all
    if args.evaluate is not None:
        print(f"{SCRIPT}: {evaluate(model.act, eval_env, args, Path(args.evaluate))[0]}; {args.evaluate}")
        return 0
    T = shared.T
    if T > args.total_timesteps:
        fail(f"{args.resume} has done {T:,} steps already: give more with --total-timesteps")

    run = Run(SCRIPT, args, METRICS, {"backend_used": backend}, checkpoint)
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
            run.save(T, model=model.state_dict(), g=shared.g)

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
