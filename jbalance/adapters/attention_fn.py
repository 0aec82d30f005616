"""Block-sparse attention for Flax's attention modules, linen and nnx, with masks and dropout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import attention, checks
from jbalance.attention import Partial, TilePlan, Tiling


class PlanOf(Protocol):
    """Which tiles to compute, from q [B, T, H, D], k and v [B, S, K, D] of a layer."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, /, *, causal: bool | None
    ) -> TilePlan:
        """A plan for T queries and S keys.

        `causal` is True if query t sees keys s <= t + S - T only, as `is_causal` or a mask says that can
        be looked at; None if a traced mask decides, of which nothing is known.
        """


def all_tiles(q: jax.Array, k: jax.Array, v: jax.Array, /, *, causal: bool | None) -> TilePlan:
    """The full budget: every tile, or every causal one where that is known."""
    del v
    return attention.dense(Tiling(q.shape[1], k.shape[1], causal=bool(causal)))


def attention_fn(
    plan_of: PlanOf = all_tiles, *, backend: str | None = None
) -> Callable[..., jax.Array]:
    """An `attention_fn` for `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    Both kinds of module hand it what it names, masks too: linen passes only the keyword arguments that
    stand in a signature, nnx passes all (hence `**_`). With the full budget it gives what the stock
    functions give, but for queries that see no key: here they get zero, there the mean of all values.

    A mask that has values here and now (made outside of the jitted function, or by NumPy) and hides all
    keys after each query is recognized as causal. `make_causal_mask` inside of a jitted function gives
    a traced mask, in which nothing can be looked at: with `is_causal=True` in its place the plan is that
    of causal attention.

    Dropout of attention weights keeps the softmax's sum, as in the stock functions and with their bits:
    y = sum_s p_s m_s v_s is the attention with log m added to its logits, times the part of the sum that
    is left, exp(lse' - lse). It costs a second pass over the tiles.

    Args:
      plan_of: chooses the tiles, from the layer's own q, k and v; it is called inside of the gradient,
        so let it stop gradients. None of its tiles may depend on `mask`: masks only take away.
      backend: of `attention.attend`; an export for several platforms at once must name "xla".

    Returns:
      f(query [..., T, H, D], key [..., S, K, D], value [..., S, K, D], ...) -> [..., T, H, D], where K
      divides H. It raises ValueError for `is_causal` with T != S, where a query's position is not known,
      and for `sow_weights`, since weights are never there as a whole.
    """

    checks.function("plan_of", plan_of)

    def balanced_attention(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = False,
        is_causal: bool = False,
        scale: float | None = None,
        soft_cap: float | None = None,
        dtype: Any = None,
        module: Any = None,
        **_: Any,
    ) -> jax.Array:
        check_module(module)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        lead, (size, heads) = query.shape[:-3], query.shape[-3:-1]
        q, k, v = (_four(x.astype(dtype)) for x in (query, key, value))
        if is_causal and q.shape[1] != k.shape[1]:
            raise ValueError(
                f"is_causal is True with {q.shape[1]} queries and {k.shape[1]} keys: which keys the "
                f"first query sees is not known; give a mask"
            )
        causal = is_causal or is_causal_mask(mask, size, key.shape[-3])
        if causal and not is_causal and shows_all_before(mask, size, key.shape[-3]):
            mask = None  # `causal` says as much, at no cost
        logits = _logit_bias(bias, mask, lead)
        plan = plan_of(q, k, v, causal=causal)
        rules: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "backend": backend}
        attend = functools.partial(attention.attend, q, k, v, plan, causal=bool(causal), **rules)
        out = attend(bias=logits)
        y = out.y
        if dropout_rate > 0 and not deterministic:
            if dropout_rng is None:
                raise ValueError("dropout_rng is None: dropout needs a key")
            shape = (*lead, heads, size, key.shape[-3])
            shape = (1,) * (len(shape) - 2) + shape[-2:] if broadcast_dropout else shape
            kept = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, shape)
            y = _of_kept(out, attend(bias=_logit_bias(logits, kept, lead)), 1 - dropout_rate)
        return y.reshape(*lead, size, heads, -1)

    return balanced_attention


def check_module(module: Any) -> None:
    """ValueError for a module that Flax hands over, to which weights are sown."""
    if module is not None:
        raise ValueError(
            "sow_weights is True: attention over tiles and over a cache never holds the weights as a "
            "whole; use the stock attention_fn in the layer whose weights you want to see"
        )


def _of_kept(out: Partial, kept: Partial, part: float) -> jax.Array:
    """Dropout of weights: y of the kept keys under the softmax over all, scaled by 1 / part."""
    share = jnp.where(kept.lse > 0.5 * attention.EMPTY, jnp.exp(kept.lse - out.lse), 0)
    return (kept.y * (share / part)[..., None]).astype(out.y.dtype)


def is_causal_mask(mask: Any, num_queries: int, num_keys: int) -> bool | None:
    """Whether a mask [..., T|1, S|1] hides all keys s > t + S - T; None for one that is traced.

    One query at the last key sees nothing behind it, whatever its mask.
    """
    if mask is None:
        return False
    if num_queries == 1:
        return True
    if not checks.is_concrete(mask):
        return None
    behind = ~np.tri(num_queries, num_keys, num_keys - num_queries, dtype=bool)
    return not (_by_pair(np.asarray(mask), np.any) & behind).any()


def shows_all_before(mask: Any, num_queries: int, num_keys: int) -> bool:
    """Whether a mask is known to hide none of the keys s <= t + S - T."""
    if not checks.is_concrete(mask):
        return False
    before = np.tri(num_queries, num_keys, num_keys - num_queries, dtype=bool)
    return bool((_by_pair(np.asarray(mask), np.all) | ~before).all())


def _by_pair(mask: np.ndarray, reduce: Callable[..., Any]) -> np.ndarray:
    """[T|1, S|1] over the leading axes."""
    return reduce(mask.astype(bool), axis=tuple(range(mask.ndim - 2)))


def _four(x):
    """[..., T, H, D] as [B, T, H, D]."""
    return x.reshape(-1, *x.shape[-3:])


def _logit_bias(bias, mask, lead):
    """Both as one bias [B|1, H|1, T|1, S|1], -inf where the mask is false; None if there is neither."""
    if mask is None:
        return None if bias is None else _broadcastable(bias, lead)
    mask = _broadcastable(mask, lead).astype(bool)  # Flax makes masks of numbers
    return jnp.where(mask, 0.0 if bias is None else _broadcastable(bias, lead), -jnp.inf)


def _broadcastable(x, lead):
    """[..., H, T, S] with one axis for all of the batch's; of size 1 if all of them are."""
    x = jnp.asarray(x)
    x = x.reshape((1,) * (len(lead) + 3 - x.ndim) + x.shape) if x.ndim < len(lead) + 3 else x
    own = x.shape[:-3]
    if math.prod(own) != 1:
        x = jnp.broadcast_to(x, (*lead, *x.shape[-3:]))
    return x.reshape(-1, *x.shape[-3:])
