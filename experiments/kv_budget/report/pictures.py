"""The report's pictures, each as one inline SVG with its alternative text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.kv_budget.report.drawing import (
    INK,
    MARK,
    MUTED,
    PLAIN,
    SERIES,
    columns,
    floats,
    log_ticks,
    new_figure,
    to_svg,
)
from experiments.kv_budget.report.wording import (
    RIVAL,
    Report,
    chosen_policy,
    find_policy,
    label,
    number,
    percent,
)
from jbalance.resources import human_bytes

_MARKERS = "osD^vPX*<>"


def importance(report: Report) -> str:
    """Importance of each token, with the pass key marked, above the share of heads that kept it."""
    mean, kept = (floats(report["importance"][name]) for name in ("mean", "kept"))
    name, key = label(chosen_policy(report)["policy"], 24), report["passkey"]
    alt = f"Two curves over {len(mean)} tokens: mean importance, and the share of heads that keep"
    alt += f" each token under {name}: {percent(np.nanmean(kept))} on average"
    if key:
        inside = np.nanmean(kept[key["start"] : key["stop"]])
        alt += f", {percent(inside)} inside the pass key at {key['start']} to {key['stop'] - 1}"
    with new_figure(3.9) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        x, peak, average = columns(mean)
        upper.set_title("Importance, mean over layers and heads")
        upper.fill_between(x, peak, color=SERIES[0], alpha=0.3, linewidth=0, step="mid")
        upper.plot(x, average, color=SERIES[0], linewidth=1.2)
        _heavy_tail(upper, average, peak)
        x, _, share = columns(kept)
        lower.set_title(f"Heads that keep the token ({name})")
        lower.fill_between(x, 100 * share, color=SERIES[2], alpha=0.75, linewidth=0, step="mid")
        lower.set(ylim=(0, 105), xlim=(-0.5, len(mean) - 0.5), xlabel="token in the context")
        lower.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        lower.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
        if key:
            _mark_key(upper, lower, key, len(mean))
        return to_svg(figure, "importance", alt)


def entries(report: Report) -> str:
    """Entries of every layer and head under the chosen plan, and beside it the uniform one."""
    chosen, rival = chosen_policy(report), find_policy(report, RIVAL)
    rows = [chosen] if rival is None or rival is chosen else [chosen, rival]
    grids = [np.array(row["entries"]) for row in rows]
    alt = "Heat map of cached entries, layer by head. " + " ".join(
        f"{label(row['policy'], 24)}: {grid.min()} to {grid.max()} per head, {grid.sum()} in all."
        for row, grid in zip(rows, grids, strict=True)
    )
    with new_figure(min(max(1.2 + 0.11 * len(grids[0]), 2.4), 4.8)) as figure:
        axes = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
        top = max(max(grid.max() for grid in grids), 1)
        for ax, row, grid in zip(axes, rows, grids, strict=True):
            image = ax.imshow(
                grid, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="none"
            )
            ax.set(title=label(row["policy"], 24), xlabel="key/value head")
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
            ax.yaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        axes[0].set_ylabel("layer")
        bar = figure.colorbar(image, ax=list(axes), label="cached tokens", aspect=30)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)
        return to_svg(figure, "entries", alt)


def lorenz(report: Report) -> str:
    """Lorenz curve of the tokens that the heads hold under the chosen plan."""
    chosen = chosen_policy(report)
    held = np.sort(np.array(chosen["entries"]).ravel())
    heads = np.linspace(0, 1, held.size + 1)
    part = np.concatenate([[0], np.cumsum(held)]) / max(held.sum(), 1)
    gini = 1 - (part[1:] + part[:-1]).sum() / held.size
    least = np.interp(0.5, heads, part)
    name = label(chosen["policy"], 24)
    alt = f"Lorenz curve of the tokens by head under {name}: the half of the heads that hold least "
    alt += f"hold {percent(least)} of the tokens; Gini coefficient {number(gini)}"
    with new_figure(2.9) as figure:
        ax = figure.subplots()
        ax.plot([0, 100], [0, 100], color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        ax.plot(100 * heads, 100 * part, color=SERIES[0], linewidth=2)
        ax.fill_between(100 * heads, 100 * part, 100 * heads, color=SERIES[0], alpha=0.18)
        ax.annotate("even", (62, 65), ha="right", color=MUTED)
        ax.set(title=f"{name}: Gini {number(gini)}", xlim=(0, 100), ylim=(0, 100))
        ax.set(xlabel="heads, those that hold least first (%)", ylabel="tokens (%)")
        ax.grid(linewidth=0.8)
        return to_svg(figure, "lorenz", alt)


def loads(report: Report) -> str:
    """Bytes of each device with an even part of the full cache, and under the chosen plan."""
    rows, number_of = chosen_policy(report)["devices"], len(report["devices"])
    before = report["full_cache_bytes"] / number_of
    names = [label(device["name"], 16) for device in report["devices"]]
    unit = 2 ** (10 * min(int(math.log2(max(before, 1)) // 10), 3))
    alt = f"Bars, bytes per device: before {human_bytes(before)} each; after " + ", ".join(
        f"{name} {human_bytes(row['live_bytes'])} of {human_bytes(row['budget_bytes'])}"
        for name, row in zip(names, rows, strict=True)
    )
    at = np.arange(number_of)
    with new_figure(1.2 + 0.5 * number_of) as figure:
        ax = figure.subplots()
        for side, values, color, words in (
            (-0.2, [before] * number_of, SERIES[1], "before"),
            (0.2, [row["live_bytes"] for row in rows], SERIES[0], "after"),
        ):
            ax.barh(at + side, np.array(values) / unit, height=0.36, color=color, label=words)
        budget = np.array([row["budget_bytes"] for row in rows]) / unit
        ax.vlines(budget, at - 0.42, at + 0.42, color=INK, linewidth=1.6, label="budget")
        ax.set_yticks(at, names)
        ax.set(xlabel=human_bytes(unit).split()[-1], ylim=(number_of - 0.4, -0.6))
        ax.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=3)
        return to_svg(figure, "loads", alt)


def has_prices(report: Report) -> bool:
    return any(row["price_per_byte"] is not None for row in chosen_policy(report)["devices"])


def prices(report: Report) -> str:
    """The chosen plan's price on every device, per KiB."""
    devices = chosen_policy(report)["devices"]
    names = [label(device["name"], 16) for device in report["devices"]]
    known = [row["price_per_byte"] for row in devices]
    words = ["no price" if p is None else number(1024 * p) for p in known]
    alt = "Bars, value of one more KiB per device: "
    alt += ", ".join(f"{name} {word}" for name, word in zip(names, words, strict=True))
    width = [1024 * p if p is not None and math.isfinite(p) else 0 for p in known]
    with new_figure(0.95 + 0.33 * len(devices)) as figure:
        ax = figure.subplots()
        bars = ax.barh(range(len(devices)), width, height=0.62, color=SERIES[0])
        ax.bar_label(bars, words, padding=4, color=INK)
        ax.set_yticks(range(len(devices)), names)
        ax.set(xlabel="value of one more KiB there", ylim=(len(devices) - 0.4, -0.6))
        ax.set_xlim(0, 1.22 * max(width) or 1)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter(PLAIN)
        ax.tick_params(axis="y", length=0)
        return to_svg(figure, "prices", alt)


def quality(report: Report) -> str:
    """KL to the full cache over the bytes of the cache, a line for every policy."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in report["curve"] or report["policies"]:
        if row["kl"] is not None and math.isfinite(row["kl"]) and row["kl"] > 0:
            curves.setdefault(row["policy"], []).append((row["cache_bytes"], row["kl"]))
    chosen, full_bytes = chosen_policy(report)["policy"], report["full_cache_bytes"]
    # The chosen plan first, in the first colour and on top.
    names = sorted(curves, key=lambda name: name != chosen)
    unit = 2 ** (10 * min(int(math.log2(max(full_bytes, 1)) // 10), 3))
    alt = "KL to the full cache over bytes. " + "; ".join(
        f"{label(name, 24)}: "
        + ", ".join(f"{number(kl)} at {human_bytes(b)}" for b, kl in sorted(curves[name]))
        for name in names
    )
    with new_figure(3.6 + 0.17 * math.ceil(len(names) / 3)) as figure:
        ax = figure.subplots()
        ax.set(xscale="log", yscale="log")
        for i, name in enumerate(names):
            x, y = np.array(sorted(curves[name])).T
            ax.plot(
                x / unit,
                y,
                label=label(name, 18),
                color=SERIES[i % len(SERIES)],
                linestyle=["-", "--", ":"][i // len(SERIES) % 3],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=6,
                linewidth=2.4 if name == chosen else 1.3,
                zorder=3 if name == chosen else 2,
            )
        ax.axvline(full_bytes / unit, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        ax.annotate(
            "full cache",
            (full_bytes / unit, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
        )
        points = np.array([point for name in names for point in curves[name]]).reshape(-1, 2)
        log_ticks(ax.xaxis, np.append(points[:, 0], full_bytes) / unit)
        log_ticks(ax.yaxis, points[:, 1])
        ax.grid(linewidth=0.8)
        ax.set_xlabel(f"bytes of the cache ({human_bytes(unit).split()[-1]})")
        ax.set_ylabel("KL to the full cache (nats)")
        if names:
            figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
        return to_svg(figure, "quality", alt)


def _heavy_tail(ax: Axes, average: np.ndarray, peak: np.ndarray) -> None:
    """Log axis where a few tokens (the sinks, usually) would flatten all the others."""
    positive = average[np.isfinite(average) & (average > 0)]
    top = np.nanmax(peak, initial=0)
    if len(positive) and math.isfinite(top) and top > 20 * np.median(positive):
        low = np.quantile(positive, 0.01) / 2
        ax.set(yscale="log", ylim=(low, 4 * top))
        log_ticks(ax.yaxis, np.array([low, 4 * top]))
    else:
        ax.set_ylim(0, 1.25 * top if math.isfinite(top) and top > 0 else 1)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(PLAIN)


def _mark_key(upper: Axes, lower: Axes, key: dict[str, Any], tokens: int) -> None:
    for ax in (upper, lower):
        ax.axvspan(key["start"] - 0.5, key["stop"] - 0.5, color=MARK, alpha=0.3, linewidth=0.8)
    left = key["start"] < tokens / 2
    upper.annotate(
        "pass key",
        (key["stop"] if left else key["start"], 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(4 if left else -4, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="top",
        color=MARK,
        weight="bold",
    )
