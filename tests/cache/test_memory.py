"""Cross-attention over an encoder's frames: dense where all fit, one price where not, bytes kept."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import cache, decode
from jbalance.cache import _centroids, _pages, _price
from jbalance.decode import context
from jbalance.decode.plan import ladder
from jbalance.decode.prefill import LayerTokens
from tests.support.small_cache import given_back

B, L, K, G, D, S, T = 2, 2, 2, 2, 16, 60, 3
H, BITS, AMPLE, SCARCE = K * G, (8, 3), 30_000, 10_500
LENGTHS = np.array([S, 45], np.int32)


def create(budget, **changes):
    good = {"num_layers": L, "num_kv_heads": K, "head_dim": D, "num_requests": B}
    good |= {"page_bytes": 264, "recent_tokens": 0, "bits": BITS}
    return cache.create(budget, **(good | changes))


@jax.jit
@chex.assert_max_traces(n=2)  # a scarce cache and an ample one
def write(held, k, v, w, lengths):
    return cache.write(held, k, v, w, lengths=lengths)


@jax.jit
@chex.assert_max_traces(n=2)
def attend(held, q):
    return jnp.stack([cache.attend(held, layer, q) for layer in range(L)])


def drawn(seed=0):
    """Keys with a mean of their own, values, and worth that differs by frame and unit."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, L, B, S, K, D)).astype(np.float32)
    w = np.exp(rng.normal(size=(L, B, K, S)) + 2 * rng.normal(size=(L, B, K, 1)) - 4)
    q = rng.normal(size=(B, T, H, D)).astype(np.float32)
    return q, k + 1.5, v, w.astype(np.float32)


def dense(q, k, v):
    """y [T, H, D] of q [T, H, D] over k, v [S, K, D] in float64, not causal."""
    k, v = (np.repeat(np.asarray(x, np.float64), G, axis=1) for x in (k, v))
    logits = np.einsum("thd,shd->ths", np.asarray(q, np.float64), k) / np.sqrt(D)
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("ths,shd->thd", weight / weight.sum(axis=-1, keepdims=True), v)


def held_of(held, request, layer):
    """Keys and values [S', D] of each head, as the bytes say, centroids as often as they stand for."""
    out = []
    for head in range(K):
        unit = int(held.units(request, layer)[head])
        parts = [_pages.read(held.arena, unit, m) for m in range(len(BITS))]
        left = jax.tree.map(lambda x: x[0], _centroids.load(held.centroids, np.array([unit])))
        many = np.asarray(left.count)
        keys = [x.k[x.valid] for x in parts] + [np.repeat(left.keys, many, axis=0)]
        values = [x.v[x.valid] for x in parts] + [np.repeat(left.values, many, axis=0)]
        out.append(given_back(held, unit, np.concatenate(keys), np.concatenate(values)))
    return out


def test_attention_is_dense_where_every_frame_is_held_at_16_bits():
    q, k, v, w = drawn()
    held = cache.write(create(60_000, bits=(16,)), k, v, w, lengths=LENGTHS)
    assert int(held.arena.count.sum()) == L * K * LENGTHS.sum()
    for layer in range(L):
        y = cache.attend(held, layer, q)
        for b, number in enumerate(LENGTHS):
            want = dense(q[b], k[layer, b, :number], v[layer, b, :number])
            np.testing.assert_allclose(y[b], want, atol=0.01)  # bfloat16 has 8 bits


def test_attention_is_close_at_8_bits_and_scaled():
    q, k, v, w = drawn()
    held = write(create(AMPLE), k, v, w, LENGTHS)
    assert int(held.arena.count[:, 0].sum()) == L * K * LENGTHS.sum()
    assert not held.centroids.count.any()
    y, sharp = attend(held, q), cache.attend(held, 1, q, scale=1.0)
    for b, number in enumerate(LENGTHS):
        for layer in range(L):
            want = dense(q[b], k[layer, b, :number], v[layer, b, :number])
            np.testing.assert_allclose(y[layer, b], want, atol=0.02)
        want = dense(np.sqrt(D) * q[b], k[1, b, :number], v[1, b, :number])
        np.testing.assert_allclose(sharp[b], want, atol=0.05)


def test_attention_is_exactly_over_what_the_bytes_hold():
    q, k, v, w = drawn()
    held = write(create(SCARCE), k, v, w, LENGTHS)
    y = attend(held, q)
    assert held.centroids.count.sum() > 20
    for b in range(B):
        for layer in range(L):
            for head, (keys, values) in enumerate(held_of(held, b, layer)):
                own = q[b][:, head * G : (head + 1) * G]
                want = dense(own, keys[:, None], values[:, None])
                np.testing.assert_allclose(
                    y[layer, b, :, head * G : (head + 1) * G], want, atol=1e-4
                )


@pytest.mark.parametrize("budget", [4_500, 7_001, SCARCE, AMPLE])
def test_the_budget_is_kept_and_filled(budget):
    _, k, v, w = drawn()
    held = create(budget)
    size = held.nbytes
    held = cache.write(held, k, v, w)
    assert held.nbytes == size <= budget < size + 264 + 4
    kept, lost = (
        np.asarray(x).reshape(B, -1).sum(axis=1) for x in (held.arena.count, held.centroids.count)
    )
    np.testing.assert_array_equal(kept + lost, L * K * S)
    if lost.any():
        assert (held.even_pages - held.held_pages <= 1).all()


def test_levels_are_those_of_one_price_over_layers_and_heads():
    """As the plan of a context, which counts pages on the host, has them: every frame, every level."""
    _, k, v, w = drawn()
    held = create(SCARCE, num_requests=1)
    held = cache.write(held, k[:, :1], v[:, :1], w[:, :1])
    codes = np.array(_price.encode_worth(w[:, 0]))
    plan = decode.fit(
        ladder(codes.reshape(L * K, S)), (L, K, S), D, [SCARCE], bits=BITS, page_bytes=264
    )
    count = (plan.level.reshape(L * K, S, 1) == np.arange(len(BITS))).sum(axis=1)
    assert plan.room.num_pages == held.arena.num_pages
    np.testing.assert_array_equal(held.arena.count, count)
    layers = [LayerTokens(k[i, 0], v[i, 0], w[i, 0], None) for i in range(L)]
    (other,) = context.write(plan, codes, layers).caches
    q = drawn()[0][:1]
    for layer in range(L):
        np.testing.assert_allclose(
            cache.attend(held, layer, q), cache.attend(other, layer, q), atol=1e-5
        )


def test_the_next_recording_takes_the_place_of_the_last():
    first, second = drawn(0), drawn(1)
    fresh = write(create(SCARCE), *second[1:], LENGTHS)
    again = write(write(create(SCARCE), *first[1:], LENGTHS[::-1]), *second[1:], LENGTHS)
    np.testing.assert_array_equal(attend(again, second[0]), attend(fresh, second[0]))


def test_requests_and_padding_are_not_seen_by_others():
    q, k, v, w = drawn()
    y = attend(write(create(SCARCE), k, v, w, LENGTHS), q)
    for x in (k, v):
        x[:, 0] *= 3
        x[:, 1, LENGTHS[1] :] = 1e3
    w[:, 0] *= 9
    other = attend(write(create(SCARCE), k, v, w, LENGTHS), q)
    np.testing.assert_array_equal(other[:, 1], y[:, 1])
    assert (other[:, 0] != y[:, 0]).any()
    none = attend(write(create(SCARCE), k, v, w, LENGTHS * [1, 0]), q)
    np.testing.assert_array_equal(none[:, 1], 0)


def test_a_frame_that_is_not_finite_is_kept_by_no_unit_whose_it_is():
    q, k, v, w = drawn()
    k[1, 0, 7, 1] = np.nan
    held = write(create(AMPLE), k, v, w, LENGTHS)
    y = attend(held, q)
    assert int(held.arena.count.sum()) == L * K * LENGTHS.sum() - 1
    keys, values = (np.delete(x[1, 0, :, 1:], 7, axis=0) for x in (k, v))
    np.testing.assert_allclose(y[1, 0, :, G:], dense(q[0][:, G:], keys, values), atol=0.02)


def test_heads_of_several_devices_add_up():
    q, k, v, w = drawn()
    y = np.zeros((L, B, T, H, D), np.float32)
    for mine in ([[0, -1], [-1, 1]], [[-1, 0], [1, -1]]):
        part = cache.write(create(AMPLE, slots=np.array(mine)), k, v, w, lengths=LENGTHS)
        y += np.stack([cache.attend(part, layer, q) for layer in range(L)])
    np.testing.assert_allclose(y, attend(write(create(AMPLE), k, v, w, LENGTHS), q), atol=1e-5)


def test_what_cannot_be_honored_is_refused_by_name():
    q, k, v, w = drawn()
    memory, growing = create(AMPLE), create(AMPLE, recent_tokens=4)
    new = q[:, 0], k[0, :, 0], v[0, :, 0]
    for call, words in (
        (lambda: create(AMPLE, windows=[4, None]), "windows are given and recent_tokens is 0"),
        (lambda: create(AMPLE, recent_tokens=3), "recent_tokens is 3"),
        (lambda: create(2_000), "2 pages of 264 bytes for the frames of each request"),
        (lambda: cache.write(growing, k, v, w), "recent buffers of 4 tokens"),
        (lambda: cache.step(memory, 0, *new), "no recent buffer"),
        (lambda: cache.prefill(memory, 0, q, k[0], v[0], frequencies=None), "no recent buffer"),
        (lambda: cache.write(memory, k[:1], v, w), r"k has shape \(1, "),
        (lambda: cache.write(memory, k, v[..., :8], w), "v has shape"),
        (lambda: cache.write(memory, k, v, w[:, :, 0]), "w must have shape"),
        (lambda: cache.write(memory, k, v, w[..., 1:]), "w has shape"),
        (lambda: cache.write(memory, k, v, -w), r"w\["),
        (lambda: cache.write(memory, k, np.where(v > 2, np.nan, v), w), r"largest \|v\| is nan"),
        (lambda: cache.write(memory, k, v, w, lengths=[S, S + 1]), r"lengths\[1\] is 61"),
        (lambda: cache.attend(memory, 2, q), "layer is 2"),
        (lambda: cache.attend(memory, 0, q[:, :, :3]), "q has shape"),
        (lambda: cache.attend(memory, 0, q[:, :0]), "q has shape"),
        (lambda: cache.attend(memory, 0, q, scale=np.nan), "scale is nan"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
