"""The how-to of explanations and rules runs as it stands there, over SmolLM2."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how_to" / "explain.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
# It decodes, and chooses greedily, as users do.
pytestmark = pytest.mark.full_effort


def test_the_how_to_runs():
    assert len(BLOCKS) > 5
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, PAGE.name, "exec"), names)
