"""The colors of all figures, for light paper, and their counterparts for dark screens."""

from __future__ import annotations

INK, MUTED, GRID = "#1c2430", "#5c6876", "#dfe4ea"
SERIES = ("#0b63c4", "#b4540a", "#1a7f4b", "#a3388f", "#6250d0", "#806500", "#007780", "#b3261e")
DARK_INK, DARK_MUTED, DARK_GRID = "#e4e9ef", "#9aa7b5", "#2c3642"
DARK_SERIES = (
    "#6cb6ff", "#f0a35e", "#5fd39a", "#e58fd4", "#a99bff", "#d9bf4a", "#4fd0da", "#ff8a80",
)  # fmt: skip
