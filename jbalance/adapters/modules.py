"""Balanced attention put into models that are there already."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def balance_nnx(model: Model, attention_fn: Callable[..., jax.Array]) -> Model:
    """The model, every `nnx.MultiHeadAttention` in it with that `attention_fn`; changed in place.

    Parameters and checkpoints stay as they are. Linen modules take theirs when they are made.

    Args:
      model: an nnx module.
      attention_fn: such as `adapters.attention_fn()`.

    Raises:
      ValueError: no such module in it.
    """
    found = [x for _, x in nnx.iter_graph(model) if isinstance(x, nnx.MultiHeadAttention)]
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without any nnx.MultiHeadAttention")
    for module in found:
        module.attention_fn = attention_fn
    return model
