"""Kernels and tables count in 32 bits, also where a program has turned JAX's 64-bit mode on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_32_bits(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, traced with 64-bit types off: what its loops count in is then of one type."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return run
