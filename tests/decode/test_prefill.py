"""A prompt layer by layer and in chunks: the model's own logits, and no more memory than one layer's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jbalance import importance
from jbalance.decode import prefill
from tests.decode.conftest import PROMPT


@pytest.mark.parametrize("size", [1, 63, 256, 257, 300])
def test_it_is_the_model(sharp, decoder, size):
    k_of_layers = []
    for x, held in prefill.layers_of(decoder, PROMPT[:size], 512):
        k_of_layers.append(np.asarray(held.k[:size]))
        last = prefill.logits_at(decoder, x, size - 1)
    keys = []

    def attention(q, k, v, _):
        weights = jnp.where(jnp.tri(k.shape[1], dtype=bool), 0.0, -jnp.inf)
        keys.append(k)
        y = jax.nn.dot_product_attention(q, k, v, bias=weights[None, None])
        return y, k

    @nnx.jit
    def dense(model, tokens):
        hidden, k = model.hidden(tokens, None, attention)
        return model.logits(hidden)[0], k[:, 0]

    tokens = np.zeros(512, np.int32)
    tokens[:size] = PROMPT[:size]
    want, k = dense(sharp, tokens[None])
    np.testing.assert_allclose(last, want[size - 1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.stack(k_of_layers), k[:, :size], rtol=1e-3, atol=1e-3)


def test_worth_is_that_of_the_whole_layer_at_once(decoder):
    """In chunks and with padding, or all tokens together."""
    size = 300
    x = prefill._embed(decoder.functions(0), decoder.params, jnp.asarray(np.pad(PROMPT, (0, 212))))
    q, k, v = decoder.qkv(decoder.layers[0], x, jnp.arange(512)[None])
    want = importance.token_worth(
        q[0, :size], k[0, :size], v[0, :size], frequencies=decoder.functions(0).spec.rotary
    )
    _, held = prefill._layer(decoder.functions(0), decoder.layers[0], None, x, jnp.int32(size))
    np.testing.assert_allclose(held.w[:, :size], want, rtol=1e-3, atol=1e-5)
    assert (held.w[:, size:] == 0).all()


def test_a_layer_needs_what_a_layer_and_a_chunk_need(decoder):
    """Compiled for a long prompt: beside x, one layer's keys and values, and a chunk's activations."""
    size, spec = 8192, decoder.attention[0]
    embed = 20
    x = jax.ShapeDtypeStruct((1, size, embed), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    memory = (
        prefill._layer.lower(decoder.functions(0), decoder.layers[0], None, x, number)
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes >= 4 * size * embed  # x takes the place of x
    layer = 4 * size * spec.num_kv_heads * (2 * spec.head_dim + 1)  # keys, values, worth
    chunk = 4 * prefill.CHUNK_TOKENS * (spec.num_heads * (spec.head_dim + 80) + 4 * 28)
    window = 4 * 64 * spec.num_heads * size  # the last queries' attention
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 1.1 * layer
    assert memory.temp_size_in_bytes <= 2 * layer + 8 * chunk + 4 * window


def test_a_prompt_above_the_capacity_is_named(decoder):
    with pytest.raises(ValueError, match="tokens has 300 entries: the capacity is 256"):
        next(prefill.layers_of(decoder, PROMPT, 256))
