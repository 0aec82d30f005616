"""jbalance: balance attention over accelerators, as pure JAX functions.

The stages in the order in which data flows through them. `multitask` needs optax and `adapters` needs
flax, so these two are imported when they are first asked for.
"""

import importlib  # noqa: I001  (pipeline order)
from typing import Any

from jbalance import types
from jbalance import importance, resources, shares, allocate, place, rescale
from jbalance import audit, tasks
from jbalance import attention, cache, decode, sharded, explain
from jbalance.balance import balancer
from jbalance.tune import tune
from jbalance.types import Binding, Status

__version__ = "0.1.0"

_LAZY = ("multitask", "adapters")

__all__ = [  # noqa: RUF022  (pipeline order)
    # stages
    "importance",
    "resources",
    "shares",
    "allocate",
    "place",
    "rescale",
    # the steps composed, and the loop around training
    "balancer",
    "tune",
    # tasks of one step, and who got what
    "tasks",
    "audit",
    # attention over tiles, the cache, decoding over it, and all of it over a mesh
    "attention",
    "cache",
    "decode",
    "sharded",
    # why units got what they got
    "explain",
    # with optax and flax
    "multitask",
    "adapters",
    # what the stages hand to each other
    "types",
    "Binding",
    "Status",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"jbalance.{name}")
    raise AttributeError(f"module 'jbalance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
