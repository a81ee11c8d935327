"""docs/lecture.md quotes the scripts as they are."""

import re

import pytest
from conftest import ROOT

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
