"""Flax models over a cache of fixed bytes: near the stock cache while it fits, and no end after that."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jbalance import adapters
from tests.support.versions import NEWER_FLAX

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
            given["attention_fn"] = adapters.LinenCachedAttention(self.num_bytes, causal=True)
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


@NEWER_FLAX
def test_layers_are_told_apart_by_their_calls_and_prompts_by_their_lengths():
    """layer10 comes before layer9 in a graph's order; prompts are padded; a chat has a second turn."""

    class Named(nnx.Module):
        def __init__(self, rngs):
            self.layer9 = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.layer10 = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)

        def __call__(self, x):
            x += self.layer9(x, is_causal=True)
            return x + self.layer10(x, is_causal=True)

    size, lengths = 20, np.array([15, 9])
    model, x = Named(nnx.Rngs(0)), inputs(2 * size + 2)
    x, later = x[:, :size], x[:, size:]
    turns = [jnp.concatenate([x[b, :n], later[b], x[b, n:]]) for b, n in enumerate(lengths)]
    want = nnx.jit(lambda model, x: model(x))(model, jnp.stack(turns))
    cache = adapters.NnxCache(model, AMPLE, B)
    call = nnx.jit(lambda model, cache, x: model(x))
    cache.reset(lengths)
    first = call(model, cache, x)
    second = call(model, cache, later[:, :size])  # of one size: one program
    for b, n in enumerate(lengths):
        assert close(first[b, :n], want[b][:n])
        assert close(second[b], want[b][n : n + size])
    for t in (size, size + 1):
        one = call(model, cache, later[:, t : t + 1])
        for b, n in enumerate(lengths):
            assert close(one[b, 0], want[b][n + t])


class Called(nnx.Module):
    """One layer, called as the test says."""

    def __init__(self, how):
        self.attend = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
        self.how = how

    def __call__(self, x):
        return self.how(self.attend, x)


LEFT = np.tri(8, dtype=bool)[None, None] & (np.arange(8) >= 3)
WINDOW = np.tri(8, dtype=bool) & ~np.tri(8, k=-3, dtype=bool)


@NEWER_FLAX
@pytest.mark.parametrize(
    ("how", "names"),
    [
        (lambda attend, x: attend(x), "without is_causal=True or a causal mask.*encoder"),
        (lambda attend, x: attend(x, x[:, :4]), "not for cross-attention"),
        (
            lambda attend, x: attend(x, mask=LEFT),
            "mask is not the causal one: pad prompts on the right",
        ),
        (lambda attend, x: attend(x, mask=WINDOW[None, None]), "windows and prefixes"),
        (lambda attend, x: attend(x, mask=nnx.make_causal_mask(x[..., 0])), "mask is traced"),
        (lambda attend, x: attend(attend(x, is_causal=True), is_causal=True), "called twice"),
    ],
)
def test_what_a_cache_cannot_honor_is_refused(how, names):
    model, x = Called(how), inputs(8)
    cache = adapters.NnxCache(model, AMPLE, B)
    if names == "called twice":  # of a model of two layers
        model.other = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
        cache = adapters.NnxCache(model, AMPLE, B)
    with pytest.raises(ValueError, match=names):
        nnx.jit(lambda model, cache, x: model(x))(model, cache, x)


def test_a_causal_mask_that_can_be_looked_at_is_taken():
    model, x = (
        Called(lambda attend, x: attend(x, mask=np.tri(8, dtype=bool)[None, None])),
        inputs(8),
    )
    want = model(x)
    cache = adapters.NnxCache(model, AMPLE, B)
    assert close(nnx.jit(lambda model, cache, x: model(x))(model, cache, x), want)
    with pytest.raises(ValueError, match="query has 3 sequences: the cache is for 2"):
        model(jnp.zeros((3, 8, WIDTH)))


def test_bad_input_names_itself():
    with pytest.raises(ValueError, match="budget_bytes is 10"):
        adapters.NnxCache(Nnx(nnx.Rngs(0)), 10)
    model = Nnx(nnx.Rngs(0))
    model.attend.append(nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="all must have the same"):
        adapters.NnxCache(model, AMPLE)

    @nnx.vmap(in_axes=0)
    def stacked(rngs):
        return nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self):
            self.attend = stacked(nnx.Rngs(0).split(3))

    with pytest.raises(ValueError, match="stacked in one module"):
        adapters.NnxCache(Stack(), AMPLE)
