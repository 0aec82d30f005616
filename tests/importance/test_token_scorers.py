"""Every token scorer, through the same properties: oracle, transformations, memory, inputs."""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import importance
from jbalance.importance import TOKEN_SCORERS
from tests.support import dense_oracles as dense
from tests.support import traced

S, T, K, G, D = 40, 24, 2, 3, 8
H = K * G
FREQUENCIES = 100.0 ** (-np.arange(0, D, 2) / D)


class Row(NamedTuple):
    scorer: object
    oracle: object


def _row(name, **options):
    return Row(partial(TOKEN_SCORERS[name], **options), partial(getattr(dense, name), **options))


TABLE = {
    "attention_mass": _row("attention_mass"),
    "max_attention": _row("max_attention"),
    "max_attention, 6 apart": _row("max_attention", min_distance=6),
    "window": _row("window", window=8),
    "window, max, one": _row("window", window=1, kernel=3, pooling="max"),
    "expected_attention": _row(
        "expected_attention", frequencies=FREQUENCIES, future=20, epsilon=0.01
    ),
    "expected_attention, mean": _row(
        "expected_attention", frequencies=FREQUENCIES, use_covariance=False, num_sinks=0
    ),
    "expected_attention, no rotary": _row("expected_attention", frequencies=None),
    "key_norm": _row("key_norm"),
    "leverage": _row("leverage"),
    "leverage, unrotated": _row("leverage", frequencies=FREQUENCIES, ridge=0.1),
    "sinks_recent": _row("sinks_recent"),
    "combined": Row(
        importance.combined({"attention_mass": 1.0, "key_norm": 0.5}, normalize="max"),
        lambda q, k, v: sum(
            weight * w / w.max(1, keepdims=True)
            for weight, w in ((1.0, dense.attention_mass(q, k, v)), (0.5, dense.key_norm(q, k, v)))
        ),
    ),
}
every_scorer = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
plain = {name: row for name, row in TABLE.items() if name in TOKEN_SCORERS}
methods = {name: row for name, row in TABLE.items() if "," not in name}
every_method = pytest.mark.parametrize("row", methods.values(), ids=methods)
every_plain = pytest.mark.parametrize("row", plain.values(), ids=plain)


def qkv(seed=0, t=S, s=S, k=K, g=G, d=D, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = (t, k * g, d), (s, k, d), (s, k, d)
    return tuple(jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes)


@cache
def jitted(row):
    """One compiled program per scorer and shape, for all tests."""
    return jax.jit(row.scorer)


def test_the_table_has_every_scorer():
    assert set(plain) == set(TOKEN_SCORERS)


@every_scorer
@pytest.mark.parametrize("t", [S, T], ids=["T=S", "T<S"])
def test_matches_dense_oracle(row, t):
    args = qkv(t=t)
    w = jitted(row)(*args)
    assert w.shape == (K, S)
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(w, row.oracle(*args), rtol=3e-4, atol=2e-6)


@every_plain
def test_one_query_head_per_key_head_and_several_blocks(row, monkeypatch):
    monkeypatch.setattr("jbalance.importance._tokens.QUERY_BLOCK_TOKENS", 7)
    args = qkv(seed=1, g=1, k=3)
    np.testing.assert_allclose(jitted(row)(*args), row.oracle(*args), rtol=3e-4, atol=2e-6)


@every_plain
def test_jit_equals_eager(row):
    args = qkv(t=T)
    np.testing.assert_allclose(jitted(row)(*args), row.scorer(*args), rtol=1e-5, atol=1e-7)


@every_plain
def test_vmap_equals_loop(row):
    sequences = [qkv(seed=seed, t=T) for seed in (10, 11)]
    batch = [jnp.stack(pair) for pair in zip(*sequences, strict=True)]
    want = jnp.stack([jitted(row)(*args) for args in sequences])
    got = jax.jit(jax.vmap(row.scorer))(*batch)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@every_plain
def test_permuting_the_heads_permutes_w(row):
    q, k, v = qkv(t=T)
    w = jitted(row)(q, k, v)
    groups = np.arange(H).reshape(K, G)[::-1].reshape(-1)
    flipped = jitted(row)(q[:, groups], k[:, ::-1], v[:, ::-1])
    np.testing.assert_allclose(flipped, w[::-1], rtol=1e-5, atol=1e-7)


@every_plain
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_input_is_computed_in_float32(row, dtype):
    arrays = traced.intermediates(row.scorer, *qkv(t=T, dtype=dtype))
    assert arrays[-1].dtype == jnp.float32
    assert not any(array.dtype == dtype for array in arrays)


@every_plain
def test_float32_with_64_bits_enabled(row):
    with jax.enable_x64(True):
        args = (x.astype(jnp.float64) for x in qkv(t=T))
        assert jax.eval_shape(row.scorer, *args).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_input_gives_the_same_w(dtype):
    row, args = TABLE["expected_attention"], qkv(t=T, dtype=dtype)
    want = jitted(row)(*(x.astype(jnp.float32) for x in args))
    np.testing.assert_allclose(jitted(row)(*args), want, rtol=1e-5, atol=1e-7)


DEGENERATE = {
    "large": lambda x: 300.0 * x,
    "all the same": lambda x: jnp.ones_like(x),
    "zero": jnp.zeros_like,
    "tiny": lambda x: 1e-20 * x,
}


@every_scorer
@pytest.mark.parametrize("change", DEGENERATE.values(), ids=DEGENERATE)
def test_finite_and_non_negative(row, change):
    w = jitted(row)(*(change(x) for x in qkv()))
    assert jnp.isfinite(w).all()
    assert (w >= 0).all()


@every_method
def test_gradients_are_finite(row):
    gradients = jax.jit(jax.grad(lambda *a: jnp.sum(row.scorer(*a) ** 2), argnums=(0, 1, 2)))
    for scale in (1.0, 0.0, 300.0):
        for gradient in gradients(*(scale * x for x in qkv(t=T))):
            assert jnp.isfinite(gradient).all()


@every_plain
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradient"])
def test_never_holds_all_queries_by_all_keys(row, backward):
    n, f = 1024, row.scorer
    if backward:
        f = jax.grad(lambda *a: row.scorer(*a).sum(), argnums=(0, 1, 2))
    shape = lambda heads: jax.ShapeDtypeStruct((n, heads, D), jnp.float32)  # noqa: E731
    sizes = [array.size for array in traced.intermediates(f, shape(H), shape(K), shape(K))]
    assert max(sizes) <= 128 * n * H < n * n * H / 4


def test_the_memory_check_sees_a_dense_array():
    arrays = traced.intermediates(jax.jit(lambda q, k, v: jnp.einsum("thd,skd->hts", q, k)), *qkv())
    assert max(array.size for array in arrays) == H * S * S


@every_plain
def test_new_values_do_not_recompile(row):
    traces = []
    scorer = jax.jit(lambda *args: traces.append(0) or row.scorer(*args))
    scorer(*qkv(seed=2))
    scorer(*qkv(seed=3))
    assert len(traces) == 1


@every_plain
def test_sharded_over_heads(row):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("h",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = jax.P(None, "h")
    split = jax.shard_map(row.scorer, mesh=mesh, in_specs=(heads,) * 3, out_specs=jax.P("h"))
    args = qkv(seed=4, t=T)
    np.testing.assert_allclose(jax.jit(split)(*args), jitted(row)(*args), rtol=1e-5, atol=1e-7)


# What each scorer is for.


def test_attention_finds_the_token_that_the_queries_point_at():
    q, k, v = qkv(seed=6)
    needle = 11
    k = k.at[needle].set(4.0)
    q = jnp.abs(q)
    for name in ("attention_mass", "max_attention", "expected_attention"):
        w = jax.jit(TOKEN_SCORERS[name])(q, k, v)
        others = jnp.delete(w, jnp.array([0, 1, 2, 3, needle]), axis=1)
        assert (w[:, needle] > others.max(axis=1)).all(), name


def test_window_finds_what_the_last_queries_need_and_keeps_itself():
    q, k, v = qkv(seed=6)
    k = k.at[11].set(4.0)
    q = q.at[-8:].set(jnp.abs(q[-8:])).at[:-8].set(-jnp.abs(q[:-8]))
    w = jax.jit(partial(importance.window, window=8, kernel=1))(q, k, v)
    assert (jnp.argmax(w[:, :-8], axis=1) == 11).all()
    assert (w[:, -8:] == w.max(axis=1, keepdims=True)).all()


def test_leverage_finds_the_token_that_is_unlike_the_rest():
    q, k, v = qkv(seed=7)
    k = k.at[:, :, 0].set(0.0).at[23].set(0.0).at[23, :, 0].set(3.0)
    assert (jnp.argmax(importance.leverage(q, k, v), axis=1) == 23).all()


def test_key_norm_ranks_short_keys_first_in_any_unit():
    q, k, v = qkv(seed=8)
    w = importance.key_norm(q, k, v)
    norms = jnp.linalg.norm(k, axis=-1).T
    np.testing.assert_array_equal(jnp.argsort(-w, axis=1), jnp.argsort(norms, axis=1))
    np.testing.assert_allclose(importance.key_norm(q, 1000 * k, v), w, rtol=1e-5)


def test_sinks_recent_is_an_order_without_ties():
    w = importance.sinks_recent(*qkv(), num_sinks=3)
    assert jnp.argsort(-w[0])[:6].tolist() == [0, 1, 2, S - 1, S - 2, S - 3]
    assert len(set(w[0].tolist())) == S


def test_expected_attention_keeps_sinks():
    q, k, v = qkv(seed=9)
    w = jax.jit(partial(importance.expected_attention, num_sinks=3))(q, k, v)
    assert (w[:, :3] == w.max(axis=1, keepdims=True)).all()


def test_unjudged_tokens_are_kept_by_max_attention():
    w = importance.max_attention(*qkv(), min_distance=10)
    assert (w[:, -10:] == w.max(axis=1, keepdims=True)).all()


def test_window_of_the_whole_sequence_is_uniform():
    np.testing.assert_array_equal(
        importance.window(*qkv(), window=S), np.full((K, S), np.float32(1 / S))
    )


# Bad input: the message names the argument and its value.

q0, k0, v0 = qkv(t=T)
ODD = tuple(x[..., :7] for x in (q0, k0, v0))
BAD = {
    "more queries than keys": (
        "attention_mass",
        (*qkv(t=S)[:1], k0[:9], v0[:9]),
        {},
        "q has 40.*9",
    ),
    "heads do not divide": ("leverage", (q0[:, :5], k0, v0), {}, "q has 5 heads.*multiple of 2"),
    "q is a matrix": ("key_norm", (q0[0], k0, v0), {}, r"q must have shape \[T, H, D\].*\(6, 8\)"),
    "v is shorter": ("window", (q0, k0, v0[:9]), {}, "v has 9 entries.*k has 40"),
    "v has other heads": ("window", (q0, k0, v0[:, :1]), {}, "v has 1 entries along axis 1"),
    "head dims differ": ("window", (q0[..., :6], k0, v0), {}, "q has 6 entries along axis 2.*8"),
    "whole numbers": ("window", (q0.astype(int), k0, v0), {}, "q has dtype int"),
    "no keys": ("leverage", (q0[:0], k0[:0], v0[:0]), {}, "q is empty"),
    "NaN": ("leverage", (q0, k0.at[3].set(jnp.nan), v0), {}, r"\|k\| is nan"),
    "infinite": ("window", (q0, k0, v0.at[3].set(jnp.inf)), {}, r"\|v\| is inf"),
    "window too long": ("window", (q0, k0, v0), {}, "window is 32 but q has 24"),
    "no window": ("window", (q0, k0, v0), {"window": 0}, "window is 0"),
    "even kernel": ("window", (q0, k0, v0), {"window": 4, "kernel": 4}, "kernel is 4.*odd"),
    "pooling": ("window", (q0, k0, v0), {"window": 4, "pooling": "min"}, "pooling is 'min'.*mean"),
    "distance": (
        "max_attention",
        (q0, k0, v0),
        {"min_distance": 40},
        r"min_distance is 40.*at most 39",
    ),
    "negative sinks": ("sinks_recent", (q0, k0, v0), {"num_sinks": -1}, "num_sinks is -1"),
    "only sinks": (
        "expected_attention",
        (q0, k0, v0),
        {"num_sinks": 40},
        r"num_sinks is 40.*at most 39",
    ),
    "odd, rotary": (
        "expected_attention",
        ODD,
        {"frequencies": FREQUENCIES},
        "head dim is 7.*frequencies=None",
    ),
    "odd, unrotated": ("leverage", ODD, {"frequencies": FREQUENCIES}, "head dim is 7"),
    "frequencies": (
        "expected_attention",
        (q0, k0, v0),
        {"frequencies": np.ones(3)},
        r"frequencies has shape \(3,\).*\(4,\)",
    ),
    "no future": ("expected_attention", (q0, k0, v0), {"future": 0}, "future is 0"),
    "epsilon": ("expected_attention", (q0, k0, v0), {"epsilon": -0.5}, "epsilon is -0.5"),
    "ridge": ("leverage", (q0, k0, v0), {"ridge": 0.0}, "ridge is 0.0"),
}


@pytest.mark.parametrize(("name", "args", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(name, args, options, message):
    with pytest.raises(ValueError, match=message):
        TOKEN_SCORERS[name](*args, **options)


def test_shapes_are_checked_under_jit():
    with pytest.raises(ValueError, match="window is 32 but q has 24"):
        jax.jit(importance.window)(q0, k0, v0)
