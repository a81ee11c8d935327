"""Deep deterministic policy gradient (Lillicrap et al. 2016, Continuous Control with Deep Reinforcement Learning).

One environment, a replay memory, a critic Q(s, a) and an actor mu(s) that climbs the critic's slope, with every branch
that the lecture shows or names. To begin with: python ddpg.py
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import nn
from torch.nn.utils import get_total_norm

from common.evaluation import evaluate
from common.inputs import InputError, check_args, check_env, check_memory, command_line, make_env, read_checkpoint
from common.iterations import restore, train
from common.run import Run
from common.seeding import seed_everything

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    env_id: str = "Pendulum-v1"
    """environment: any id that gymnasium.make takes, `module:Env-v0` included"""
    seed: int = 1
    """seed of everything random: the same seed gives the same run"""
    total_timesteps: int = 10_000
    """environment steps in all"""
    learning_starts: int = 1_000
    """steps with uniformly random actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions that the replay memory R holds; beyond that the oldest are overwritten"""
    batch_size: int = 64
    """N: transitions of a minibatch; there is one for each step"""
    learning_rate: float = 1e-3
    """Adam's, of the critic"""
    actor_learning_rate: float = 1e-3
    """Adam's, of the actor"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """how much of the networks goes into the target networks at each step"""
    target_network: bool = True
    """compute the targets y by networks that follow slowly; without: the original DPG"""
    batch_norm: bool = False
    """batch normalisation of the observations, the actor's layers and the critic's layers before the action"""
    action_layer: Literal[1, 2] = 2
    """layer of the critic that a Box action enters at: 2 as in the paper, 1 beside the observation"""
    small_last_layer: bool = True
    """begin with weights of at most 0.003 in the networks' last layers, as in the paper; without: as torch does"""
    noise: Literal["gaussian", "ou"] = "gaussian"
    """exploration: independent normal numbers, or an Ornstein-Uhlenbeck process"""
    noise_std: float = 0.1
    """the noise's scale sigma, in units in which the actions' bounds lie at -1 and 1"""
    final_noise_std: float | None = None
    """sigma at the end, to which it is annealed linearly; without: as at the beginning"""
    ou_theta: float = 0.15
    """how fast the Ornstein-Uhlenbeck process returns to 0"""
    gumbel_temperature: float = 1.0
    """of the differentiable samples that take the place of mu(s) where actions are Discrete"""
    logit_penalty: float = 1e-3
    """weight of the mean squared logit in the actor's loss where actions are Discrete: it keeps them uncertain"""
    num_threads: int = 1
    """torch's threads: a second one, if there is a core for it, helps more the larger the minibatches are"""
    log_interval: int = 1_000
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
    """a run's folder: go on from its checkpoint, with its arguments and its replay memory, to --total-timesteps"""


HIDDEN = 256  # units of each of the two hidden layers


def layer(inputs: int, outputs: int, batch_norm: bool) -> list[nn.Module]:
    """A linear layer with rectifiers, whose inputs to these are normalised by batch if asked for."""
    return [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if batch_norm else []), nn.ReLU(inplace=True)]


def last_layer(outputs: int, small: bool) -> nn.Linear:
    """With small weights the first actions and values are near 0 (Lillicrap et al. 2016, section 7)."""
    linear = nn.Linear(HIDDEN, outputs)
    if small:
        nn.init.uniform_(linear.weight, -3e-3, 3e-3)
        nn.init.uniform_(linear.bias, -3e-3, 3e-3)
    return linear


class Actor(nn.Module):
    """The policy mu(s).

    Box actions are the network's outputs by tanh; -1 and 1 stand for the bounds. Where actions are Discrete, mu(s)
    is a one-hot sample of the outputs' softmax that passes a gradient on (Gumbel-Softmax, straight-through).
    """

    def __init__(self, observation_size: int, action_space: spaces.Space, args: Args):
        super().__init__()
        self.space, self.discrete = action_space, isinstance(action_space, spaces.Discrete)
        self.action_size = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.temperature = args.gumbel_temperature
        self.net = nn.Sequential(
            *([nn.BatchNorm1d(observation_size)] if args.batch_norm else []),
            *layer(observation_size, HIDDEN, args.batch_norm),
            *layer(HIDDEN, HIDDEN, args.batch_norm),
            last_layer(self.action_size, args.small_last_layer),
        )
        if not self.discrete:
            low, high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
            self.center, self.scale = (low + high) / 2, (high - low) / 2

    def forward(self, observations: torch.Tensor, greedy: bool = False) -> torch.Tensor:
        """mu(s) for observations of shape (n, observation_size): shape (n, action_size).

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
    def act(self, observation: np.ndarray, greedy: bool = False) -> np.ndarray:
        """mu(s) for one observation."""
        return self(torch.from_numpy(observation[None]), greedy)[0].numpy()

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        """A uniformly random action, as `act` gives them."""
        if self.discrete:
            return np.eye(self.action_size)[rng.integers(self.action_size)]
        return rng.uniform(-1, 1, self.action_size)

    def to_env(self, action: np.ndarray):
        """The environment's action for one between -1 and 1, or for a one-hot vector."""
        if self.discrete:
            return self.space.start + action.argmax()
        action = (self.center + self.scale * action.reshape(self.space.shape)).astype(self.space.dtype)
        return np.minimum(np.maximum(action, self.space.low), self.space.high)


class Critic(nn.Module):
    """Q(s, a), where a is an action as the actor gives it.

    Box actions enter at the layer `action_layer`. Discrete ones are one-hot and pick an output: Q is linear in them, as
    every function of one-hot vectors can be written. Its slope, which the actor climbs, is then what each action is
    worth; that of a network which takes a in, and has seen one-hot vectors only, need not lead from one to another.
    """

    def __init__(self, observation_size: int, actor: Actor, args: Args):
        super().__init__()
        self.discrete, action_size, batch_norm = actor.discrete, actor.action_size, args.batch_norm
        before, after = [nn.BatchNorm1d(observation_size)] if batch_norm else [], []
        if self.discrete:
            before += [*layer(observation_size, HIDDEN, batch_norm), *layer(HIDDEN, HIDDEN, batch_norm)]
        elif args.action_layer == 1:
            after += [*layer(observation_size + action_size, HIDDEN, False), *layer(HIDDEN, HIDDEN, False)]
        else:
            before += layer(observation_size, HIDDEN, batch_norm)
            after += layer(HIDDEN + action_size, HIDDEN, False)
        after.append(last_layer(action_size if self.discrete else 1, args.small_last_layer))
        self.before, self.after = nn.Sequential(*before), nn.Sequential(*after)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q of n pairs, shapes (n, observation_size) and (n, action_size): shape (n,)."""
        if self.discrete:
            return (self.after(self.before(observations)) * actions).sum(1)
        return self.after(torch.cat([self.before(observations), actions], dim=1)).squeeze(-1)


class DDPG(nn.Module):
    """mu, Q and their target networks mu' and Q', which without target networks are mu and Q themselves.

    All are in evaluation mode but `by_minibatch`.
    """

    def __init__(self, observation_size: int, action_space: spaces.Space, args: Args):
        super().__init__()
        self.actor = Actor(observation_size, action_space, args)
        self.critic = Critic(observation_size, self.actor, args)
        self.target_actor = copy.deepcopy(self.actor) if args.target_network else self.actor
        self.target_critic = copy.deepcopy(self.critic) if args.target_network else self.critic
        self.batch_norm = args.batch_norm
        self.eval()

    @contextmanager
    def by_minibatch(self, network: nn.Module) -> Iterator[None]:
        """While a network's own gradient is taken, it normalises by the minibatch and renews the running statistics."""
        if self.batch_norm:
            network.train()
        yield
        if self.batch_norm:
            network.eval()

    @cached_property
    def tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """theta' and theta: the target networks' parameters and running statistics, and the networks'."""
        targets, networks = (self.target_critic, self.target_actor), (self.critic, self.actor)
        return tuple(
            [tensor for network in these for tensor in network.state_dict().values() if tensor.is_floating_point()]
            for these in (targets, networks)
        )


class ReplayBuffer:
    """R: a ring of transitions (s, a, r, s', terminated) of which the latest are kept.

    A transition takes 4 bytes for each of its 2 x observation_size + action_size + 2 numbers: 36 bytes on Pendulum-v1,
    168 on HalfCheetah-v5. The action is the one that was executed, in units in which the bounds lie at -1 and 1.

    The rows are a file that is mapped into memory, so that a resumed run finds all of them: if it began with an empty
    memory, its networks would be fitted to its first few steps and forget the rest.

    Args:
        path: the file. It is made, or with `count` above 0 read and written on.
        capacity: transitions that there is room for.
        observation_size, action_size: numbers of an observation and of an action.
        count: transitions so far. The i-th of a run, counted from 0, is in row i modulo the capacity.

    Raises:
        OSError, ValueError: the file is not there, is damaged or has another shape.
    """

    def __init__(self, path: Path, capacity: int, observation_size: int, action_size: int, count: int = 0):
        sizes = observation_size, action_size, 1, observation_size, 1
        s, a, r, s_next, end = np.cumsum((0, *sizes))[:-1]
        self.columns = slice(s, a), slice(a, r), r, slice(s_next, end), end
        self.capacity, self.count, shape = capacity, count, (capacity, sum(sizes))
        if not count:
            rows = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        elif (rows := np.lib.format.open_memmap(path, "r+")).shape != shape:
            raise ValueError(f"{path} has the shape {rows.shape}, not {shape}")
        self.rows = np.asarray(rows)  # the same memory without the slow indexing of np.memmap

    def add(self, observation, action, reward: float, next_observation, terminated: bool) -> None:
        """Store a transition in place of the oldest."""
        row = np.concatenate((observation, action, [reward], next_observation, [terminated]))
        self.rows[self.count % self.capacity] = row
        self.count += 1

    def sample(self, n: int, rng: np.random.Generator) -> list[torch.Tensor]:
        """n random transitions: s, a, r, s' and terminated, of shapes (n, size), and (n,) for r and terminated."""
        rows = self.rows[rng.integers(min(self.count, self.capacity), size=n)]
        return [torch.from_numpy(rows[:, columns]) for columns in self.columns]


class GaussianNoise:
    """N_t: independent normal numbers of mean 0."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.size, self.rng = size, rng

    def reset(self) -> None:
        """A new episode begins."""

    def sample(self, std: float) -> np.ndarray:
        """N_t, of shape (size,), with the standard deviation `std`."""
        return std * self.rng.standard_normal(self.size)


class OrnsteinUhlenbeckNoise(GaussianNoise):
    """N_t = N_{t-1} - theta N_{t-1} + sigma xi, xi normal: noise with inertia (Lillicrap et al. 2016, section 3).

    Its mean is 0, its variance in the long run sigma^2 / (1 - (1 - theta)^2), its autocorrelation over k steps
    (1 - theta)^k.
    """

    def __init__(self, size: int, rng: np.random.Generator, theta: float):
        super().__init__(size, rng)
        self.theta, self.state = theta, np.zeros(size)

    def reset(self) -> None:
        """A new episode begins: the process does so at 0."""
        self.state = np.zeros(self.size)

    def sample(self, std: float) -> np.ndarray:
        """N_t, of shape (size,), with sigma = `std`."""
        self.state = self.state - self.theta * self.state + super().sample(std)
        return self.state


def td_target(rewards, next_values, terminated, gamma: float):
    """y_i = r_i + gamma Q'(s_{i+1}, mu'(s_{i+1})), or r_i where s_{i+1} is terminal. All shapes are (n,)."""
    assert rewards.shape == next_values.shape == terminated.shape, (rewards.shape, next_values.shape)
    return rewards + gamma * (1 - terminated) * next_values


def critic_loss(model: DDPG, batch: list[torch.Tensor], gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """L = 1/N sum (y_i - Q(s_i, a_i))^2, with a gradient for the critic alone, and the mean of Q(s_i, a_i)."""
    observations, actions, rewards, next_observations, terminated = batch
    with torch.no_grad():
        next_values = model.target_critic(next_observations, model.target_actor(next_observations))
        y = td_target(rewards, next_values, terminated, gamma)
    with model.by_minibatch(model.critic):
        values = model.critic(observations, actions)
    assert values.shape == y.shape, (values.shape, y.shape)
    return F.mse_loss(values, y), values.detach().mean()


def actor_gradient(model: DDPG, observations: torch.Tensor, logit_penalty: float = 0.0) -> torch.Tensor:
    """Add the gradient of -J to the actor's, where J is the mean of Q(s_i, mu(s_i)). Returns -J.

    grad J = 1/N sum grad_a Q(s, a) at s = s_i, a = mu(s_i), times grad mu(s_i) (Lillicrap et al. 2016, equation 6).
    A policy of Discrete actions that is certain neither explores nor passes a gradient on: their logits, squared,
    are part of the loss.
    """
    with model.by_minibatch(model.actor):
        outputs = model.actor.net(observations)
    mu = model.actor.choose(outputs)
    actions = mu.detach().requires_grad_()
    loss = -model.critic(observations, actions).mean()
    (grad_a,) = torch.autograd.grad(loss, actions)
    if model.actor.discrete:
        torch.autograd.backward([mu, logit_penalty * outputs.square().mean()], [grad_a, None])
    else:
        mu.backward(grad_a)
    return loss.detach()


@torch.no_grad()
def soft_update(targets: list[torch.Tensor], networks: list[torch.Tensor], tau: float) -> None:
    """theta' <- tau theta + (1 - tau) theta'; so do the running statistics of batch normalisation."""
    torch._foreach_lerp_(targets, networks, tau)


def update(model: DDPG, optimizers: dict, batch: list[torch.Tensor], args: Args) -> dict[str, torch.Tensor]:
    """Learn from one minibatch: critic, actor, target networks. Returns metrics by name."""
    # Update critic by minimizing the loss
    loss, q_values = critic_loss(model, batch, args.gamma)
    optimizers["critic"].zero_grad()
    loss.backward()
    optimizers["critic"].step()
    # Update the actor policy using the sampled policy gradient
    optimizers["actor"].zero_grad()
    actor_loss = actor_gradient(model, batch[0], args.logit_penalty)
    optimizers["actor"].step()
    # Update the target networks
    if args.target_network:
        soft_update(*model.tensors, args.tau)
    return {"critic_loss": loss.detach(), "actor_loss": actor_loss, "q_values": q_values}


METRICS = {  # columns of metrics.csv, with their families in TensorBoard
    "critic_loss": "losses",
    "actor_loss": "losses",
    "q_values": "losses",
    "critic_grad_norm": "losses",
    "actor_grad_norm": "losses",
    "noise_std": "charts",
    "learning_rate": "charts",
}
STEPS = 50  # of an iteration; metrics are those of its last update


def learn(model: DDPG, optimizers: dict, buffer: ReplayBuffer, args: Args, rng, seconds: Callable) -> Iterator[tuple]:
    """Train. Yields T, the rows of the episodes that have ended and the metrics after each iteration.

    Raises:
        FloatingPointError: a loss or a gradient is not finite.
    """
    torch.set_num_threads(args.num_threads)
    env, actor, T = make_env(args.env_id), model.actor, buffer.count
    # Initialize a random process N for action exploration
    noise = GaussianNoise(actor.action_size, rng)
    if args.noise == "ou":
        noise = OrnsteinUhlenbeckNoise(actor.action_size, rng, args.ou_theta)
    final_std = args.noise_std if args.final_noise_std is None else args.final_noise_std
    observation = np.asarray(env.reset(seed=int(rng.integers(2**31)))[0], np.float32)
    episode_return, episode_length = 0.0, 0
    while T < args.total_timesteps:
        episodes, metrics = [], {}
        for _ in range(min(STEPS, args.total_timesteps - T)):
            # Select action a_t = mu(s_t) + N_t
            std = args.noise_std + (final_std - args.noise_std) * T / args.total_timesteps
            if T < args.learning_starts:
                action = actor.random_action(rng)
            elif actor.discrete:  # a sample of mu(s_t), which explores by itself
                action = actor.act(observation)
            else:
                action = np.minimum(np.maximum(actor.act(observation) + noise.sample(std), -1), 1)
            # Execute it, observe r_t and s_{t+1}
            next_observation, reward, terminated, truncated, _ = env.step(actor.to_env(action))
            next_observation = np.asarray(next_observation, np.float32)
            T += 1
            episode_return += float(reward)
            episode_length += 1
            # Store the transition in R
            buffer.add(observation, action, reward, next_observation, terminated)
            observation = next_observation
            if terminated or truncated:
                episodes.append((T, seconds(), 0, episode_return, episode_length))
                observation = np.asarray(env.reset()[0], np.float32)
                noise.reset()
                episode_return, episode_length = 0.0, 0
            # Sample a random minibatch from R
            if T >= args.learning_starts:
                metrics = update(model, optimizers, buffer.sample(args.batch_size, rng), args)
        if metrics:
            for name, network in (("critic", model.critic), ("actor", model.actor)):
                metrics[f"{name}_grad_norm"] = get_total_norm([parameter.grad for parameter in network.parameters()])
            metrics = {name: float(value) for name, value in metrics.items()}
            if not all(map(math.isfinite, metrics.values())):
                raise FloatingPointError(f"the losses are not finite at step {T:,}: {metrics}")
            metrics |= {"noise_std": std, "learning_rate": args.learning_rate}
        yield T, episodes, metrics
    env.close()


def main(args: Args) -> int:
    """Train, go on training or only evaluate, as `args` says. Returns the exit code."""
    check_args(args)
    if args.batch_size > args.buffer_size:
        raise InputError(f"--batch-size must be at most --buffer-size, {args.buffer_size}, not {args.batch_size}")
    if args.batch_norm and args.batch_size < 2:
        raise InputError("--batch-norm needs a --batch-size of at least 2: one number has no variance")
    checkpoint = read_checkpoint(args, SCRIPT)
    observation_size, space = check_env(args, checkpoint)
    is_box = isinstance(space, spaces.Box) and space.dtype.kind == "f" and space.is_bounded()
    if not (isinstance(space, spaces.Discrete) or is_box):
        actions = " ".join(str(space).split())
        raise InputError(
            f"{args.env_id} takes actions {actions}: ddpg.py needs a Box of real numbers with bounds, or Discrete ones"
        )
    (rng,) = seed_everything(args.seed, 1)
    model, T, seconds, buffer = DDPG(observation_size, space, args), 0, 0.0, None
    optimizers = {
        "actor": torch.optim.Adam(model.actor.parameters(), args.actor_learning_rate, fused=True),
        "critic": torch.optim.Adam(model.critic.parameters(), args.learning_rate, fused=True),
    }
    size_of_buffer = args.buffer_size, observation_size, model.actor.action_size
    if checkpoint:
        T, seconds = restore(checkpoint, model, optimizers, rng)

    def greedy_policy(observation: np.ndarray):
        return model.actor.to_env(model.actor.act(observation, greedy=True))

    if args.evaluate:
        print(f"{SCRIPT}: {evaluate(greedy_policy, args, Path(args.evaluate))[0]}; {args.evaluate}")
        return 0
    if T >= args.total_timesteps:
        raise InputError(f"{args.resume} has done {T:,} steps already: give more with --total-timesteps")
    check_memory("--buffer-size", args.buffer_size, 4 * (2 * observation_size + model.actor.action_size + 2))
    if checkpoint:
        try:
            buffer = ReplayBuffer(Path(args.resume) / "replay.npy", *size_of_buffer, T)
        except (OSError, ValueError) as error:
            raise InputError(f"--resume needs the replay memory as the run left it: {error}") from None

    run = Run(SCRIPT, args, METRICS, {}, T, seconds)
    buffer = buffer or ReplayBuffer(run.folder / "replay.npy", *size_of_buffer)
    memory = f"replay memory of {buffer.rows.nbytes / 2**20:,.1f} MiB"
    print(f"{SCRIPT}: {args.env_id}, {memory}, {run.folder}", flush=True)
    if model.actor.discrete:
        print(f"{SCRIPT}: Discrete actions are samples by Gumbel-Softmax, which explore in place of the noise")
    exit_code = train(run, learn(model, optimizers, buffer, args, rng, run.seconds), model, optimizers, rng)
    if exit_code == 0:
        run.finish(*evaluate(greedy_policy, args, run.folder))
    return exit_code


if __name__ == "__main__":
    command_line(main, Args)
