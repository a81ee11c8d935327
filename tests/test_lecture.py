"""docs/lecture.md quotes the scripts as they are, and the scripts have in common what they seem to."""

import re

import pytest
import torch
from conftest import ROOT

import a3c
import gae

BLOCKS = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "docs" / "lecture.md").read_text(), re.DOTALL)


def test_every_block_names_its_script():
    text = (ROOT / "docs" / "lecture.md").read_text()
    assert text.count("```python") == len(BLOCKS) > 30
    assert {script for script, _ in BLOCKS} == {"a3c", "async_qlearning", "gae", "ddpg"}


@pytest.mark.parametrize(("script", "block"), BLOCKS, ids=[f"{script}-{i}" for i, (script, _) in enumerate(BLOCKS)])
def test_every_quoted_line_stands_in_the_script(script, block):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    for line in block.splitlines():
        assert line in lines, f"{script}.py has no line {line!r}"


def test_a3c_and_gae_begin_with_the_same_networks():
    networks = []
    for script in (a3c, gae):
        torch.manual_seed(0)
        networks.append(script.mlp(3, 2, gain=0.5))
    assert str(networks[0]) == str(networks[1])
    assert all(map(torch.equal, networks[0].parameters(), networks[1].parameters()))
