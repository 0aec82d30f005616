"""A model that calls `jax.nn.dot_product_attention` gets another attention, and is left as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jbalance import adapters, attention

B, T, WIDTH, HEADS, KV_HEADS, D = 2, 32, 16, 4, 2, 8


class LlamaAttention(nnx.Module):
    """Grouped heads, its own projections, one call of JAX's attention."""

    def __init__(self, rngs):
        self.q = nnx.LinearGeneral(WIDTH, (HEADS, D), use_bias=False, rngs=rngs)
        self.kv = nnx.LinearGeneral(WIDTH, (2, KV_HEADS, D), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, D), WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x, **given):
        k, v = jnp.moveaxis(self.kv(x), -3, 0)
        return self.out(
            jax.nn.dot_product_attention(self.q(x), k, v, **(given or {"is_causal": True}))
        )


CALLS = {
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "window": {"local_window_size": (4, 0)},
    "lengths": {
        "query_seq_lengths": jnp.array([T, T - 5]),
        "key_value_seq_lengths": jnp.array([T - 3, T]),
    },
    "mask": {"mask": jnp.tril(jnp.ones((T, T), bool))[None, None], "local_window_size": 6},
}


@pytest.mark.parametrize("name", CALLS)
def test_all_tiles_are_what_the_stock_function_gives(name):
    model, x = LlamaAttention(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (B, T, WIDTH))
    stock = jax.nn.dot_product_attention

    @nnx.jit
    def ours(model, x):
        with adapters.patch_dot_product_attention(adapters.attention_fn()):
            return model(x, **CALLS[name])

    got, want = (
        np.array(ours(model, x)),
        np.array(nnx.jit(lambda m, x: m(x, **CALLS[name]))(model, x)),
    )
    if name == "lengths":  # what padding asks for is not defined
        got[1, T - 5 :] = want[1, T - 5 :] = 0
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert jax.nn.dot_product_attention is stock


def test_a_budget_reaches_it_and_errors_leave_the_name_as_it_was():
    model, x = LlamaAttention(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (B, T, WIDTH))
    asked = []

    def plan_of(q, k, v, /, *, causal):
        asked.append((q.shape, k.shape))
        return attention.window(8, attention.Tiling(T, T, 8, 8))

    stock = jax.nn.dot_product_attention
    with adapters.patch_dot_product_attention(adapters.attention_fn(plan_of)):
        jax.eval_shape(model, x)
    assert asked == [((B, T, HEADS, D), (B, T, KV_HEADS, D))]
    with (
        pytest.raises(ValueError, match="return_residual"),
        adapters.patch_dot_product_attention(adapters.attention_fn()),
    ):
        model(x, return_residual=True)
    assert jax.nn.dot_product_attention is stock


def test_a_scale_is_applied_in_float32():
    """In float16 the scaled queries, 600 x 128, would be infinite."""
    q = jnp.full((1, 4, 1, 256), 600, jnp.float16)
    k = jax.random.normal(jax.random.key(0), q.shape, jnp.float16) * 1e-4
    want = jax.nn.dot_product_attention(q, k, k, scale=8.0, is_causal=True)
    with adapters.patch_dot_product_attention(adapters.attention_fn()):
        got = jax.nn.dot_product_attention(q, k, k, scale=8.0, is_causal=True)
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-6)


def test_nothing_reached_is_an_error():
    stock = jax.nn.dot_product_attention
    for model in (lambda x: x, lambda x: stock(x, x, x)):  # and one that has bound it before
        with (
            pytest.raises(ValueError, match=r"nothing was reached.*adapters\.decoder"),
            adapters.patch_dot_product_attention(adapters.attention_fn()),
        ):
            model(jnp.ones((1, 4, 1, 8)))
    with (  # the model's own error is not hidden
        pytest.raises(ZeroDivisionError),
        adapters.patch_dot_product_attention(adapters.attention_fn()),
    ):
        _ = 1 / 0
    assert jax.nn.dot_product_attention is stock
