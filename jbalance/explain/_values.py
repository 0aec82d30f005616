"""Explanations are about numbers that are there: they are made on the host, outside of jit."""

from __future__ import annotations

from typing import Any

from jbalance import checks


def concrete(**arrays: Any) -> None:
    """ValueError for traced arrays, which have no values yet."""
    for name, x in arrays.items():
        if not checks.is_concrete(x):
            raise ValueError(
                f"{name} is traced: an explanation is made of values, so call it outside of jit"
            )
