"""Attention that computes only what was allocated."""

from jbalance.attention.partial import EMPTY, Partial, merge

__all__ = ["EMPTY", "Partial", "merge"]
