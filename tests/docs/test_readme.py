"""The code of the README and of the page on the cache runs as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "how_to" / "cache.md").read_text(encoding="utf-8")


def blocks():
    """Each block of Python, named by the section that it stands in."""
    section = "start"
    for part in re.finditer(r"^## ([^\n]*)$|```python\n(.*?)```", README, re.DOTALL | re.M):
        if part[1]:
            section = part[1]
        else:
            yield pytest.param(part[2], id=section)


BLOCKS = list(blocks())


def test_there_is_code():
    assert len(BLOCKS) > 1


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_of_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_code_of_the_page_on_the_cache_runs():
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code) == 2
    exec(compile("\n".join(code), "cache.md", "exec"), {})


def test_the_readme_is_read_in_two_minutes():
    assert len(README.encode()) <= 7000
