"""What a query sees of a cache: the tokens of its layer's window, through a soft cap of their logits.

Where layers have windows, tokens carry their positions, modulo 2^16 (`_layout`): a token that has left
its window is hidden at once, and gone with the next admission of its request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A quarter of what positions tell apart: tokens stay a while after they have left their window.
MOST_WINDOW = (1 << 14) - 1
NO_WINDOW = 2**31 - 1


class Limits(NamedTuple):
    """Of a layer's attention; static."""

    window: int | None = None  # tokens that a query sees, itself among them; None for all
    soft_cap: float | None = None  # c of c tanh(logit / c); None for none


FULL = Limits()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """What queries [N, T] see."""

    limits: Limits = dataclasses.field(default=FULL, metadata={"static": True})
    position: jax.Array | None = None  # [N, T] int32 of the queries, where there is a window
    bias: jax.Array | None = None  # [N, T] float32, what all logits of a query lack, for the cap

    def capped(self, logits: jax.Array) -> jax.Array:
        """c tanh((logits + bias) / c) of logits [N, T, S]; as they are without a cap."""
        if self.limits.soft_cap is None:
            return logits
        if self.bias is not None:
            logits = logits + self.bias[..., None]
        return capped(logits, self.limits)

    def reaches(self, time: jax.Array) -> jax.Array:
        """Whether tokens of times [N, 1, S] are in the window of the queries: [N, T, S]."""
        assert self.position is not None
        assert self.limits.window is not None
        return age(self.position[..., None], time) < self.limits.window


def capped(logits: jax.Array, limits: Limits) -> jax.Array:
    """Logits under the soft cap, if there is one."""
    c = limits.soft_cap
    return logits if c is None else c * jnp.tanh(logits / c)


def age(position: jax.Array, time: jax.Array) -> jax.Array:
    """How many positions a time modulo 2^16 lies before a position; -2^15 .. 2^15 - 1."""
    apart = jnp.asarray(position, jnp.int32) - time.astype(jnp.int32)
    return ((apart + (1 << 15)) & 0xFFFF) - (1 << 15)


class Ages(NamedTuple):
    """Which tokens of a request's n units have left their windows, when it is weighed anew."""

    window: jax.Array  # [n] int32, NO_WINDOW for all tokens
    held: jax.Array  # [] int32, the next query of the tokens that are held
    new: jax.Array  # [] int32, the first query after the new ones

    def held_alive(self, time: jax.Array, unit: jax.Array) -> jax.Array:
        """Of tokens that are held, by their times modulo 2^16 and units, counted from the first."""
        return age(self.held, time) < self.window[unit]

    def new_alive(self, time: jax.Array, unit: jax.Array) -> jax.Array:
        """Of new tokens, by their positions and units."""
        return self.new - time < self.window[unit]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """Positions in a cache of B requests whose layers have windows."""

    window: jax.Array  # [n] int32 of a request's units
    next: jax.Array  # [B] int32 position of each request's next token
    recent: jax.Array  # [B, R] int32 positions of the recent tokens

    def ages(self, request: jax.Array | int) -> Ages:
        """Of a request between two tokens."""
        return Ages(self.window, self.next[request], self.next[request])


def clock_bytes(num_requests: int, units_per_request: int, recent_tokens: int) -> int:
    """Bytes of a `Clock`."""
    return 4 * (units_per_request + num_requests * (1 + recent_tokens))


def create_clock(
    windows: Sequence[int | None], slots: np.ndarray, num_requests: int, recent_tokens: int
) -> Clock:
    """Of requests at position 0.

    Args:
      windows: of each layer.
      slots: [L, K] unit of each head, -1 for those of other devices.
      num_requests: B.
      recent_tokens: R.
    """
    of_unit = np.full(int(slots.max()) + 1, NO_WINDOW, np.int32)
    for window, own in zip(windows, slots, strict=True):
        of_unit[own[own >= 0]] = NO_WINDOW if window is None else window
    return Clock(
        jnp.array(
            of_unit
        ),  # a copy: caches are donated, and asarray may keep the memory of the host
        jnp.zeros(num_requests, jnp.int32),
        jnp.zeros((num_requests, recent_tokens), jnp.int32),
    )
