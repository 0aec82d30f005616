"""Rules about a context's tokens: what must stay does in every head, and brings others along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import decode
from jbalance.cache import _pages
from jbalance.cache._price import PROTECTED
from jbalance.decode import Reserve
from jbalance.decode.state import ALWAYS
from jbalance.importance import Implies, Keep, Matters, knowledge
from tests.decode.conftest import PROMPT

TOKENS, BUDGET = PROMPT[:200], [42_000]
RESERVE = Reserve(1, 8)


def plan_of(decoder, rules=None, **options):
    known = None if rules is None else knowledge(rules, len(TOKENS), **options)
    return decode.read(decoder, TOKENS, BUDGET, reserve=RESERVE, known=known).plan


def span(start, stop):
    return (np.arange(len(TOKENS)) >= start) & (np.arange(len(TOKENS)) < stop)


@pytest.fixture(scope="module")
def plain(decoder):
    return plan_of(decoder)


def test_what_attention_alone_loses_stays_by_a_rule(decoder, plain):
    least = plain.kept[..., 8:-8].mean(axis=(0, 1)).reshape(-1, 8).mean(axis=1).argmin()
    lost = span(8 + 8 * least, 16 + 8 * least)
    assert plain.kept[..., lost].mean() < 0.9
    ruled = plan_of(decoder, [Keep(lost)], beta=0)
    assert (ruled.level[..., lost] == 0).all()
    assert ruled.room.num_pages == plain.room.num_pages  # the same bytes


def test_no_head_keeps_a_without_b(decoder, plain):
    a, b = span(20, 24), span(150, 158)
    assert (plain.kept[..., a].any(axis=-1) & ~plain.kept[..., b].all(axis=-1)).any()
    ruled = plan_of(decoder, [Implies(a, b)], beta=0)
    assert ruled.kept[..., b].all(axis=-1)[ruled.kept[..., a].any(axis=-1)].all()
    # The first tokens always stay, and so does what they imply.
    always = plan_of(decoder, [Implies(span(0, 1), b)], beta=0)
    assert (always.level[..., b] == 0).all()


def test_what_matters_gets_more_and_no_rules_change_nothing(decoder, plain):
    some = span(40, 100)
    more = plan_of(decoder, [Matters(some, 100.0)])
    assert more.kept[..., some].sum() > plain.kept[..., some].sum()
    np.testing.assert_array_equal(plan_of(decoder, [], beta=0).level, plain.level)


def test_bad_rules_are_named(decoder):
    with pytest.raises(ValueError, match=r"known.keep has 5 entries"):
        decode.read(decoder, TOKENS, BUDGET, known=knowledge([], 5))
    with pytest.raises(ValueError, match="known is 3"):
        decode.read(decoder, TOKENS, BUDGET, known=3)
    everything = knowledge([Keep(np.ones(len(TOKENS), bool))], len(TOKENS))
    with pytest.raises(ValueError, match="always stay lack"):
        decode.read(decoder, TOKENS, BUDGET, reserve=RESERVE, known=everything)


# A request's own prompt, among others that take turns in one arena.
CROWDED, PLACES = [60_000], 3


def protected(state, request):
    """Of a request, how many tokens always stay, in each unit."""
    cache = state.caches[0]
    units = np.arange(cache.units_per_request) + request * cache.units_per_request
    held = [_pages.read(cache.arena, jnp.int32(unit), 0) for unit in units]
    return {int(jnp.sum(x.valid & (x.code == PROTECTED))) for x in held}


def joined(decoder, rules, **options):
    state = decode.create(decoder, CROWDED, num_requests=PLACES, recent_tokens=16)
    known = knowledge(rules, len(TOKENS), **options)
    return decode.join(decoder, state, 1, TOKENS, known=known)


def test_what_a_request_keeps_stays_while_others_come_and_go(decoder, tmp_path):
    state = joined(decoder, [Keep(span(100, 140))], beta=0)
    assert protected(state, 1) == {ALWAYS + 40}
    for request in (0, 2):
        state = decode.join(decoder, state, request, PROMPT, weight=20.0)
    for _ in range(20):
        _, state = decode.step(decoder, state)
    decode.save(tmp_path / "state", decoder, state)
    state = decode.restore(tmp_path / "state", decoder, CROWDED)
    for _ in range(20):
        _, state = decode.step(decoder, state)
    assert protected(state, 1) == {ALWAYS + 40}
    assert protected(state, 0) == {ALWAYS}
    assert sum(state.nbytes) <= sum(CROWDED)
    state = decode.join(decoder, decode.leave(state, 1), 1, TOKENS)
    assert protected(state, 1) == {ALWAYS}  # the rule has left with its request


def test_what_always_stays_brings_along_what_it_implies(decoder):
    state = joined(decoder, [Implies(span(0, 1), span(150, 158))], beta=0)
    assert protected(state, 1) == {ALWAYS + 8}


def test_no_rules_change_nothing(decoder):
    state = decode.create(decoder, CROWDED, num_requests=PLACES, recent_tokens=16)
    plain, ruled = decode.join(decoder, state, 1, TOKENS), joined(decoder, [], beta=0)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(ruled), strict=True):
        np.testing.assert_array_equal(x, y)


def test_rules_that_a_request_cannot_have_are_named(decoder):
    state = decode.create(decoder, CROWDED, num_requests=PLACES, recent_tokens=16)
    with pytest.raises(ValueError, match=r"known\.keep has 5 entries"):
        decode.join(decoder, state, 0, TOKENS, known=knowledge([], 5))
    everything = knowledge([Keep(span(0, 200))], len(TOKENS))
    with pytest.raises(ValueError, match=r"known\.keep: .* need \d+ pages, the device has \d+"):
        decode.join(decoder, state, 0, TOKENS, known=everything)
    assert not state.active.any()  # it goes on as it was
    state = decode.join(decoder, state, 0, TOKENS)
    context = decode.read(decoder, TOKENS, BUDGET, reserve=RESERVE)
    beside = decode.create(decoder, BUDGET, context=context)
    with pytest.raises(ValueError, match="known is given beside a context"):
        decode.join(decoder, beside, 0, TOKENS[:4], known=knowledge([], 4))
