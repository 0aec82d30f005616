"""Decoding over reduced caches on their devices equals dense attention under the same mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.kv_budget import evaluate, measure
from experiments.kv_budget.decode import Decoder, Layout, place_caches
from experiments.kv_budget.policies import make_plan, policy_of
from jbalance.cache import paged_attention, pages

NEW = np.random.default_rng(1).integers(0, 61, 9).astype(np.int32)


def masked_logits(model, context, kept, new):
    """The oracle: the whole sequence at once; new tokens see what each head kept, and each other.

    The context's own outputs are those of full attention, as in a prefill.
    """
    size, total = len(context), len(context) + len(new)
    causal = np.tril(np.ones((total, total), bool))
    mask = np.broadcast_to(causal, (*kept.shape[:2], total, total)).copy()
    mask[..., size:, :size] = kept[:, :, None]

    def attention(q, k, v, mask):
        group = q.shape[2] // k.shape[2]
        y = jax.nn.dot_product_attention(q, k, v, mask=jnp.repeat(mask, group, axis=0)[None])
        return y, None

    tokens = np.concatenate([context, new])[None]

    @nnx.jit
    def logits(model, tokens, mask):
        return model.logits(model.hidden(tokens, None, attention, mask)[0])

    return logits(model, tokens, jnp.asarray(mask))[0, size:]


@pytest.mark.parametrize(
    ("name", "budgets"),
    [
        pytest.param("ladder-eviction-only", [20_000], marks=pytest.mark.slow),
        ("ladder-eviction-only", [9_000, 6_000, 4_000, 3_000]),
        pytest.param("uniform", [16_000, 8_000], marks=pytest.mark.slow),
        ("full", [1, 1]),
    ],
)
def test_logits_equal_the_masked_model(small_model, context, measured, name, budgets):
    devices = jax.devices()[: len(budgets)]
    plan = make_plan(policy_of(name), measured, budgets)
    caches = place_caches(measured, plan, devices, dtype=jnp.float32)
    layout = Layout.of(plan.device_of, plan.kept.shape[:2])
    logits, _ = Decoder(small_model, devices).forward(NEW, len(context), caches, layout, 0)
    want = masked_logits(small_model, context, plan.kept, NEW)
    np.testing.assert_allclose(logits, want, atol=1e-4)


@pytest.mark.parametrize("budgets", [[24_000], [16_000, 8_000]])
@pytest.mark.slow
def test_paged_logits_equal_dense_attention_over_what_is_decoded(
    small_model, context, monkeypatch, budgets
):
    measured = measure.prefill(small_model, context, "sketch")
    devices = jax.devices()[: len(budgets)]
    plan = make_plan(policy_of("ladder"), measured, budgets)
    caches = place_caches(measured, plan, devices)
    layout = Layout.of(plan.device_of, plan.kept.shape[:2])
    decoder = Decoder(small_model, devices)
    paged, _ = decoder.forward(NEW, len(context), caches, layout, 0)
    monkeypatch.setattr(paged_attention, "attend_pages", paged_attention.attend_decoded)
    jax.clear_caches()
    dense, _ = decoder.forward(NEW, len(context), caches, layout, 0)
    np.testing.assert_allclose(paged, dense, atol=1e-4)
    for d, held in enumerate(caches):
        lost = np.sum(~plan.kept.reshape(-1, len(context))[plan.device_of == d], axis=1)
        np.testing.assert_array_equal(held.context.remainder.count.sum(axis=1), lost)
        for slot, unit in enumerate(np.flatnonzero(plan.device_of == d)):
            layer, head = divmod(int(unit), 3)
            want = np.asarray(measured.k[layer, :, head])[plan.kept[layer, head]]
            got = [pages.read(held.context.arena, slot, m) for m in range(3)]
            k = np.concatenate([x.k[x.valid] for x in got]) + held.context.key_mean[slot]
            near = np.linalg.norm(k[:, None] - want, axis=-1).min(axis=1)
            assert np.median(near / np.linalg.norm(want, axis=-1).mean()) < 0.2


def test_token_by_token_into_the_room_equals_all_at_once(small_model, context, measured):
    devices = jax.devices()[:2]
    decoder = Decoder(small_model, devices)
    plan = make_plan(policy_of("ladder-eviction-only"), measured, [16_000, 8_000], len(NEW))
    layout = Layout.of(plan.device_of, plan.kept.shape[:2])
    at_once, _ = decoder.forward(
        NEW, len(context), place_caches(measured, plan, devices, dtype=jnp.float32), layout, 0
    )
    caches = place_caches(measured, plan, devices, len(NEW), dtype=jnp.float32)
    size = sum(held.nbytes for held in caches)
    start = 6
    logits, caches = decoder.forward(NEW[:start], len(context), caches, layout, 0)
    rows = [logits]
    for i in range(start, len(NEW)):
        logits, caches = decoder.forward(NEW[i : i + 1], len(context) + i, caches, layout, i)
        rows.append(logits)
    np.testing.assert_allclose(jnp.concatenate(rows), at_once, atol=1e-4)
    assert sum(held.nbytes for held in caches) == size
    with pytest.raises(ValueError, match="10 new tokens exceed the 9"):
        decoder.forward(NEW[:1], len(context) + 9, caches, layout, len(NEW))


def test_generation_is_greedy(small_model, context, measured):
    decoder = Decoder(small_model, jax.devices()[:1])
    plan = make_plan(policy_of("full"), measured, [1], 0)
    caches = place_caches(measured, plan, decoder.devices, 8, dtype=jnp.float32)
    out = evaluate.generate(decoder, plan, caches, NEW[:3], 5)
    # Each token is the most likely one after all before it: one causal pass judges them all.
    tokens = np.concatenate([context, NEW[:3], out.tokens])
    logits = nnx.jit(lambda model, tokens: model(tokens))(small_model, tokens[None])[0]
    np.testing.assert_array_equal(out.tokens, np.argmax(logits[-6:-1], axis=-1))


def test_quality_of_the_full_cache_is_perfect(small_model, measured):
    decoder = Decoder(small_model, jax.devices()[:1])
    full = evaluate.reference(decoder, measured, NEW[:-1])
    same = evaluate.quality(full, full, NEW[1:])
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1 == 1
    assert same.nll == same.nll_full
    other = evaluate.quality(jax.nn.log_softmax(full * 0.5), full, NEW[1:])
    assert other.kl > 0
