"""A3C, asynchronous advantage actor-critic (Mnih et al. 2016, Asynchronous Methods for Deep Reinforcement Learning).

Several workers, each with an environment and parameters theta' of its own, update one shared network theta without
waiting for each other. To begin with: python a3c.py --num-workers 8
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.evaluation import evaluate
from common.inputs import InputError, check_args, check_env, command_line, make_env, read_checkpoint
from common.run import Run
from common.seeding import seed_everything
from common.workers import choose_backend, train

SCRIPT = Path(__file__).stem
MIN_VARIANCE = 0.01  # added to a Gaussian policy's variance: the smaller that is, the larger the gradients


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """environment: any id that gymnasium.make takes, `module:Env-v0` included"""
    seed: int = 1
    """seed of everything random; with one worker, the same seed gives the same run"""
    total_timesteps: int = 200_000
    """T_max: environment steps of all workers together"""
    num_workers: int = 8
    """workers, each with an environment of its own"""
    backend: Literal["auto", "thread", "process"] = "auto"
    """what a worker is; auto: threads for one worker or where Python has no GIL, processes otherwise"""
    t_max: int = 32
    """steps of a worker between two updates, fewer at the end of an episode"""
    learning_rate: float = 3e-3
    """eta at the beginning"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over the total timesteps"""
    gamma: float = 0.99
    """discount factor"""
    ent_coef: float = 0.001
    """beta: weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the squared value error"""
    max_grad_norm: float = 1000.0
    """longer gradients are shortened to this; mind that they are sums over a segment, not means"""
    rmsprop_alpha: float = 0.99
    """decay of RMSProp's mean of squared gradients"""
    rmsprop_eps: float = 0.1
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


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units; orthogonal weights, those of the last layer scaled by `gain`."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, layer_gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class ActorCritic(nn.Module):
    """The policy pi(a|s; theta) and the value function V(s; theta_v).

    A Discrete policy is a softmax. A Box policy is a Gaussian whose mean and variance (a softplus, plus MIN_VARIANCE)
    are outputs of the network, in units in which the bounds lie at -1 and 1; its draws are clipped to the bounds.

    The attribute `theta` is one vector with the lecture's theta and theta_v, of which every parameter is a view: to
    write to it is to change the networks.
    """

    def __init__(self, observation_size: int, action_space: spaces.Space):
        super().__init__()
        self.space, self.discrete = action_space, isinstance(action_space, spaces.Discrete)
        self.action_dtype = np.int64 if self.discrete else np.float32
        outputs = int(action_space.n) if self.discrete else 2 * math.prod(action_space.shape)
        self.actor, self.critic = mlp(observation_size, outputs, gain=0.01), mlp(observation_size, 1, gain=1.0)
        self.theta = parameters_to_vector(self.parameters()).detach()
        vector_to_parameters(self.theta, self.parameters())
        # The actor again, as numpy views of the same memory: for a single observation it takes a sixth of torch's time.
        linear = [layer for layer in self.actor if isinstance(layer, nn.Linear)]
        self.layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]
        if not self.discrete:
            low, high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
            has_low, has_high = np.abs(low) < 1e9, np.abs(high) < 1e9  # beyond that, no bound is meant
            low = np.where(has_low, low, np.where(has_high, high - 2, -1))
            high = np.where(has_high, high, low + 2)
            self.center, self.scale = (low + high) / 2, (high - low) / 2

    def act(self, observation: np.ndarray, rng: np.random.Generator | None = None):
        """Draw a ~ pi(a|s; theta) for one observation, shape (observation_size,); without `rng` take the likeliest.

        Returns the action as `log_prob_and_entropy` takes it: an index, or the Gaussian's draw, shape (action_size,).
        """
        x = observation
        for weight, bias in self.layers[:-1]:
            x = np.tanh(weight @ x + bias)
        weight, bias = self.layers[-1]
        x = weight @ x + bias
        if self.discrete:  # argmax of the logits plus Gumbel noise (minus the log of an exponential variable): a draw
            return int((x if rng is None else x - np.log(rng.standard_exponential(len(x)))).argmax())
        mean, raw_variance = x[: len(x) // 2], x[len(x) // 2 :]
        if rng is None:
            return mean
        return mean + np.sqrt(np.logaddexp(0, raw_variance) + MIN_VARIANCE) * rng.standard_normal(len(mean))

    def to_env(self, action):
        """The environment's action for one that `act` returned."""
        if self.discrete:
            return int(self.space.start) + action
        action = (self.center + self.scale * action.reshape(self.space.shape)).astype(self.space.dtype)
        return np.minimum(np.maximum(action, self.space.low), self.space.high)

    def log_prob_and_entropy(self, observations: torch.Tensor, actions: torch.Tensor):
        """log pi(a|s; theta) and the entropy H[pi(.|s; theta)], two tensors of shape (n,).

        `observations` has shape (n, observation_size); `actions` (n,), int64, or (n, action_size).
        """
        outputs = self.actor(observations)
        if self.discrete:
            log_probs = F.log_softmax(outputs, dim=-1)
            log_prob = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return log_prob, -(log_probs.exp() * log_probs).sum(-1)
        mean, raw_variance = outputs.chunk(2, dim=-1)
        variance = F.softplus(raw_variance) + MIN_VARIANCE
        log_scale = 0.5 * torch.log(2 * math.pi * variance)
        return -(0.5 * (actions - mean).square() / variance + log_scale).sum(-1), (0.5 + log_scale).sum(-1)


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
        observations: s_{t_start}, ..., s_t, shape (n + 1, observation_size).
        actions: a_{t_start}, ..., a_{t - 1} as `ActorCritic.act` returns them, shape (n,) or (n, action_size).
        rewards: r_{t_start}, ..., r_{t - 1}.
        terminated: whether s_t is terminal; at a time limit it is not.
        args: gamma, ent_coef, vf_coef.

    Returns:
        The loss, a scalar tensor, and the means over the steps of policy loss, value loss, entropy and value.
    """
    n = len(rewards)
    values = model.critic(observations).squeeze(-1)
    # R = 0 for terminal s_t, V(s_t; theta'_v) for non-terminal s_t
    returns = n_step_returns(rewards, 0.0 if terminated else values[-1].item(), args.gamma)
    log_prob, entropy = model.log_prob_and_entropy(observations[:-1], actions)
    assert values.shape == (n + 1,), values.shape
    assert returns.shape == log_prob.shape == entropy.shape == (n,), (returns.shape, log_prob.shape, entropy.shape)
    advantages = returns - values[:-1]
    # d theta <- d theta + grad log pi(a_i|s_i; theta') (R - V(s_i; theta'_v)); minus: a loss; R - V is a constant here
    policy_loss = -(log_prob * advantages.detach()).sum()
    # d theta_v <- d theta_v + d (R - V(s_i; theta'_v))^2 / d theta'_v
    value_loss = advantages.square().sum()
    # L_actor = -(R - V(s)) log pi(a|s) - beta H[pi(a|s)], and the critic's loss
    loss = policy_loss - args.ent_coef * entropy.sum() + args.vf_coef * value_loss
    return loss, (torch.stack([policy_loss, value_loss, entropy.sum(), values[:-1].sum()]) / n).tolist()


class SharedRMSProp:
    """RMSProp whose statistics g all workers share, as they share theta (Mnih et al. 2016, section 4):

        g <- alpha g + (1 - alpha) d^2          theta <- theta - eta d / sqrt(g + epsilon)

    No lock is taken: of two workers that update at the same time, one may overwrite parts of the other's step.
    """

    def __init__(self, theta: torch.Tensor, alpha: float, eps: float):
        self.theta, self.alpha, self.eps = theta.share_memory_(), alpha, eps
        self.g = torch.zeros_like(theta).share_memory_()

    def step(self, d_theta: torch.Tensor, learning_rate: float) -> None:
        """Update theta in place by the gradient `d_theta`, of the same shape."""
        self.g.mul_(self.alpha).addcmul_(d_theta, d_theta, value=1 - self.alpha)
        self.theta.addcdiv_(d_theta, (self.g + self.eps).sqrt_(), value=-learning_rate)


METRICS = {  # columns of metrics.csv, with their families in TensorBoard
    "policy_loss": "losses",
    "value_loss": "losses",
    "entropy": "losses",
    "value": "losses",
    "grad_norm": "losses",
    "learning_rate": "charts",
}


class Shared:
    """What all workers share. Each writes its own row of `steps` and `sums` alone: no count is lost, without a lock."""

    def __init__(self, theta: torch.Tensor, args: Args):
        self.optimizer = SharedRMSProp(theta, args.rmsprop_alpha, args.rmsprop_eps)
        self.steps = torch.zeros(args.num_workers, dtype=torch.int64).share_memory_()  # t of each
        self.sums = torch.zeros(args.num_workers, 1 + len(METRICS), dtype=torch.float64).share_memory_()
        self.stop = torch.zeros((), dtype=torch.bool).share_memory_()

    def T(self) -> int:
        """The global step counter: the sum of the workers' own."""
        return int(self.steps.sum())


def worker(channel, index: int, args: Args, shared: Shared, rng: np.random.Generator) -> None:
    """One worker of algorithm S3, a thread or a process. It reports every episode through `channel`.

    Raises:
        FloatingPointError: a gradient is not finite; theta is left as it was.
    """
    torch.set_num_threads(1)
    env = make_env(args.env_id)
    model, optimizer = ActorCritic(env.observation_space.shape[0], env.action_space), shared.optimizer
    parameters = list(model.parameters())
    t, sums = shared.steps[index : index + 1].numpy(), shared.sums[index].numpy()
    observations = np.empty((args.t_max + 1, *env.observation_space.shape), np.float32)
    observations[0], _ = env.reset(seed=int(rng.integers(2**31)))
    episode_return, episode_length = 0.0, 0
    start_time = channel.wait_for_start()

    while (T := shared.T()) <= args.total_timesteps and not shared.stop:  # until T > T_max
        # d theta <- 0 and d theta_v <- 0: nothing to do, the gradients of a segment are taken at once below
        model.theta.copy_(optimizer.theta)  # theta' = theta and theta'_v = theta_v
        actions, rewards, terminated, truncated = [], [], False, False
        n = 0  # t - t_start; s_t is observations[n]
        while not (terminated or truncated) and n < args.t_max:  # until terminal s_t (or time limit) or n == t_max
            action = model.act(observations[n], rng)  # perform a_t according to pi(a_t|s_t; theta')
            # receive reward r_t and new state s_{t+1}
            observations[n + 1], reward, terminated, truncated, _ = env.step(model.to_env(action))
            actions.append(action)
            rewards.append(float(reward))
            n += 1
            t += 1  # t <- t + 1, and with it T <- T + 1

        # R, and for i in {t - 1, ..., t_start} the gradients
        tensors = torch.from_numpy(observations[: n + 1]), torch.from_numpy(np.array(actions, model.action_dtype))
        loss, means = a3c_loss(model, *tensors, rewards, terminated, args)
        d_theta = parameters_to_vector(torch.autograd.grad(loss, parameters))
        norm = d_theta.norm().item()
        if not math.isfinite(norm):
            healthy = np.isfinite(observations[: n + 1]).all() and np.isfinite(rewards).all()
            hint = "a lower --learning-rate may help" if healthy else "so is what the environment returned"
            raise FloatingPointError(f"the gradient is {norm} at step {T + n:,}; {hint}")
        if norm > args.max_grad_norm:
            d_theta *= args.max_grad_norm / norm
        learning_rate = args.learning_rate * (1 - T / args.total_timesteps if args.anneal_lr else 1.0)
        optimizer.step(d_theta, learning_rate)  # asynchronous update of theta using d theta, theta_v using d theta_v
        sums += (1, *means, norm, learning_rate)

        episode_return, episode_length = episode_return + sum(rewards), episode_length + n
        observations[0] = observations[n]
        if terminated or truncated:
            row = (shared.T(), time.monotonic() - start_time, episode_return, episode_length)
            channel.send((row, rng.bit_generator.state))
            observations[0], _ = env.reset()
            episode_return, episode_length = 0.0, 0
    channel.send((None, rng.bit_generator.state))
    env.close()


def main(args: Args) -> int:
    """Train, go on training or only evaluate, as `args` says. Returns the exit code."""
    check_args(args)
    checkpoint = read_checkpoint(args, SCRIPT)
    observation_size, space = check_env(args, checkpoint)
    if not (isinstance(space, spaces.Discrete) or (isinstance(space, spaces.Box) and space.dtype.kind == "f")):
        actions = " ".join(str(space).split())
        raise InputError(
            f"{args.env_id} takes actions {actions}: A3C here needs Discrete ones or a Box of real numbers"
        )
    generators = seed_everything(args.seed, args.num_workers)
    model = ActorCritic(observation_size, space)
    shared, seconds = Shared(model.theta.clone(), args), 0.0
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
            shared.optimizer.theta.copy_(model.theta)
            shared.optimizer.g.copy_(checkpoint["g"])
            shared.steps[0], seconds = checkpoint["step"], checkpoint["seconds"]
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
        return {"model": model.state_dict(), "g": shared.optimizer.g.clone()}

    backend, reason = choose_backend(args.backend, args.num_workers)
    run = Run(SCRIPT, args, METRICS, {"backend_used": backend}, shared.T(), seconds)
    print(
        f"{SCRIPT}: {args.env_id}, {args.num_workers} workers, backend {backend} ({reason}), {run.folder}", flush=True
    )
    exit_code = train(run, worker, [(args, shared, rng) for rng in generators], backend, shared, snapshot)
    if exit_code == 0:
        model.theta.copy_(shared.optimizer.theta)
        run.finish(*evaluate(greedy_policy, args, run.folder))
    return exit_code


if __name__ == "__main__":
    command_line(main, Args)
