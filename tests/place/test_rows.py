"""Rows that are cut or dealt: layers to pipeline stages, causal tiles to ranks; the time of a step."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import Status, place
from jbalance.place import Term


def best_cut(loads, capacity, memory, room):
    """By trying every cut."""
    best = np.inf
    for cut in itertools.combinations(range(1, len(loads)), len(capacity) - 1):
        parts = np.split(loads, cut)
        fits = all(m.sum() <= r for m, r in zip(np.split(memory, cut), room, strict=True))
        worst = max(p.sum() / c for p, c in zip(parts, capacity, strict=True))
        best = min(best, worst) if fits else best
    return best


def test_stages_against_every_cut():
    rng = np.random.default_rng(0)
    loads = rng.lognormal(0, 1, (30, 9)).astype(np.float32)
    memory = rng.integers(1, 6, loads.shape).astype(np.float32)
    capacity, room = np.array([1, 2, 1], np.float32), np.array([9, 12, 12], np.float32)

    def run(loads, memory):
        return place.contiguous(loads, 3, capacity, memory=memory, memory_capacity=room)

    out = jax.tree.map(np.asarray, jax.vmap(run)(loads, memory))
    found = 0
    for i in range(len(loads)):
        best = best_cut(loads[i], capacity, memory[i], room)
        assert (np.diff(out.device_of[i]) >= 0).all()
        assert set(np.asarray(out.device_of[i])) == {0, 1, 2}
        held = np.bincount(out.device_of[i], memory[i], 3)
        if np.isfinite(best):
            found += 1
            assert (held <= room).all()
            np.testing.assert_allclose(out.relative_load[i], best, rtol=1e-5)
            assert out.bound[i] <= best * (1 + 1e-6)
        else:
            assert out.status[i] == Status.INFEASIBLE
    assert 5 < found < 30


def test_stages_of_equal_layers():
    out = place.contiguous(jnp.ones(8), 4)
    np.testing.assert_array_equal(out.device_of, [0, 0, 1, 1, 2, 2, 3, 3])
    assert out.relative_load == out.bound == 2
    np.testing.assert_array_equal(place.contiguous(jnp.zeros(3), 3).device_of, [0, 1, 2])


def test_visible_keys_against_the_mask():
    ids = np.repeat([3, 1, 1, 7], [5, 9, 2, 7])
    t = np.arange(ids.size)
    document = np.cumsum(np.append(True, ids[1:] != ids[:-1]))
    mask = (t[:, None] >= t) & (document[:, None] == document)
    for block in (1, 4, 23, 40):
        keys = np.add.reduceat(mask.sum(axis=1), np.arange(0, ids.size, block))
        np.testing.assert_array_equal(place.visible_keys(ids, block), keys)


def test_causal_tiles_are_balanced():
    rng = np.random.default_rng(1)
    tokens, ranks = 2**13, 32
    lengths = np.maximum(rng.lognormal(5.5, 1.2, 400), 4).astype(int)
    packed = np.repeat(np.arange(400), lengths)[:tokens]
    many = jax.vmap(lambda ids: place.causal_tiles(ids, ranks, 16))
    out = many(jnp.stack([jnp.zeros(tokens, int), jnp.asarray(packed)]))
    mean = out.load.mean(axis=1)
    assert out.relative_load[0] / mean[0] <= 1.0001  # one document: as zigzag
    assert out.relative_load[1] / mean[1] <= 1.005
    np.testing.assert_array_equal(out.count, tokens // 16 // ranks)


def test_step_time():
    loads = jnp.array([[4.0, 4.0, 4.0, 4.0], [9.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 0.0]])
    placed = jax.vmap(lambda x: place.pack(x, 2, swaps=0))(loads)
    out = place.step_time(placed, jnp.array([1.0, 2.0, 1.0]))
    assert out.total == 8 + 2 * 9 + 4
    assert out.bound == out.total
    np.testing.assert_array_equal(out.by_term, [8, 18, 4, 0, 0])
    one = place.step_time(jax.tree.map(lambda x: x[2], placed), 0.5)
    assert one.total == one.by_term[Term.PIGEON_HOLE] == 2
