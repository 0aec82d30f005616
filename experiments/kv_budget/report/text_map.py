"""The text as the cache remembers it: its tokens, darker the more bits of them are kept."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.kv_budget.report.wording import Report, clean, number

SHADES = 9  # one hue, from nothing to full: lightness alone tells them apart, whatever the eyes
_MOST_TOKENS = 4096  # on a page

CSS = (
    """\
.text-map {
  margin: 1rem 0; padding: .7rem .9rem; border: 1px solid var(--grid); border-radius: .3rem;
  white-space: pre-wrap; max-height: 34rem; overflow-y: auto; line-height: 1.75;
}
.text-map span { padding: .12rem 0; }
.text-map .s0 { color: var(--muted); }
"""
    + "\n".join(
        f".s{i} {{ background: color-mix(in srgb, var(--series0) {6 * i}%, transparent); }}"
        for i in range(SHADES)
    )
    + "\n"
)


def remembered(report: Report) -> str:
    """Tokens shaded by the bits that are kept of them, the mean over layers and heads.

    Hovering tells the bits, how many heads keep the token, what it is worth and what memory costs.
    """
    found, price = report["importance"], _price(report)
    bits = _finite(found["bits"])
    top = max(bits.max(initial=0), 1e-9)
    shades = np.ceil((SHADES - 1) * bits / top)
    titles = [
        f"{own:.1f} bits, {100 * kept:.0f} % of heads; worth {number(1024 * worth)} a KiB{price}"
        for own, kept, worth in zip(
            bits, found["kept"], _finite(found["worth_per_byte"]), strict=True
        )
    ]
    return _map(report["text"]["pieces"], shades, titles)


def asked_for(report: Report) -> str:
    """Tokens shaded by the rank of what they are worth to the heads' queries, the mean over heads."""
    worth = _finite(report["importance"]["mean"])
    rank = np.searchsorted(np.sort(worth), worth, side="right") / max(worth.size, 1)
    return _map(report["text"]["pieces"], np.floor((SHADES - 1) * rank), None)


def _map(pieces: Sequence[str], shades: np.ndarray, titles: Sequence[str] | None) -> str:
    spans = list(_spans(pieces[:_MOST_TOKENS], shades, titles))
    if len(pieces) > _MOST_TOKENS:
        spans.append(f" … and {len(pieces) - _MOST_TOKENS:,} tokens more")
    return f'<div class="text-map" tabindex="0">{"".join(spans)}</div>'


def _spans(
    pieces: Sequence[str], shades: np.ndarray, titles: Sequence[str] | None
) -> Iterator[str]:
    hovers = [f' title="{html.escape(x)}"' for x in titles or [""] * len(shades)]
    for piece, shade, hover in zip(pieces, shades, hovers, strict=False):
        yield f'<span class="s{int(shade)}"{hover if titles else ""}>{html.escape(clean(piece))}</span>'


def _finite(values: Sequence[float | None]) -> np.ndarray:
    return np.array([v if v is not None and math.isfinite(v) else 0.0 for v in values])


def _price(report: Report) -> str:
    """The price where memory is dearest, in the words of a hover."""
    rows = report["policies"][-1]["devices"]
    known = [row["price_per_byte"] for row in rows if row["price_per_byte"] is not None]
    known = [p for p in known if math.isfinite(p)]
    return f", price {number(1024 * max(known))}" if known else ""
