"""Figures and names of a report in words: units, cleaned text, the plan to look at, the verdict."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

Report = dict[str, Any]

#: The plan that the pictures look at, and the one that they put beside it.
CHOSEN, RIVAL = "ladder", "uniform"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits; `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:,.{digits}g}" if math.isfinite(value) else "not finite"


def fixed(value: float | None, decimals: int = 0, suffix: str = "") -> str:
    """A figure with so many decimals, for columns read from top to bottom; `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:,.{decimals}f}{suffix}" if math.isfinite(value) else "not finite"


def percent(fraction: float | None) -> str:
    return fixed(None if fraction is None else 100 * fraction, 1, " %")


def yes_no(flag: bool | None) -> str:
    return "-" if flag is None else "yes" if flag else "no"


def clean(text: str, limit: int | None = None) -> str:
    """Text fit for any screen: no control codes, no lone surrogates, cut with an ellipsis."""
    text = "".join(
        "\ufffd" if unicodedata.category(char) in {"Cc", "Cs"} and char not in "\n\t" else char
        for char in (text if limit is None else text[: limit + 1])
    )
    return text if limit is None or len(text) <= limit else text[: limit - 1].rstrip() + "…"


def label(text: str, limit: int = 40) -> str:
    """Text on one line."""
    return clean(" ".join(text[: 8 * limit].split()), limit)


def find_policy(report: Report, name: str) -> dict[str, Any] | None:
    return next((row for row in report["policies"] if row["policy"] == name), None)


def chosen_policy(report: Report) -> dict[str, Any]:
    """The ladder; the last policy where the run left the ladder out."""
    return find_policy(report, CHOSEN) or report["policies"][-1]


def policy_name(row: dict[str, Any]) -> str:
    return label(row["policy"]) + ("" if row["within_budget"] else " (over)")


def verdict(report: Report) -> str:
    """One sentence: how far the chosen plan is from the full cache, and the next best plan."""
    chosen = chosen_policy(report)
    name, kl = label(chosen["policy"]), chosen["kl"]
    room = (
        f"{name} holds {percent(chosen['cache_bytes'] / report['full_cache_bytes'])} of the bytes"
    )
    words = f"{room}, and its KL to the full cache is {number(kl)} nats per token"
    others = [
        row
        for row in report["policies"]
        if row is not chosen and row["within_budget"] and _positive(row["kl"])
    ]
    if not others or not _positive(kl) or not chosen["within_budget"]:
        return words + "."
    best = min(others, key=lambda row: row["kl"])
    return (
        f"{words}: {kl / best['kl']:.2f} times that of {label(best['policy'])} ({number(best['kl'])}), "
        f"the best of the other plans within the budget."
    )


def evenness(report: Report) -> str:
    """One sentence about the chosen plan on several devices; empty where there is one, or no budget."""
    chosen = chosen_policy(report)
    even = chosen.get("evenness")
    if even is None:
        return ""
    time = even["layer_time"] / even["layer_time_bound"]
    return (
        f"The layers of {label(chosen['policy'])} take {time:.3f} times a time that no placement beats, "
        f"and its fullest device holds {percent(even['memory_over_even'])} more than its share."
    )


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0
