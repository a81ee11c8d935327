"""Actor-critic with generalised advantage estimation (Schulman et al. 2016, High-Dimensional Continuous Control Using
Generalized Advantage Estimation).

Batches of steps from several environments, advantages by GAE(gamma, lambda), and the paper's update of the policy,
inside a trust region. To begin with: python gae.py
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics, TransformAction
from gymnasium.wrappers.utils import update_mean_var_count_from_moments as update_moments
from threadpoolctl import threadpool_limits
from torch import nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.arguments import fail, failing, load_checkpoint, parse_args
from common.evaluation import check_film, evaluate
from common.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_args
from common.run import Run, seed_everything

SCRIPT = Path(__file__).stem
CG_ITERATIONS = 10  # of conjugate gradients
FISHER_FRACTION = 0.25  # share of the steps, drawn at random, that the Fisher matrix is estimated from: it saves time
LINE_SEARCH_STEPS = 10  # step lengths that are tried, each half of the one before


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """any id that gymnasium.make takes, `module:Env-v0` included"""
    seed: NonNegativeInt = 1
    """seed of everything random: the same seed gives the same run"""
    total_timesteps: PositiveInt = 150_000
    """environment steps in all; the last batch may exceed it by less than --num-envs"""
    num_envs: PositiveInt = 8
    """environments, stepped in turn"""
    batch_size: PositiveInt = 2_000
    """steps between two updates, of all environments together; adjusted, so that batches are about equally long"""
    gamma: Fraction = 0.99
    """discount factor"""
    gae_lambda: Fraction = 0.95
    """lambda: 0 has the least variance and the most bias, 1 the most variance and the least bias"""
    trust_region: bool = True
    """update the policy inside a trust region; without: one step of Adam on the same loss"""
    max_kl: PositiveFloat = 0.02
    """epsilon: mean KL divergence from the old policy that an update may reach"""
    cg_damping: NonNegativeFloat = 0.1
    """added to the diagonal of the Fisher matrix"""
    initial_std: PositiveFloat = 1.0
    """standard deviation that a Gaussian policy begins with, in units in which the actions' bounds lie at -1 and 1"""
    learning_rate: PositiveFloat = 3e-3
    """Adam's learning rate for the value function and, without a trust region, for the policy"""
    vf_epochs: PositiveInt = 5
    """passes over the batch in which the value function is fitted"""
    minibatch_size: PositiveInt = 250
    """smallest number of steps in a minibatch when the value function is fitted; a smaller batch is one minibatch"""
    norm_obs: bool = True
    """subtract the observations' running mean and divide by their running standard deviation; the first hundredth of
    the steps, a batch at most, only measures these. A resumed run without it keeps them as they are"""
    norm_returns: bool = True
    """normalise the returns that the value function learns by their running mean and standard deviation; a resumed run
    without it keeps these as they are"""
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
    """a run's folder: go on from its checkpoint, with its arguments, to --total-timesteps"""


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The environment, with flat observations and with actions as the network gives them.

    A Box of actions becomes flat, too; -1 and 1 stand for its bounds, and what lies outside of these is clipped.
    Discrete actions count from 0.

    Raises:
        ValueError: the script cannot play it.
    """
    env = gym.make(env_id, disable_env_checker=True, **({"render_mode": render_mode} if render_mode else {}))
    env = RecordEpisodeStatistics(env)
    space = env.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        if not space.is_np_flattenable or space.dtype == np.uint8:
            raise ValueError(f"its observations cannot be made a vector of numbers (images: a3c.py): {space}")
        env = FlattenObservation(env)
    space = env.action_space
    if isinstance(space, spaces.Discrete):
        return env if space.start == 0 else TransformAction(env, lambda a: space.start + a, spaces.Discrete(space.n))
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        raise ValueError(f"{SCRIPT}.py needs Discrete actions or a Box of real numbers, not {space}")
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    has_bounds = (low > -1e9) & (high < 1e9)  # beyond that, no bound is meant
    scale = np.where(has_bounds, high / 2 - low / 2, 1)
    center = np.where(has_bounds, low + scale, np.clip(0, low, high))

    def to_bounds(action: np.ndarray) -> np.ndarray:
        return np.clip(center + scale * action.reshape(space.shape), low, high).astype(space.dtype)

    return TransformAction(env, to_bounds, spaces.Box(-np.inf, np.inf, (center.size,)))


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units; orthogonal weights, those of the last layer scaled by `gain`.

    `ActorCritic.act` computes the same in numpy: change both, nothing fails if they differ.
    """
    layers = [nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, layer_gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class RunningStatistics(nn.Module):
    """Running mean and standard deviation of vectors of `size` numbers; a deviation below 1e-4 counts as 1."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("count", torch.tensor(0.0))

    def update(self, data: np.ndarray, memory: float = math.inf) -> None:
        """Take in `data`, shape (n, size). What came before weighs as much as `memory` vectors at most."""
        running = self.mean.double().numpy(), self.var.double().numpy(), min(self.count.item(), memory)
        mean, var, count = update_moments(*running, data.mean(0, np.float64), data.var(0, np.float64), len(data))
        std = np.where(var > 1e-8, np.sqrt(var), 1.0)
        for buffer, value in ((self.mean, mean), (self.var, var), (self.std, std), (self.count, count)):
            buffer.copy_(torch.as_tensor(value))


class ActorCritic(nn.Module):
    """The policy pi(a|s; theta) and the value function V(s).

    A Discrete policy is a softmax. A Box policy is a Gaussian whose mean is the network's output and whose standard
    deviation has a parameter of its own, its logarithm.

    The attribute `theta` is one vector of which every parameter of the policy is a view: writing to it changes the
    policy. The networks see normalised observations, and the critic's output is a normalised return, which `value`
    turns into V(s). When the running statistics change, a layer makes up for it, so that, after the first batch, only
    `update_policy` changes the policy and only `fit_value_function` changes V. That is what PopArt does for returns
    (van Hasselt et al. 2016, Learning Values across Many Orders of Magnitude).
    """

    def __init__(self, observation_size: int, action_space: spaces.Space, initial_std: float = 1.0):
        super().__init__()
        self.discrete = isinstance(action_space, spaces.Discrete)
        outputs = int(action_space.n) if self.discrete else action_space.shape[0]
        self.actor, self.critic = mlp(observation_size, outputs, gain=0.01), mlp(observation_size, 1, gain=1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.full((outputs,), math.log(initial_std)))
        self.observations, self.returns = RunningStatistics(observation_size), RunningStatistics(1)
        self.theta = parameters_to_vector(self.policy_parameters()).detach()
        vector_to_parameters(self.theta, self.policy_parameters())
        # The actor again, as numpy views of the same memory: for a few observations it takes a third of torch's time.
        self.numpy_layers = [(each.weight.detach().numpy().T, each.bias.detach().numpy()) for each in self.actor[::2]]

    def policy_parameters(self) -> list[nn.Parameter]:
        """The parameters that theta consists of."""
        return [*self.actor.parameters(), *([] if self.discrete else [self.log_std])]

    def normalize(self, observations: np.ndarray) -> np.ndarray:
        """Observations, shape (..., observation_size), in standard deviations from the running mean."""
        return (observations - self.observations.mean.numpy()) / self.observations.std.numpy()

    @torch.no_grad()
    def update_observation_statistics(self, observations: np.ndarray) -> None:
        """Take in observations, shape (n, observation_size). The first layers make up for it."""
        mean, std = self.observations.mean.clone(), self.observations.std.clone()
        self.observations.update(observations)
        for layer in (self.actor[0], self.critic[0]):
            layer.bias += layer.weight @ ((self.observations.mean - mean) / std)
            layer.weight *= self.observations.std / std

    @torch.no_grad()
    def update_return_statistics(self, returns: np.ndarray) -> None:
        """Take in returns, shape (n,). The last layer makes up for it.

        The latest batch makes up a tenth of the statistics or more, because returns grow while the policy learns.
        """
        mean, std, last = self.returns.mean.clone(), self.returns.std.clone(), self.critic[-1]
        self.returns.update(returns[:, None], memory=9 * len(returns))
        last.weight *= std / self.returns.std
        last.bias.copy_((mean + std * last.bias - self.returns.mean) / self.returns.std)

    def value(self, inputs: torch.Tensor) -> torch.Tensor:
        """V(s) for normalised observations, shape (..., observation_size), without the last dimension."""
        return self.returns.mean + self.returns.std * self.critic(inputs).squeeze(-1)

    def policy(self, inputs: torch.Tensor) -> torch.distributions.Distribution:
        """pi(.|s; theta) for n normalised observations, shape (n, observation_size)."""
        outputs = self.actor(inputs)
        if self.discrete:
            return Categorical(logits=outputs, validate_args=False)  # main finds out what is not finite
        return Independent(Normal(outputs, self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def act(self, observations: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Draw a ~ pi(a|s; theta) for observations, shape (..., observation_size); without `rng` take the likeliest.

        Returns actions as `policy` takes them: indices, shape (...), or the Gaussian's draws, shape (..., action_size).
        """
        x = self.normalize(observations)
        for weight, bias in self.numpy_layers[:-1]:
            x = np.tanh(x @ weight + bias)
        weight, bias = self.numpy_layers[-1]
        x = x @ weight + bias
        if self.discrete:  # argmax of the logits plus Gumbel noise (minus the log of an exponential variable): a draw
            return (x if rng is None else x - np.log(rng.standard_exponential(x.shape))).argmax(-1)
        return x if rng is None else x + self.log_std.exp().detach().numpy() * rng.standard_normal(x.shape, np.float32)


def compute_gae(rewards, values, next_values, terminated, truncated, gamma: float, gae_lambda: float) -> np.ndarray:
    """Generalised advantage estimates A^GAE(gamma, lambda) of a batch (Schulman et al. 2016, equation 16).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)       A_t = delta_t + gamma lambda A_{t+1}

    which is the sum over l of (gamma lambda)^l delta_{t+l}, as far as the episode and the batch go, and the mean of the
    k-step advantages A^(k) weighted by (1 - lambda) lambda^(k-1), the last of which takes the weight that is left.
    A^(k) has k terms, gamma^l delta_{t+l} for l = 0 to k - 1; the slide's sum goes on to k, one too far. V of a
    terminal state is 0. A time limit is not terminal: there, and where the batch ends, V(s_{t+1}) stands for what is
    beyond.

    Args: the first five are arrays of shape (steps, environments)
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


def fisher_vector_product(kl: torch.Tensor, parameters: list[nn.Parameter], damping: float):
    """v -> F v: the Fisher matrix, the Hessian of the mean KL divergence from the old policy, plus damping I, times v.

    F is never built: the Hessian times v is the gradient of (gradient of KL) . v (Schulman et al. 2015, appendix C.1).
    """
    d_kl = flat_grad(kl, parameters, create_graph=True)
    return lambda v: flat_grad(d_kl @ v, parameters, retain_graph=True) + damping * v


def conjugate_gradients(product, b: torch.Tensor, iterations: int) -> torch.Tensor:
    """Solve A x = b, nearly, for the positive definite matrix A that `product` multiplies by. Shapes (n,)."""
    x = torch.zeros_like(b)
    residual = direction = b
    squared = residual @ residual
    for _ in range(iterations):
        if squared <= 1e-10 * (b @ b):
            break
        A_direction = product(direction)
        alpha = squared / (direction @ A_direction)
        x = x + alpha * direction
        residual = residual - alpha * A_direction
        last_squared, squared = squared, residual @ residual
        direction = residual + squared / last_squared * direction
    return x


def update_policy(model: ActorCritic, optimizer, inputs, actions, advantages, args: Args, rng) -> dict[str, float]:
    """One update of the policy, by natural gradient inside a trust region, or by one plain step of `optimizer`.

    Both ascend L(theta), the mean of A pi(a|s; theta) / pi(a|s; theta_old), whose gradient at theta_old is the
    lecture's policy gradient: the mean of A grad log pi(a|s; theta). The trust region solves

        maximise g . step  subject to  1/2 step . F step <= max_kl
        =>  step = sqrt(2 max_kl / (y . F y)) y,  y = F^-1 g

    where F is the Fisher matrix with cg_damping added to its diagonal. A line search along the step accepts the first
    point with a better L and a mean KL divergence of at most max_kl (Schulman et al. 2015, Trust Region Policy
    Optimization, appendix C). If there is none, the policy stays.

    Args:
        inputs, actions: shapes (n, observation_size), normalised, and (n,) or (n, action_size).
        advantages: A, shape (n,). `main` normalises them: that scales L, and takes a constant off as a baseline.
        args: trust_region, max_kl, cg_damping.
        rng: draws the steps for the Fisher matrix.

    Returns:
        Metrics by name.
    """
    parameters = model.policy_parameters()
    fisher_inputs = inputs[rng.permutation(len(inputs))[: math.ceil(len(inputs) * FISHER_FRACTION)]]
    with torch.no_grad():
        old_policy, old_fisher_policy = model.policy(inputs), model.policy(fisher_inputs)
        old_log_prob = old_policy.log_prob(actions)

    def objective_and_kl() -> tuple[torch.Tensor, torch.Tensor]:
        policy = model.policy(inputs)
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
    elif g.any():  # otherwise there is no direction
        kl = kl_divergence(old_fisher_policy, model.policy(fisher_inputs)).mean()
        product = fisher_vector_product(kl, parameters, args.cg_damping)
        y = conjugate_gradients(product, g, CG_ITERATIONS)
        step = torch.sqrt(2 * args.max_kl / (y @ product(y))) * y
        theta_old = model.theta.clone()
        for i in range(LINE_SEARCH_STEPS):
            model.theta.copy_(theta_old + 0.5**i * step)
            with torch.no_grad():
                new_L, new_kl = objective_and_kl()
            metrics["line_search_steps"] = i + 1
            if new_L > L and new_kl <= args.max_kl:
                break
        else:  # none was accepted
            model.theta.copy_(theta_old)
            metrics["rejected"] = 1.0
    new_L, new_kl = objective_and_kl()
    return metrics | {"policy_loss": -new_L.item(), "kl": new_kl.item(), "entropy": old_policy.entropy().mean().item()}


def fit_value_function(model: ActorCritic, optimizer, inputs, lambda_returns, args: Args, rng) -> float:
    """Regress V(s) on `lambda_returns`, shape (n,), in minibatches. Returns the mean squared error meanwhile.

    `main` gives it A_t + V(s_t), with lambda. The paper has the discounted rewards, which is lambda = 1, and a trust
    region for V, too (section 5).
    """
    if args.norm_returns:
        model.update_return_statistics(lambda_returns.numpy())
    targets = (lambda_returns - model.returns.mean) / model.returns.std
    losses = []
    for _ in range(args.vf_epochs):
        for indices in np.array_split(rng.permutation(len(inputs)), max(1, len(inputs) // args.minibatch_size)):
            loss = F.mse_loss(model.critic(inputs[indices]).squeeze(-1), targets[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return float(np.mean(losses)) * model.returns.std.item() ** 2


# Columns of metrics.csv, with their families in TensorBoard
METRICS = dict.fromkeys(("policy_loss", "value_loss", "entropy", "kl", "line_search_steps", "rejected"), "losses")
METRICS |= dict.fromkeys(("explained_variance", "advantage_mean", "advantage_std", "grad_norm"), "losses")
METRICS["learning_rate"] = "charts"


def collect(model: ActorCritic, envs: list[gym.Env], current: np.ndarray, steps: int, T: int, run: Run, rng) -> tuple:
    """Take `steps` steps in each environment, in turn; T steps have been taken before. If the run is stopped meanwhile,
    what it returns is not whole.

    `current`, shape (environments, observation_size), holds the environments' observations before and after.

    Returns:
        s_t, a_t, r_t, s_{t+1} before any reset, and whether s_{t+1} is terminal and whether it was cut off there;
        shapes (steps, environments) and for observations and Box actions one dimension more.
    """
    observations, next_observations = np.empty((2, steps, *current.shape), np.float32)
    rewards = np.zeros((steps, len(envs)))
    terminated, truncated = np.zeros((2, steps, len(envs)), bool)
    actions = []
    for t in range(steps):
        observations[t] = current
        actions.append(model.act(current, rng))
        for i, env in enumerate(envs):
            current[i], rewards[t, i], terminated[t, i], truncated[t, i], info = env.step(actions[t][i])
            next_observations[t, i] = current[i]
            T += 1
            if terminated[t, i] or truncated[t, i]:
                run.log_episode(T, i, info["episode"])
                current[i], _ = env.reset()
        if run.stopped:
            break
    return observations, np.stack(actions), rewards, next_observations, terminated, truncated


def main(args: Args) -> int:
    """Train, go on training or only evaluate, as `args` says. Returns the exit code."""
    check_args(args)
    checkpoint = load_checkpoint(args, SCRIPT)
    with failing(f"{args.env_id} cannot be used"):
        eval_env = make_env(args.env_id, "rgb_array" if args.capture_video else None)
    if args.capture_video:
        check_film(eval_env)
    T = checkpoint["step"] if checkpoint else 0
    rng = seed_everything(args.seed, T)
    torch.set_num_threads(1)
    threadpool_limits(1)
    model = ActorCritic(eval_env.observation_space.shape[0], eval_env.action_space, args.initial_std)
    groups = {"actor": model.policy_parameters(), "critic": model.critic.parameters()}
    optimizers = {name: torch.optim.Adam(group, args.learning_rate, fused=True) for name, group in groups.items()}
    if checkpoint:
        with failing(f"the checkpoint does not fit {args.env_id} as it is installed here"):
            model.load_state_dict(checkpoint["model"])
            for name, optimizer in optimizers.items():
                # with the learning rates that are asked for now
                optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizers"][name]["state"]})
    if args.evaluate is not None:
        print(f"{SCRIPT}: {evaluate(model.act, eval_env, args, Path(args.evaluate))[0]}; {args.evaluate}")
        return 0
    if T >= args.total_timesteps:
        fail(f"{args.resume} has done {T:,} steps already: give more with --total-timesteps")

    run = Run(SCRIPT, args, METRICS, {}, checkpoint)
    print(f"{SCRIPT}: {args.env_id}, {args.num_envs} environments, {run.folder}", flush=True)
    latest = []  # metrics of the updates since the last row

    def log_and_save() -> None:
        if latest:
            run.log_metrics(T, {name: float(np.mean([metrics[name] for metrics in latest])) for name in METRICS})
            latest.clear()
        run.save(T, model=model.state_dict(), optimizers={name: each.state_dict() for name, each in optimizers.items()})

    with run:  # an error inside is printed, and the run goes on after the block, where it is saved
        envs = [make_env(args.env_id) for _ in range(args.num_envs)]
        current = np.stack([env.reset(seed=int(rng.integers(2**31)))[0] for env in envs]).astype(np.float32)
        run.start()
        while T < args.total_timesteps:
            left = args.total_timesteps - T
            is_first = args.norm_obs and T == 0
            # Steps are divided evenly over the batches. With norm_obs the first one, about a hundredth of the steps at
            # most, is played by the untrained policy and only measures the observations.
            batches = max(100 if is_first else 1, math.ceil(left / args.batch_size))
            steps = math.ceil(left / batches / args.num_envs)
            batch = collect(model, envs, current, steps, T, run, rng)
            if run.stopped:  # a batch that is not whole counts as not begun
                break
            T += steps * args.num_envs
            observations, actions, rewards, next_observations, terminated, truncated = batch
            if is_first:
                model.observations.update(observations.reshape(-1, observations.shape[-1]))
                continue

            inputs = torch.from_numpy(model.normalize(observations))
            with torch.no_grad():
                values = model.value(inputs).numpy()
                next_values = model.value(torch.from_numpy(model.normalize(next_observations))).numpy()
            data = rewards, values, next_values, terminated, truncated
            advantages = compute_gae(*data, args.gamma, args.gae_lambda)
            mean, std = advantages.mean(), advantages.std()
            if not math.isfinite(std):
                raise FloatingPointError(f"the advantages are {mean} at step {T:,}: what does the environment return?")
            normalized = torch.tensor((advantages - mean) / (std + 1e-8), dtype=torch.float32).flatten()
            lambda_returns = torch.tensor(advantages + values, dtype=torch.float32).flatten()
            inputs, actions = inputs.flatten(0, 1), torch.from_numpy(actions).flatten(0, 1)
            metrics = update_policy(model, optimizers["actor"], inputs, actions, normalized, args, rng)
            metrics["value_loss"] = fit_value_function(model, optimizers["critic"], inputs, lambda_returns, args, rng)
            # Only to judge V: with lambda = 1, discounted rewards, and V beyond their end
            returns = compute_gae(*data, args.gamma, gae_lambda=1.0) + values
            metrics["explained_variance"] = 1 - (returns - values).var() / max(returns.var(), 1e-12)
            latest.append(metrics | {"advantage_mean": mean, "advantage_std": std, "learning_rate": args.learning_rate})
            if args.norm_obs:
                model.update_observation_statistics(observations.reshape(-1, observations.shape[-1]))
            if T // args.log_interval > run.last_step // args.log_interval:
                log_and_save()
            run.progress(T)
        for env in envs:
            env.close()
    with run:
        log_and_save()
    run.close(T)
    if run.exit_code == 0:
        with run:
            run.finish(*evaluate(model.act, eval_env, args, run.folder))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main(parse_args(Args, SCRIPT)))
