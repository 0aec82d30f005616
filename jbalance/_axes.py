"""Errors for arrays that are split over explicit mesh axes where a function works on one device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def unsplit(**arrays: Any) -> None:
    """ValueError for arrays split over explicit mesh axes, whose sums and sorts would cross devices."""
    for name, x in arrays.items():
        if isinstance(x, jax.Array) and any(jax.typeof(x).sharding.spec):
            raise ValueError(
                f"{name} is split over explicit mesh axes, {jax.typeof(x).sharding.spec}: use the "
                f"function of this name in jbalance.sharded, or put it together by jax.sharding.reshard"
            )


def unsplit_otherwise(**arrays: Any) -> None:
    """`unsplit`, unless the vectors among the arrays are all split alike."""
    vectors = [
        jax.typeof(x).sharding.spec for x in arrays.values() if isinstance(x, jax.Array) and x.ndim
    ]
    hosts = any(
        isinstance(x, list | tuple) or (isinstance(x, np.ndarray) and x.ndim > 0)
        for x in arrays.values()
    )
    if hosts or len(set(map(tuple, vectors))) > 1:
        unsplit(**arrays)
