"""The architecture on a small random model: transformations, replaceable attention, cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import (
    RopeScaling,
    Transformer,
    causal_attention,
    decode_attention,
    greedy,
    prefill_attention,
)
from experiments.models.rotary import frequencies, rotate

ATOL = 1e-5

forward = nnx.jit(lambda model, *inputs: model(*inputs))


def test_pure_function_of_the_state(model, tokens, logits):
    graphdef, state = nnx.split(model)
    pure = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    np.testing.assert_allclose(pure(state, tokens), logits, atol=ATOL)


def test_one_trace_for_new_values(config, tokens):
    traces = 0

    @nnx.jit
    def counted(model, tokens):
        nonlocal traces
        traces += 1
        return model(tokens)

    for seed in (0, 1):
        counted(Transformer(config, rngs=nnx.Rngs(seed)), (tokens + seed) % config.vocab_size)
    assert traces == 1


def test_vmap(model, tokens, logits):
    by_sequence = jax.vmap(lambda row: model(row[None])[0])(tokens)
    np.testing.assert_allclose(by_sequence, logits, atol=ATOL)


def test_vmap_over_parameters(config, tokens):
    graphdef, first = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    second = nnx.state(Transformer(config, rngs=nnx.Rngs(1)))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    out = jax.vmap(lambda state: nnx.merge(graphdef, state)(tokens))(both)
    np.testing.assert_allclose(out[1], nnx.merge(graphdef, second)(tokens), atol=ATOL)


def test_gradient_of_every_parameter(model, tokens):
    graphdef, state, fixed = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(state):
        logprobs = jax.nn.log_softmax(nnx.merge(graphdef, state, fixed)(tokens[:, :-1]))
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

    for path, leaf in nnx.to_flat_state(gradient(state)):
        assert jnp.isfinite(leaf[...]).all(), path
        assert jnp.abs(leaf[...]).sum() > 0, path


def test_gradient_of_the_inputs_is_causal(model, tokens):
    x, cut = model.embed(tokens), 4
    gradient = jax.grad(lambda x: (model.logits(model.run_layers(x)[0])[:, cut] ** 2).sum())(x)
    assert jnp.isfinite(gradient).all()
    assert (jnp.abs(gradient[:, : cut + 1]).sum(-1) > 0).all()
    assert (gradient[:, cut + 1 :] == 0).all()


def test_layer_by_layer_equals_the_scan(config, model, tokens, logits):
    x, positions = model.embed(tokens), jnp.arange(tokens.shape[1])
    for index in range(config.num_layers):
        layer = model.layer(index)
        q, k, v = layer.qkv(x, positions)
        assert q.shape == (*tokens.shape, config.num_heads, config.head_dim)
        assert k.shape == v.shape == (*tokens.shape, config.num_kv_heads, config.head_dim)
        x = layer.finish(x, causal_attention(q, k, v)[0])
    np.testing.assert_allclose(model.logits(x), logits, atol=ATOL)


def test_attention_gets_and_returns_its_layers_state(config, model, tokens):
    """Input and output structures differ; each layer sees its own slice."""

    def attention(q, k, v, state):
        y, _ = causal_attention(q, k, v)
        return state["scale"] * y, (state["index"], jnp.abs(y).max())

    layers = jnp.arange(config.num_layers)
    state = {"index": layers, "scale": jnp.where(layers == 1, 0.0, 1.0)}
    h, (index, largest) = model.hidden(tokens, attention=attention, state=state)
    np.testing.assert_array_equal(index, layers)
    assert largest.shape == (config.num_layers,)
    x, positions = model.embed(tokens), jnp.arange(tokens.shape[1])
    for i in range(config.num_layers):
        q, k, v = model.layer(i).qkv(x, positions)
        x = model.layer(i).finish(x, (i != 1) * causal_attention(q, k, v)[0])
    np.testing.assert_allclose(h, x, atol=ATOL)


def test_cached_decoding_equals_the_full_forward(config, model, tokens, logits):
    batch, prompt = tokens.shape[0], 4
    h, cache = model.hidden(tokens[:, :prompt], attention=prefill_attention)
    shape = (config.num_layers, batch, prompt, config.num_kv_heads, config.head_dim)
    assert cache[0].shape == cache[1].shape == shape
    np.testing.assert_allclose(model.logits(h), logits[:, :prompt], atol=ATOL)
    room = tokens.shape[1] - prompt
    cache = jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, 0)] * 2 + [(0, room)] + [(0, 0)] * 2), cache
    )

    @nnx.jit
    def step(model, token, at, cache):
        h, cache = model.hidden(token, at[:, None], decode_attention(at), cache)
        return model.logits(h)[:, 0], cache

    for t in range(prompt, tokens.shape[1]):
        out, cache = step(model, tokens[:, t : t + 1], jnp.full((batch,), t), cache)
        np.testing.assert_allclose(out, logits[:, t], atol=ATOL)


def test_a_full_cache_is_not_overwritten():
    """JAX clamps indices by default: without care the last entry would be replaced silently."""
    k = jax.random.normal(jax.random.key(0), (2, 1, 2, 8))
    cache = (jnp.zeros((2, 3, 2, 8)), jnp.zeros((2, 3, 2, 8)))
    _, (keys, _) = decode_attention(jnp.array([3, 1]))(jnp.tile(k, (1, 1, 3, 1)), k, k, cache)
    assert (keys[0] == 0).all()
    np.testing.assert_array_equal(keys[1, 1], k[1, 0])


def test_greedy_with_padding_equals_repeated_forward(model, tokens):
    lengths, steps = [5, 9], 6
    out = greedy(model, tokens, steps, lengths=lengths)
    for row, length in enumerate(lengths):
        ids = np.zeros((1, length + steps), int)
        ids[0, :length] = tokens[row, :length]
        for at in range(length, length + steps):
            ids[0, at] = forward(model, ids)[0, at - 1].argmax()
        np.testing.assert_array_equal(out[row], ids[0, length:])


@pytest.mark.parametrize("length", [256, 257, 1300])
def test_blocks_of_queries_equal_one_block(length):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, length, heads, 4))
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    )

    def loss(attend):
        return lambda q, k, v: (attend(q, k, v) ** 2).sum()

    def whole(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def blocked(q, k, v):
        return causal_attention(q, k, v)[0]

    np.testing.assert_allclose(blocked(q, k, v), whole(q, k, v), atol=ATOL)
    got = jax.jit(jax.grad(loss(blocked), argnums=(0, 1, 2)))(q, k, v)
    want = jax.jit(jax.grad(loss(whole), argnums=(0, 1, 2)))(q, k, v)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    frequency = frequencies(8, 10_000.0)

    def score(at, of):
        return jnp.sum(
            rotate(q, jnp.array([at]), frequency) * rotate(k, jnp.array([of]), frequency)
        )

    np.testing.assert_allclose(score(7, 3), score(1007, 1003), rtol=1e-3)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_llama3_frequencies(golden):
    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    scaled = frequencies(64, 500_000.0, scaling)
    np.testing.assert_allclose(scaled, golden["llama3_frequencies"], rtol=1e-5)


def test_bfloat16(config, model, tokens, logits):
    narrow = Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow, nnx.Param))} == {
        jnp.dtype("bfloat16")
    }
    # The draws differ between dtypes, so the float32 model's parameters are rounded.
    parameters = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model, nnx.Param))
    nnx.update(narrow, parameters)
    out = forward(narrow, tokens)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, logits, atol=0.02)


def test_positions_are_those_given(model, tokens, logits):
    """Rotary scores are relative, so a shift of all positions changes nothing, a stretch does."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    np.testing.assert_allclose(forward(model, tokens, positions + 17), logits, atol=1e-4)
    assert jnp.abs(forward(model, tokens, 3 * positions) - logits).max() > 1e-4


def test_untied_head(config, tokens):
    model = Transformer(dataclasses.replace(config, tied_embeddings=False), rngs=nnx.Rngs(0))
    before = forward(model, tokens)
    model.head[...] = 2 * model.head[...]
    np.testing.assert_allclose(forward(model, tokens), 2 * before, atol=ATOL)
