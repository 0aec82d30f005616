"""Division of a training step among tasks: examples, tokens, caches and loss weights.

METHOD's four steps with tasks as units: w -> alpha, C, c, c' -> what remains, alpha -> amounts. A task
that ends or starts is data: the arrays have a place for every task that there may be.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import _axes, allocate, checks, resources, shares
from jbalance import _search as search
from jbalance.types import Resources, Status, container


@container
class TaskAmounts:
    """What N tasks get of a step."""

    alpha: jax.Array  # [N] shares, which are the weights of their losses too
    examples: jax.Array  # [N] int32 of the batch
    tokens: jax.Array  # [N] int32
    cache: jax.Array  # [G, N] int32 blocks on each device
    status: jax.Array  # [] int32, a Status


def divide(
    w: ArrayLike,
    active: ArrayLike,
    *,
    batch: ArrayLike,
    tokens: ArrayLike,
    capacity: ArrayLike,
    demand: ArrayLike,
    used: ArrayLike,
    floor: ArrayLike = 0.0,
) -> TaskAmounts:
    """Shares of the active tasks, and what these come to.

    Of a device's cache each task keeps what it uses and needs, min(c, c'); what remains (METHOD step 2)
    is shared out by alpha up to what each still needs. What a task uses beyond its need it gives back,
    as one that has ended does with all.

    Args:
      w: [N] importance, >= 0.
      active: [N] bool; the others get nothing of anything.
      batch: [] examples of a step, whole.
      tokens: [] tokens of a step, whole.
      capacity: [G] C, cache of each device in blocks, whole.
      demand: [G, N] c, blocks that each task needs there, whole.
      used: [G, N] c', blocks that each task uses there now, whole.
      floor: [N] or [] least share of an active task, in 0..1.

    Returns:
      `TaskAmounts`. Sums are exact: all examples and tokens are given out while any task is active, no
      cache beyond its device's capacity. Under jit, needs that are in use beyond a capacity give status
      INFEASIBLE and are scaled down.

    Raises:
      ValueError: shapes or ranges as above; floors of the active tasks above 1.
    """
    _axes.unsplit(w=w, active=active, capacity=capacity, demand=demand, used=used)
    checks.rank("w", w, 1, "[N]")
    w = checks.non_negative("w", w)
    active = checks.booleans("active", active, np.shape(w), "[N]")
    for name, amount in (("batch", batch), ("tokens", tokens)):
        checks.rank(name, amount, 0, "[]")
        checks.whole(name, amount)
    checks.rank("capacity", capacity, 1, "[G]")
    for name, x in (("demand", demand), ("used", used)):
        checks.rank(name, x, 2, "[G, N]")
        if np.shape(x) != (*np.shape(capacity), *np.shape(w)):
            raise ValueError(
                f"{name} has shape {np.shape(x)}: it must be [G, N] = "
                f"{(*np.shape(capacity), *np.shape(w))}, as capacity and w say"
            )
    checks.rank("floor", floor, (0, 1), "[] or [N]")
    if np.ndim(floor):
        checks.same_length("floor", floor, "w", w)
    demand, used = checks.whole("demand", demand), checks.whole("used", used)
    capacity = checks.whole("capacity", capacity)
    active = jnp.asarray(active, bool)
    w = jnp.where(active, w, 0)
    # All of no importance count alike, but only those that are there.
    w = jnp.where(jnp.all(w == 0), active.astype(jnp.float32), w)
    some = jnp.any(active)
    cap = jnp.where(some, active.astype(jnp.float32), 1)
    floor = jnp.where(active, checks.in_range("floor", floor, 0, 1), 0)
    alpha = shares.proportional(w)
    alpha, shared = shares.constrained(alpha, floor=floor, cap=cap, with_status=True)
    alpha, shared = jnp.where(some, alpha, 0), jnp.where(some, shared, Status.OK)
    most = jnp.where(active, checks.INT32_MAX, 0)
    parts = [allocate.whole(alpha, amount, 0, most) for amount in (batch, tokens)]
    cache, status = _caches(alpha, active, capacity, demand, used)
    status = jnp.max(jnp.stack([status, shared, *(x.status for x in parts)]))
    return TaskAmounts(alpha, parts[0].amount, parts[1].amount, cache, status)


def remaining(capacity: ArrayLike, demand: ArrayLike, used: ArrayLike) -> Resources:
    """`resources.status` of tasks [G, N] that may each use every device of `capacity` [G]."""
    checks.rank("demand", demand, 2, "[G, N]")
    checks.rank("used", used, 2, "[G, N]")
    devices, tasks = np.shape(demand)
    device_of = np.repeat(np.arange(devices), tasks)
    demand, used = (
        jnp.ravel(x) if isinstance(x, jax.Array) else np.ravel(np.asarray(x))
        for x in (demand, used)
    )
    return resources.status(capacity, demand, used, device_of)


def task_of(examples: jax.Array, batch: int) -> jax.Array:
    """[B] int32: whose each example of a batch is, the tasks one after the other.

    Args:
      examples: [N] of `divide`, B in sum (fewer leave the last rows to task N: nobody's).
      batch: B, static.
    """
    checks.rank("examples", examples, 1, "[N]")
    batch = checks.static_int("batch", batch)
    ends = jnp.cumsum(checks.whole("examples", examples))
    return jnp.searchsorted(ends, jnp.arange(batch), side="right").astype(jnp.int32)


def _caches(alpha, active, capacity, demand, used):
    """[G, N] blocks, and a `Status`."""
    need = jnp.where(active, jnp.asarray(demand, jnp.int32), 0)
    kept = jnp.minimum(need, jnp.asarray(used, jnp.int32))
    devices, tasks = need.shape
    device_of = np.repeat(np.arange(devices), tasks)
    capacity = jnp.asarray(capacity, jnp.int32)
    # What is kept counts first: the floors; what remains goes by alpha.
    sums = search.total(kept.reshape(-1), jnp.asarray(device_of), devices, None)
    fits = sums <= capacity.astype(jnp.uint32)
    left = jnp.where(fits, capacity - sums.astype(jnp.int32), capacity)
    weight = jnp.where(fits[:, None], alpha, kept.astype(jnp.float32))
    more = jnp.where(fits[:, None], need - kept, kept)
    out = allocate.whole(weight.reshape(-1), left, 0, more.reshape(-1), device_of)
    amount = out.amount.reshape(devices, tasks) + jnp.where(fits[:, None], kept, 0)
    return amount, jnp.where(jnp.all(fits), out.status, Status.INFEASIBLE)
