"""What evicting tokens costs a head, against the definition written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import importance

T, S, H, K, D = 5, 24, 4, 2, 8


def arrays(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((T, H, D), (S, K, D), (S, K, D))
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return q, k, v, jnp.asarray(rng.random((K, S)), jnp.float32)


def by_definition(q, k, v, w, counts, num_local):
    """Loops in float64: softmax over the kept tokens, minus softmax over all that are visible."""
    q, k, v, w = (np.asarray(x, np.float64) for x in (q, k, v, w))
    error = np.zeros((K, len(counts)))
    for h in range(H):
        head = h // (H // K)
        best = np.argsort(-w[head], kind="stable")
        for t in range(T):
            position = S - T + t
            weight = np.exp(q[t, h] @ k[:, head].T / np.sqrt(D))
            weight[position + 1 :] = 0
            full = weight @ v[:, head] / weight.sum()
            for m, count in enumerate(counts):
                kept = np.zeros(S, bool)
                kept[best[:count]] = True
                kept |= position - np.arange(S) < num_local
                part = weight * kept
                y = part @ v[:, head] / part.sum() if part.sum() else np.zeros(D)
                error[head, m] += ((y - full) ** 2).sum() / T
    return error


@pytest.mark.parametrize("num_local", [0, 1, 7])
@pytest.mark.parametrize("counts", [(S,), (1, 2, 5, 12, S), (3, 4)])
def test_equals_the_definition(counts, num_local):
    given = arrays()
    got = importance.output_error(*given, counts, num_local=num_local)
    want = by_definition(*given, counts, num_local)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_all_tokens_cost_nothing_and_dtypes_are_accepted():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        error = importance.output_error(*arrays(dtype=dtype), (4, S))
        assert error.dtype == jnp.float32
        np.testing.assert_allclose(error[:, -1], 0, atol=1e-9)


def test_jit_and_vmap_agree_with_a_loop():
    batch = [arrays(seed) for seed in range(3)]
    stacked = [jnp.stack(x) for x in zip(*batch, strict=True)]
    fn = jax.jit(jax.vmap(lambda *x: importance.output_error(*x, (2, 6, S))))
    want = jnp.stack([importance.output_error(*x, (2, 6, S)) for x in batch])
    np.testing.assert_allclose(fn(*stacked), want, rtol=1e-5, atol=1e-7)


def test_a_head_that_attends_to_one_token_needs_only_that_one():
    q, k, v, w = arrays()
    k = k.at[3].set(0).at[3, :, 0].set(40.0)
    q = q.at[..., 0].set(20.0)
    w = w.at[:, 3].set(2.0)
    assert importance.output_error(q, k, v, w, (1,), num_local=0).max() < 1e-6


def test_protected_tokens_stand_above_all_others_and_keep_their_order():
    w = jnp.asarray(np.random.default_rng(0).random((K, S)))
    p = importance.protected(w, num_sinks=2, num_recent=3)
    inner = p[:, 2:-3]
    np.testing.assert_array_equal(inner, w[:, 2:-3])
    edge = jnp.concatenate([p[:, :2], p[:, -3:]], axis=1)
    assert edge.min() > inner.max()
    np.testing.assert_array_equal(
        jnp.argsort(edge), jnp.argsort(jnp.concatenate([w[:, :2], w[:, -3:]], axis=1))
    )


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"counts": ()}, "counts"),
        ({"counts": (4, 4)}, "counts"),
        ({"counts": (0, 4)}, "counts"),
        ({"counts": (4, S + 1)}, "counts"),
        ({"num_local": -1}, "num_local"),
        ({"w": jnp.ones((K, S + 1))}, "w must have shape"),
        ({"q": jnp.ones((S + 1, H, D))}, "q has 25 queries"),
        ({"k": jnp.full((S, K, D), jnp.nan)}, "|k|"),
    ],
)
def test_bad_input_is_named(change, names):
    q, k, v, w = arrays()
    given = {"q": q, "k": k, "v": v, "w": w, "counts": (4, 8), "num_local": 2} | change
    with pytest.raises(ValueError, match=r"counts|num_local|must have shape|queries|k") as error:
        importance.output_error(**given)
    assert names in str(error.value)


def test_protecting_more_tokens_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"num_sinks \+ num_recent is 30"):
        importance.protected(jnp.ones((K, S)), num_sinks=10, num_recent=20)
