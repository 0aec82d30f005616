"""What units are worth by what happens without them: ablation one by one, and Shapley values.

A game is any function of coalitions: `worth(kept [N, U] bool) -> [N]`, the measure of N interventions in
which some units are kept and the others are taken out. `jax.vmap` makes it of a function of one mask;
`explain.ablate` measures a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks
from jbalance._bits import in_32_bits

Game = Callable[[jax.Array], Any]
MOST_EXACT = 10  # units, of which 1,024 coalitions are measured


class Shapley(NamedTuple):
    """Values that sum to what all units together are worth above none."""

    value: jax.Array  # [U]
    error: jax.Array  # [U] its standard error; 0 where it is exact


@in_32_bits
def leave_one_out(worth: Game, num_units: int) -> jax.Array:
    """The causal effect of each unit: worth with all of them less worth with all but one.

    Args:
      worth: of coalitions [U + 1, U].
      num_units: U.

    Returns:
      [U] float32.

    Raises:
      ValueError: fewer than one unit; a worth that is not one number a coalition.
    """
    num_units = checks.static_int("num_units", num_units, 1)
    everyone = np.ones((1, num_units), bool)
    measured = _measured(worth, np.concatenate([everyone, ~np.eye(num_units, dtype=bool)]))
    return measured[0] - measured[1:]


@in_32_bits
def shapley(worth: Game, num_units: int, key: jax.Array, *, num_permutations: int = 64) -> Shapley:
    """Shapley values by sampled permutations: a unit's mean gain over those that came before it.

    Unbiased: each permutation's gains sum to worth(all) - worth(none). Under jit if the game is.

    Args:
      worth: of coalitions, num_permutations (U + 1) in one call.
      num_units: U.
      key: of the permutations.
      num_permutations: P >= 2; the error falls with its root.

    Returns:
      `Shapley`: means, and standard errors of the mean over the permutations.

    Raises:
      ValueError: counts too small; a worth that is not one number a coalition.

    Reference: Shapley (1953); Castro, Gómez and Tejada, Computers & Operations Research 36 (2009).
    """
    num_units = checks.static_int("num_units", num_units, 1)
    checks.random_key("key", key)
    num_permutations = checks.static_int("num_permutations", num_permutations, 2)
    order = jax.vmap(lambda k: jax.random.permutation(k, num_units))(
        jax.random.split(key, num_permutations)
    )
    turn = jnp.argsort(order, axis=1)  # [P, U] when each unit comes
    kept = turn[:, None, :] < jnp.arange(num_units + 1)[:, None]  # [P, U + 1, U]
    measured = _measured(worth, kept.reshape(-1, num_units)).reshape(num_permutations, -1)
    gain = jnp.take_along_axis(jnp.diff(measured, axis=1), turn, axis=1)
    error = jnp.std(gain, axis=0, ddof=1) / np.sqrt(num_permutations)
    return Shapley(jnp.mean(gain, axis=0), error)


@in_32_bits
def exact_shapley(worth: Game, num_units: int) -> Shapley:
    """Shapley values from all coalitions: sum over S without i of |S|! (U-|S|-1)! / U! gains.

    Args:
      worth: of coalitions, all 2^U in one call.
      num_units: U, at most 10.

    Returns:
      `Shapley` without errors.

    Raises:
      ValueError: more units; a worth that is not one number a coalition.
    """
    hint = f"at most {MOST_EXACT} are enumerated; sample more of them by `shapley`"
    num_units = checks.static_int("num_units", num_units, 1, MOST_EXACT, hint)
    coalition = np.arange(2**num_units)
    kept = (coalition[:, None] >> np.arange(num_units)) & 1 == 1
    size = kept.sum(axis=1)
    factorial = np.cumprod(np.concatenate([[1.0], np.arange(1.0, num_units + 1)]))
    measured = _measured(worth, kept)
    others = [coalition[~kept[:, i]] for i in range(num_units)]
    without = np.stack(others)  # [U, 2^(U-1)]
    joined = without | (1 << np.arange(num_units))[:, None]
    weight = factorial[size] * factorial[num_units - np.minimum(size, num_units - 1) - 1]
    weight = (weight / factorial[num_units])[without].astype(np.float32)
    value = jnp.sum(weight * (measured[joined] - measured[without]), axis=1)
    return Shapley(value, jnp.zeros_like(value))


def _measured(worth: Game, kept: Any) -> jax.Array:
    """[N] float32: what a game says of coalitions [N, U]."""
    checks.function("worth", worth)
    kept = jnp.asarray(kept)
    measured = jnp.asarray(worth(kept), jnp.float32)
    if measured.shape != kept.shape[:1]:
        raise ValueError(
            f"worth gave shape {measured.shape} for {kept.shape[0]} coalitions: it must give one number "
            f"for each, [{kept.shape[0]}]"
        )
    return measured
