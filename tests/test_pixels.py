"""ddpg.py --pixels: the environment, the networks, the replay memory of images, runs."""

import gymnasium as gym
import image_probes
import numpy as np
import pytest
import torch
from conftest import load, tables
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

import ddpg
from ddpg import DDPG, Args, ImageReplayBuffer, make_env

pytest.importorskip("cv2")
PAINTED, SHAPE, BOX = "image_probes:Painted-v0", (9, 64, 64), spaces.Box(-1, 1, (2,))


def paint(steps, side: int) -> np.ndarray:
    """The observation that the images of three steps make."""
    env = image_probes.Painted("rgb_array")
    env.side, images = side, []
    for env.t in steps:
        images += list(np.moveaxis(env.render()[::2, ::2], -1, 0))
    return np.array(images)


# make_env


def test_an_action_is_held_for_three_steps_which_are_all_seen():
    env = make_env(PAINTED, pixels=True)
    for seed in range(4):
        observation, _ = env.reset(seed=seed)
        side = env.unwrapped.side
        np.testing.assert_array_equal(observation, paint((0, 0, 0), side))
        expected = [((1, 2, 3), 1, False), ((4, 5, 6), 1, False), ((5, 6, 7), 1 / 3, True)]
        for number, (steps, reward, end) in enumerate(expected):
            observation, *result, info = env.step(np.array([side - 0.5]))
            np.testing.assert_array_equal(observation, paint(steps, side))
            assert env.observation_space.contains(observation)
            by_limit = bool(seed % 2 and end)
            assert result == [pytest.approx(reward), end and not by_limit, by_limit]
            assert ("episode" in info) == (number == 2)
        assert (info["episode"]["r"], info["episode"]["l"]) == (pytest.approx(7 / 3), 3)
    assert env.action_space.shape == (1,)


# Networks


def test_networks_of_images():
    torch.manual_seed(0)
    model, rng = DDPG(SHAPE, BOX, Args(pixels=True)), np.random.default_rng(0)
    images, actions = torch.from_numpy(rng.integers(0, 256, (5, *SHAPE), np.uint8)), torch.zeros(5, 2)
    for network, second in (model.actor, 200), (model.critic, 200 + 2):  # the action enters there
        convolutions = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert [(layer.in_channels, layer.out_channels) for layer in convolutions] == [(9, 32), (32, 32), (32, 32)]
        assert {(layer.kernel_size, layer.stride) for layer in convolutions} == {((3, 3), (2, 2))}
        *hidden, last = (layer for layer in network.modules() if isinstance(layer, torch.nn.Linear))
        assert [(layer.in_features, layer.out_features) for layer in hidden] == [(1568, 200), (second, 200)]
        for parameter in last.parameters():
            assert parameter.abs().max() <= 3e-4
        assert last.weight.abs().max() > 2.9e-4
        last.weight.data *= 1000
    assert model.actor(images).shape == (5, 2)
    assert model.critic(images, actions).shape == (5,)
    np.testing.assert_allclose(model.actor.act(images[3].numpy()), model.actor(images)[3].detach(), atol=1e-5)
    for image in range(3):  # each of the nine maps and each action counts
        for color in range(3):
            changed = images.clone()
            changed[:, 3 * image + color] = 0
            assert not torch.allclose(model.actor(changed), model.actor(images))
            assert not torch.allclose(model.critic(changed, actions), model.critic(images, actions))
    for action in torch.eye(2):
        assert not torch.allclose(model.critic(images, actions + action), model.critic(images, actions))
    white = model.actor(torch.full((1, *SHAPE), 255, dtype=torch.uint8))
    layers = list(model.actor.net)
    torch.testing.assert_close(white, torch.nn.Sequential(*layers[1:])(torch.ones(1, *SHAPE)).tanh())


def test_batch_normalisation_of_images():
    """Of the nine maps, of all that is between the actor's layers, and of the critic's before the action."""
    model = DDPG(SHAPE, BOX, Args(pixels=True, batch_norm=True))
    for network, sizes in (model.actor, [9, 32, 32, 32, 200, 200]), (model.critic, [9, 32, 32, 32, 200]):
        layers = [layer for layer in network.modules() if "BatchNorm" in type(layer).__name__]
        assert [layer.num_features for layer in layers] == sizes
        assert not any(layer.running_mean.any() for layer in layers)
        before = [layer.running_mean.clone() for layer in layers]
        images = torch.randint(256, (4, *SHAPE), dtype=torch.uint8)
        model.in_training_mode(network, images, *([torch.zeros(4, 2)] if network is model.critic else []))
        assert not any(torch.equal(layer.running_mean, mean) for layer, mean in zip(layers, before, strict=True))
        torch.testing.assert_close(layers[0].running_mean, images.div(255).mean((0, 2, 3)) / 10)


# The replay memory


class Experience:
    """What has been stored, as plain lists: images by their numbers, and transitions (s, a, r, s', terminated)."""

    def __init__(self):
        self.count, self.stored, self.transitions, self.newest = 0, [], [], None

    def new_image(self) -> np.ndarray:
        self.count += 1
        self.stored.append(self.count)
        return np.full((3, 2, 2), self.count, np.uint8)

    def play(self, buffer: ImageReplayBuffer, steps: int, terminates: bool = False, goes_on: bool = False) -> None:
        """So many steps of a new episode, or of the last one."""
        observation = self.newest if goes_on else self.new_image()
        for step in range(steps):
            action, reward, self.newest = np.array([0.5, self.count]), -float(self.count), self.new_image()
            self.transitions.append((observation, action, reward, self.newest, terminates and step == steps - 1))
            buffer.add(*self.transitions[-1])
            observation = self.newest


def drawn(buffer: ImageReplayBuffer, n: int = 200) -> set:
    batch = buffer.sample(n, np.random.default_rng(0))
    assert [(tuple(part.shape), part.dtype) for part in batch] == [
        ((n, 3, 2, 2), torch.uint8),
        ((n, 2), torch.float32),
        ((n,), torch.float32),
        ((n, 3, 2, 2), torch.uint8),
        ((n,), torch.float32),
    ]
    return {tuple(tuple(part[i].flatten().tolist()) for part in batch) for i in range(n)}


def as_set(transitions) -> set:
    return {tuple(tuple(np.ravel(part).astype(float).tolist()) for part in each) for each in transitions}


EPISODES = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.lists(st.tuples(st.integers(-3, 4), EPISODES, st.integers(0, 3)), min_size=1, max_size=4))
def test_memory_of_images_holds_what_a_plain_list_holds(tmp_path_factory, capacity, runs):
    """Across runs that go on, with more room or less, after some of which the file has steps that they have not.

    There are the transitions both of whose images are among the latest `capacity` + 1. Those steps that only the file
    has may be there, too, and take the place of the oldest.
    """
    path, experience, first = tmp_path_factory.mktemp("memory") / "replay.npy", Experience(), 0
    for growth, episodes, ahead in runs:
        count, capacity = len(experience.stored), max(1, capacity + growth)
        buffer = ImageReplayBuffer(capacity, (3, 2, 2), 2)
        if path.exists():
            buffer.load(path, count)
        buffer.create(path)
        for steps, terminates in episodes:
            experience.play(buffer, steps, terminates)
            first = max(first, len(experience.stored) - (capacity + 1))
            present = set(experience.stored[first:])
            latest = [each for each in experience.transitions if {each[0].flat[0], each[3].flat[0]} <= present]
            assert as_set(latest) <= drawn(buffer) <= as_set(experience.transitions)
            assert len(drawn(buffer)) <= capacity
            buffer.save(path)
        count = buffer.count
        assert count == len(experience.stored)
        experience.play(buffer, ahead, goes_on=True)
        buffer.save(path)
        first = max(first, len(experience.stored) - (capacity + 1))
        del experience.stored[count:]


def test_minibatches_of_images_are_uniform():
    """Over transitions, and no row without one makes that before or after it likelier."""
    buffer, experience, n = ImageReplayBuffer(30, (3, 2, 2), 2), Experience(), 20_000
    for steps in (1, 4, 1, 2):
        experience.play(buffer, steps)
    rewards = buffer.sample(n, np.random.default_rng(0))[2].tolist()
    shares = [rewards.count(each[2]) / n for each in experience.transitions]
    np.testing.assert_allclose(shares, 1 / 8, atol=4 * (7 / 64 / n) ** 0.5)


def test_file_of_images_that_does_not_fit_is_refused(tmp_path):
    path, buffer = tmp_path / "replay.npy", ImageReplayBuffer(5, (3, 2, 2), 2)
    Experience().play(buffer, 5, False)
    buffer.create(path)
    for shape, actions in ((3, 2, 3), 2), ((3, 2, 2), 1):
        with pytest.raises(ValueError, match="has rows of"):
            ImageReplayBuffer(5, shape, actions).load(path, buffer.count)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="mmap"):
        ImageReplayBuffer(5, (3, 2, 2), 2).load(path, buffer.count)


# Runs


@pytest.fixture
def train_on_pixels(train):
    def call(**arguments):
        return train(ddpg, **{"env_id": PAINTED, "pixels": True, "total_timesteps": 30} | arguments)

    return call


def test_the_memory_of_a_run(train_on_pixels):
    """Each row is the image of a step, each transition three steps of the simulator, and an episode has three."""
    code, folder = train_on_pixels()
    assert code == 0
    rows = np.load(folder / "replay.npy")
    assert len(rows) == 31
    checkpoint = load(folder)
    assert (checkpoint["step"], checkpoint["replayed"]) == (30, 40)  # ten episodes of three steps and four images
    rows = np.roll(rows, -(checkpoint["replayed"] % len(rows)))  # the oldest first: the end of an episode, seven whole
    images, steps = rows["image"], rows["image"][:, 6, 0, 0] // 10
    assert rows.dtype["image"] == (np.uint8, SHAPE)
    assert steps.tolist() == [3, 6, 7, *7 * [0, 3, 6, 7]]
    assert rows["goes_on"].tolist() == (steps < 7).tolist()
    for image, step in zip(images, steps, strict=True):
        side = int(image[2].any())
        seen = {0: (0, 0, 0), 3: (1, 2, 3), 6: (4, 5, 6), 7: (5, 6, 7)}[step]
        np.testing.assert_array_equal(image, paint(seen, side))
    for row in rows[rows["goes_on"]]:
        side, simulated = int(row["image"][2].any()), 1 if row["image"][6, 0, 0] == 60 else 3
        expected = simulated * (1 - (row["action"][0] + 0.5 - side) ** 2) / 3
        assert row["reward"] == pytest.approx(expected, abs=1e-5)
    ends = rows["terminated"][steps == 6]
    assert np.abs(np.diff(ends)).min() == 1  # by turns
    assert not rows["terminated"][(steps == 0) | (steps == 3)].any()
    assert set(tables(folder)[0]["length"]) == {3}


def test_a_run_goes_on_and_is_evaluated_and_filmed(train_on_pixels):
    pytest.importorskip("moviepy")
    _, folder = train_on_pixels(batch_norm=True)
    code, _ = train_on_pixels(
        batch_norm=True, resume=str(folder), total_timesteps=40, eval_episodes=2, capture_video=True
    )
    assert code == 0
    assert (load(folder)["step"], load(folder)["replayed"]) == (40, 40 + 14)  # a row more for each episode
    assert len(np.load(folder / "replay.npy")) == 41
    assert len(list((folder / "videos").glob("*.mp4"))) == 2
    assert len(tables(folder)[0]) == 13


def test_a_probe_of_pixels_is_learned(train_on_pixels, monkeypatch):
    """Without a future, the value of three steps is 1 - (a - m)^2, and the best action m: -0.5 or 0.5.

    Every second pixel is enough, and takes a quarter of the time.
    """
    shape = (9, 32, 32)

    def make_small(*args, **options):
        env = make_env(*args, **options)
        return gym.wrappers.TransformObservation(env, lambda x: x[:, ::2, ::2], spaces.Box(0, 255, shape, np.uint8))

    monkeypatch.setattr(ddpg, "make_env", make_small)
    options = {"gamma": 0.0, "learning_starts": 60, "batch_size": 16, "noise_std": 1.0, "logit_penalty": 0.1}
    _, folder = train_on_pixels(total_timesteps=400, log_interval=400, actor_learning_rate=1e-4, **options)
    env = make_env(PAINTED, pixels=True)
    model = DDPG(shape, env.action_space, Args(**load(folder)["args"]))
    model.load_state_dict(load(folder)["model"])
    for side in (0, 1):
        image = paint((1, 2, 3), side)[:, ::2, ::2].copy()
        np.testing.assert_allclose(model.actor.act(image), [side - 0.5], atol=0.35)
        for action in (-0.5, 0.5):
            value = model.critic(torch.from_numpy(image[None]), torch.tensor([[action]])).item()
            assert value == pytest.approx(1 - (action - side + 0.5) ** 2, abs=0.4)


def test_tanh_is_kept_from_its_bounds():
    """`logit_penalty` is the weight of the mean squared output of the actor, before its tanh."""
    torch.manual_seed(0)
    args = Args(pixels=True, logit_penalty=0.3)
    model, images = DDPG(SHAPE, BOX, args), torch.randint(256, (4, *SHAPE), dtype=torch.uint8)
    model.actor.net[-1].weight.data *= 3000  # or the penalty would be as good as 0
    outputs = model.actor.net(images)
    loss, metrics = ddpg.actor_loss(model, images, args)
    minus_J = -model.critic(images, outputs.tanh()).mean()
    torch.testing.assert_close(loss, minus_J + 0.3 * outputs.square().mean())
    torch.testing.assert_close(metrics["actor_loss"], minus_J)
