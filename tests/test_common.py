"""common/: ranges of arguments, refusals, the arguments of an earlier run, random numbers, evaluation."""

import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch

from common import ranges
from common.arguments import fail, failing, load_checkpoint, parse_args
from common.evaluation import check_film, evaluate
from common.ranges import Range, check_args
from common.run import seed_everything

inf, nan = math.inf, math.nan


def refusal(capsys, function, *arguments) -> str:
    """The one line with which `function` ends the process, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


# Ranges


@dataclass
class Args:
    """Arguments of a script that there is not."""

    env_id: str = "CartPole-v1"
    seed: ranges.NonNegativeInt = 1
    total_timesteps: int = 1000
    sizes: tuple[ranges.PositiveInt, ...] = (64, 64)
    pair: tuple[ranges.Fraction, ranges.Fraction] | None = None
    std: ranges.NonNegativeFloat | None = None
    tau: ranges.Fraction = 0.1
    even: Annotated[int, Range("even", lambda x: x % 2 == 0)] = 0
    free: float = 0.0
    eval_episodes: int = 3
    capture_video: bool = False
    evaluate: str | None = None
    resume: str | None = None
    log_dir: str = "runs"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("PositiveInt", [1, 10**20], [0, -1]),
        ("NonNegativeInt", [0, 10**20], [-1]),
        ("PositiveFloat", [1e-30, 1e30], [0.0, -1.0, inf, nan]),
        ("NonNegativeFloat", [0.0, 1e30], [-1e-30, inf, nan]),
        ("Fraction", [0.0, 0.5, 1.0], [-1e-9, 1.001, inf, nan]),
    ],
)
def test_ranges_accept_what_they_say(name, good, bad):
    (accepted,) = getattr(ranges, name).__metadata__
    assert [x for x in good if not accepted.accepts(x)] == []
    assert [x for x in bad if accepted.accepts(x)] == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"seed": -1}, "--seed must be at least 0, not -1"),
        ({"sizes": (64, 0)}, "--sizes must be at least 1, not 0"),
        ({"pair": (1.5, 1.0)}, "--pair must be between 0 and 1, not 1.5"),
        ({"pair": (nan, 1.0)}, "--pair must be between 0 and 1, not nan"),
        ({"std": -0.5}, "--std must be at least 0 and finite, not -0.5"),
        ({"std": nan}, "--std must be at least 0 and finite, not nan"),
        ({"tau": 1.5}, "--tau must be between 0 and 1, not 1.5"),
        ({"even": 3}, "--even must be even, not 3"),
        ({"eval_episodes": 0, "capture_video": True}, "--capture-video and --evaluate need an evaluation"),
        ({"eval_episodes": 0, "evaluate": "a_run"}, "--capture-video and --evaluate need an evaluation"),
    ],
)
def test_a_number_out_of_range_is_refused(capsys, arguments, line):
    assert refusal(capsys, check_args, Args(**arguments)).startswith(line)


def test_numbers_in_range_and_without_one_are_accepted():
    check_args(Args())
    check_args(Args(sizes=(), pair=(0.0, 1.0), std=0.0, tau=1.0, even=4, free=nan, eval_episodes=0))


# Refusals and the arguments of an earlier run


def test_a_refusal_is_one_line(capsys):
    def raises(error: Exception):
        with failing("it broke"):
            raise error

    assert refusal(capsys, fail, "something is wrong") == "something is wrong"
    assert refusal(capsys, raises, ValueError("\nfirst line\nsecond line")) == "it broke: first line second line"
    assert refusal(capsys, raises, ValueError()) == "it broke: ValueError"


@pytest.fixture
def parse(monkeypatch):
    def call(*arguments) -> Args:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        return parse_args(Args, "script")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_arguments_of_the_run_take_the_place_of_the_defaults(tmp_path, parse):
    of_one_call = {"eval_episodes": 0, "capture_video": True, "resume": "elsewhere", "evaluate": "elsewhere"}
    stored = vars(Args(tau=0.2, std=0.5, sizes=(8,))) | of_one_call | {"of_an_older_version": 1}
    torch.save({"script": "script", "args": stored}, tmp_path / "checkpoint.pt")
    assert parse("--tau", 0.3) == Args(tau=0.3)
    for flag in ("resume", "evaluate"):
        expected = Args(tau=0.3, std=0.5, sizes=(8,), **{flag: str(tmp_path)})
        assert parse(f"--{flag}", tmp_path, "--tau", 0.3) == expected
        assert load_checkpoint(expected, "script")["args"] == stored
    assert load_checkpoint(Args(), "script") is None


def test_signals_end_the_process_before_and_after_a_run(parse, monkeypatch):
    """At once: Python may be on its way out already."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    parse()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    assert ended == [130, 143]


# Random numbers


def test_random_streams_are_of_seed_step_and_worker():
    places = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 2), (2, 1, 0)]
    numpy_draws, torch_draws, global_draws = [], [], []
    for place in places:
        for _ in range(2):
            numpy_draws.append(seed_everything(*place).integers(2**62))
            torch_draws.append(torch.randint(2**62, (1,)).item())
            global_draws.append(np.random.randint(2**62))  # what an environment may draw from
    for draws in (numpy_draws, torch_draws, global_draws):
        assert draws[::2] == draws[1::2]
        assert len(set(draws)) == len(places)
    assert numpy_draws[0] != np.random.default_rng(1).integers(2**62)  # the stream that Gymnasium takes


# Evaluation


@pytest.mark.parametrize(("seed", "first"), [(3, 2**31 + 3), (2**33 + 5, 2**31 + 5)])  # MinAtar takes 32 bits
def test_evaluation_plays_whole_episodes_from_one_seed(tmp_path, monkeypatch, seed, first):
    args = SimpleNamespace(seed=seed, eval_episodes=4, capture_video=False)
    monkeypatch.setattr(probes.Script, "log", [])
    env, seeds = gym.make("probes:Script-v0"), []
    played = gym.wrappers.RecordEpisodeStatistics(env)
    reset = env.unwrapped.reset
    env.unwrapped.reset = lambda seed=None, options=None: seeds.append(seed) or reset(seed=seed)
    text, mean = evaluate(lambda observation: 0, gym.wrappers.TransformReward(played, lambda r: 0.0), args, tmp_path)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert seeds == [first, None, None, None]
    assert sum(result["returns"]) == pytest.approx(sum(step[2] for step in probes.Script.log))
    assert sum(step[4] or step[5] for step in probes.Script.log) == 4
    assert result["episodes"] == len(result["returns"]) == 4
    assert mean == result["mean_return"] == pytest.approx(np.mean(result["returns"]))
    assert result["std_return"] == pytest.approx(np.std(result["returns"]))
    assert text == f"greedy return {mean:.1f} ± {result['std_return']:.1f} over 4 episodes"
    assert evaluate(None, env, SimpleNamespace(eval_episodes=0), tmp_path) == ("no evaluation", None)


def test_evaluation_ends_where_no_episode_does(tmp_path):
    args = SimpleNamespace(seed=1, eval_episodes=1, capture_video=False)
    env = gym.wrappers.RecordEpisodeStatistics(gym.make("probes:Endless-v0"))
    assert evaluate(lambda observation: 0, env, args, tmp_path)[1] == 30_000


def test_what_cannot_be_filmed_is_refused(capsys, monkeypatch):
    env = gym.make("CartPole-v1", render_mode="rgb_array")
    refusal(capsys, check_film, gym.make("probes:Constant-v0"))  # it cannot render at all
    with monkeypatch.context() as patch:
        patch.setattr(env.unwrapped, "render", lambda: None)
        assert "CartPole-v1 renders no rgb_array" in refusal(capsys, check_film, env)
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "pip install moviepy" in refusal(capsys, check_film, env)
