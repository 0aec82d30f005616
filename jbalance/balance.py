"""Exponential moving average of importance, and the shares and whole amounts that follow from it.

`balancer(...)` returns an `init`/`update` pair of pure functions, as optax does. `update` runs inside a
jit-compiled step: new importance, budgets and feedback are data, so it is traced once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbalance import checks, shares
from jbalance.allocate import whole
from jbalance.importance import CURVE_BINS, blend
from jbalance.types import IntegerAllocation

_PRICED = "priced"


class BalanceState(NamedTuple):
    """What a balancer remembers between updates."""

    average: jax.Array  # [U] or [U, M] float32, moving average of w, before bias correction
    step: jax.Array  # [] int32, updates so far


class Balance(NamedTuple):
    """What a balancer hands out."""

    w: (
        jax.Array
    )  # [U] averaged importance, prior and feedback blended in; [U, M] curves as they are
    alpha: jax.Array  # [U] shares, sum 1
    allocation: IntegerAllocation  # whole amounts under the budgets, with prices


class Balancer(NamedTuple):
    """A pair of pure functions."""

    init: Callable[[int], BalanceState]  # of U units
    update: Callable[..., tuple[Balance, BalanceState]]


def balancer(
    *,
    decay: float = 0.9,
    rule: str = "proportional",
    floor: jax.Array | int = 0,
    cap: jax.Array | int = checks.INT32_MAX,
    prior: jax.Array | None = None,
    beta: float = 0.0,
    eta: float = 0.0,
    axis_name: str | None = None,
) -> Balancer:
    """Compose importance -> average -> prior and feedback -> shares -> whole amounts.

    w_t = decay w_{t-1} + (1 - decay) w, divided by 1 - decay^t so that the first updates are not drawn
    to zero; before the first, the shares are uniform (METHOD section 1, second source).

    Args:
      decay: of the moving average, in [0, 1): 0 forgets at once.
      rule: a name in `shares.SHARE_RULES`, or "priced": w is then [U, M], the `importance.worth_curve`
        of what each unit owns, and prior and feedback are blended into the shares.
      floor: [U] or [] least whole amount of a unit.
      cap: [U] or [] greatest whole amount of a unit.
      prior: [U] p >= 0, prior knowledge of the units' importance; its weight is beta.
      beta: in [0, 1].
      eta: >= 0, the weight of feedback.
      axis_name: mesh axis that the units are split over.

    Returns:
      `Balancer(init, update)` with
      `init(num_units) -> state` and
      `update(w, state, budget, device_of=None, feedback=None) -> (Balance, state)`:
      w [U] (or [U, M]) >= 0; budget [] or [G] whole amounts; device_of [U]; feedback [U] in [-1, 1].

    Raises:
      ValueError: decay, beta or eta out of range, unknown rule; and from update as the stages do.
    """
    _check(decay, beta, eta)

    def blended(w: jax.Array, feedback: jax.Array | None) -> jax.Array:
        return blend(w, prior, beta, feedback, eta, axis_name=axis_name)

    shares_of = _rule(rule, blended, axis_name)

    def init(num_units: int) -> BalanceState:
        num_units = checks.static_int("num_units", num_units, 1)
        shape = (num_units, CURVE_BINS) if shares_of.of_curves else (num_units,)
        return BalanceState(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.int32))

    def update(
        w: jax.Array,
        state: BalanceState,
        budget: jax.Array | int,
        device_of: jax.Array | None = None,
        feedback: jax.Array | None = None,
    ) -> tuple[Balance, BalanceState]:
        checks.rank("w", w, 1 + shares_of.of_curves, "[U, M]" if shares_of.of_curves else "[U]")
        w = checks.non_negative("w", w)
        checks.same_length("w", w, "state.average", state.average)
        w = jnp.asarray(w, jnp.float32)
        known, state = _averaged(w, state, decay)
        known, alpha = shares_of.run(known, budget, feedback)
        allocation = whole(alpha, budget, floor, cap, device_of, axis_name=axis_name)
        return Balance(known, alpha, allocation), state

    return Balancer(init, update)


@functools.partial(jax.jit, static_argnames="decay")
def _averaged(w: jax.Array, state: BalanceState, decay: float) -> tuple[jax.Array, BalanceState]:
    """The bias-corrected moving average with `w`, and the state after it.

    One program for all steps: without jit a power of a known number is one of its own for each.
    """
    step = state.step + 1
    # What is no importance makes this step invalid, but not those to come: it counts as before.
    valid = (w >= 0) & jnp.isfinite(w)
    before = state.average / jnp.where(state.step > 0, 1 - jnp.float32(decay) ** state.step, 1)
    average = decay * state.average + (1 - decay) * jnp.where(valid, w, before)
    known = jnp.where(valid, average / (1 - jnp.float32(decay) ** step), w)
    return known, BalanceState(average, step)


class _Rule(NamedTuple):
    """Shares from averaged importance."""

    of_curves: bool  # importance is [U, M] curves, else [U]
    run: Callable[..., tuple[jax.Array, jax.Array]]  # known, budget, feedback -> w, alpha


def _rule(name: str, blended: Callable[..., jax.Array], axis_name: str | None) -> _Rule:
    share = checks.choice("rule", name, shares.SHARE_RULES | {_PRICED: None})
    if share is None:

        def by_price(curves, budget, feedback):
            amount = jnp.sum(jnp.asarray(budget))
            return curves, blended(shares.priced(curves, amount, axis_name=axis_name), feedback)

        return _Rule(True, by_price)

    def by_weight(w, budget, feedback):
        del budget
        w = blended(w, feedback)
        return w, share(w, axis_name=axis_name)

    return _Rule(False, by_weight)


def _check(decay: float, beta: float, eta: float) -> None:
    if checks.static_float("decay", decay, 0, 1) == 1:
        raise ValueError(f"decay is {decay}: it must be below 1")
    checks.static_float("beta", beta, 0, 1)
    checks.static_float("eta", eta, 0, checks.FLOAT32_MAX)
