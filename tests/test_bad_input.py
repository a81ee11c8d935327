"""Bad input: one line that says what is wrong, exit code 2, and nothing is written."""

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import WITH_WORKERS, each_script, load

import a3c
import async_qlearning
import ddpg
import gae


@pytest.fixture
def refuse(monkeypatch, capfd, tmp_path, command):
    """The one line with which a script refuses `arguments`."""

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}

    def call(script, *arguments) -> str:
        monkeypatch.chdir(tmp_path)
        before = contents()
        capfd.readouterr()
        code = command(script, *arguments)
        out, err = capfd.readouterr()
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert contents() == before
        return err.removeprefix("error: ").strip()

    return call


@each_script()
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--env-id", "CartPol-v1"), "Did you mean: `CartPole`?"),
        (("--env-id", "CartPole-v99"), "[ `v0`, `v1` ]"),
        (("--env-id", "no_such_module:Env-v0"), "no_such_module"),
        (("--env-id", "probes:NoSuchProbe-v0"), "NoSuchProbe"),
        (("--env-id", "probes:Words-v0"), "its observations cannot be made a vector of numbers"),
        (("--env-id", "probes:ManyActions-v0"), "MultiDiscrete([2 2])"),
        (("--env-id", "probes:IntegerBox-v0"), "Box(0, 5, (1,), int64)"),
        (("--seed", -1), "--seed must be at least 0, not -1"),
        (("--total-timesteps", 0), "--total-timesteps must be at least 1, not 0"),
        (("--learning-rate", 0), "--learning-rate must be above 0 and finite, not 0"),
        (("--learning-rate", "inf"), "--learning-rate must be above 0 and finite, not inf"),
        (("--gamma", 1.1), "--gamma must be between 0 and 1, not 1.1"),
        (("--gamma", "nan"), "--gamma must be between 0 and 1, not nan"),
        (("--log-interval", 0), "--log-interval must be at least 1"),
        (("--eval-episodes", -1), "--eval-episodes must be at least 0"),
        (("--log-dir", "/dev/null/runs"), "--log-dir: no folder can be made there"),
        (("--log-dir", "n" * 300), "--log-dir: no folder can be made there"),
        (("--capture-video", "--eval-episodes", 0), "need an evaluation"),
        (("--capture-video", "--env-id", "probes:Constant-v0"), "probes:Constant-v0 cannot be used"),
        (("--resume", ""), "holds no checkpoint.pt"),
        (("--resume", "nowhere"), "'nowhere' holds no checkpoint.pt"),
        (("--evaluate", "nowhere"), "'nowhere' holds no checkpoint.pt"),
        (("--resume", "here", "--evaluate", "there"), "give one of them"),
    ],
)
def test_what_no_script_takes(refuse, script, arguments, text):
    assert text in refuse(script, *arguments)


@pytest.mark.parametrize(
    ("script", "arguments", "text"),
    [
        (a3c, ("--num-workers", 0), "--num-workers must be at least 1, not 0"),
        (a3c, ("--t-max", 0), "--t-max must be at least 1"),
        (a3c, ("--ent-coef", "nan"), "--ent-coef must be at least 0 and finite, not nan"),
        (a3c, ("--max-grad-norm", 0), "--max-grad-norm must be above 0"),
        (a3c, ("--rmsprop-alpha", -0.1), "--rmsprop-alpha must be between 0 and 1"),
        (a3c, ("--env-id", "probes:Target-v0"), "a3c.py needs Discrete actions or a Box of real numbers with bounds"),
        (a3c, ("--env-id", "image_probes:NarrowImages-v0"), "its images have a side of less than 3"),
        (async_qlearning, ("--env-id", "image_probes:NarrowImages-v0"), "its images have a side of less than 3"),
        (gae, ("--env-id", "image_probes:Images-v0"), "a vector of numbers (images: a3c.py)"),
        (ddpg, ("--env-id", "image_probes:Images-v0"), "a vector of numbers (images: --pixels)"),
        (async_qlearning, ("--env-id", "Pendulum-v1"), "Q-learning needs Discrete actions (ddpg.py takes a Box)"),
        (async_qlearning, ("--num-workers", -3), "--num-workers must be at least 1, not -3"),
        (async_qlearning, ("--final-epsilons", 0.1, 0.01, 1.5), "--final-epsilons must be between 0 and 1, not 1.5"),
        (async_qlearning, ("--final-epsilon-probs", 0.5, -0.5, 1), "must be between 0 and 1, not -0.5"),
        (async_qlearning, ("--final-epsilon-probs", 0.4, 0.3, 0.299), "must be 3 numbers that sum to 1"),
        (async_qlearning, ("--final-epsilon-probs", 0.4, 0.3, "nan"), "must be between 0 and 1, not nan"),
        (async_qlearning, ("--final-epsilons", 0.1, 0.5), "must be 2 numbers that sum to 1"),
        (async_qlearning, ("--final-epsilons", "--final-epsilon-probs"), "numbers that sum to 1"),
        (gae, ("--gae-lambda", 1.1), "--gae-lambda must be between 0 and 1, not 1.1"),
        (gae, ("--num-envs", 0), "--num-envs must be at least 1"),
        (gae, ("--max-kl", 0), "--max-kl must be above 0"),
        (gae, ("--cg-damping", -1), "--cg-damping must be at least 0"),
        (ddpg, ("--env-id", "probes:Target-v0"), "needs Discrete actions or a Box of real numbers with bounds"),
        (ddpg, ("--env-id", "probes:HugeBounds-v0"), "needs Discrete actions or a Box of real numbers with bounds"),
        (ddpg, ("--pixels", "--env-id", "probes:BoundedConstant-v0"), "probes:BoundedConstant-v0 cannot be used"),
        (ddpg, ("--pixels", "--env-id", "image_probes:PaintedInGrey-v0"), "PaintedInGrey-v0 cannot be used"),
        (ddpg, ("--pixels", "--env-id", "image_probes:PaintedInFloats-v0"), "PaintedInFloats-v0 cannot be used"),
        (
            ddpg,
            ("--pixels", "--env-id", "image_probes:PaintedForTwoActions-v0"),
            "needs a Box of real numbers with bounds",
        ),
        (ddpg, ("--tau", 1.5), "--tau must be above 0 and at most 1, not 1.5"),
        (ddpg, ("--final-noise-std", -0.1), "--final-noise-std must be at least 0 and finite, not -0.1"),
        (ddpg, ("--tau", 0), "--tau must be above 0 and at most 1, not 0"),
        (ddpg, ("--batch-norm", "--batch-size", 1), "--batch-norm needs a --batch-size of at least 2"),
        (ddpg, ("--buffer-size", 10**13, "--total-timesteps", 10**13), "memory of 10,000,000,000,000 needs"),
    ],
    ids=str,
)
def test_what_one_script_does_not_take(refuse, script, arguments, text):
    assert text in refuse(script, *arguments)


@each_script()
def test_a_space_with_a_long_text_is_refused_in_one_line(refuse, script):
    assert "needs Discrete actions" in refuse(script, "--env-id", "probes:VeryManyActions-v0")


@each_script()
def test_a_film_that_cannot_be_made_is_refused_before_training(refuse, monkeypatch, script):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "pip install moviepy" in refuse(script, "--capture-video")


class RunsCode:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@each_script()
def test_bad_checkpoints(train, refuse, monkeypatch, script):
    _, folder = train(script, total_timesteps=20)
    path, env_id = folder / "checkpoint.pt", load(folder)["args"]["env_id"]
    whole, content = path.read_bytes(), load(folder)
    more = ("--total-timesteps", 100)
    damaged_one = f"holds no checkpoint.pt of {script.SCRIPT}.py, or a damaged one"

    for fewer in ((), ("--total-timesteps", 5)):
        assert "steps already: give more with --total-timesteps" in refuse(script, "--resume", folder, *fewer)
    for flag in ("--resume", "--evaluate"):
        assert f"is a run on {env_id}, not on Acrobot-v1" in refuse(script, flag, folder, "--env-id", "Acrobot-v1")
        assert "--learning-rate must be above 0" in refuse(script, flag, folder, *more, "--learning-rate", 0)
    assert "need an evaluation" in refuse(script, "--evaluate", folder, "--eval-episodes", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (folder, os.W_OK))  # for root, too
        for flag in ("--resume", "--evaluate"):
            assert "one: the folder cannot be written to, copy it first" in refuse(script, flag, folder, *more)
    for data in (b"", whole[:10], whole[: len(whole) // 2], whole[:-1], b"certainly not a checkpoint" * 100):
        path.write_bytes(data)
        for flag in ("--resume", "--evaluate"):
            assert damaged_one in refuse(script, flag, folder, *more)
    for damaged in ([1, 2, 3], {"model": content["model"]}, content | {"args": {}}):
        torch.save(damaged, path)
        assert damaged_one in refuse(script, "--resume", folder, *more)
    torch.save(content | {"args": content["args"] | {"more": RunsCode(folder / "made")}}, path)
    assert damaged_one in refuse(script, "--evaluate", folder)
    assert not (folder / "made").exists()
    torch.save(content | {"script": "another"}, path)
    assert "or a damaged one: it is of another.py" in refuse(script, "--resume", folder, *more)
    torch.save(content | {"model": {"wrong": torch.zeros(1)}}, path)
    for flag in ("--resume", "--evaluate"):
        assert f"the checkpoint does not fit {env_id}" in refuse(script, flag, folder, *more)
    for missing in content.keys() - {"script", "args", "step", "seconds"}:
        torch.save({name: value for name, value in content.items() if name != missing}, path)
        assert f"the checkpoint does not fit {env_id}" in refuse(script, "--resume", folder, *more)


def test_resuming_ddpg_needs_the_whole_replay_memory(train, refuse):
    _, folder = train(ddpg, total_timesteps=60)
    path = folder / "replay.npy"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:-1], whole[:50], b"", b"certainly no array" * 100):
        path.write_bytes(data)
        line = refuse(ddpg, "--resume", folder, "--total-timesteps", 90)
        assert line.startswith("--resume needs the replay memory as the run left it")
    for flag in ("--batch-norm", "--no-target-network"):
        line = refuse(ddpg, "--evaluate", folder, flag)
        assert line == "--pixels, --batch-norm and --target-network must be those of the run"
    path.unlink()
    line = refuse(ddpg, "--resume", folder, "--total-timesteps", 90)
    assert line.startswith("--resume needs the replay memory as the run left it")


@each_script(*WITH_WORKERS)
def test_only_the_two_backends_are_known(command, capfd, script):
    assert command(script, "--backend", "cuda") == 2
    assert "thread" in capfd.readouterr().err
