"""Actor-critic with generalised advantage estimation (Schulman et al. 2016, High-Dimensional Continuous Control Using
Generalized Advantage Estimation).

Batches of steps from several environments, advantages by GAE(gamma, lambda), and the paper's update of the policy,
inside of a trust region. To begin with: python gae.py
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.wrappers.utils import update_mean_var_count_from_moments
from torch import nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.evaluation import evaluate
from common.inputs import InputError, check_args, check_env, command_line, make_env, read_checkpoint
from common.iterations import restore, train
from common.run import Run
from common.seeding import seed_everything

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """environment: any id that gymnasium.make takes, `module:Env-v0` included"""
    seed: int = 1
    """seed of everything random: the same seed gives the same run"""
    total_timesteps: int = 150_000
    """environment steps in all"""
    num_envs: int = 8
    """environments, stepped in turn"""
    batch_size: int = 2_000
    """steps between two updates, of all environments together; rounded down to a multiple of --num-envs"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda: 0 has the least variance and the most bias, 1 no bias and the most variance"""
    trust_region: bool = True
    """update the policy inside of a trust region; without: one step of Adam on the same loss"""
    max_kl: float = 0.02
    """epsilon: mean KL divergence from the old policy that an update may reach"""
    cg_iterations: int = 10
    """iterations of conjugate gradients"""
    cg_damping: float = 0.1
    """added to the diagonal of the Fisher matrix"""
    fisher_stride: int = 4
    """the Fisher matrix is taken over every so many-th step of the batch; the line search looks at all of them"""
    line_search_steps: int = 10
    """step lengths that are tried, each half of the one before"""
    learning_rate: float = 3e-3
    """Adam's, of the value function, and of the policy without a trust region"""
    vf_epochs: int = 5
    """passes over the batch in which the value function is fitted"""
    minibatch_size: int = 250
    """steps in each of its minibatches"""
    norm_obs: bool = True
    """subtract the running mean from the observations and divide by the running standard deviation"""
    norm_returns: bool = True
    """do the same to the returns that the value function is fitted to"""
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
    """a run's folder: go on from its checkpoint, with its arguments, to --total-timesteps"""


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units; orthogonal weights, those of the last layer scaled by `gain`."""
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, layer_gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class RunningStatistics(nn.Module):
    """Running mean and standard deviation, at least 1e-4, of vectors of `size` numbers."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, data: np.ndarray, memory: float = math.inf) -> None:
        """Take in `data`, shape (n, size). What came before weighs as much as `memory` vectors at most."""
        moments = data.mean(0, np.float64), data.var(0, np.float64), len(data)
        running = self.mean.double().numpy(), self.std.double().numpy() ** 2, min(self.count.item(), memory)
        mean, var, count = update_mean_var_count_from_moments(*running, *moments)
        for buffer, value in ((self.mean, mean), (self.std, np.maximum(np.sqrt(var), 1e-4)), (self.count, count)):
            buffer.copy_(torch.as_tensor(value))


class ActorCritic(nn.Module):
    """The policy pi(a|s; theta) and the value function V(s).

    A Discrete policy is a softmax. A Box policy is a Gaussian whose mean is the network's output and whose standard
    deviation is a parameter by itself, in units in which the bounds lie at -1 and 1; draws are clipped to the bounds.

    The attribute `theta` is one vector of which every parameter of the policy is a view: to write to it is to change
    the policy. Observations, and the returns that the critic is fitted to, are normalised by running statistics.
    """

    def __init__(self, observation_size: int, action_space: spaces.Space):
        super().__init__()
        self.space, self.discrete = action_space, isinstance(action_space, spaces.Discrete)
        outputs = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.actor, self.critic = mlp(observation_size, outputs, gain=0.01), mlp(observation_size, 1, gain=1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(outputs))
        self.observations, self.returns = RunningStatistics(observation_size), RunningStatistics(1)
        self.theta = parameters_to_vector(self.policy_parameters()).detach()
        vector_to_parameters(self.theta, self.policy_parameters())
        # The actor again, as numpy views of the same memory: for a few observations it takes a third of torch's time.
        linear = [layer for layer in self.actor if isinstance(layer, nn.Linear)]
        self.layers = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in linear]
        if not self.discrete:
            low, high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
            has_low, has_high = np.abs(low) < 1e9, np.abs(high) < 1e9  # beyond that, no bound is meant
            low = np.where(has_low, low, np.where(has_high, high - 2, -1))
            high = np.where(has_high, high, low + 2)
            self.center, self.scale = (low + high) / 2, (high - low) / 2

    def normalize(self, observations: np.ndarray) -> np.ndarray:
        """Observations, shape (..., observation_size), in standard deviations from the running mean; at most 10."""
        if self.observations.count.item() < 1:
            return observations
        normalized = (observations - self.observations.mean.numpy()) / self.observations.std.numpy()
        return np.minimum(np.maximum(normalized, -10), 10)

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        """V(s) for normalised observations, shape (..., observation_size), without the last dimension."""
        return self.returns.mean + self.returns.std * self.critic(observations).squeeze(-1)

    def normalize_returns(self, returns: np.ndarray) -> None:
        """Renew the statistics of returns, shape (n,); the last layer makes up for it, so that V stays the same.

        That is PopArt of van Hasselt et al. 2016, Learning Values across Many Orders of Magnitude. The latest batch
        makes up a tenth of the statistics or more, because returns grow while the policy learns.
        """
        mean, std, last = self.returns.mean.clone(), self.returns.std.clone(), self.critic[-1]
        self.returns.update(returns[:, None], memory=9 * len(returns))
        with torch.no_grad():
            last.weight.mul_(std / self.returns.std)
            last.bias.copy_((mean + std * last.bias - self.returns.mean) / self.returns.std)

    def policy_parameters(self) -> list[nn.Parameter]:
        """The parameters that theta consists of."""
        return [*self.actor.parameters(), *([] if self.discrete else [self.log_std])]

    def policy(self, observations: torch.Tensor) -> torch.distributions.Distribution:
        """pi(.|s; theta) of n observations, shape (n, observation_size)."""
        outputs = self.actor(observations)
        if self.discrete:
            return Categorical(logits=outputs, validate_args=False)  # what is not finite is found out by `learn`
        return Independent(Normal(outputs, self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def act(self, observations: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Draw a ~ pi(a|s; theta) for n observations, shape (n, observation_size); without `rng` take the likeliest.

        Returns actions as `policy` takes them: indices, shape (n,), or the Gaussian's draws, shape (n, action_size).
        """
        x = observations
        for weight, bias in self.layers[:-1]:
            x = np.tanh(x @ weight + bias)
        weight, bias = self.layers[-1]
        x = x @ weight + bias
        if self.discrete:  # argmax of the logits plus Gumbel noise (minus the log of an exponential variable): a draw
            return (x if rng is None else x - np.log(rng.standard_exponential(x.shape))).argmax(-1)
        if rng is None:
            return x
        return x + np.exp(self.log_std.detach().numpy()) * rng.standard_normal(x.shape, np.float32)

    def to_env(self, action):
        """The environment's action for one that `act` returned."""
        if self.discrete:
            return self.space.start + action
        action = (self.center + self.scale * action.reshape(self.space.shape)).astype(self.space.dtype)
        return np.minimum(np.maximum(action, self.space.low), self.space.high)


def compute_gae(rewards, values, next_values, terminated, truncated, gamma: float, gae_lambda: float) -> np.ndarray:
    """Generalised advantage estimates A^GAE(gamma, lambda) of a batch (Schulman et al. 2016, equation 16).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)       A_t = delta_t + gamma lambda A_{t+1}

    which is the sum over l of (gamma lambda)^l delta_{t+l}, as far as the episode and the batch go, and the mean of the
    k-step advantages A^(k) weighted by (1 - lambda) lambda^(k-1). A^(k) has k terms, gamma^l delta_{t+l} for l = 0 to
    k - 1; the slide's sum goes on to k, one too far. V of a terminal state is 0. A time limit is not terminal: there,
    and where the batch ends, V(s_{t+1}) stands for what is beyond.

    Args: arrays of shape (steps, environments)
        rewards: r_t.
        values: V(s_t).
        next_values: V(s_{t+1}) of the observation that followed, before any reset.
        terminated: whether s_{t+1} is terminal.
        truncated: whether the episode was cut off at s_{t+1}.
        gamma: discount factor.
        gae_lambda: lambda.

    Returns:
        A_t, of the same shape. A_t + V(s_t) is what the value function is to learn.
    """
    deltas = rewards + gamma * np.where(terminated, 0.0, next_values) - values
    goes_on = ~(terminated | truncated)
    advantages, A = np.empty_like(deltas), np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        A = deltas[t] + gamma * gae_lambda * goes_on[t] * A
        advantages[t] = A
    return advantages


def flat_grad(output: torch.Tensor, parameters: list[nn.Parameter], **options) -> torch.Tensor:
    """The gradient of a scalar as one vector."""
    return parameters_to_vector(torch.autograd.grad(output, parameters, **options))


def fisher_vector_product(kl: torch.Tensor, parameters: list[nn.Parameter], damping: float) -> Callable:
    """v -> (F + damping I) v, with the Fisher matrix F as the Hessian of the mean KL divergence from the old policy.

    F is never built: F v is the gradient of (gradient of KL) . v (Schulman et al. 2015, appendix C.1).
    """
    d_kl = flat_grad(kl, parameters, create_graph=True)
    return lambda v: flat_grad(d_kl @ v, parameters, retain_graph=True) + damping * v


def conjugate_gradients(product: Callable, b: torch.Tensor, iterations: int, tolerance: float = 1e-10) -> torch.Tensor:
    """Solve A x = b for the positive definite matrix A that `product` multiplies by. Shapes (n,)."""
    x, residual = torch.zeros_like(b), b.clone()
    direction, squared = residual, residual @ residual
    for _ in range(iterations):
        if squared < tolerance:
            break
        A_direction = product(direction)
        alpha = squared / (direction @ A_direction)
        x = x + alpha * direction
        residual = residual - alpha * A_direction
        last_squared, squared = squared, residual @ residual
        direction = residual + squared / last_squared * direction
    return x


def update_policy(model: ActorCritic, optimizer, observations, actions, advantages, args: Args) -> dict[str, float]:
    """One update of the policy, by natural gradient inside of a trust region, or by one plain step of `optimizer`.

    Both ascend L(theta), the mean of A pi(a|s; theta) / pi(a|s; theta_old), whose gradient at theta_old is the
    lecture's policy gradient: the mean of A grad log pi(a|s; theta). The trust region solves

        maximise g . x  subject to  1/2 x . F x <= max_kl       =>      x = sqrt(2 max_kl / (y . F y)) y,  y = F^-1 g

    and a line search along x accepts the first point with a better L and a mean KL divergence of at most max_kl
    (Schulman et al. 2015, Trust Region Policy Optimization, appendix C). If there is none, the policy stays.

    Args:
        observations, actions: shapes (n, observation_size) and (n,) or (n, action_size).
        advantages: A, shape (n,).
        args: trust_region, max_kl, cg_iterations, cg_damping, fisher_stride, line_search_steps.

    Returns:
        Metrics by name.
    """
    parameters = model.policy_parameters()
    with torch.no_grad():
        old_policy = model.policy(observations)
        old_log_prob = old_policy.log_prob(actions)

    def objective_and_kl() -> tuple[torch.Tensor, torch.Tensor]:
        policy = model.policy(observations)
        log_prob = policy.log_prob(actions)
        assert log_prob.shape == old_log_prob.shape == advantages.shape, (log_prob.shape, advantages.shape)
        L = ((log_prob - old_log_prob).exp() * advantages).mean()
        return L, kl_divergence(old_policy, policy).mean()

    L, _ = objective_and_kl()
    g = flat_grad(L, parameters, retain_graph=True)
    metrics = {"grad_norm": g.norm().item(), "line_search_steps": 0, "rejected": 0.0}
    if not args.trust_region:
        optimizer.zero_grad()
        (-L).backward()
        optimizer.step()
    elif g.any():
        some = observations[:: args.fisher_stride]
        with torch.no_grad():
            some_old_policy = model.policy(some)
        kl = kl_divergence(some_old_policy, model.policy(some)).mean()
        product = fisher_vector_product(kl, parameters, args.cg_damping)
        y = conjugate_gradients(product, g, args.cg_iterations)
        step = torch.sqrt(2 * args.max_kl / (y @ product(y))) * y
        theta_old = model.theta.clone()
        for i in range(args.line_search_steps):
            model.theta.copy_(theta_old + 0.5**i * step)
            with torch.no_grad():
                new_L, new_kl = objective_and_kl()
            metrics["line_search_steps"] = i + 1
            if new_L > L and new_kl <= args.max_kl:
                break
        else:
            model.theta.copy_(theta_old)
            metrics["rejected"] = 1.0
    with torch.no_grad():
        new_L, new_kl = objective_and_kl()
    entropy = old_policy.entropy().mean().item()
    return metrics | {"policy_loss": -new_L.item(), "kl": new_kl.item(), "entropy": entropy}


def fit_value_function(model: ActorCritic, optimizer, observations, returns, args: Args, rng) -> float:
    """Regress V(s) on `returns`, shape (n,), in minibatches. Returns the mean squared error."""
    if args.norm_returns:
        model.normalize_returns(returns.numpy())
    targets, losses = (returns - model.returns.mean) / model.returns.std, []
    for _ in range(args.vf_epochs):
        for indices in np.array_split(rng.permutation(len(returns)), max(1, len(returns) // args.minibatch_size)):
            values = model.critic(observations[indices]).squeeze(-1)
            loss = F.mse_loss(values, targets[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return float(np.mean(losses)) * model.returns.std.item() ** 2


METRICS = {  # columns of metrics.csv, with their families in TensorBoard
    "policy_loss": "losses",
    "value_loss": "losses",
    "entropy": "losses",
    "kl": "losses",
    "line_search_steps": "losses",
    "rejected": "losses",
    "explained_variance": "losses",
    "advantage_mean": "losses",
    "advantage_std": "losses",
    "grad_norm": "losses",
    "learning_rate": "charts",
}


def learn(model: ActorCritic, optimizers: dict, args: Args, T: int, rng, seconds: Callable) -> Iterator[tuple]:
    """Train from step T on. Yields T, the rows of the episodes that have ended and the metrics after each batch.

    Raises:
        FloatingPointError: the advantages are not finite.
    """
    torch.set_num_threads(1)
    envs, steps = [make_env(args.env_id) for _ in range(args.num_envs)], args.batch_size // args.num_envs
    shape, observation_shape = (steps, args.num_envs), envs[0].observation_space.shape
    observations, next_observations = np.empty((2, *shape, *observation_shape), np.float32)
    rewards, (terminated, truncated) = np.empty(shape), np.empty((2, *shape), bool)
    current = np.stack([env.reset(seed=int(rng.integers(2**31)))[0] for env in envs]).astype(np.float32)
    episode_returns, episode_lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
    while T < args.total_timesteps:
        actions, episodes = [], []
        for t in range(steps):
            observations[t] = current
            actions.append(model.act(model.normalize(current), rng))
            for i, env in enumerate(envs):
                action = model.to_env(actions[t][i])
                current[i], rewards[t, i], terminated[t, i], truncated[t, i], _ = env.step(action)
                next_observations[t, i] = current[i]
                T += 1
                episode_returns[i] += rewards[t, i]
                episode_lengths[i] += 1
                if terminated[t, i] or truncated[t, i]:
                    episodes.append((T, seconds(), i, episode_returns[i], episode_lengths[i]))
                    current[i], _ = env.reset()
                    episode_returns[i], episode_lengths[i] = 0.0, 0

        inputs = torch.from_numpy(model.normalize(observations))
        with torch.no_grad():
            values = model.value(inputs).numpy()
            next_values = model.value(torch.from_numpy(model.normalize(next_observations))).numpy()
        advantages = compute_gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        returns, mean, std = advantages + values, advantages.mean(), advantages.std()
        if not math.isfinite(std):
            raise FloatingPointError(f"the advantages are {mean} at step {T:,}; so is what the environment returned")
        inputs, actions = inputs.flatten(0, 1), torch.from_numpy(np.concatenate(actions))
        normalized, targets = (
            torch.tensor(x.flatten(), dtype=torch.float32) for x in ((advantages - mean) / (std + 1e-8), returns)
        )
        metrics = update_policy(model, optimizers["actor"], inputs, actions, normalized, args)
        metrics["value_loss"] = fit_value_function(model, optimizers["critic"], inputs, targets, args, rng)
        if args.norm_obs:
            model.observations.update(observations.reshape(-1, *observation_shape))
        metrics["explained_variance"] = 1 - (returns - values).var() / max(returns.var(), 1e-12)
        metrics |= {"advantage_mean": mean, "advantage_std": std, "learning_rate": args.learning_rate}
        yield T, episodes, metrics
    for env in envs:
        env.close()


def main(args: Args) -> int:
    """Train, go on training or only evaluate, as `args` says. Returns the exit code."""
    check_args(args)
    if args.batch_size < args.num_envs:
        raise InputError(f"--batch-size must be at least --num-envs, {args.num_envs}, not {args.batch_size}")
    checkpoint = read_checkpoint(args, SCRIPT)
    observation_size, space = check_env(args, checkpoint)
    if not (isinstance(space, spaces.Discrete) or (isinstance(space, spaces.Box) and space.dtype.kind == "f")):
        actions = " ".join(str(space).split())
        raise InputError(f"{args.env_id} takes actions {actions}: gae.py needs Discrete ones or a Box of real numbers")
    (rng,) = seed_everything(args.seed, 1)
    model, T, seconds = ActorCritic(observation_size, space), 0, 0.0
    optimizers = {
        "actor": torch.optim.Adam(model.policy_parameters(), args.learning_rate, fused=True),
        "critic": torch.optim.Adam(model.critic.parameters(), args.learning_rate, fused=True),
    }
    if checkpoint:
        T, seconds = restore(checkpoint, model, optimizers, rng)

    def greedy_policy(observation: np.ndarray):
        return model.to_env(model.act(model.normalize(observation[None]))[0])

    if args.evaluate:
        print(f"{SCRIPT}: {evaluate(greedy_policy, args, Path(args.evaluate))[0]}; {args.evaluate}")
        return 0
    if T >= args.total_timesteps:
        raise InputError(f"{args.resume} has done {T:,} steps already: give more with --total-timesteps")

    run = Run(SCRIPT, args, METRICS, {}, T, seconds)
    print(f"{SCRIPT}: {args.env_id}, {args.num_envs} environments, {run.folder}", flush=True)
    exit_code = train(run, learn(model, optimizers, args, T, rng, run.seconds), model, optimizers, rng)
    if exit_code == 0:
        run.finish(*evaluate(greedy_policy, args, run.folder))
    return exit_code


if __name__ == "__main__":
    command_line(main, Args)
