"""Checks under jit: found by checkify, and programs that depend on nothing traced before them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import checkify

from jbalance import _debug_check, attention, cache, shares
from jbalance._debug_check import debug_check
from jbalance.attention import Tiling

Q = jnp.ones((1, 8, 2, 64))


def both(x):
    debug_check(jnp.all(x > 0), "must be > 0: {x}")
    debug_check(jnp.all(x < 5), "must be < 5")
    return x


def scanned(x):
    return lax.scan(lambda carry, row: (carry, both(row)), 0, x[None])[1]


def branched(x):
    return lax.cond(x[0] > -9, both, lambda x: x, x)


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("around", [both, jax.jit(both), jax.vmap(both), scanned, branched])
def test_checkify_finds_what_does_not_hold(around, numbered, monkeypatch):
    monkeypatch.setattr(_debug_check, "_NUMBERED", numbered)  # False as with a JAX of other names
    jax.clear_caches()
    found = checkify.checkify(around)
    assert found(jnp.array([1.0, 2.0]))[0].get() is None
    assert "must be > 0: {x}" in found(jnp.array([1.0, -2.0]))[0].get()
    assert "must be < 5" in found(jnp.array([1.0, 9.0]))[0].get()
    assert jax.jit(around)(jnp.array([1.0, 9.0])).size == 2  # nothing without it


def prefilled(q):
    empty = cache.create(1 << 20, 1, 2, 64)
    return cache.prefill(empty, 0, q, q, q, frequencies=None, lengths=jnp.full(1, 8))[0]


PROGRAMS = {
    "proportional": (shares.proportional, jnp.arange(4.0)),
    "attend": (
        lambda q: attention.attend(q, q, q, attention.dense(Tiling(8, 8, 4, 4)), causal=True).y,
        Q,
    ),
    "prefill": (prefilled, Q),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_the_same_whatever_was_traced_before(name):
    """As JAX's persistent compilation cache must find it again, in another process."""
    function, x = PROGRAMS[name]
    texts = []
    for checks_before in range(2):
        jax.clear_caches()
        for i in range(checks_before):
            jax.make_jaxpr(shares.proportional)(jnp.ones(3 + i))
        texts.append(jax.jit(lambda x: function(x)).lower(x).as_text())
    assert texts[0] == texts[1]
