"""The changes that docs/your_own.md shows can be made to the scripts as they are, and what comes out trains."""

import ast
import importlib.util
import re
import sys
import textwrap

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SHORT, load, tables
from gymnasium.spaces import Discrete

import a3c
import async_qlearning
import ddpg
import gae

TEXT = (ROOT / "docs" / "your_own.md").read_text()
CHANGES = re.findall(r"```diff\n# (\w+)\.py(.*?)\n(.*?)```", TEXT, re.DOTALL)
ORIGINALS = {"a3c": a3c, "async_qlearning": async_qlearning, "gae": gae, "ddpg": ddpg}
NETWORKS = {  # for CartPole-v1
    "a3c": lambda script: script.ActorCritic((4,), Discrete(2)),
    "async_qlearning": lambda script: script.QNetwork((4,), 2),
    "gae": lambda script: script.ActorCritic(4, Discrete(2)),
}


def changed(text: str, change: str) -> str:
    """The script's text after the change, whose parts stand in it once each."""
    for part in change.split("...\n"):
        lines = part.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        assert text.count(f"\n{old}") == 1, f"there is not one place for\n{old}"
        text = text.replace(f"\n{old}", f"\n{new}")
    return text


def test_there_are_changes():
    assert len(CHANGES) == TEXT.count("```diff") == 13


@pytest.mark.parametrize("name", ORIGINALS)
def test_each_argument_is_explained(name):
    check_help((ROOT / f"{name}.py").read_text())


def check_help(script: str):
    """Each field of Args has a docstring, in which tyro keeps no line break: it does before what is no letter."""
    (args,) = [node for node in ast.parse(script).body if getattr(node, "name", None) == "Args"]
    for field, text in zip(args.body[::2], args.body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert all(line.strip()[0].isalpha() for line in text.value.value.splitlines()[1:])


def test_a_notebook_goes_on_with_a_run(tmp_path):
    args = a3c.Args(num_workers=1, total_timesteps=100, gamma=0.9, eval_episodes=0, log_dir=str(tmp_path))
    assert a3c.main(args) == 0
    (run,) = tmp_path.iterdir()
    (code,) = re.findall(r"^    from common.arguments.*?\n\n", TEXT, re.DOTALL | re.MULTILINE)
    code = code.replace("runs/CartPole-v1__a3c__1__...", str(run)).replace("100_000", "200")
    exec(textwrap.dedent(code), {"a3c": a3c})
    args = load(run)["args"]
    assert (args["gamma"], args["total_timesteps"], args["num_workers"]) == (0.9, 200, 1)
    assert load(run)["step"] >= 200


@pytest.mark.parametrize(("name", "flags", "change"), CHANGES, ids=[f"{each[0]}-{i}" for i, each in enumerate(CHANGES)])
def test_what_is_changed_trains(name, flags, change, tmp_path, monkeypatch):
    path = tmp_path / f"my_{name}.py"
    path.write_text(changed((ROOT / f"{name}.py").read_text(), change.replace("cuda", "cpu")))
    check_help(path.read_text())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, script)
    spec.loader.exec_module(script)
    original, folder = ORIGINALS[name], tmp_path / "runs"
    options = {"total_timesteps": 200, "log_interval": 10, "eval_episodes": 1, "log_dir": str(folder)}
    options |= {"minibatch_size": 5} if name == "gae" else {}  # two of them in a batch
    args = tyro.cli(script.Args, args=flags.split(), default=script.Args(**options | SHORT[original]))
    assert script.main(args) == 0
    run = next(folder.glob("*__my_*"))
    episodes, metrics = tables(run)
    assert len(episodes) > 0
    assert len(metrics) > 0
    if "segment_length" in change:
        assert metrics["segment_length"].between(1, 5).all()
    if '/ "best"' in change:
        steps = np.arange(10, 201, 10)  # of the checkpoints
        scores = [episodes["return"][episodes["step"] <= T].tail(10).mean() for T in steps]
        assert load(run / "best")["step"] == steps[np.nanargmax(scores)] < 200
    if name == "async_qlearning":  # it acts as q says
        network = script.QNetwork((4,), 2)
        observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
        q = network.q(torch.from_numpy(observations))
        assert [network.act(each) for each in observations] == q.argmax(1).tolist()
    if name in NETWORKS and "torch.no_grad" in change:  # the network acts as numpy did
        observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
        actions = []
        for module in (original, script):
            module.seed_everything(1, 0)
            network = NETWORKS[name](module)
            actions.append([int(network.act(observation)) for observation in observations])
        assert actions[0] == actions[1]
        assert set(actions[0]) == {0, 1}
