"""Who got how much of the budget, and what the next token of each modality is worth, as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.harness import palette
from experiments.multimodal.tokens import MODALITIES

PICTURE = "multimodal_budget.png"
SHOWS = "Parts of the modalities in the tokens that are kept, and the prices of one token"


def draw(report: Mapping[str, Any]) -> bytes:
    """A PNG: modalities' parts by arm with and without noise, and prices of the ladder's budgets."""
    details = {run["arm"]: run["details"] for run in report["runs"]}
    figure = Figure(figsize=(9.6, 3.4), layout="constrained", dpi=120)
    *panels, prices = figure.subplots(1, 3)
    arms = [arm for arm in details if arm != "separate"]
    for panel, condition in zip(panels, ("clean", "noisy"), strict=True):
        left = np.zeros(len(arms))
        for m, name in enumerate(MODALITIES):
            part = np.array([details[arm]["parts"][condition][m] for arm in arms])
            panel.barh(arms, part, left=left, color=palette.SERIES[m], label=f"{name}s")
            left += part
        panel.invert_yaxis()
        panel.set_title(f"parts of what is kept, {condition}", fontsize=10)
    panels[1].set_yticks([])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, fontsize=7, frameon=False)
    priced = {arm: found["prices"] for arm, found in details.items() if found["prices"]}
    for i, (arm, found) in enumerate(priced.items()):
        x = np.arange(len(MODALITIES)) + 0.4 * (i - 0.5)
        own = [found[name] for name in MODALITIES]
        prices.bar(x, own, 0.35, color=palette.SERIES[3 + i], label=arm)
        prices.axhline(found["one"], color=palette.SERIES[3 + i], linestyle="--", linewidth=1)
    prices.set_xticks(range(len(MODALITIES)), [f"{name}s" for name in MODALITIES])
    prices.set_title("prices of a token (line: one budget)", fontsize=10)
    prices.legend(fontsize=7)
    for panel in (*panels, prices):
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()
