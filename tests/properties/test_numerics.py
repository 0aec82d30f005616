"""Half precision, logits of every size, and the same bits: against float64 in NumPy.

The errors that are allowed are those of the formats: units in the last place of what is stored.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jbalance import allocate, attention, cache, place, rescale, sharded, shares
from jbalance.attention import Tiling

TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SIZE, HEADS, KV_HEADS, DIM = 24, 4, 2, 16
TILING = Tiling(SIZE, SIZE, 8, 8)
RNG = np.random.default_rng(3)
Q, K, V = (RNG.normal(size=(1, SIZE, n, DIM)) for n in (HEADS, KV_HEADS, KV_HEADS))
# What logits look like: the scale of q and k in which they come, and the keys.
LOGITS = {
    "ordinary": (1.0, K),
    "1e4": (1e4 / np.abs(np.einsum("bthd,bshd->hts", Q, np.repeat(K, 2, 2))).max() * 4, K),
    "all equal": (1.0, np.broadcast_to(K[:, :1], K.shape)),
    "zero": (0.0, K),
    "one-hot": (300.0, K),
    "denormal": (1e-39, K),
}


def dense(q, k, v):
    """Causal attention [1, S, H, D] in float64 of operands as they are stored."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(DIM)
    logits = np.where(np.tri(SIZE, dtype=bool), logits, -np.inf)
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weight / weight.sum(axis=-1, keepdims=True), v)


def operands(case, name):
    """q, k, v of a type; the scale is in q, which half precision must hold."""
    scale, keys = LOGITS[case]
    kind = TYPES[name]
    with np.errstate(under="ignore"):
        return (Q * scale).astype(kind), keys.astype(kind), V.astype(kind)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("case", LOGITS)
def test_attend(case, name):
    q, k, v = operands(case, name)
    plan = attention.dense(TILING)
    y = np.asarray(attention.attend(jnp.asarray(q), k, v, plan, causal=True).y, np.float64)
    # XLA takes numbers below the smallest normal one for zero.
    want = dense(np.where(np.abs(np.asarray(q, float)) < 2.0**-126, 0, q), k, v)
    # Logits of 1e4 are held to 1e4 units of float32, by so much the weights may differ.
    largest = max(1.0, np.abs(np.asarray(q, float)).max() * 8)
    bound = 4 * EPSILON[name] * np.abs(V).max() + 16 * 2.0**-23 * largest
    assert np.abs(y - want).max() <= bound


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("case", LOGITS)
def test_the_cache_of_frames(case, name):
    """Codes of 8 bits: the error is that of the codes, whatever the logits' size and the type."""
    q, k, v = operands(case, name)
    held = cache.create(200_000, 1, KV_HEADS, DIM, recent_tokens=0)
    ones = np.ones((1, 1, KV_HEADS, SIZE), np.float32)
    held = cache.write(held, k[None], v[None], ones, lengths=np.array([SIZE]))
    y = np.asarray(cache.attend(held, 0, q[:, -1:]), np.float64)
    assert np.isfinite(y).all()
    if case in ("1e4", "one-hot"):  # the best keys are nearer to each other than codes tell apart
        assert np.abs(y).max() <= 1.05 * np.abs(V).max()
        return
    want = dense(q, k, v)[:, -1:]
    assert np.abs(y - want).max() <= 0.03 * np.abs(V).max() + 4 * EPSILON[name] * np.abs(V).max()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4])
def test_shares_and_amounts_of_half_precision(name, size):
    with np.errstate(under="ignore", over="ignore"):
        w = (RNG.uniform(0.1, 1, 50) * size).astype(TYPES[name])
    if not np.isfinite(np.asarray(w, float)).all():
        pytest.skip("beyond the type")
    exact = np.asarray(w, np.float64)
    total = exact.sum()
    want = exact / total if total else np.full(50, 1 / 50)
    np.testing.assert_allclose(shares.proportional(w), want, rtol=1e-5, atol=1e-9)
    alpha = np.asarray(shares.softmax(w, 0.5), np.float64)
    np.testing.assert_allclose(
        alpha,
        np.exp(exact * 2 - exact.max() * 2) / np.exp(exact * 2 - exact.max() * 2).sum(),
        rtol=1e-2 if size > 1 else 1e-5,
        atol=1e-12,
    )
    out = allocate.whole(w, 1000)
    assert int(out.amount.sum()) == 1000
    assert np.abs(np.asarray(out.amount) - 1000 * want).max() <= 1
    filled = allocate.water_fill(w, 10.0, 0.01, 1.0)
    np.testing.assert_allclose(np.asarray(filled.amount, float).sum(), 10, rtol=1e-5)
    rescaled = rescale.weights(w, np.ones((50, 3)), np.array([0.2, 0.3, 0.5]), rule="split")
    claimed = 1.0 if total else 0.0
    np.testing.assert_allclose(rescaled.sum(axis=0), np.array([0.2, 0.3, 0.5]) * claimed, rtol=1e-5)


def bits_of(x):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(x)]


W, OF = RNG.uniform(0.1, 9, 64).astype(np.float32), RNG.integers(0, 8, 64)
SAME_BITS = {
    "whole": lambda: allocate.whole(W, np.full(8, 40), device_of=OF),
    "water_fill": lambda: allocate.water_fill(W, 77.0, 0.1, 9.0),
    "softmax": lambda: shares.softmax(W, 0.7),
    "pack": lambda: place.pack(W, 8, swaps=8),
    "choose": lambda: attention.choose(RNG_SCORE, 20, TILING, floor=0.5),
    "attend": lambda: attention.attend(
        *(jnp.asarray(x, jnp.float32) for x in (Q, K, V)), attention.dense(TILING), causal=True
    ),
}
RNG_SCORE = np.random.default_rng(0).uniform(size=(1, HEADS, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("name", SAME_BITS)
def test_two_runs_give_the_same_bits(name):
    """In one process, and compiled anew."""
    first = bits_of(SAME_BITS[name]())
    assert bits_of(SAME_BITS[name]()) == first
    jax.clear_caches()
    assert bits_of(SAME_BITS[name]()) == first


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_whole_amounts_have_the_same_bits_on_any_number_of_devices(num_devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("units",))
    got = sharded.whole(W, np.full(8, 40), device_of=OF, mesh=mesh, axis_name="units")
    want = allocate.whole(W, np.full(8, 40), device_of=OF)
    assert bits_of((got.amount, got.price)) == bits_of((want.amount, want.price))
