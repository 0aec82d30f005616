"""The code of the README and of the page on the cache runs as it stands there."""

import json
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


def test_the_table_of_the_readme_is_that_of_the_recorded_run():
    recorded = json.loads((ROOT / "docs/results/kv_budget.score.json").read_text(encoding="utf-8"))
    for policy in ("ladder", "ladder-thorough"):
        (line,) = re.findall(rf"^\| `{policy}`.*$", README, re.M)
        said = re.findall(r"\*\*([\d.]+)\*\*, (\d+)", line)
        rows = [x for x in recorded["results"] if x["policy"] == policy]
        assert [x["budget"] for x in rows] == [0.25, 0.1, 0.05]
        for (kl, keys), row in zip(said, rows, strict=True):
            assert kl == f"{row['mean']['kl']:.{len(kl) - 2}f}"
            assert int(keys) == sum(case["passkey_exact"] for case in row["cases"])
            assert len(row["cases"]) == 16
