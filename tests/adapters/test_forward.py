"""Training through the four functions of a decoder: all tiles are dense attention, half of them less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jbalance import adapters
from jbalance.adapters import Tiles
from jbalance.decode import AttentionSpec
from tests.support import window_models as models
from tests.support.small_models import VOCAB, small_llama

TOKENS = np.random.default_rng(3).integers(0, 50, (2, 40)).astype(np.int32)


@pytest.mark.parametrize("soft_cap", [None, models.CAP])
def test_all_tiles_are_dense_attention(soft_cap):
    """With windows, a scale and a cap, against NumPy in float64."""
    specs = models.specs(soft_cap=soft_cap)
    got = jax.jit(lambda tokens: adapters.forward(models.model(specs), tokens))(TOKENS)
    for row, tokens in zip(np.asarray(got), TOKENS, strict=True):
        np.testing.assert_allclose(row, models.dense_logits(tokens, specs), rtol=1e-3, atol=1e-3)


def test_a_part_of_the_tiles():
    """All of them by the budget are all; at half, gradients flow and logits stay near."""
    model, ids = small_llama(), TOKENS % VOCAB
    tiles = Tiles(block_q=8, block_k=4)

    def logits_of(model, fraction):
        spec = model.attention_specs
        return adapters.forward(adapters.decoder(model, spec), ids, fraction=fraction, tiles=tiles)

    want = np.asarray(model(ids))
    np.testing.assert_allclose(logits_of(model, 1.0), want, rtol=1e-4, atol=1e-4)

    @nnx.jit
    def grads(model):
        return nnx.value_and_grad(lambda m: jnp.mean(jnp.square(logits_of(m, 0.5))))(model)

    value, found = grads(model)
    assert np.isfinite(value)
    assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(found))
    half = np.asarray(logits_of(model, 0.5))
    assert 0 < np.abs(half - want).max() < np.abs(want).max()


class Foreign(nnx.Module):
    """Another's code: layers of two kinds, without the methods that the library asks for."""

    def __init__(self, rngs):
        self.table = nnx.Embed(50, 16, rngs=rngs)
        self.blocks = nnx.List([ForeignBlock(kind, rngs) for kind in ("relu", "tanh")])


class ForeignBlock(nnx.Module):
    def __init__(self, kind, rngs):
        self.kind = kind  # static: the blocks differ in structure
        self.q, self.k, self.v, self.o = (nnx.Linear(16, 16, rngs=rngs) for _ in range(4))

    def act(self, x):
        return jax.nn.relu(x) if self.kind == "relu" else jnp.tanh(x)


def _heads(x):
    return x.reshape(*x.shape[:2], 2, 8)


FUNCTIONS = {
    "embed": lambda m, tokens, positions: m.table(tokens),
    "qkv": lambda b, x, positions: tuple(_heads(p(x)) for p in (b.q, b.k, b.v)),
    "finish": lambda b, x, y: x + b.act(b.o(y.reshape(*x.shape))),
    "logits": lambda m, x: m.table.attend(x),
}


def test_functions_beside_the_model_reach_code_that_has_no_methods():
    model, spec = Foreign(nnx.Rngs(0)), AttentionSpec(2, 2, 8)
    decoder = adapters.decoder(model, spec, layers="blocks", **FUNCTIONS)
    x = model.table(TOKENS)
    for block in model.blocks:
        q, k, v = (_heads(p(x)) for p in (block.q, block.k, block.v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + block.act(block.o(y.reshape(x.shape)))
    np.testing.assert_allclose(
        adapters.forward(decoder, TOKENS), model.table.attend(x), rtol=1e-4, atol=1e-4
    )


class LinenModel(linen.Module):
    """As the packages write theirs: blocks of `setup`, no methods for the library."""

    def setup(self):
        self.table = linen.Embed(11, 16)
        self.blocks = [LinenBlock() for _ in range(2)]

    def __call__(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.table.attend(x)


class LinenBlock(linen.Module):
    def setup(self):
        self.q, self.k, self.v, self.o = (linen.Dense(16) for _ in range(4))

    def act(self, x):
        return jnp.tanh(x)

    def __call__(self, x):
        q, k, v = (_heads(p(x)) for p in (self.q, self.k, self.v))
        angle = jnp.arange(x.shape[1])[:, None, None] * jnp.asarray([1.0, 0.5, 0.1, 0.0])
        q, k = (_turned(z, angle) for z in (q, k))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return x + self.act(self.o(y.reshape(x.shape)))


def _turned(x, angle):
    """Half-split pairs as complex numbers."""
    pairs = (x[..., :4] + 1j * x[..., 4:]) * jnp.exp(1j * angle)
    return jnp.concatenate([pairs.real, pairs.imag], axis=-1)


def test_a_linen_model_is_reached_and_rotated_here():
    model, spec = LinenModel(), AttentionSpec(2, 2, 8, (1.0, 0.5, 0.1, 0.0))
    tokens = TOKENS % 11  # its vocabulary
    variables = model.init(jax.random.key(0), tokens)
    given = FUNCTIONS | {"layers": "blocks", "rotate": True}
    decoder = adapters.decoder(model.bind(variables), spec, **given)
    assert not isinstance(decoder.qkv, tuple), "equal layers share their programs"
    np.testing.assert_allclose(
        adapters.forward(decoder, tokens), model.apply(variables, tokens), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"without variables: give model\.bind"):
        adapters.decoder(model, spec, **given)


def test_what_is_not_reached_is_named():
    model, spec = Foreign(nnx.Rngs(0)), AttentionSpec(2, 2, 8)
    with pytest.raises(ValueError, match="no attribute 'layers'"):
        adapters.decoder(model, spec)
    rest = {name: FUNCTIONS[name] for name in ("embed", "logits")}
    with pytest.raises(ValueError, match=r"ForeignBlock has no method qkv, finish.* give qkv="):
        adapters.decoder(model, spec, layers="blocks", **rest)
    decoder = adapters.decoder(model, spec, layers="blocks", **FUNCTIONS)
    for fraction, tiles in ((1.5, None), (0.5, Tiles(64, 16))):
        with pytest.raises(ValueError, match=f"fraction is {fraction}"):
            adapters.forward(decoder, TOKENS, fraction=fraction, tiles=tiles)
