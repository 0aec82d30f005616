"""Reasons of a context's heads, against planning again with more memory."""

from __future__ import annotations

import numpy as np
import pytest

from jbalance import Binding, decode, explain
from jbalance.cache import _price
from jbalance.cache._layout import token_bytes
from jbalance.resources import human_bytes

SHAPE, UNITS, DIM = (4, 3, 200), 12, 8


def codes_of(seed=0, size=200):
    """Codes of worth that differ by unit, the ends protected."""
    rng = np.random.default_rng(seed)
    out = rng.normal(120, 25, (UNITS, size)) + 10 * rng.normal(size=(UNITS, 1))
    out = np.clip(out, 1, 254).astype(np.uint8)
    out[:, :4] = out[:, -8:] = _price.PROTECTED
    return out


def plan_of(codes, budgets, *, certain=False, **kwargs):
    return decode.fit(decode.ladder(codes, certain=certain), SHAPE, DIM, budgets, **kwargs)


def held_bytes(level, bits):
    size = np.array([*(token_bytes(DIM, b) for b in bits), 0])
    return size[level].sum(axis=-1).reshape(-1)


@pytest.mark.parametrize(
    ("seed", "budgets", "certain"),
    [(0, [24_000], False), (1, [14_000, 10_000], False), (2, [13_000, 10_000], True)],
)
def test_a_head_holds_more_from_its_bytes_on_and_not_before(seed, budgets, certain):
    codes = codes_of(seed)
    plan = plan_of(codes, budgets, certain=certain, page_bytes=128)
    why = explain.heads(plan, codes)
    room, now = plan.room, int(plan.priced_pages.sum())
    assert plan.priced_pages.size == 1  # at one price
    pool = room._replace(device_of=np.zeros(UNITS, np.int32))
    before = held_bytes(plan.level, plan.bits)
    least = np.full(UNITS, -1)
    for extra in range(1, 200):
        grown = pool._replace(num_pages=np.array([now + extra]))
        level = decode.ladder(codes, certain=certain)(grown).level
        more = held_bytes(level, plan.bits) > before
        least[more & (least < 0)] = extra * (room.page_bytes + 4)
    assert (least > 0).sum() > 6
    got = why.more_bytes.reshape(-1)
    np.testing.assert_array_equal(got[least > 0], least[least > 0])
    assert ((got < 0) | (got > least.max())).all(where=least < 0)


def test_each_device_at_a_price_of_its_own():
    """Where units do not fit at one price, each device's own pages are what a head lacks."""
    codes = codes_of()
    codes[6:] = np.where(codes[6:] == _price.PROTECTED, codes[6:], 20)
    room = plan_of(codes, [9_000, 9_000]).room
    rule = decode.ladder(codes)(room)
    plan = decode.Plan(rule.level.reshape(SHAPE), room, rule.price, None, None, room.num_pages)
    why = explain.heads(plan, codes)
    assert (why.binding[why.more_bytes > 0] != Binding.PRICE).all()
    d = int(plan.device_of[0, 0])
    words = explain.sentence(plan, codes, 0, 0)
    assert f"because device {d} is full" in words
    np.testing.assert_allclose(why.price, plan.price[plan.device_of])
    pages = plan.room.num_pages.copy()
    pages[d] += int(why.more_bytes[0, 0]) // (plan.room.page_bytes + 4)
    again = decode.ladder(codes)(plan.room._replace(num_pages=pages)).level
    grown = held_bytes(again, plan.bits) - held_bytes(plan.level, plan.bits)
    assert grown[0] > 0
    assert (grown[plan.room.device_of != d] == 0).all()


def test_numbers_are_those_of_the_plan():
    codes = codes_of()
    plan = plan_of(codes, [24_000])
    why = explain.heads(plan, codes)
    np.testing.assert_array_equal(why.tokens.sum(axis=2), plan.kept.sum(axis=2))
    pages = plan.room.pages_of(plan.level.reshape(UNITS, -1))
    np.testing.assert_array_equal(why.got_bytes.reshape(-1), pages * plan.room.page_bytes)
    assert (why.got_bytes <= why.asked_bytes).all()
    assert (why.binding == Binding.DEVICE).all()
    np.testing.assert_allclose(why.price, plan.price[0])


def test_what_is_left_out_is_worth_less_than_the_price():
    """Complementary slackness in worth per byte; the price is a twelfth of an octave coarse."""
    codes = codes_of()
    plan = plan_of(codes, [24_000])
    why = explain.heads(plan, codes)
    assert (why.marginal > 0).all()
    assert (why.marginal < why.price * (1 + 1e-6)).all()
    # By hand: the best evicted token of a unit would gain its worth at the lowest level.
    level, own = plan.level.reshape(UNITS, -1), codes.astype(float)
    worth = 2 ** ((own - 200) / 12) * (level == len(plan.bits))
    lowest = worth.max(axis=1) / token_bytes(DIM, plan.bits[-1])
    assert (why.marginal.reshape(-1) >= lowest * (1 - 1e-6)).all()


def test_ample_memory_binds_nothing_and_scarce_memory_leaves_the_floor():
    codes = codes_of()
    plan = plan_of(codes, [400_000])
    why = explain.heads(plan, codes)
    assert (why.binding == Binding.CAP).all()
    assert (why.more_bytes == -1).all()
    assert (why.marginal == 0).all()
    assert "all that it asked for" in explain.sentence(plan, codes, 3, 2)
    codes[0] = np.where(codes[0] == _price.PROTECTED, codes[0], 1)
    plan = plan_of(codes, [16_000])
    why = explain.heads(plan, codes)
    assert why.binding[0, 0] == Binding.FLOOR
    assert why.tokens[0, 0].tolist() == [12, 0, 0]
    assert "which always stay" in explain.sentence(plan, codes, 0, 0)


def test_the_sentence_says_what_more_memory_buys():
    codes = codes_of()
    plan = plan_of(codes, [24_000])
    words = explain.sentence(plan, codes, 2, 1, more_bytes=4096)
    pages = 4096 // (plan.room.page_bytes + 4)
    room = plan.room._replace(num_pages=plan.room.num_pages + pages)
    after = decode.ladder(codes)(room).level.reshape(SHAPE)
    more = (after < len(plan.bits)).sum(axis=2) - plan.kept.sum(axis=2)
    finer = (plan.kept & (after < plan.level)).sum(axis=2)
    # By hand: the relative errors of 8, 4 and 3 bits to the power of 3/4, and of nothing.
    lost = np.array([3.45e-5, 0.0072, 0.0295, 1]) ** 0.75
    gains = (lost[plan.level] - lost[after]) * 2 ** ((codes.reshape(SHAPE) - 200.0) / 12)
    gained = gains[plan.level != after].sum()
    assert words.startswith(f"Head 1 of layer 2 keeps {plan.kept[2, 1].sum()} of 200 tokens (")
    assert "because device 0 is full" in words
    assert f"4 KiB more there would buy {pages} pages: {more.sum()} more tokens" in words
    assert f"tokens ({more[2, 1]} of this head) and more bits for {finer.sum()} (" in words
    assert f"({finer[2, 1]} of this head), worth {gained:.3g} together." in words
    least = explain.heads(plan, codes).more_bytes[2, 1]
    assert f"{human_bytes(least)} more there" in explain.sentence(plan, codes, 2, 1)
    spread = plan_of(codes, [14_000, 10_000])
    assert "all 2 devices' memory is spent at one price" in explain.sentence(spread, codes, 2, 1)


def test_tokens_outside_of_a_window_are_not_asked_for():
    """A layer with a window that holds all of it lacks nothing; what it cannot see is the others'."""
    windows = (20, None, 20, None)
    seen = np.ones(SHAPE, bool)
    seen[::2, :, : 200 - 19] = False  # the next query and 19 tokens before it
    codes = codes_of()
    codes[:, :4] = 90
    codes[:3] = codes[6:9] = np.maximum(codes[:3], 250)
    rule = decode.ladder(codes, seen.reshape(UNITS, -1))
    plan = decode.fit(rule, SHAPE, DIM, [30_000], windows=windows)
    why = explain.heads(plan, codes)
    assert (why.binding[::2] == Binding.CAP).all()
    assert (why.tokens[::2, :, 0] == 19).all()
    assert (why.binding[1::2] == Binding.DEVICE).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"codes": codes_of(1)}, "codes do not lead to plan.level"),
        ({"codes": codes_of().astype(int)}, "codes has dtype int64"),
        ({"layer": 4}, "layer is 4"),
        ({"head": 3}, "head is 3"),
        ({"more_bytes": 0}, "more_bytes is 0"),
        ({"plan": 3}, "plan is 3"),
    ],
)
def test_bad_input_is_named(given, words):
    given = {
        "plan": plan_of(codes_of(), [24_000]),
        "codes": codes_of(),
        "layer": 0,
        "head": 0,
    } | given
    with pytest.raises(ValueError, match=words):
        explain.sentence(**given)
