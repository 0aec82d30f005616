"""What the runs say: intervals over the recordings, and errors against bytes as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.harness import palette
from experiments.harness.statistics import paired_bootstrap
from experiments.speech import memories
from experiments.speech.experiment import CONDITIONS, PERCENTS

PICTURE = "speech_budget.png"
_KINDS = {"wrong": "said", "changed": "heard"}


def recordings(report: Mapping[str, Any], arm: str, condition: str, wrong: str) -> np.ndarray:
    """[recordings, 2] wrong words and all words; the novel, which all seeds have, is one recording."""
    own = sorted((r for r in report["runs"] if r["arm"] == arm), key=lambda r: r["seed"])
    rows = [[x for x in r["details"] if x["condition"] == condition] for r in own]
    pairs = [[(x[wrong], x[_KINDS[wrong]]) for x in row if wrong in x] for row in rows]
    novel = np.sum([row[0] for row in pairs], axis=0)
    return np.array([novel, *(pair for row in pairs for pair in row[1:])], float)


def intervals(report: Mapping[str, Any]) -> list[str]:
    """A line for each budget: words that the ladder gets wrong less those of another rule."""
    lines, have = [], {run["arm"] for run in report["runs"]}
    for percent in PERCENTS:
        ours = f"ladder, {percent}%"
        for rule in memories.RULES:
            theirs = f"{rule}, {percent}%"
            if rule == "ladder" or not {ours, theirs} <= have:
                continue
            cells = []
            for condition in CONDITIONS:
                a, b = (recordings(report, x, condition, "changed") for x in (ours, theirs))
                found = paired_bootstrap(a[:, 0], b[:, 0], a[:, 1])
                cells.append(f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
            lines.append(f"- {ours} less {theirs}: " + ", ".join(cells))
    return lines


def draw(report: Mapping[str, Any]) -> bytes:
    """A PNG: changed words against bytes, a panel for each condition, a line for each rule."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(CONDITIONS), sharey=True)
    have = {run["arm"] for run in report["runs"]}
    for panel, condition in zip(panels, CONDITIONS, strict=True):
        for i, rule in enumerate(memories.RULES):
            own = [p for p in PERCENTS if f"{rule}, {p}%" in have]
            pairs = [recordings(report, f"{rule}, {p}%", condition, "changed") for p in own]
            values = [100 * x[:, 0].sum() / x[:, 1].sum() for x in pairs]
            panel.plot(own, values, "o-", color=palette.SERIES[i], label=rule, markersize=4)
        panel.set_title(condition, fontsize=10)
        panel.set_xscale("log")
        panel.set_xticks(PERCENTS, [f"{p}%" for p in PERCENTS])
        panel.minorticks_off()
        panel.set_yscale("symlog", linthresh=1)
        panel.set_xlabel("of the bytes", fontsize=9)
        panel.grid(color=palette.GRID)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("words unlike the full cache's, %", fontsize=9)
    panels[-1].legend(fontsize=7)
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()
