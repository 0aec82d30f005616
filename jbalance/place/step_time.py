"""Step time of a placement in which all devices wait for the fullest one, layer after layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jbalance import checks
from jbalance.place.types import Placement, Replicas, StepTime, Term


def step_time(placed: Placement | Replicas, seconds: jax.Array | float = 1.0) -> StepTime:
    """Predict the time of a step in which all devices wait for the fullest one, layer after layer.

    total = sum over layers of seconds * relative load, and the same of the bound, apart by the term
    that binds in each layer: whether to blame the loads or the solver, and what would help.

    Args:
      placed: of one layer, or of many (vmapped: a leading axis).
      seconds: [] or [layers] that a relative load of 1 takes; 1 where capacities are rates.

    Returns:
      A `StepTime`.

    Raises:
      ValueError: seconds negative, NaN or of another number of layers.
    """
    checks.instance("placed", placed, Placement, Replicas)
    seconds = checks.non_negative("seconds", seconds)
    layers = jnp.shape(placed.relative_load)
    if jnp.shape(seconds) not in ((), layers):
        raise ValueError(
            f"seconds has shape {jnp.shape(seconds)}: the placement has layers {layers}, give one or "
            f"as many"
        )
    least = jnp.atleast_1d(seconds * placed.bound)
    return StepTime(
        total=jnp.sum(seconds * placed.relative_load),
        bound=jnp.sum(least),
        by_term=jax.ops.segment_sum(least, jnp.atleast_1d(placed.term), len(Term)),
    )
