"""A context read once: planned at one price, within every device's bytes, alike for all who read it."""

import dataclasses

import jax
import numpy as np
import pytest

from jbalance import decode
from jbalance.cache import _price
from jbalance.decode import Reserve, context, extend, prefill
from jbalance.decode.plan import ladder
from tests.decode.conftest import PROMPT

SHAPE = (4, 3, 200)  # of the small model
RESERVE = Reserve(2, 24)
AMPLE = [110_000, 70_000]
QUESTIONS = [PROMPT[:7], PROMPT[50:90], PROMPT[90:91]]


@pytest.fixture(scope="module")
def read(decoder):
    return decode.read(decoder, PROMPT[:200], AMPLE, reserve=RESERVE)


def test_questions_of_an_ample_context_are_answered_as_by_dense_attention(decoder, dense, read):
    found = decode.generate(
        decoder, QUESTIONS, AMPLE, max_new_tokens=6, num_requests=2, context=read
    )
    for tokens, question in zip(found, QUESTIONS, strict=True):
        whole = np.concatenate([PROMPT[:200], question])
        np.testing.assert_array_equal(tokens, dense(whole, 6))


def test_many_questions_read_it_once_and_answer_as_alone(decoder, read, monkeypatch):
    before = [np.asarray(x) for x in jax.tree.leaves(read.caches)]
    together = decode.generate(
        decoder, QUESTIONS, AMPLE, max_new_tokens=6, num_requests=2, context=read
    )
    calls = []
    layers_of = prefill.layers_of
    monkeypatch.setattr(prefill, "layers_of", lambda *a: calls.append(a) or layers_of(*a))
    alone = [
        decode.generate(decoder, [q], AMPLE, max_new_tokens=6, num_requests=2, context=read)[0]
        for q in QUESTIONS
    ]
    assert not calls
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a, b)
    for old, new in zip(before, jax.tree.leaves(read.caches), strict=True):
        np.testing.assert_array_equal(old, new)


def codes(size=200):
    """Codes of worth that differ by unit, the ends protected."""
    rng = np.random.default_rng(0)
    out = rng.normal(120, 25, (12, size)) + 10 * rng.normal(size=(12, 1))
    out = np.clip(out, 1, 254).astype(np.uint8)
    out[:, :4] = out[:, -8:] = _price.PROTECTED
    return out


def layers():
    """Of each layer the keys and values of 200 tokens."""
    rng = np.random.default_rng(1)
    return [
        prefill.LayerTokens(
            *rng.normal(size=(2, 200, 3, 8)).astype(np.float32),
            np.ones((3, 200), np.float32),
            np.ones((3, 8), np.float32),
        )
        for _ in range(4)
    ]


def test_what_a_budget_holds_besides_is_not_taken():
    plan = decode.fit(ladder(codes()), SHAPE, 8, [2**36])
    held = context.write(plan, codes().reshape(SHAPE), layers())
    assert int(held.caches[0].arena.count[:, 0].sum()) == 4 * 3 * 200
    assert held.nbytes[0] < 2**20


@pytest.mark.parametrize("budgets", [[20_000], [16_000, 8_000], [12_000, 6_000, 4_000, 4_000]])
@pytest.mark.parametrize("reserve", [None, Reserve(1, 8)])
def test_every_devices_bytes_are_kept(budgets, reserve):
    scale = 1 if reserve is None else 3
    budgets = [scale * b for b in budgets]
    plan = decode.fit(ladder(codes()), SHAPE, 8, budgets, reserve=reserve)
    held = context.write(plan, codes().reshape(SHAPE), layers())
    for d, (cache, budget) in enumerate(zip(held.caches, budgets, strict=True)):
        beside = 0
        if reserve is not None:
            units = cache.key_mean.shape[0]
            beside = units * reserve.unit_bytes(8) + reserve.device_bytes(12)
        assert sum(x.nbytes for x in jax.tree.leaves(cache)) == held.nbytes[d] <= budget - beside
        assert all(x.devices() == {jax.devices()[d]} for x in jax.tree.leaves(cache))
        kept = plan.kept[plan.device_of == d].sum()
        lost = (~plan.kept[plan.device_of == d]).sum()
        assert int(cache.arena.count.sum()) == kept
        assert int(cache.centroids.count.sum()) == lost


def test_unequal_devices_share_one_price():
    alone, spread = (
        decode.fit(ladder(codes(2000)), (4, 3, 2000), 8, budgets)
        for budgets in ([200_000], [120_000, 80_000])
    )
    np.testing.assert_array_equal(spread.price, np.repeat(spread.price[:1], 2))
    assert np.mean(spread.level != alone.level) < 0.05
    assert spread.evenness.layer_time >= spread.evenness.layer_time_bound


def test_precision_falls_with_worth_at_one_price():
    plan = decode.fit(ladder(codes()), SHAPE, 8, [20_000])
    level, code = plan.level.reshape(12, 200), codes().astype(int)
    assert (level[:, :4] == 0).all()
    assert (level[:, -8:] == 0).all()
    for row, own in zip(level, code, strict=True):
        for m in range(3):  # those of one code enter together, or none of them
            assert own[row <= m].min(initial=999) >= own[row > m].max(initial=0)


@pytest.mark.parametrize("devices", [2, 4])
def test_units_decode_alike_wherever_they_are(decoder, devices):
    """Three heads divide by none of them; the sum over the devices is exact."""
    layers = [held for _, held in prefill.layers_of(decoder, PROMPT[:200])]
    plan = decode.fit(ladder(codes()), SHAPE, 8, [30_000])
    logits = []
    for number in (1, devices):
        device_of = (np.arange(12, dtype=np.int32) * 5) % number
        pages = np.bincount(device_of, plan.room.pages_of(plan.level.reshape(12, -1)), number)
        room = plan.room._replace(device_of=device_of, num_pages=pages.astype(int))
        spread = dataclasses.replace(plan, room=room)
        held = context.write(spread, codes().reshape(SHAPE), layers)
        on = jax.devices()[:number]
        logits.append(extend.log_probs(decoder, on, None, held.caches, PROMPT[:9], 200))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)


def test_budgets_without_a_device_are_named(decoder):
    with pytest.raises(ValueError, match="2 entries for 1 devices"):
        decode.read(decoder, PROMPT[:200], AMPLE, devices=jax.devices()[:1])


def test_too_little_memory_is_named(decoder):
    with pytest.raises(ValueError, match=r"budgets_bytes\[0\] is 3000"):
        decode.read(decoder, PROMPT[:200], [3000])
