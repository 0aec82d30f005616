"""Flax models over a cache of fixed bytes: near the stock cache while it fits, and no end after that."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jbalance import adapters

B, PROMPT, WIDTH, HEADS = 2, 48, 32, 2
AMPLE, SMALL = 400_000, 30_000


class Nnx(nnx.Module):
    def __init__(self, rngs, layers=2):
        self.attend = nnx.List(
            nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs) for _ in range(layers)
        )

    def __call__(self, x):
        for attend in self.attend:
            x += attend(x, is_causal=True)
        return x


class Linen(linen.Module):
    num_bytes: int | None = None

    @linen.compact
    def __call__(self, x):
        given = {}
        if self.num_bytes:
            given["attention_fn"] = adapters.LinenCachedAttention(self.num_bytes)
        mask = linen.make_causal_mask(x[..., 0])
        return linen.MultiHeadDotProductAttention(HEADS, **given)(x, mask=mask)


def inputs(size):
    return jax.random.normal(jax.random.key(0), (B, size, WIDTH))


def close(got, want):
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    return error < 0.02


@pytest.mark.slow  # the second notebook decodes so
def test_an_nnx_model_decodes_as_if_it_had_all_keys():
    model, x = Nnx(nnx.Rngs(0)), inputs(PROMPT + 40)
    want = nnx.jit(lambda model, x: model(x))(model, x)
    cache = adapters.NnxCache(model, AMPLE, B)
    call = nnx.jit(lambda model, cache, x: model(x))
    assert close(call(model, cache, x[:, :PROMPT]), want[:, :PROMPT])
    for t in range(PROMPT, x.shape[1]):
        assert close(call(model, cache, x[:, t : t + 1])[:, 0], want[:, t])
    assert cache.num_bytes <= AMPLE


@pytest.mark.slow
def test_its_bytes_stay_and_it_begins_anew():
    model, x = Nnx(nnx.Rngs(0), layers=1), inputs(PROMPT)
    cache = adapters.NnxCache(model, SMALL, B)
    call = nnx.jit(lambda model, cache, x: model(x))
    first = call(model, cache, x)

    @nnx.jit
    def many(model, cache, x):
        def one(carry, _):
            model, cache, x = carry
            y = model(x)
            return (model, cache, y / jnp.linalg.norm(y, axis=-1, keepdims=True)), jnp.all(
                jnp.isfinite(y)
            )

        (model, cache, x), fine = nnx.scan(one, length=600, out_axes=(nnx.Carry, 0))(
            (model, cache, x), None
        )
        return jnp.all(fine)

    assert many(model, cache, x[:, -1:])
    assert cache.num_bytes <= SMALL
    assert cache.lacking.get_value() == 0
    cache.reset()
    np.testing.assert_array_equal(call(model, cache, x), first)


@pytest.mark.slow
def test_a_linen_model_decodes_too_with_the_stock_parameters():
    x = inputs(PROMPT + 20)
    stock, ours = Linen(), Linen(AMPLE)
    params = jax.jit(stock.init)(jax.random.key(0), x)["params"]
    want = jax.jit(stock.apply)({"params": params}, x)

    @jax.jit
    def call(variables, x):
        y, new = ours.apply({"params": params, **variables}, x, mutable=["cache"])
        return y, new

    y, variables = call({}, x[:, :PROMPT])
    assert close(y, want[:, :PROMPT])
    for t in range(PROMPT, x.shape[1]):
        y, variables = call(variables, x[:, t : t + 1])
        assert close(y[:, 0], want[:, t])


def test_bad_input_names_itself():
    with pytest.raises(ValueError, match="budget_bytes is 10"):
        adapters.NnxCache(Nnx(nnx.Rngs(0)), 10)
    model = Nnx(nnx.Rngs(0))
    model.attend.append(nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="layers of different"):
        adapters.NnxCache(model, AMPLE)
