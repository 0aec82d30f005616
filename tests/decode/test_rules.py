"""Rules about a context's tokens: what must stay does in every head, and brings others along."""

import numpy as np
import pytest

from jbalance import decode
from jbalance.decode import Reserve
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
