"""JAX's 64-bit mode on: the same results, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PROGRAM = """
    import jax
    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import numpy as np
    from jbalance import allocate, attention, cache, multitask, place

    k = np.linspace(-1, 1, 24 * 8).astype(np.float32).reshape(1, 24, 1, 8)
    held = cache.create(20_000, 1, 1, 8, recent_tokens=4)
    y, held = cache.prefill(held, 0, k, k, k, frequencies=None)
    plan = attention.dense(attention.Tiling(24, 24, 8, 8))
    want = attention.attend(jnp.asarray(k), jnp.asarray(k), jnp.asarray(k), plan, causal=True).y
    np.testing.assert_allclose(y, want, atol=1e-5)
    step = jax.jit(lambda cache_, k: cache.step(cache_, 0, k, k, k))
    for _ in range(9):
        y, held = step(held, k[:, 0])
    assert np.isfinite(y).all() and int(held.arena.count.sum()) > 24
    cache.release(held, 0)
    loss = lambda q: attention.attend(q, k, k, plan, causal=True).y.sum()
    assert np.isfinite(jax.grad(loss)(jnp.asarray(k))).all()
    np.testing.assert_array_equal(allocate.whole(np.arange(1, 5), 9).amount, [1, 2, 3, 3])
    np.testing.assert_array_equal(place.pack(np.arange(1, 5), 2).load, [5, 5])
    for weighting in (multitask.upgrad(), multitask.fair(1.0), multitask.fair(float("inf"))):
        gram = jnp.array([[2.0, -1.0], [-1.0, 2.0]])
        weights, _ = weighting.weigh(multitask.TaskStats(gram, None), weighting.init(2))
        np.testing.assert_allclose(weights[0], weights[1], rtol=1e-3)
"""


def test_all_stages_in_64_bit_mode():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
