"""The model over a live cache: bytes that stay, prompts entering by layers, requests kept apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.kv_budget import stream
from experiments.kv_budget.stream import Streamer
from jbalance.cache import pages

NEW = np.random.default_rng(1).integers(0, 61, 40).astype(np.int32)
BUDGET = 60_000  # everything fits at 8 bits


@pytest.fixture(scope="module")
def streamer(small_model):
    return Streamer.of(small_model)


def decode(streamer, cache, tokens, start, allowance=None):
    """Logits [T, V] after each of the tokens, one by one, and the cache."""
    allowance = jnp.array([cache.arena.num_pages] if allowance is None else allowance)
    rows = []
    for i, token in enumerate(tokens):
        position = jnp.full(len(allowance), start + i)
        given = jnp.full(len(allowance), token)
        logits, cache = streamer.step(cache, given, position, allowance)
        rows.append(logits[0])
    return jnp.stack(rows), cache


@pytest.mark.slow
def test_an_ample_cache_decodes_as_the_model_does(small_model, streamer, context):
    cache = streamer.create(BUDGET, ring_tokens=8)
    last, cache = streamer.prefill(cache, context, allowance_pages=cache.arena.num_pages)
    got, cache = decode(streamer, cache, NEW, len(context))
    tokens = np.concatenate([context, NEW])[None]
    want = jax.jit(lambda t: small_model(t))(tokens)[0]
    np.testing.assert_allclose(last, want[len(context) - 1], atol=1e-4)
    np.testing.assert_allclose(got, want[len(context) :], atol=0.05)
    assert cache.nbytes <= BUDGET


@pytest.mark.slow  # `test_a_long_decode_is_reported` is the same by the command's own loop
def test_the_bytes_stay_far_beyond_the_context_and_nothing_compiles_again(streamer, context):
    budget = 24_000
    cache = streamer.create(budget, ring_tokens=8)
    _, cache = streamer.prefill(cache, context, allowance_pages=cache.arena.num_pages)
    before, sizes = stream._step._cache_size(), set()
    allowance = jnp.array([cache.arena.num_pages])
    for i in range(300):
        _, cache = streamer.step(cache, NEW[i % 40][None], jnp.array([200 + i]), allowance)
        sizes.add(cache.nbytes)
    assert len(sizes) == 1
    assert sizes.pop() <= budget
    assert stream._step._cache_size() <= before + 1
    assert int(cache.held_pages[0]) <= cache.arena.num_pages


def test_the_full_cache_of_a_prompt_never_exists(streamer, context):
    """Compiled: beside the cache, one layer's program needs what one layer needs, not all of them."""
    config = streamer.config
    cache = streamer.create(24_000, ring_tokens=8)
    x = stream._embed(streamer.graph, streamer.state, jnp.asarray(context))
    lowered = stream._admit_layer.lower(
        streamer.layer_graph, streamer.layers[0], cache, x, 0, 0, cache.arena.num_pages
    )
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes  # the cache is changed in place
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert new <= 1024  # x takes the place of x
    size = len(context)
    block = 4 * config.num_heads * min(size, 256) * size  # logits of one block of queries
    layer = 4 * size * config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
    assert memory.temp_size_in_bytes <= 4 * block + 8 * layer
    live = {id(a) for a in jax.live_arrays()}
    _, cache = streamer.prefill(cache, context, allowance_pages=cache.arena.num_pages)
    full = 2 * config.num_layers * config.num_kv_heads * len(context) * config.head_dim * 4
    left = [a for a in jax.live_arrays() if id(a) not in live]
    assert sum(a.nbytes for a in left) <= 24_000 + 4 * config.vocab_size + 1024 < full


@pytest.mark.slow
def test_a_flood_does_not_reach_another_request(small_model, streamer, context):
    """Squeezed to its floor, a request says what it says alone in a cache of that size."""
    floor = 24

    def tokens_of(cache, allowance, request, others):
        logits, cache = streamer.prefill(
            cache, context, request=request, allowance_pages=int(allowance[request])
        )
        for other in others:
            _, cache = streamer.prefill(
                cache, context[::-1].copy(), request=other, allowance_pages=int(allowance[other])
            )
        found, rows = [int(jnp.argmax(logits))], []
        for i in range(24):
            given = np.full(len(allowance), NEW[i])
            given[request] = found[-1]
            position = jnp.full(len(allowance), len(context) + i)
            logits, cache = streamer.step(cache, jnp.asarray(given), position, allowance)
            found.append(int(jnp.argmax(logits[request])))
            rows.append(logits[request])
        return found, np.stack(rows)

    both = streamer.create(64_000, num_requests=2, ring_tokens=8)
    page = both.arena.page_bytes
    allowance = jnp.array([floor, both.arena.num_pages - floor])
    shared = tokens_of(both, allowance, 0, [1])
    fixed = both.nbytes - both.arena.data.nbytes
    alone = streamer.create(fixed + floor * (page + 4), ring_tokens=8)
    alone = dataclasses.replace(alone, arena=_arena_of(alone.arena, floor, page))
    single = tokens_of(alone, jnp.array([floor]), 0, [])
    assert shared[0] == single[0]
    # Products of two rows and of one differ in the last bit; what comes from the cache does not.
    np.testing.assert_allclose(shared[1], single[1], atol=1e-6)


def _arena_of(arena, num_pages, page_bytes):
    return pages.empty(num_pages, arena.count.shape[0], arena.head_dim, arena.bits, page_bytes)


@pytest.mark.slow
def test_a_cache_saved_while_decoding_goes_on_bit_for_bit(streamer, context, tmp_path):
    cache = streamer.create(24_000, ring_tokens=8)
    _, cache = streamer.prefill(cache, context, allowance_pages=cache.arena.num_pages)
    _, cache = decode(streamer, cache, NEW[:13], len(context))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "cache", cache)
    empty = jax.tree.map(jnp.zeros_like, cache)
    want, _ = decode(streamer, cache, NEW[13:], len(context) + 13)
    with ocp.StandardCheckpointer() as saver:
        restored = saver.restore(tmp_path / "cache", empty)
    got, _ = decode(streamer, restored, NEW[13:], len(context) + 13)
    np.testing.assert_array_equal(got, want)


def test_bad_input_is_named(streamer, context):
    cache = streamer.create(24_000, ring_tokens=8)
    with pytest.raises(RuntimeError, match=r"lacks \d+ pages at layer"):
        streamer.prefill(cache, context, allowance_pages=3)
    with pytest.raises(ValueError, match="tokens has 5 tokens"):
        streamer.prefill(cache, context[:5], allowance_pages=3)


@pytest.mark.slow
def test_a_long_decode_is_reported(small_model, context):
    counted = []
    result = stream.stream(
        small_model, context, memory_bytes=24_000, new_tokens=150, step=counted.append
    )
    assert sum(counted) == 149
    assert len(result["tokens"]) == 150
    assert result["largest_resident_bytes"] <= 24_000 < result["full_cache_bytes"]
    assert result["compilations"] == 2  # of 64 steps, and of those that are left over
    assert result["tokens_seen"] == len(context) + 149
