"""Observations that are images, in a3c.py and async_qlearning.py; MinAtar and Atari where they are installed."""

import sys

import gymnasium as gym
import image_probes
import numpy as np
import pytest
import torch
from conftest import WITH_WORKERS, each_script, load, tables
from gymnasium import spaces

import a3c
import async_qlearning
from common.evaluation import evaluate

MINATAR, ATARI = "MinAtar/Breakout-v1", "ale_py:PongNoFrameskip-v4"


def needs(env_id: str) -> None:
    """Skip the test where the package is not installed."""
    for package in ("minatar",) if "MinAtar" in env_id else ("ale_py", "cv2"):
        pytest.importorskip(package)


def new_network(script, shape: tuple[int, ...], actions: int = 3):
    torch.manual_seed(0)
    return script.ActorCritic(shape, spaces.Discrete(actions)) if script is a3c else script.QNetwork(shape, actions)


def outputs(network, images: np.ndarray) -> torch.Tensor:
    """What the greedy action is the argmax of."""
    images = torch.from_numpy(images)
    return network.actor(network.body(images)) if isinstance(network, a3c.ActorCritic) else network.q(images)


# make_env


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize(
    ("env_id", "shape", "dtype"),
    [
        ("image_probes:Images-v0", (2, 8, 6), np.uint8),
        ("image_probes:ImagesWithChannelsFirst-v0", (2, 8, 6), np.uint8),
        ("image_probes:WideImages-v0", (2, 6, 8), np.uint8),
        ("image_probes:LargeImages-v0", (2, 64, 48), np.uint8),
        ("image_probes:BoolImages-v0", (2, 8, 6), np.bool_),
        (MINATAR, (4, 10, 10), np.bool_),
        ("MinAtar/Seaquest-v1", (10, 10, 10), np.bool_),
        (ATARI, (4, 42, 42), np.uint8),
    ],
)
def test_channels_come_first_and_images_stay_what_they_are(script, env_id, shape, dtype):
    if "image_probes" not in env_id:
        needs(env_id)
    env = script.make_env(env_id)
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        if "MinAtar" in env_id:
            np.testing.assert_array_equal(observation, np.moveaxis(env.unwrapped.game.state(), -1, 0))
        assert env.observation_space == spaces.Box(0, 255 if dtype is np.uint8 else 1, shape, dtype)
        assert (observation.shape, observation.dtype) == (shape, dtype)
        assert env.observation_space.contains(observation)
        observation, *_ = env.step(0)


@each_script(*WITH_WORKERS)
def test_channels_last_and_first_are_the_same(train, script):
    runs = []
    for name in ("Images", "ImagesWithChannelsFirst"):
        _, folder = train(script, env_id=f"image_probes:{name}-v0", total_timesteps=100)
        runs.append((load(folder)["model"], tables(folder)[0].drop(columns="time").to_numpy().tolist()))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize("env_id", [ATARI, "ale_py:ALE/Pong-v5", "ALE/Pong-v5"])
def test_atari_skips_frames_once_and_stacks_four(script, env_id):
    needs(ATARI)
    env = script.make_env(env_id, screen_size=84)
    frame, starts = env.unwrapped.ale.getEpisodeFrameNumber, set()
    for seed in range(5):
        before, _ = env.reset(seed=seed)
        starts.add(frame())
    assert before.shape == (4, 84, 84)
    assert 1 <= min(starts) < max(starts) <= 30  # so many steps of nothing
    for _ in range(6):
        start = frame()
        after, *_ = env.step(2)
        assert frame() == start + 4
        np.testing.assert_array_equal(after[:3], before[1:])
        before = after
    assert len(np.unique(after.reshape(4, -1), axis=0)) > 1  # the ball moves


@each_script(*WITH_WORKERS)
def test_a_lost_life_ends_no_episode(script):
    needs(ATARI)
    env = script.make_env("ale_py:BreakoutNoFrameskip-v4")
    env.reset(seed=0)
    lives, terminated = env.unwrapped.ale.lives, False
    for _ in range(200):
        before = lives()
        *_, terminated, _, _ = env.step(1)
        if lives() < before:
            break
    assert (lives(), terminated) == (before - 1, False)


@each_script(*WITH_WORKERS)
def test_three_dimensions_of_real_numbers_are_a_vector(monkeypatch, script):
    monkeypatch.setattr(image_probes.Images, "observation_space", spaces.Box(-1, 1, (4, 4, 4)))
    assert script.make_env("image_probes:Images-v0").observation_space.shape == (64,)


@each_script(*WITH_WORKERS)
def test_grey_images_are_refused(monkeypatch, script):
    """They have no channels, and as a vector nobody would learn from them."""
    monkeypatch.setattr(image_probes.Images, "observation_space", spaces.Box(0, 255, (84, 84), np.uint8))
    with pytest.raises(ValueError, match="its observations cannot be made a vector of numbers"):
        script.make_env("image_probes:Images-v0")


@each_script(*WITH_WORKERS)
def test_clipping_touches_learning_and_not_the_tables(train, monkeypatch, script):
    """A game of five steps in which every step pays 3 or -3, by turns."""
    needs(ATARI)
    step, rewards = gym.wrappers.AtariPreprocessing.step, []

    def five_steps(self, action):
        self.count = getattr(self, "count", 0) + 1
        observation, *_, info = step(self, action)
        return observation, 3.0 if self.count % 2 else -3.0, self.count % 5 == 0, False, info

    update = {a3c: "a3c_loss", async_qlearning: "q_loss"}[script]
    learn = getattr(script, update)

    def look(*arguments):
        rewards.extend(torch.as_tensor(arguments[-3]).tolist())
        return learn(*arguments)

    monkeypatch.setattr(gym.wrappers.AtariPreprocessing, "step", five_steps)
    monkeypatch.setattr(script, update, look)
    _, folder = train(script, env_id=ATARI, total_timesteps=40, eval_episodes=1)
    assert set(rewards) == {1.0, -1.0}
    assert set(tables(folder)[0]["return"]) == {3.0, -3.0}
    assert set(tables(folder)[0]["length"]) == {5}
    assert '"mean_return": 3.0' in (folder / "evaluation.json").read_text()


# Networks


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize(
    ("shape", "convolutions", "features", "units"),
    [
        ((4, 10, 10), [(4, 16)], 16 * 8 * 8, 128),
        ((1, 3, 20), [(1, 16)], 16 * 1 * 18, 128),
        ((4, 42, 42), [(4, 32), (32, 32), (32, 32), (32, 32)], 32 * 3 * 3, 256),
        ((4, 84, 84), [(4, 32), (32, 32), (32, 32), (32, 32)], 32 * 6 * 6, 256),
        ((3, 21, 5), [(3, 32), (32, 32), (32, 32), (32, 32)], 32 * 2 * 1, 256),
    ],
)
def test_the_network_follows_the_size_of_the_image(script, shape, convolutions, features, units):
    network, rng = new_network(script, shape), np.random.default_rng(0)
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels) for layer in layers] == convolutions
    assert {layer.kernel_size for layer in layers} == {(3, 3)}
    assert {layer.stride for layer in layers} == {(2, 2) if len(layers) == 4 else (1, 1)}
    dense = [
        (layer.in_features, layer.out_features) for layer in network.modules() if isinstance(layer, torch.nn.Linear)
    ]
    assert dense == [(features, units), (units, 3), *([(units, 1)] if script is a3c else [])]
    activations = {type(layer) for layer in network.modules()} & {torch.nn.ReLU, torch.nn.ELU, torch.nn.Tanh}
    assert activations == {torch.nn.ELU if len(layers) == 4 else torch.nn.ReLU}
    for images in (rng.integers(0, 256, (7, *shape), np.uint8), rng.random((7, *shape)) < 0.5):
        assert outputs(network, images).shape == (7, 3)
        for image in images:
            before = outputs(network, image[None])
            network.theta += 0.05 * torch.randn_like(network.theta)  # every parameter is a view of theta
            after = outputs(network, image[None])
            assert not torch.allclose(after, before)
            assert network.act(image) == after.argmax().item()
            if script is a3c:
                np.testing.assert_allclose(network.outputs(image), after[0].detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        outputs(network, np.full((1, *shape), 255, np.uint8)), outputs(network, np.ones((1, *shape), bool))
    )


@each_script(*WITH_WORKERS)
def test_convolutions_in_numpy_have_any_shape(script):
    layer, image = torch.nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 1)), torch.randn(2, 5, 7)
    ((patches, weight, bias),) = script.numpy_convolutions(torch.nn.Sequential(layer), image.shape)
    maps = np.append(image.numpy(), np.float32(0)).take(patches, mode="wrap") @ weight + bias
    np.testing.assert_allclose(maps.T, layer(image).detach().flatten(1), rtol=1e-4, atol=1e-5)


def test_actions_on_images_are_drawn_from_the_policy():
    network, rng = new_network(a3c, (4, 10, 10)), np.random.default_rng(0)
    network.actor.bias.data += torch.tensor([0.0, 1.0, -1.0])
    image = rng.random((4, 10, 10)) < 0.5
    draws = [network.act(image, rng) for _ in range(3000)]
    probs = outputs(network, image[None]).softmax(1)[0]
    np.testing.assert_allclose(np.bincount(draws) / 3000, probs.detach(), atol=0.03)


def test_a_random_action_on_an_image_may_be_any():
    network, rng = new_network(async_qlearning, (4, 10, 10)), np.random.default_rng(0)
    assert {network.act(np.zeros((4, 10, 10), bool), 1.0, rng) for _ in range(50)} == {0, 1, 2}


# Runs

PROBE = {
    a3c: {"ent_coef": 0.01},
    async_qlearning: {"rmsprop_eps": 0.01, "target_network_frequency": 50},
}


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize("name", ["Images", "LargeImages", "BoolImages"])
def test_a_probe_of_images_is_learned(train, script, name):
    """Without a future, the values of all states are 1, those of the worse actions -1."""
    env_id = f"image_probes:{name}-v0"
    options = {"gamma": 0.0, "learning_rate": 1e-3, "anneal_lr": False, **PROBE[script]}
    _, folder = train(script, env_id=env_id, total_timesteps=1500, **options)
    env = script.make_env(env_id)
    network = new_network(script, env.observation_space.shape, 2)
    network.load_state_dict(load(folder)["model"])
    images, sides = zip(*[(env.reset(seed=seed)[0], env.unwrapped.side) for seed in range(50)], strict=True)
    result, other = outputs(network, np.stack(images)), 1 - np.array(sides)
    assert (result.argmax(1).numpy() == sides).mean() > 0.95
    if script is a3c:
        values = network.critic(network.body(torch.from_numpy(np.stack(images))))
        np.testing.assert_allclose(values.mean().item(), 1, atol=0.15)
    else:
        np.testing.assert_allclose(result[range(50), sides].mean().item(), 1, atol=0.2)
        np.testing.assert_allclose(result[range(50), other].mean().item(), -1, atol=0.3)


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize("env_id", [MINATAR, ATARI])
def test_smoke(train, script, env_id):
    needs(env_id)
    options = {"env_id": env_id, "backend": "process", "num_workers": 2, "total_timesteps": 100, "log_interval": 50}
    options["screen_size"] = 50
    code, folder = train(script, **options)
    assert code == 0
    checkpoint = load(folder)
    assert 100 < checkpoint["step"] <= 120
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    features = 32 * 4 * 4 if env_id == ATARI else 16 * 8 * 8
    assert features in [tensor.shape[1] for tensor in checkpoint["model"].values() if tensor.dim() == 2]
    resumed = {"resume": str(folder), "total_timesteps": 200, "backend": "thread", "num_workers": 1}
    assert script.main(script.Args(**checkpoint["args"] | resumed)) == 0
    assert load(folder)["step"] > 200


@each_script(*WITH_WORKERS)
def test_minatar_is_filmed_in_bytes(train, script):
    needs(MINATAR)
    pytest.importorskip("moviepy")
    _, folder = train(script, env_id=MINATAR, total_timesteps=20, eval_episodes=1, capture_video=True)
    assert len(list((folder / "videos").glob("*.mp4"))) == 1
    env = script.make_env(MINATAR, "rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert (frame.shape, frame.dtype) == ((160, 160, 3), np.uint8)
    assert frame.max() > 100
    np.testing.assert_array_equal(np.kron(frame[::16, ::16], np.ones((16, 16, 1), np.uint8)), frame)


@each_script(*WITH_WORKERS)
def test_the_evaluation_gives_images_as_they_are(tmp_path, script):
    seen = []
    args = script.Args(env_id="image_probes:BoolImages-v0", eval_episodes=2)
    evaluate(lambda image: seen.append(image) or 0, script.make_env(args.env_id), args, tmp_path)
    assert [(image.shape, image.dtype) for image in seen] == [((2, 8, 6), np.bool_)] * 10


@each_script(*WITH_WORKERS)
@pytest.mark.parametrize(
    ("env_id", "package", "expected"),
    [
        (MINATAR, "minatar.gym", "needs pip install MinAtar: "),
        (ATARI, "ale_py", 'needs pip install "gymnasium[atari]" opencv-python-headless: '),
        (ATARI, "cv2", 'needs pip install "gymnasium[atari]" opencv-python-headless: '),
    ],
)
def test_one_line_says_what_to_install(command, capsys, monkeypatch, script, env_id, package, expected):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(gym, "registry", {})
    assert command(script, "--env-id", env_id) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"error: {env_id} {expected}")
    assert err.count("\n") == 1
