"""The how-to of explanations and rules runs as it stands there, over SmolLM2."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how_to" / "explain.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# It decodes, and chooses greedily, as users do.
pytestmark = pytest.mark.full_effort


def test_the_how_to_runs():
    assert len(BLOCKS) > 5
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, PAGE.name, "exec"), names)
    # README quotes its sentence; what it counts differs a little with the processor's rounding.
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    quoted = re.search(r'"\.\.\. (because .*?) \.\.\."', readme)[1]
    said = names["words"][names["words"].index("because") :]
    assert NUMBER.sub("", said).startswith(NUMBER.sub("", quoted))
    figures = [list(map(float, NUMBER.findall(x))) for x in (quoted, said)]
    np.testing.assert_allclose(figures[1][: len(figures[0])], figures[0], rtol=0.05)
