"""Deep deterministic policy gradient (Lillicrap et al. 2016, Continuous Control with Deep Reinforcement Learning).

One environment, a replay memory, a critic Q(s, a) and an actor mu(s) that climbs the critic's slope, with every branch
that the lecture shows or names. To begin with: python ddpg.py
"""

import copy
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from gymnasium import spaces, wrappers
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.arguments import fail, failing, load_checkpoint, parse_args
from common.evaluation import check_film, evaluate
from common.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, check_args
from common.run import Run, seed_everything

SCRIPT = Path(__file__).stem
HIDDEN = 256  # units of each of the two hidden layers (the paper has 400 and 300); with images 200, as in the paper
METRICS_EVERY = 50  # a row of metrics.csv is a mean over the updates at multiples of 50 steps and of --log-interval


@dataclass
class Args:
    env_id: str = "Pendulum-v1"
    """any id that gymnasium.make takes, `module:Env-v0` included"""
    seed: NonNegativeInt = 1
    """seed of everything random: the same seed gives the same run"""
    total_timesteps: PositiveInt = 10_000
    """environment steps in all; with --pixels, each is three of the simulator's"""
    learning_starts: NonNegativeInt = 1_000
    """steps with uniformly random actions before the first update; a shorter run learns nothing"""
    buffer_size: PositiveInt = 1_000_000
    """transitions that the replay memory R has room for, at most --total-timesteps; if it is full, the oldest are
    overwritten. With --pixels it counts images: an episode of n transitions has n + 1"""
    batch_size: PositiveInt = 64
    """N: transitions in a minibatch; each step learns from one minibatch"""
    learning_rate: PositiveFloat = 1e-3
    """Adam's learning rate for the critic"""
    actor_learning_rate: PositiveFloat = 1e-3
    """Adam's learning rate for the actor"""
    gamma: Fraction = 0.99
    """discount factor"""
    reward_scale: PositiveFloat = 1.0
    """rewards are multiplied by this in y; Q values of a few dozen are learned faster than those of thousands"""
    tau: Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)] = 0.005
    """weight of the networks in each update of the target networks"""
    target_network: bool = True
    """compute the targets y with networks that follow slowly; without: the original DPG"""
    batch_norm: bool = False
    """batch normalisation of the observations, the actor's layers, and the critic's layers before the action"""
    noise: Literal["gaussian", "ou"] = "gaussian"
    """exploration of Box actions: independent normal numbers, or an Ornstein-Uhlenbeck process"""
    noise_std: NonNegativeFloat = 0.1
    """the noise's scale sigma, in units in which the actions' bounds lie at -1 and 1"""
    final_noise_std: NonNegativeFloat | None = None
    """the noise's scale at the end, reached linearly; if not given, the scale stays the same"""
    ou_theta: Fraction = 0.15
    """how fast the Ornstein-Uhlenbeck process returns to 0"""
    gumbel_temperature: PositiveFloat = 1.0
    """temperature of the Gumbel-Softmax samples that replace mu(s) and its noise where actions are Discrete"""
    logit_penalty: NonNegativeFloat = 1e-3
    """weight of the mean squared output in the actor's loss, with Discrete actions, which it keeps uncertain, and with
    images (--pixels), where it keeps tanh from its bounds; not in the paper"""
    pixels: bool = False
    """learn from rendered images alone, 64x64; each action is held for three steps, which are all seen, as in the
    paper; for Box actions only"""
    num_threads: PositiveInt = 1
    """threads that torch uses; a second one helps with large minibatches if a core is free"""
    log_interval: PositiveInt = 1_000
    """steps between two rows of metrics.csv, and between two checkpoints"""
    log_dir: str = "runs"
    """where run folders go"""
    eval_episodes: NonNegativeInt = 20
    """greedy episodes after training, on a fresh environment; 0: none"""
    capture_video: bool = False
    """film the greedy policy of the evaluation into the run's videos/; with --pixels every third image"""
    evaluate: str | None = None
    """a run's folder: do not train, evaluate its checkpoint"""
    resume: str | None = None
    """a run's folder: go on from its checkpoint, with its arguments and its replay memory, to --total-timesteps"""


def make_env(env_id: str, render_mode: str | None = None, pixels: bool = False) -> gym.Env:
    """The environment, with flat observations and with actions as the actor gives them.

    A Box of actions becomes flat, too, and -1 and 1 stand for its bounds. Discrete actions are one-hot vectors;
    `action_space` is then Discrete all the same.

    With `pixels`, each action is held for three steps of the simulator. The observation is what these look like, three
    images of 64x64 in red, green and blue: bytes of shape (9, 64, 64). The reward is the sum of the three.

    Raises:
        ValueError: the script cannot play it.
    """
    render_mode = "rgb_array" if pixels else render_mode
    env = gym.make(env_id, disable_env_checker=True, **({"render_mode": render_mode} if render_mode else {}))
    if pixels:
        env = wrappers.ResizeObservation(wrappers.AddRenderObservation(env), (64, 64))
        env = wrappers.RepeatAction(wrappers.FrameStackObservation(env, 3), 3)
        maps = spaces.Box(0, 255, (9, 64, 64), np.uint8)
        # (3, 64, 64, 3) becomes (3, 3, 64, 64), then (9, 64, 64)
        env = wrappers.TransformObservation(env, lambda x: np.moveaxis(x, -1, 1).reshape(maps.shape), maps)
        env.reset()  # raises if what it renders is not made of bytes for red, green and blue
    env = wrappers.RecordEpisodeStatistics(env)
    space = env.observation_space
    if not pixels and (not isinstance(space, spaces.Box) or len(space.shape) != 1):
        if not space.is_np_flattenable or space.dtype == np.uint8:
            raise ValueError(f"its observations cannot be made a vector of numbers (images: --pixels): {space}")
        env = wrappers.FlattenObservation(env)
    space = env.action_space
    if isinstance(space, spaces.Discrete) and not pixels:
        return wrappers.TransformAction(env, lambda a: space.start + a.argmax(), spaces.Discrete(space.n))
    is_box = isinstance(space, spaces.Box) and space.dtype.kind == "f"
    if not is_box or not (np.abs([space.low, space.high]) < 1e9).all():  # beyond that, no bound is meant
        discrete = "" if pixels else "Discrete actions or "
        raise ValueError(f"{SCRIPT}.py needs {discrete}a Box of real numbers with bounds, not {space}")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    scale = high / 2 - low / 2
    center = low + scale

    def to_bounds(action: np.ndarray) -> np.ndarray:
        action = center + scale * action.reshape(space.shape)
        return np.minimum(np.maximum(action, low), high).astype(space.dtype)

    return wrappers.TransformAction(env, to_bounds, spaces.Box(-1, 1, (center.size,)))


def layer(inputs: int, outputs: int, batch_norm: bool) -> list[nn.Module]:
    """A linear layer, batch normalisation if asked for, and rectifiers."""
    return [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if batch_norm else []), nn.ReLU(inplace=True)]


class ToFloat(nn.Module):
    """Bytes as numbers from 0 to 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(torch.float32, memory_format=torch.channels_last) / 255  # faster for convolutions


def first_layers(shape: tuple[int, ...], batch_norm: bool) -> tuple[list[nn.Module], int, int]:
    """The layers before the hidden ones, how many numbers they give, and how many units a hidden layer has."""
    if len(shape) == 1:
        return [nn.BatchNorm1d(shape[0])] if batch_norm else [], shape[0], HIDDEN
    layers = [ToFloat(), *([nn.BatchNorm2d(shape[0])] if batch_norm else [])]
    for inputs in (shape[0], 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, stride=2), *([nn.BatchNorm2d(32)] if batch_norm else [])]
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Flatten())
    return layers, nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1], 200


def last_layer(inputs: int, outputs: int, shape: tuple[int, ...]) -> nn.Linear:
    """With small weights the first actions and values are near 0 (Lillicrap et al. 2016, section 7)."""
    linear = nn.Linear(inputs, outputs)
    bound = 3e-3 if len(shape) == 1 else 3e-4
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.uniform_(linear.bias, -bound, bound)
    return linear


class Actor(nn.Module):
    """The policy mu(s).

    Box actions are tanh of the network's outputs. Where actions are Discrete, mu(s) is a one-hot sample of the outputs'
    softmax that passes a gradient on (Gumbel-Softmax, straight-through).
    """

    def __init__(self, shape: tuple[int, ...], action_space: spaces.Space, args: Args):
        super().__init__()
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.temperature = args.gumbel_temperature
        self.action_size = int(action_space.n) if self.discrete else action_space.shape[0]
        layers, inputs, hidden = first_layers(shape, args.batch_norm)
        layers += layer(inputs, hidden, args.batch_norm) + layer(hidden, hidden, args.batch_norm)
        self.net = nn.Sequential(*layers, last_layer(hidden, self.action_size, shape))

    def forward(self, observations: torch.Tensor, greedy: bool = False) -> torch.Tensor:
        """mu(s) for observations of shape (n, observation_size) or (n, 9, 64, 64): shape (n, action_size).

        `greedy` takes the likeliest of Discrete actions instead of a sample.
        """
        return self.choose(self.net(observations), greedy)

    def choose(self, outputs: torch.Tensor, greedy: bool = False) -> torch.Tensor:
        """mu(s) from the network's outputs, which for Discrete actions are logits."""
        if not self.discrete:
            return outputs.tanh()
        if greedy:
            return F.one_hot(outputs.argmax(-1), self.action_size).float()
        return F.gumbel_softmax(outputs, self.temperature, hard=True)

    @torch.inference_mode()
    def act(self, observation: np.ndarray, greedy: bool = True) -> np.ndarray:
        """mu(s) for one observation."""
        return self(torch.from_numpy(observation[None]), greedy)[0].numpy()

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        """A uniformly random action, as `act` gives them."""
        if self.discrete:
            return np.eye(self.action_size)[rng.integers(self.action_size)]
        return rng.uniform(-1, 1, self.action_size)


class Critic(nn.Module):
    """Q(s, a), where a is an action as the actor gives it.

    Box actions enter at the second hidden layer (Lillicrap et al. 2016, section 7). Discrete ones are one-hot and pick
    an output. Every function of one-hot vectors is linear in them, so nothing is lost. The slope that the actor climbs
    is then what each action is worth. A network that took a as an input would have seen one-hot vectors only, and its
    slope need not lead from one to another.
    """

    def __init__(self, shape: tuple[int, ...], action_space: spaces.Space, args: Args):
        super().__init__()
        self.discrete = isinstance(action_space, spaces.Discrete)
        batch_norm = args.batch_norm
        before, inputs, hidden = first_layers(shape, batch_norm)
        before += layer(inputs, hidden, batch_norm)
        if self.discrete:
            after = [*layer(hidden, hidden, batch_norm), last_layer(hidden, int(action_space.n), shape)]
        else:
            after = [*layer(hidden + action_space.shape[0], hidden, False), last_layer(hidden, 1, shape)]
        self.before, self.after = nn.Sequential(*before), nn.Sequential(*after)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q of n pairs, shapes (n, observation_size) or (n, 9, 64, 64), and (n, action_size): shape (n,)."""
        if self.discrete:
            return (self.after(self.before(observations)) * actions).sum(1)
        return self.after(torch.cat([self.before(observations), actions], dim=1)).squeeze(-1)


class DDPG(nn.Module):
    """mu, Q and their target networks mu' and Q', which without target networks are mu and Q themselves.

    All are in evaluation mode, except for a network whose own gradient is taken: with batch normalisation, that one
    normalises by the minibatch and renews its running statistics. The parameters of each network are views of one
    vector, its `theta`: Adam and the target networks are faster with one tensor than with many small ones.
    """

    def __init__(self, shape: tuple[int, ...], action_space: spaces.Space, args: Args):
        super().__init__()
        self.actor = Actor(shape, action_space, args)
        self.critic = Critic(shape, action_space, args)
        self.target_actor = copy.deepcopy(self.actor) if args.target_network else self.actor
        self.target_critic = copy.deepcopy(self.critic) if args.target_network else self.critic
        for network in (self.actor, self.critic, self.target_actor, self.target_critic):
            network.theta = parameters_to_vector(network.parameters()).detach()
            vector_to_parameters(network.theta, network.parameters())
        self.batch_norm = args.batch_norm
        self.eval()

    def in_training_mode(self, network: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The network's outputs, with batch normalisation in training mode: where its own gradient is taken."""
        if not self.batch_norm:
            return network(*inputs)
        network.train()
        outputs = network(*inputs)
        network.eval()
        return outputs


class ReplayBuffer:
    """R: a ring of transitions (s, a, r, s', terminated) of which the latest are kept.

    A transition takes 4 bytes for each of its 2 x observation_size + action_size + 2 numbers: 36 bytes on Pendulum-v1,
    168 on HalfCheetah-v5. The action is the one that was executed, between -1 and 1 or one-hot.

    Args:
        capacity: transitions that there is room for. The i-th, counted from 0, is in row i modulo the capacity.
        shape: of an observation.
        action_size: numbers of an action.
    """

    def __init__(self, capacity: int, shape: tuple[int, ...], action_size: int):
        self.capacity = capacity
        self.count = self.saved = 0
        parts = [("observation", np.float32, shape), ("action", np.float32, (action_size,)), ("reward", np.float32)]
        parts += [("next_observation", np.float32, shape), ("terminated", np.float32)]
        self.rows = np.zeros(capacity, parts)

    def add(self, observation, action, reward: float, next_observation, terminated: bool) -> None:
        """Store a transition in place of the oldest."""
        self.rows[self.count % self.capacity] = observation, action, reward, next_observation, terminated
        self.count += 1

    def sample(self, n: int, rng: np.random.Generator) -> list[torch.Tensor]:
        """n random transitions: s, a, r, s' and terminated, of shapes (n, size), and (n,) for r and terminated."""
        rows = self.rows.take(rng.integers(min(self.count, self.capacity), size=n))
        return [torch.from_numpy(rows[name]) for name in rows.dtype.names]

    def create(self, path: Path) -> None:
        """Write the whole file, with the room that is still empty: a disk that is too small shows at once."""
        np.save(path.with_suffix(".tmp.npy"), self.rows)
        os.replace(path.with_suffix(".tmp.npy"), path)
        self.saved = self.count

    def save(self, path: Path) -> None:
        """Write the rows since the last call into the file, and the one before: an image gets its action later."""
        new = np.arange(max(0, self.saved - 1, self.count - self.capacity), self.count) % self.capacity
        np.load(path, mmap_mode="r+")[new] = self.rows[new]
        self.saved = self.count

    def load(self, path: Path, count: int) -> None:
        """Take over the file of a run with `count` rows so far, whose capacity may have been another one.

        Raises:
            OSError, EOFError, ValueError: there is no file, it is damaged, or it does not fit.
        """
        rows = np.load(path, mmap_mode="r")
        if rows.dtype != self.rows.dtype:
            raise ValueError(f"{path} has rows of {rows.dtype}, not of {self.rows.dtype}")
        kept = np.arange(max(0, count - self.capacity), count)
        for part in np.array_split(kept, 1 + len(kept) // 1_000):  # all at once would take twice the memory
            self.rows[part % self.capacity] = rows[part % len(rows)]  # a later one in place of one that is lost
        self.count = count


class ImageReplayBuffer(ReplayBuffer):
    """R for images: each is kept once, as bytes, for the transition that it ends and for the one that it begins.

    A row is an image, the action taken there, r, whether s' is terminal, and whether an action was taken there at all
    (goes_on): then s' is the image of the next row. It takes 36,864 bytes and a few, and each episode has a row more
    than transitions.
    """

    def __init__(self, capacity: int, shape: tuple[int, ...], action_size: int):
        self.capacity = capacity + 1
        self.count = self.saved = 0
        self.newest = None
        numbers = [("action", np.float32, (action_size,)), ("reward", np.float32), ("terminated", np.float32)]
        self.rows = np.zeros(self.capacity, [("image", np.uint8, shape), *numbers, ("goes_on", bool)])

    def add(self, observation, action, reward: float, next_observation, terminated: bool) -> None:
        """Store a transition in place of the oldest.

        `observation` is the last call's `next_observation`, the same object, or the first of an episode.
        """
        if observation is not self.newest:
            self.add_image(observation)
        row = self.rows[(self.count - 1) % self.capacity]
        row["action"], row["reward"], row["terminated"], row["goes_on"] = action, reward, terminated, True
        self.add_image(next_observation)

    def add_image(self, image: np.ndarray) -> None:
        """Store an image, with which no transition begins as yet, in place of the oldest."""
        row = self.rows[self.count % self.capacity]
        row["image"], row["goes_on"] = image, False
        self.newest = image
        self.count += 1

    def sample(self, n: int, rng: np.random.Generator) -> list[torch.Tensor]:
        """n random transitions, as `ReplayBuffer.sample` gives them, with images of bytes."""
        i = rng.integers(min(self.count, self.capacity), size=n)
        while (ends := ~self.rows["goes_on"][i]).any():  # draw again where an episode has ended
            i[ends] = rng.integers(min(self.count, self.capacity), size=ends.sum())
        s, a, r, end = (self.rows[name][i] for name in ("image", "action", "reward", "terminated"))
        return [torch.from_numpy(part) for part in (s, a, r, self.rows["image"][(i + 1) % self.capacity], end)]

    def load(self, path: Path, count: int) -> None:
        """As `ReplayBuffer.load`."""
        super().load(path, count)
        self.rows["goes_on"][(count - 1) % self.capacity] = False  # the file may be newer than the checkpoint


class OrnsteinUhlenbeckNoise:
    """N_t = N_{t-1} - theta N_{t-1} + sigma xi, xi normal: noise with inertia (Lillicrap et al. 2016, section 3).

    Its mean is 0, its variance in the long run sigma^2 / (1 - (1 - theta)^2), its autocorrelation over k steps
    (1 - theta)^k. With theta = 1 it is Gaussian noise: independent normal numbers.
    """

    def __init__(self, size: int, rng: np.random.Generator, theta: float):
        self.size, self.rng, self.theta = size, rng, theta
        self.reset()

    def reset(self) -> None:
        """A new episode begins: the process does so at 0."""
        self.state = np.zeros(self.size)

    def sample(self, std: float) -> np.ndarray:
        """N_t, of shape (size,), with sigma = `std`."""
        self.state = self.state - self.theta * self.state + std * self.rng.standard_normal(self.size)
        return self.state


def td_target(rewards, next_values, terminated, gamma: float):
    """y_i = r_i + gamma Q'(s_{i+1}, mu'(s_{i+1})), or r_i where s_{i+1} is terminal. All shapes are (n,)."""
    assert rewards.shape == next_values.shape == terminated.shape, (rewards.shape, next_values.shape)
    return rewards + gamma * (1 - terminated) * next_values


def critic_loss(model: DDPG, batch: list[torch.Tensor], args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L = 1/N sum (y_i - Q(s_i, a_i))^2, with a gradient for the critic alone, and metrics by name."""
    observations, actions, rewards, next_observations, terminated = batch
    with torch.no_grad():
        next_values = model.target_critic(next_observations, model.target_actor(next_observations))
        y = td_target(args.reward_scale * rewards, next_values, terminated, args.gamma)
    values = model.in_training_mode(model.critic, observations, actions)
    assert values.shape == y.shape, (values.shape, y.shape)
    loss = F.mse_loss(values, y)
    return loss, {"critic_loss": loss.detach(), "q_values": values.detach().mean()}


def actor_loss(model: DDPG, observations: torch.Tensor, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-J, where J is the mean of Q(s_i, mu(s_i)), plus a penalty; and metrics by name: -J without it.

    By the chain rule, grad J = 1/N sum grad_a Q(s, a) at s = s_i, a = mu(s_i), times grad mu(s_i) (Lillicrap et al.
    2016, equation 6). A policy that is certain of its Discrete actions neither explores nor passes a gradient on, and
    from images tanh soon sticks at -1 or 1. So the mean squared output, times logit_penalty, is to be minimised, too.
    """
    outputs = model.in_training_mode(model.actor.net, observations)
    minus_J = -model.critic(observations, model.actor.choose(outputs)).mean()
    loss = minus_J
    if model.actor.discrete or args.pixels:
        loss = minus_J + args.logit_penalty * outputs.square().mean()
    return loss, {"actor_loss": minus_J.detach()}


def descend(network: nn.Module, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step down the loss's gradient with respect to the network's parameters, and to no others."""
    gradients = torch.autograd.grad(loss, network.parameters())
    network.theta.grad = torch.cat([gradient.flatten() for gradient in gradients])
    optimizer.step()


def soft_update(target: nn.Module, network: nn.Module, tau: float) -> None:
    """theta' <- tau theta + (1 - tau) theta'; the running statistics of batch normalisation follow in the same way."""
    target.theta.lerp_(network.theta, tau)
    for statistic, newer in zip(target.buffers(), network.buffers(), strict=True):
        if statistic.is_floating_point():
            statistic.lerp_(newer, tau)


def update(model: DDPG, optimizers: dict, batch: list[torch.Tensor], args: Args) -> dict[str, torch.Tensor]:
    """Learn from one minibatch: critic, actor, target networks. Returns metrics by name.

    Raises:
        FloatingPointError: the critic's loss is not finite; no parameter has changed.
    """
    # Update critic by minimizing the loss
    loss, metrics = critic_loss(model, batch, args)
    if not loss.isfinite():
        raise FloatingPointError(f"the critic's loss is {loss.item()}: check the learning rates")
    descend(model.critic, loss, optimizers["critic"])
    # Update the actor policy using the sampled policy gradient
    loss, actor_metrics = actor_loss(model, batch[0], args)
    descend(model.actor, loss, optimizers["actor"])
    # Update the target networks
    if args.target_network:
        soft_update(model.target_critic, model.critic, args.tau)
        soft_update(model.target_actor, model.actor, args.tau)
    return metrics | actor_metrics


# Columns of metrics.csv, with their families in TensorBoard
METRICS = dict.fromkeys(("critic_loss", "actor_loss", "q_values", "critic_grad_norm", "actor_grad_norm"), "losses")
METRICS |= dict.fromkeys(("noise_std", "learning_rate"), "charts")


def check_space(args: Args, row_size: int) -> int:
    """`fail` if the replay memory does not fit into memory or onto the disk. Returns the buffer's capacity."""
    capacity = min(args.buffer_size, args.total_timesteps)
    folder = Path(args.log_dir if args.resume is None else args.resume).absolute()
    disk = shutil.disk_usage(next(path for path in (folder, *folder.parents) if os.path.exists(path)))
    free = min(psutil.virtual_memory().available, disk.free)
    if capacity * row_size > free:
        needed = f"a replay memory of {capacity:,} needs {capacity * row_size / 2**20:,.0f} MiB of memory and disk"
        fail(f"{needed}, and {free / 2**20:,.0f} are free: give --buffer-size {free // row_size:,} at most")
    return capacity


def main(args: Args) -> int:
    """Train, go on training or only evaluate, as `args` says. Returns the exit code."""
    check_args(args)
    if args.batch_norm and args.batch_size == 1:
        fail("--batch-norm needs a --batch-size of at least 2")
    checkpoint = load_checkpoint(args, SCRIPT)
    networks = ("pixels", "batch_norm", "target_network")
    if checkpoint and any(getattr(args, name) != checkpoint["args"][name] for name in networks):
        fail("--pixels, --batch-norm and --target-network must be those of the run")
    with failing(f"{args.env_id} cannot be used"):
        eval_env = make_env(args.env_id, "rgb_array" if args.capture_video else None, args.pixels)
    if args.capture_video:
        check_film(eval_env)
    T = checkpoint["step"] if checkpoint else 0  # steps so far, of all episodes; the slide's T is the length of one
    rng = seed_everything(args.seed, T)
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)  # Adam's averages decay to numbers below 1e-38, which the CPU computes with slowly
    shape = eval_env.observation_space.shape
    dtype = np.uint8 if args.pixels else np.float32
    model = DDPG(shape, eval_env.action_space, args)
    groups = {"actor": (model.actor, args.actor_learning_rate), "critic": (model.critic, args.learning_rate)}
    optimizers = {name: torch.optim.Adam([net.theta], rate, fused=True) for name, (net, rate) in groups.items()}
    if checkpoint:
        with failing(f"the checkpoint does not fit {args.env_id} as it is installed here"):
            model.load_state_dict(checkpoint["model"])
            for name, optimizer in optimizers.items() if args.resume is not None else ():
                # with the learning rates that are asked for now
                optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["adam"][name]["state"]})
            replayed = checkpoint["replayed"]
    if args.evaluate is not None:
        print(f"{SCRIPT}: {evaluate(model.actor.act, eval_env, args, Path(args.evaluate))[0]}; {args.evaluate}")
        return 0
    if T >= args.total_timesteps:
        fail(f"{args.resume} has done {T:,} steps already: give more with --total-timesteps")
    new_buffer = ImageReplayBuffer if args.pixels else ReplayBuffer
    capacity = check_space(args, new_buffer(1, shape, model.actor.action_size).rows[0].nbytes)
    buffer = new_buffer(capacity, shape, model.actor.action_size)
    if checkpoint:
        with failing("--resume needs the replay memory as the run left it"):
            buffer.load(Path(args.resume) / "replay.npy", replayed)

    run = Run(SCRIPT, args, METRICS, {}, checkpoint)
    print(f"{SCRIPT}: {args.env_id}, replay memory {buffer.rows.nbytes / 2**20:,.1f} MiB, {run.folder}", flush=True)
    latest = []  # metrics since the last row, of one update in METRICS_EVERY

    def log_and_save() -> None:
        if latest:
            run.log_metrics(T, {name: float(np.mean([float(metrics[name]) for metrics in latest])) for name in METRICS})
            latest.clear()
        buffer.save(run.folder / "replay.npy")
        states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        run.save(T, model=model.state_dict(), adam=states, replayed=buffer.count)

    with run:  # an error inside is printed, and the run goes on after the block, where it is saved
        buffer.create(run.folder / "replay.npy")
        env = make_env(args.env_id, pixels=args.pixels)
        # Initialize a random process N for action exploration
        ou_theta = args.ou_theta if args.noise == "ou" else 1.0  # with 1 it is Gaussian noise, new at each step
        noise = OrnsteinUhlenbeckNoise(model.actor.action_size, rng, ou_theta)
        final_std = args.noise_std if args.final_noise_std is None else args.final_noise_std
        # Receive initial observation state s_1
        observation = np.array(env.reset(seed=int(rng.integers(2**31)))[0], dtype)
        run.start()
        while T < args.total_timesteps and not run.stopped:
            # Select action a_t = mu(s_t) + N_t; a sample of Discrete actions explores by itself
            std = args.noise_std + (final_std - args.noise_std) * T / args.total_timesteps
            if T < args.learning_starts:
                action = model.actor.random_action(rng)
            else:
                action = model.actor.act(observation, greedy=False)
                if not model.actor.discrete:
                    action = np.minimum(np.maximum(action + noise.sample(std), -1), 1)
            # Execute it, observe r_t and s_{t+1}
            next_observation, reward, terminated, truncated, info = env.step(action)
            next_observation = np.array(next_observation, dtype)
            # R is of float32. `observation` is checked, too: it may come from a reset.
            if not (np.isfinite([observation, next_observation]).all() and abs(reward) < 3e38):
                seen = f"{observation}, {action} gave {next_observation} and reward {reward}"
                raise FloatingPointError(f"{seen} at step {T + 1:,}")
            T += 1
            # Store the transition in R. A time limit (truncated) is no terminal state: y then has the value of s_{t+1}
            buffer.add(observation, action, reward, next_observation, terminated)
            # Sample a random minibatch from R, and learn from it
            if T >= args.learning_starts:
                metrics = update(model, optimizers, buffer.sample(args.batch_size, rng), args)
                if T % METRICS_EVERY == 0 or T % args.log_interval == 0:
                    for name, network in (("critic", model.critic), ("actor", model.actor)):
                        metrics[f"{name}_grad_norm"] = network.theta.grad.norm()
                    latest.append(metrics | {"noise_std": std, "learning_rate": args.learning_rate})
            observation = next_observation
            if terminated or truncated:
                run.log_episode(T, 0, info["episode"])
                # The next episode: initialize N, receive s_1
                noise.reset()
                observation = np.array(env.reset()[0], dtype)
            if T % args.log_interval == 0:
                log_and_save()
            if T % METRICS_EVERY == 0 or T == args.total_timesteps:
                run.progress(T)
        env.close()
    with run:
        log_and_save()
    run.close(T)
    if run.exit_code == 0:
        with run:
            run.finish(*evaluate(model.actor.act, eval_env, args, run.folder))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main(parse_args(Args, SCRIPT)))
