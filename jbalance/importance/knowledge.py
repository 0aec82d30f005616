"""Knowledge as a prior: rules about units, compiled to a prior, to floors and to implications.

"Tokens of these spans matter", "these always stay", "who keeps A keeps B, too". A rule is about a mask
of units, so whatever can be told of them will do: an entity's spans, a speaker's turns, a section.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.types import container


class Matters(NamedTuple):
    """These units are worth `times` as much as others, before anything is measured."""

    where: ArrayLike  # [U] bool
    times: float


class Keep(NamedTuple):
    """These units always stay."""

    where: ArrayLike  # [U] bool


class Implies(NamedTuple):
    """If any of these units stays, those do."""

    kept: ArrayLike  # [U] bool
    then: ArrayLike  # [U] bool


Rule = Matters | Keep | Implies


@container
class Knowledge:
    """What rules come to; U units, R implications."""

    prior: jax.Array  # [U] float32 > 0, for `blend`
    beta: jax.Array  # [] float32 in 0..1, how much the prior counts beside what is measured
    keep: jax.Array  # [U] bool, floors: units that stay whatever they are worth
    kept: jax.Array  # [R, U] bool
    then: jax.Array  # [R, U] bool


def knowledge(rules: Iterable[Rule], num_units: int, *, beta: float = 0.5) -> Knowledge:
    """Compile rules about units.

    Priors of several rules multiply. What an implication asks of units that always stay always stays.

    Args:
      rules: `Matters`, `Keep` and `Implies` of masks [U].
      num_units: U.
      beta: β of `blend`, in 0..1.

    Returns:
      `Knowledge`: `blend(w, prior, beta)` for the worth, `imply` for what it orders, and `keep` for the
      floor of an allocation. `decode.read` takes it as a whole.

    Raises:
      ValueError: something that is no rule, masks of another shape, times that are not positive.
    """
    num_units = checks.static_int("num_units", num_units, 1)
    beta = checks.static_float("beta", beta, 0, 1)
    prior, keep = np.ones(num_units, np.float32), np.zeros(num_units, bool)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def mask(name: str, x: ArrayLike) -> np.ndarray:
        return np.asarray(checks.booleans(name, x, (num_units,), "[U]"))

    for i, rule in enumerate(checks.items("rules", rules, "rules")):
        name = f"rules[{i}]"
        if isinstance(rule, Matters):
            low = checks.FLOAT32_TINY
            times = checks.static_float(f"{name}.times", rule.times, low, checks.FLOAT32_MAX)
            prior = np.where(mask(f"{name}.where", rule.where), prior * np.float32(times), prior)
        elif isinstance(rule, Keep):
            keep |= mask(f"{name}.where", rule.where)
        elif isinstance(rule, Implies):
            pairs.append((mask(f"{name}.kept", rule.kept), mask(f"{name}.then", rule.then)))
        else:
            raise ValueError(f"{name} is {reprlib.repr(rule)}: it must be Matters, Keep or Implies")
    checks.positive("prior, the product of all times,", prior)
    kept, then = (
        np.array([pair[side] for pair in pairs], bool).reshape(-1, num_units) for side in (0, 1)
    )
    closed = _raised(jnp.asarray(keep), jnp.asarray(kept), jnp.asarray(then))
    return Knowledge(
        jnp.asarray(prior),
        jnp.float32(beta),
        closed,
        jnp.asarray(kept),
        jnp.asarray(then),
    )


def imply(w: ArrayLike, known: Knowledge) -> jax.Array:
    """The least worth, at least w, by which no price keeps a unit without what it implies.

    w'_b >= max over a in A of w'_a for each implication from A to b, in chains as well: whatever keeps
    all units above some worth keeps what follows from them.

    Args:
      w: [..., U] >= 0, worth, or codes of worth in uint8.
      known: of the U units.

    Returns:
      w', float32, or codes.

    Raises:
      ValueError: units that differ in number; worth that is negative or not finite.
    """
    checks.instance("known", known, Knowledge)
    checks.rank("w", w, tuple(range(1, 9)), "[..., U]")
    checks.same_length("w", w, "known.keep", known.keep, axis=-1)
    if getattr(w, "dtype", None) != np.uint8:
        w = checks.non_negative("w", w)
    return _raised(jnp.asarray(w), known.kept, known.then)


@jax.jit  # once for all eager calls of equal shapes
def _raised(w: jax.Array, kept: jax.Array, then: jax.Array) -> jax.Array:
    """w [..., U] with each side B raised to the best of its A, as often as chains are long."""

    def by_rule(w, rule):
        best = jnp.max(jnp.where(rule[0], w, jnp.zeros_like(w)), axis=-1, keepdims=True)
        return jnp.where(rule[1], jnp.maximum(w, best), w), None

    def by_all(_, w):
        return lax.scan(by_rule, w, (kept, then))[0]

    return lax.fori_loop(0, kept.shape[0], by_all, w)


def padded(known: Knowledge, num_units: int) -> Knowledge:
    """With further units, of which nothing is known."""
    more = num_units - known.keep.shape[0]
    keep, kept, then = (
        jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, more)])
        for x in (known.keep, known.kept, known.then)
    )
    prior = jnp.pad(known.prior, (0, more), constant_values=1)
    return Knowledge(prior, known.beta, keep, kept, then)


def in_spans(offsets: ArrayLike, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens lie in some spans of the text, in whole or in part.

    Args:
      offsets: [U, 2] first character of each token and the one behind its last, as tokenizers give them.
      spans: of characters, such as `(match.start(), match.end())` of a regular expression.

    Returns:
      [U] bool.

    Raises:
      ValueError: offsets that are no whole numbers [U, 2]; a span that ends before it begins.
    """
    checks.rank("offsets", offsets, 2, "[U, 2]")
    offsets = np.asarray(checks.whole("offsets", offsets))
    if offsets.shape[1] != 2:
        raise ValueError(f"offsets must have shape [U, 2], got shape {offsets.shape}")
    found = np.zeros(len(offsets), bool)
    for i, span in enumerate(checks.items("spans", spans, "pairs of characters")):
        checks.rank(f"spans[{i}]", span, 1, "[2]")
        checks.length(f"spans[{i}]", span, 2, "start and stop")
        start, stop = (checks.static_int(f"spans[{i}]", x) for x in span)
        if start > stop:
            raise ValueError(f"spans[{i}] is {(start, stop)}: it must be 0 <= start <= stop")
        found |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    return found
