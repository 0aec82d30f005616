"""Figures without a screen: new ones, their scales, and SVG in the colours of the page."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from experiments.kv_budget.report.wording import number

# Colours to draw with; in the SVG each becomes the page's variable of that name, which the page
# sets for light and for dark screens.
INK, MUTED, GRID, MARK = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#05050{i}" for i in range(8)]
VARIABLES = dict(zip([INK, MUTED, GRID, MARK], ["ink", "muted", "grid", "mark"], strict=True))
VARIABLES |= {colour: f"series{i}" for i, colour in enumerate(SERIES)}

_WIDTH_INCHES = 5.2  # narrow, so that the text is still readable at the width of a phone
_MAX_COLUMNS = 320  # of the pictures over tokens
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
}

#: Ticks as plain figures.
PLAIN = FuncFormatter(lambda value, _: number(value))


@contextmanager
def new_figure(height_inches: float) -> Iterator[Figure]:
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")


def floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], float)


def columns(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbouring tokens in one column: its middle, the largest value in it, the mean."""
    edges = np.linspace(0, len(values), min(len(values), _MAX_COLUMNS) + 1).astype(int)
    first, size = edges[:-1], np.diff(edges)
    peak = np.maximum.reduceat(values, first)
    return first + (size - 1) / 2, peak, np.add.reduceat(values, first) / size


def log_ticks(axis: Axis, values: np.ndarray) -> None:
    """Plain figures at 1, 2, 5 (or only powers of ten, or even steps, as the range asks)."""
    span = values.max() / values.min() if len(values) else 1
    subs = (1.0, 2.0, 5.0) if span < 1e3 else (1.0,)
    axis.set_major_locator(MaxNLocator(4) if span < 4 else LogLocator(subs=subs, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure to put into a page: no address of any kind, no id twice, the page's colours."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    view_box = re.search(r'viewBox="[\d. -]+"', svg)
    head = f'<svg {view_box and view_box[0]} role="img" aria-label="{html.escape(alt)}">'
    svg = head + re.split(r"<svg[^>]*>", svg, maxsplit=1)[1]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r'\s+id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
