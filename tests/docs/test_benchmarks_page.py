"""Figures of the page of benchmarks are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_weights_and_cache_in_one_memory():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    part = page.partition("## Weights and cache in one memory")[2].partition("\n## ")[0]
    rows = [re.findall(r"[\d.]*\d", line) for line in part.splitlines() if "**" in line]
    recorded = json.loads((ROOT / "docs/results/kv_budget.memory.json").read_text(encoding="utf-8"))
    totals: dict[str, dict] = {}
    for row in recorded["results"]:
        totals.setdefault(row["total"], {})[row["arm"]] = row
    assert len(rows) == len(totals) == 4
    for said, (name, arms) in zip(rows, totals.items(), strict=True):
        figures = [float(x) for x in said]
        want = [arms["one price"]["total_bytes"] / 1e6, arms["one price"]["kl"]]
        want += [arms["one price"]["predicted_kl"], arms["weights alone"]["kl"]]
        at = figures.index(pytest.approx(want[0], abs=0.05))
        assert figures[at : at + 4] == pytest.approx(want, rel=0.05), name
        best = min(x["kl"] for arm, x in arms.items() if arm != "one price")
        assert arms["one price"]["kl"] < 0.5 * best
