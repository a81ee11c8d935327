"""docs/lecture.md quotes the scripts as they are, and the scripts have in common what they seem to."""

import ast
import re

import pytest
import torch
from conftest import ROOT

import a3c
import gae

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lecture.md").read_text(), re.DOTALL)


def source(script: str, function: str) -> str:
    """The text of a function or method, by its qualified name; without one, of the whole script."""
    text = (ROOT / f"{script}.py").read_text()
    node = ast.parse(text)
    for name in function.split(".") if function else ():
        (node,) = [each for each in ast.walk(node) if getattr(each, "name", None) == name]
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]) if function else text


def test_there_is_code_of_every_script():
    heads = {line for block in BLOCKS for line in block.splitlines() if re.match(r"# \w+\.py", line)}
    assert len(BLOCKS) > 30
    assert {head[2:].partition(".")[0] for head in heads} == {"a3c", "async_qlearning", "gae", "ddpg"}


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0] for block in BLOCKS])
def test_what_is_quoted_stands_there(block):
    _, *parts = re.split(r"^# (\w+)\.py(?:, ([\w.]+))?\n", block, flags=re.MULTILINE)
    assert parts
    for script, function, lines in zip(*[iter(parts)] * 3, strict=True):
        rest = source(script, function)
        for part in re.split(r"^ *\.\.\.\n", lines, flags=re.MULTILINE):
            assert part
            _, found, rest = f"\n{rest}\n".partition(f"\n{part}")
            assert found, f"{function} in {script}.py does not have, in this order:\n{part}"


def test_a3c_and_gae_begin_with_the_same_networks():
    networks = []
    for script in (a3c, gae):
        torch.manual_seed(0)
        networks.append(script.mlp(3, 2, gain=0.5))
    assert str(networks[0]) == str(networks[1])
    assert all(map(torch.equal, networks[0].parameters(), networks[1].parameters()))
