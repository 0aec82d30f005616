"""What a run tells of its plan, by rules and without."""

from __future__ import annotations

import numpy as np

from experiments.kv_budget import policies, telling
from experiments.kv_budget.policies import POLICIES
from jbalance.importance import Keep, knowledge

BUDGET = [16_000]


def test_ladders_keep_what_they_are_told(measured):
    size = measured.k.shape[1]
    where = (np.arange(size) >= 40) & (np.arange(size) < 48)
    told = measured._replace(known=knowledge([Keep(where)], size, beta=0))
    ladder = POLICIES["ladder"]
    plain, ruled = (policies.make_plan(ladder, x, BUDGET) for x in (measured, told))
    assert plain.kept[..., where].mean() < 1
    assert (ruled.level[..., where] == 0).all()
    words = telling.reasons(np.asarray(told.w[ladder.scorer]), ruled, told.known)
    assert all(sentence.startswith("Head ") for sentence in words)
    # Rules are about single tokens: policies without a price for each go on as before.
    others = [policies.make_plan(POLICIES["uniform"], x, BUDGET).level for x in (measured, told)]
    np.testing.assert_array_equal(*others)


def test_tokens_are_told_in_the_currency_of_the_price(measured):
    ladder = POLICIES["ladder"]
    plan = policies.make_plan(ladder, measured, BUDGET)
    w = np.asarray(measured.w[ladder.scorer])
    told = telling.of_tokens(w, plan)
    assert {len(x) for x in told.values()} == {w.shape[-1]}
    bits = np.array([8, 4, 3, 0])[plan.level].mean(axis=(0, 1))
    np.testing.assert_allclose(told["bits"], bits)
    entry_bytes = 2 * (8 * 3 / 8 + 2) + 1  # key and value of 8 features at 3 bits, norms, worth
    np.testing.assert_allclose(told["worth_per_byte"], w.mean(axis=(0, 1)) / entry_bytes, rtol=1e-5)
