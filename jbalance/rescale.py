"""A~: the original attention weights, rescaled by the shares (METHOD section 2)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbalance import _search as search
from jbalance import checks


def weights(
    alpha: ArrayLike, association: ArrayLike, attention: ArrayLike, *, rule: str = "split"
) -> jax.Array:
    """Rescaled attention weights A~ by one of the three rules.

    Args:
      alpha: [N] shares, >= 0.
      association: a [N, K] >= 0, how much unit i claims key k.
      attention: A [..., K] >= 0, the original weights over K keys (or indicators).
      rule: "literal", "split" or "renormalize", see the functions of these names.

    Returns:
      A~ [..., N, K] for "literal" and "split", [..., K] for "renormalize".

    Raises:
      ValueError: unknown rule, shapes that do not fit, negative or NaN entries.
    """
    fn = checks.choice("rule", rule, RULES)
    return fn(alpha, association, attention)


def _claims(alpha: ArrayLike, association: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both in float32; ValueError unless they are [N] and [N, K], finite and >= 0."""
    checks.rank("alpha", alpha, 1, "[N]")
    checks.rank("association", association, 2, "[N, K]")
    checks.same_length("association", association, "alpha", alpha)
    checks.non_empty("association", association)
    given = {"alpha": alpha, "association": association}
    alpha, association = (jnp.asarray(checks.non_negative(name, x)) for name, x in given.items())
    return alpha, association


def _weights(attention: ArrayLike, association: jax.Array) -> jax.Array:
    """The original weights in float32; ValueError unless they are [..., K], finite and >= 0."""
    checks.rank("attention", attention, tuple(range(1, 9)), "[..., K]")
    checks.same_length("attention", attention, "association", association, axis=-1)
    checks.non_empty("attention", attention)
    return jnp.asarray(checks.non_negative("attention", attention))


def literal(alpha: ArrayLike, association: ArrayLike, attention: ArrayLike) -> jax.Array:
    """A~_ik = alpha_i / (sum_k' alpha_i a_ik') A_k, as printed in the source.

    alpha cancels: this is A_k / sum_k' a_ik'. Kept so that the source's figures can be reproduced. A
    unit without a share or without an association gets 0.
    """
    alpha, association = _claims(alpha, association)
    attention = _weights(attention, association)
    alpha, _ = _in_units(alpha)
    claim = alpha * jnp.sum(association, axis=1)
    factor = jnp.where(claim > 0, alpha / jnp.where(claim > 0, claim, 1.0), 0.0)
    return factor[:, None] * attention[..., None, :]


def split(alpha: ArrayLike, association: ArrayLike, attention: ArrayLike) -> jax.Array:
    """A~_ik = alpha_i a_ik / (sum_j alpha_j a_jk) A_k: every key divided among those that claim it.

    Conserving: sum_i A~_ik = A_k. A key that no unit claims goes to nobody: see `unclaimed`.
    """
    alpha, association = _claims(alpha, association)
    attention = _weights(attention, association)
    claim = _in_units(alpha)[0][:, None] * _in_units(association, axis=0)[0]
    claimed = jnp.sum(claim, axis=0)
    part = jnp.where(claimed > 0, claim / jnp.where(claimed > 0, claimed, 1.0), 0.0)
    return part * attention[..., None, :]


def renormalize(alpha: ArrayLike, association: ArrayLike, attention: ArrayLike) -> jax.Array:
    """A~_k = A_k g_k / sum_k' A_k' g_k' with the gain g = alpha^T a.

    The same as adding `logit_bias` to the attention logits. Where no key with attention has a gain,
    the result is 0.
    """
    alpha, association = _claims(alpha, association)
    attention = _weights(attention, association)
    scaled = _in_units(attention, axis=-1)[0] * _gain(alpha, association)[0]
    whole = jnp.sum(scaled, axis=-1, keepdims=True)
    return jnp.where(whole > 0, scaled / jnp.where(whole > 0, whole, 1.0), 0.0)


def logit_bias(alpha: ArrayLike, association: ArrayLike, *, minimum: float = -1e9) -> jax.Array:
    """log g, the bias [K] on the attention logits that equals the "renormalize" rule.

    Args:
      alpha: [N] shares.
      association: [N, K].
      minimum: the bias of a key without gain: finite, so that a row of such keys gives no NaN.

    Returns:
      log(alpha^T a) [K] float32, differentiable in alpha (gradient 0 where the gain is 0).
    """
    gain, exponent = _gain(*_claims(alpha, association))
    power = jnp.log(2.0) * exponent
    return jnp.where(gain > 0, jnp.log(jnp.where(gain > 0, gain, 1.0)) + power, minimum)


def unclaimed(alpha: ArrayLike, association: ArrayLike) -> jax.Array:
    """Keys [K] bool that no unit with a share claims, whose attention "split" gives to nobody."""
    alpha, association = _claims(alpha, association)
    return ~jnp.any((alpha[:, None] > 0) & (association > 0), axis=0)


def _gain(alpha: jax.Array, association: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha^T a over 2^exponent, [K] and []: it neither overflows nor vanishes."""
    (alpha, of_alpha), (association, of_association) = map(_in_units, (alpha, association))
    return alpha @ association, of_alpha + of_association


def _in_units(x: jax.Array, axis: int | None = None) -> tuple[jax.Array, jax.Array]:
    """x >= 0 over 2^exponent, by which the largest along the axis is in 1..2; exact."""
    keep = axis is not None
    largest = lax.stop_gradient(jnp.max(x, axis=axis, keepdims=keep))
    exponent = jnp.clip(search.exponent_of(largest), -126, 126)
    return search.scale(x, -exponent), exponent


RULES: dict[str, Callable[[ArrayLike, ArrayLike, ArrayLike], jax.Array]] = {
    "literal": literal,
    "split": split,
    "renormalize": renormalize,
}
