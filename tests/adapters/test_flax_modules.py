"""What Flax's own attention modules are called with, door by door: honored as the stock, or refused."""

import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jbalance import adapters
from tests.support.versions import NEWER_FLAX

B, T, S, WIDTH, HEADS = 2, 24, 24, 16, 2
AMPLE = 400_000
X = jax.random.normal(jax.random.key(0), (B, T, WIDTH))
OTHER = jax.random.normal(jax.random.key(1), (B, 10, WIDTH))
LENGTHS = np.array([T, T - 7])
CAUSAL = np.tri(T, dtype=bool)[None, None]
VALID = (np.arange(T) < LENGTHS[:, None])[:, None, None]
WINDOW = CAUSAL & ~np.tri(T, k=-6, dtype=bool)
PREFIX = CAUSAL | (np.arange(T) < 5)

# What a tutorial writes: keys that are attended to (None: the queries' own), and the arguments.
CALLS = {
    "causal mask": (None, {"mask": CAUSAL}),
    "causal and padding": (None, {"mask": CAUSAL & VALID}),
    "window": (None, {"mask": WINDOW}),
    "prefix": (None, {"mask": PREFIX}),
    "padding": (None, {"mask": VALID}),
    "no mask": (None, {}),
    "cross-attention": (OTHER, {}),
    "cross-attention with padding": (OTHER, {"mask": (np.arange(10) < 6)[None, None, None]}),
}
ENCODER = "cache is for decoders"
NOT_CAUSAL = "mask is not the causal one: .*right.*lengths"
CROSS = "not for cross-attention"
BY_CACHE = {  # None: honored
    "causal mask": None,
    "causal and padding": NOT_CAUSAL,
    "window": NOT_CAUSAL,
    "prefix": NOT_CAUSAL,
    "padding": NOT_CAUSAL,
    "no mask": ENCODER,
    "cross-attention": CROSS,
    "cross-attention with padding": CROSS,
}


def nnx_layer():
    return nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))


def close(got, want, limit):
    valid = np.arange(T) < LENGTHS[:, None]  # what padding asks for is nobody's
    error = np.linalg.norm((got - want)[valid]) / np.linalg.norm(np.asarray(want)[valid])
    assert error < limit, error


@pytest.mark.parametrize("name", CALLS)
def test_tiles_honor_all_of_them(name):
    """`attention_fn` by `set_attention_fn`, `NnxBalance` at density 1, and the same in linen."""
    keys, given = CALLS[name]
    layer = nnx_layer()
    want = layer(X, keys, **given)
    close(adapters.set_attention_fn(layer, adapters.attention_fn())(X, keys, **given), want, 1e-5)
    balanced = nnx_layer()
    adapters.NnxBalance(balanced, 1.0)
    close(balanced(X, keys, **given), want, 1e-5)
    stock = linen.MultiHeadDotProductAttention(HEADS)
    variables = stock.init(jax.random.key(0), X)
    ours = linen.MultiHeadDotProductAttention(HEADS, attention_fn=adapters.attention_fn())
    both = (module.apply(variables, X, keys, **given) for module in (ours, stock))
    close(*both, 1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_a_cache_honors_causal_self_attention_and_refuses_the_rest(name):
    keys, given = CALLS[name]
    layer, want = nnx_layer(), nnx_layer()(X, keys, **given)
    adapters.NnxCache(layer, AMPLE, B)
    own = linen.MultiHeadDotProductAttention(
        HEADS, attention_fn=adapters.LinenCachedAttention(AMPLE)
    )
    params = linen.MultiHeadDotProductAttention(HEADS).init(jax.random.key(0), X)
    calls = {
        "nnx": lambda: layer(X, keys, **given),
        "linen": lambda: own.apply(params, X, keys, **given, mutable=["cache"])[0],
    }
    stock = linen.MultiHeadDotProductAttention(HEADS).apply(params, X, keys, **given)
    for kind, call in calls.items():
        if BY_CACHE[name] is None:
            close(call(), want if kind == "nnx" else stock, 0.02)
            continue
        with pytest.raises(ValueError, match=re.compile(BY_CACHE[name], re.DOTALL)):
            call()


class Whisper(nnx.Module):
    """An encoder without masks; a decoder of causal self-attention and cross-attention."""

    def __init__(self, rngs):
        kinds = "encoder", "decoder", "cross"
        self.layers = nnx.Dict(
            {k: nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs) for k in kinds}
        )

    def __call__(self, sound, text):
        heard = sound + self.layers["encoder"](sound)
        text = text + self.layers["decoder"](text, is_causal=True)
        return text + self.layers["cross"](text, heard)


@NEWER_FLAX
@pytest.mark.parametrize(("tokens", "heard"), [(6, 6), (6, 1), (6, 10), (1, 6)])
def test_an_encoder_decoder_is_refused_by_a_cache(tokens, heard):
    """Also where the sound is as long as the text, or a single frame, or the text one token."""
    model = Whisper(nnx.Rngs(0))
    adapters.NnxCache(model, AMPLE, B)
    names = "encoder|cross-attention"
    with pytest.raises(ValueError, match=names):
        model(jnp.ones((B, heard, WIDTH)), jnp.ones((B, tokens, WIDTH)))


@NEWER_FLAX
def test_an_encoder_decoder_trains_over_tiles():
    model, stock = Whisper(nnx.Rngs(0)), Whisper(nnx.Rngs(0))
    adapters.set_attention_fn(model, adapters.attention_fn())
    np.testing.assert_allclose(model(OTHER, X), stock(OTHER, X), atol=1e-5)
