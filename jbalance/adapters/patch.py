"""Patch of `jax.nn.dot_product_attention`, for models that call it by that name (many Llamas)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks


@contextlib.contextmanager
def patch_dot_product_attention(attention_fn: Callable[..., jax.Array]) -> Iterator[None]:
    """While it is open, `jax.nn.dot_product_attention` is `attention_fn`.

    Open it where the model is called, inside of the function that is jitted: what counts is which
    attention is traced.

        def loss_of(model, ids):
            with adapters.patch_dot_product_attention(attention_fn):
                return cross_entropy(model(ids), ids)

    The name is changed for the whole process meanwhile, so trace in one thread. A model that has bound
    the function under a name of its own, or writes its products out, is not reached: `adapters.decoder`
    is for those.

    Args:
      attention_fn: such as `adapters.attention_fn(plan_of)`; it takes `scale` where the model gives one.

    Raises:
      ValueError: an attention_fn that is no function; at the end, if nothing was reached: the function
        was not called by its name meanwhile.
    """
    checks.function("attention_fn", attention_fn)
    stock, module = jax.nn.dot_product_attention, cast(Any, jax.nn)
    reached = False

    def dot_product_attention(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        implementation: Any = None,
        return_residual: bool = False,
    ) -> jax.Array:
        nonlocal reached
        reached = True
        del implementation
        if return_residual:
            raise ValueError("return_residual is True: an attention_fn returns the outputs alone")
        given = {} if scale is None else {"scale": scale}
        size, keys = query.shape[-3], key.shape[-3]
        seen: Any = mask
        for more in (
            _window(local_window_size, size, keys),
            _shorter(query_seq_lengths, size, -1),
            _shorter(key_value_seq_lengths, keys, -2),
        ):
            seen = more if seen is None else seen if more is None else _both(seen, more)
        return attention_fn(query, key, value, bias=bias, mask=seen, is_causal=is_causal, **given)

    module.dot_product_attention = dot_product_attention
    try:
        yield
    finally:
        module.dot_product_attention = stock
    if not reached:
        raise ValueError(
            "nothing was reached: jax.nn.dot_product_attention was not called by that name. Open the "
            "patch inside of the jitted function, where the model is traced; a model that writes its "
            "attention out is reached by adapters.decoder, flax's modules by adapters.set_attention_fn"
        )


def _window(window: int | tuple[int, int] | None, queries: int, keys: int) -> np.ndarray | None:
    """[1, 1, T, S]: the keys from `left` before to `right` behind each query."""
    if window is None:
        return None
    left, right = (window, window) if isinstance(window, int) else window
    ahead = np.arange(keys) - np.arange(queries)[:, None]
    return ((ahead >= -left) & (ahead <= right))[None, None]


def _both(a: Any, b: Any) -> Any:
    """Both masks, with values if both have them: under jit `&` would trace them."""
    return np.asarray(a) & np.asarray(b) if checks.is_concrete(a, b) else a & b


def _shorter(lengths: jax.Array | None, size: int, axis: int) -> jax.Array | None:
    """[B, 1, T, 1] or [B, 1, 1, S]: what is not padding."""
    if lengths is None:
        return None
    valid = jnp.arange(size) < lengths[:, None]
    return jnp.expand_dims(valid[:, None], axis)
