"""The report's tables as rows of text, the same for the terminal and for the page."""

from __future__ import annotations

from typing import Any

from experiments.kv_budget.report.wording import (
    Report,
    fixed,
    label,
    number,
    percent,
    policy_name,
    yes_no,
)
from jbalance.resources import human_bytes

POLICY_COLUMNS = (
    *("policy", "KL", "NLL rise", "perplexity", "top-1", "pass key"),
    *("cache", "budget", "plan", "tok/s"),
)
DEVICE_COLUMNS = ("policy", "device", "budget", "live", "entries", "price per byte")


def policy_rows(report: Report) -> list[list[str]]:
    return [
        [
            policy_name(row),
            number(row["kl"]),
            fixed(_nll_rise(row), 4),
            fixed(row["perplexity"], 2),
            percent(row["top1"]),
            yes_no(row["passkey_exact"]),
            human_bytes(row["cache_bytes"]),
            human_bytes(row["budget_bytes"]),
            fixed(row["plan_s"], 2, " s"),
            fixed(row["tokens_per_s"], 1),
        ]
        for row in report["policies"]
    ]


def device_rows(report: Report) -> list[list[str]]:
    return [
        [
            policy_name(row),
            label(device["name"]),
            human_bytes(held["budget_bytes"]),
            _live(held),
            f"{held['entries']:,}",
            number(held["price_per_byte"]),
        ]
        for row in report["policies"]
        for device, held in zip(report["devices"], row["devices"], strict=True)
    ]


def _live(held: dict[str, Any]) -> str:
    over = held["live_bytes"] > held["budget_bytes"]
    return human_bytes(held["live_bytes"]) + (" (over)" if over else "")


def _nll_rise(row: dict[str, Any]) -> float | None:
    missing = row["nll"] is None or row["nll_full"] is None
    return None if missing else row["nll"] - row["nll_full"]
