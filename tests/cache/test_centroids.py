"""What stays of tokens that leave: as by a plain loop, attended to as so many tokens, in exact bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance.attention import EMPTY, Partial, merge
from jbalance.cache import _centroids
from jbalance.cache._centroids import CHUNK_TOKENS, NUM_ENTRIES

U, N, S, D, T = 3, 2, 150, 16, 5
UNITS = np.array([2, 0])
absorb = jax.jit(_centroids.absorb)
add = jax.jit(_centroids.add)


def leaving(seed, size=S, share=0.6):
    """k, v, w and valid of tokens; what is not valid must not be looked at."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, N, size, D)).astype(np.float32)
    valid = rng.random((N, size)) < share
    k[~valid] = np.nan
    return k, v, rng.uniform(0.1, 1, (N, size)).astype(np.float32), valid


def by_loop(entries, k, v, w, valid):
    """`add` of one chunk, token by token, for one unit, in float64."""
    keys, values, count, weight = (np.array(x) for x in entries)
    keys, values, weight = (x.astype(float) for x in (keys, values, weight))
    tokens = np.flatnonzero(valid)
    opening = [int(s) for s in tokens[: int((count == 0).sum())]]
    seeds = keys.copy()
    for place, s in enumerate(opening, int((count > 0).sum())):
        seeds[place] = k[s]
    there = count.astype(bool) | (np.arange(NUM_ENTRIES) < (count > 0).sum() + len(opening))
    first = int((count > 0).sum())
    for s in tokens:
        apart = np.where(there, np.square(seeds - k[s]).sum(axis=1), np.inf)
        at = first + opening.index(s) if s in opening else int(apart.argmin())
        weight[at] += w[s]
        count[at] += 1
        keys[at] += (k[s] - keys[at]) * w[s] / weight[at]
        values[at] += (v[s] - values[at]) * w[s] / weight[at]
    return keys, values, count, weight


def fields(entries, row):
    return [x[row] for x in (entries.keys, entries.values, entries.count, entries.weight)]


@pytest.mark.parametrize("share", [0.02, 0.6, 1.0])  # of the first, entries stay open
def test_chunks_join_as_by_a_plain_loop(share):
    entries = _centroids.load(_centroids.create(U, D), UNITS)
    for seed in range(3):
        tokens = leaving(seed, CHUNK_TOKENS, share)
        want = [by_loop(fields(entries, n), *(x[n] for x in tokens)) for n in range(N)]
        entries = add(entries, *tokens)
        for n in range(N):
            for got, wanted in zip(fields(entries, n), want[n], strict=True):
                np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_many_tokens_join_chunk_by_chunk_and_others_keep_their_bytes():
    tokens, rest = leaving(0), _centroids.create(U, D)
    entries = _centroids.load(rest, UNITS)
    for first in range(0, S, CHUNK_TOKENS):
        entries = add(entries, *(x[:, first : first + CHUNK_TOKENS] for x in tokens))
    rest = absorb(rest, UNITS, *tokens)
    got = _centroids.load(rest, UNITS)
    np.testing.assert_array_equal(got.count, entries.count)
    np.testing.assert_array_equal(got.count.sum(axis=1), tokens[-1].sum(axis=1))
    np.testing.assert_allclose(got.weight, entries.weight, rtol=1e-6)
    np.testing.assert_allclose(got.keys, entries.keys, atol=0.02)
    np.testing.assert_allclose(got.values, entries.values, atol=0.02)
    assert not any(np.any(np.asarray(x)[1]) for x in jax.tree.leaves(rest))
    k, v, w, valid = tokens
    valid[1] = False
    again = absorb(rest, UNITS, k, v, w, valid)
    for old, new in zip(jax.tree.leaves(rest), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(old[:2], new[:2])  # of units 0 and 1 none left
    assert (again.count[2] > rest.count[2]).any()


def dense(q, k, v):
    """Attention of q [T, D] over k, v [S, D] in float64."""
    logits = np.asarray(q, float) @ np.asarray(k, float).T / np.sqrt(D)
    weight = np.exp(logits)
    return weight / weight.sum(axis=1, keepdims=True) @ v, np.log(weight.sum(axis=1))


def queries():
    return np.random.default_rng(9).normal(size=(U, T, D)).astype(np.float32)


def test_an_entry_is_attended_to_as_so_many_tokens():
    rest, q = absorb(_centroids.create(U, D), UNITS, *leaving(0)), queries()
    part = _centroids.attend(q, rest, np.arange(U))
    entries = _centroids.load(rest, np.arange(U))
    for unit in UNITS:
        many = (
            np.repeat(x[unit], entries.count[unit], axis=0) for x in (entries.keys, entries.values)
        )
        y, lse = dense(q[unit], *many)
        np.testing.assert_allclose(part.y[unit], y, atol=1e-5)
        np.testing.assert_allclose(part.lse[unit], lse, atol=1e-5)
    np.testing.assert_array_equal(part.y[1], 0)
    np.testing.assert_array_equal(part.lse[1], np.float32(EMPTY))


def test_tokens_that_are_alike_are_lost_without_loss():
    rng, q = np.random.default_rng(0), queries()[:1]
    k, v = (np.repeat(rng.normal(size=(NUM_ENTRIES, D)), 20, axis=0) for _ in range(2))
    order = np.concatenate([np.arange(0, len(k), 20), rng.permutation(len(k))])
    k, v = (x[order].astype(np.float32)[None] for x in (k, v))
    w = rng.uniform(0.1, 1, k.shape[:2]).astype(np.float32)
    rest = absorb(_centroids.create(1, D), np.array([0]), k, v, w, np.ones(w.shape, bool))
    part = _centroids.attend(q, rest, np.array([0]))
    y, lse = dense(q[0], k[0], v[0])
    np.testing.assert_allclose(part.y[0], y, atol=0.02)
    np.testing.assert_allclose(part.lse[0], lse, atol=0.02)


def test_where_nothing_left_attention_is_the_same_bit_for_bit():
    rng, q = np.random.default_rng(0), queries()
    none = _centroids.attend(q, _centroids.create(U, D), np.arange(U))
    held = Partial(jnp.asarray(rng.normal(size=q.shape), jnp.float32), jnp.asarray(q[..., 0]))
    held = Partial(held.y.at[0].set(0), held.lse.at[0].set(EMPTY))  # nor is anything there
    for got, want in zip(jax.jit(merge)(held, none), held, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_bytes_are_what_was_said(head_dim):
    rest = _centroids.create(U, head_dim)
    assert rest.nbytes == U * _centroids.unit_bytes(head_dim)
    assert rest.nbytes == U * NUM_ENTRIES * (2 * (head_dim + 2) + 4 + 4)
    assert rest.head_dim == head_dim


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: absorb_with(units=np.arange(3)), ("(2, 150, 16)", "[3, S, 16]")),
        (lambda: absorb_with(v=np.ones((N, S, 8))), ("(2, 150, 8)",)),
        (lambda: absorb_with(w=np.ones(N)), ("w has shape (2,)", "(2, 150)")),
        (lambda: absorb_with(k=np.ones(N)), ("k must have shape [N, S, D]",)),
        (lambda: attend_with(np.ones((U, T, 8)), np.arange(U)), ("(3, 5, 8)", "D = 16")),
        (lambda: attend_with(queries(), np.arange(2)), ("units has 2",)),
        (lambda: _centroids.create(U, 12), ("head_dim is 12",)),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"must|entries") as error:
        call()
    for name in names:
        assert name in str(error.value)


def absorb_with(**changes):
    good = dict(zip(("k", "v", "w", "valid"), leaving(0), strict=True))
    return _centroids.absorb(_centroids.create(U, D), **({"units": UNITS} | good | changes))


def attend_with(q, units):
    return _centroids.attend(q, _centroids.create(U, D), units)
