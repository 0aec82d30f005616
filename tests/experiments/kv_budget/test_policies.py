"""Every policy keeps every device's bytes; what it keeps is what it said."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.kv_budget import measure
from experiments.kv_budget.decode import place_caches
from experiments.kv_budget.policies import POLICIES, PagedPolicy, Policy, make_plan, policy_of
from experiments.models import Llama, prefill_attention
from jbalance.cache import worth

UNITS, ENTRY = 12, 2 * 8 * 2
REDUCING = [name for name in POLICIES if name != "full" and ":" not in name]


@pytest.fixture(scope="session")
def by_scorer(small_model, context):
    """The context as each policy measures it."""
    names = {policy_of(name).scorer for name in REDUCING}
    return {
        name: jax.block_until_ready(measure.prefill(small_model, context, name)) for name in names
    }


BUDGETS = [[20_000], [16_000, 8_000], [12_000, 6_000, 3_000, 3_000], [70_000, 7_000]]
PAGED = [name for name in REDUCING if isinstance(policy_of(name), PagedPolicy)]


@pytest.mark.parametrize(
    ("name", "budgets", "tail_tokens"),
    [
        *((n, BUDGETS[2], 5) for n in REDUCING if n not in PAGED),
        ("ladder", BUDGETS[2], 0),
        *(
            pytest.param(n, b, t, marks=pytest.mark.slow)
            for names, budgets, t in (
                ([n for n in REDUCING if n not in PAGED], BUDGETS, 0),
                ([n for n in REDUCING if n not in PAGED], [BUDGETS[i] for i in (0, 1, 3)], 5),
                (PAGED, BUDGETS[1:2], 5),
            )
            for n in names
            for b in budgets
        ),
    ],
)
def test_live_bytes_stay_within_each_device(by_scorer, name, budgets, tail_tokens):
    measured = by_scorer[policy_of(name).scorer]
    plan = make_plan(policy_of(name), measured, budgets, tail_tokens)
    caches = place_caches(measured, plan, jax.devices()[: len(budgets)], tail_tokens)
    for d, (held, budget) in enumerate(zip(caches, budgets, strict=True)):
        arrays = jax.tree.leaves(held)
        assert sum(x.nbytes for x in arrays) == held.nbytes <= budget
        assert all(x.devices() == {jax.devices()[d]} for x in arrays)
        assert held.context.num_entries == plan.entries[plan.device_of == d].sum()
    assert sum(held.context.num_entries for held in caches) == plan.entries.sum()


def test_the_same_bytes_are_used_up(measured):
    """No policy gains by holding more: whole amounts leave less than an entry of each device's, the
    ladder one step."""
    used = {
        name: make_plan(policy_of(name), measured, [16_000, 8_000]).entries.sum()
        for name in REDUCING
        if isinstance(policy_of(name), Policy)
    }
    most = max(used.values())
    assert all(most - used[name] < 2 for name in ("uniform", "sinks-recent", "proportional"))
    assert used["ladder-eviction-only"] >= 0.9 * most


def test_uniform_gives_every_head_of_a_device_the_same(measured):
    plan = make_plan(policy_of("uniform"), measured, [16_000, 8_000])
    for d in range(2):
        own = plan.entries[plan.device_of == d]
        assert own.max() - own.min() <= 1


def test_the_ladder_has_prices_and_spends_where_the_error_is(measured):
    ladder, uniform = (
        make_plan(policy_of(name), measured, [20_000])
        for name in ("ladder-eviction-only", "uniform")
    )
    assert ladder.price is not None
    assert (ladder.price > 0).all()
    counts = np.array(measure.counts(measured.w.shape[-1]))
    error = np.asarray(measured.error).reshape(UNITS, -1)

    def cost(entries):
        return sum(np.interp(n, counts, e) for n, e in zip(entries, error, strict=True))

    assert cost(ladder.entries) < cost(uniform.entries)


def test_the_ladder_fills_its_pages_with_the_best_tokens_of_every_head(by_scorer):
    """Sinks and recent tokens highest; in each head, precision falls with worth; slots are filled."""
    measured = by_scorer["sketch"]
    plan = make_plan(policy_of("ladder"), measured, [16_000, 8_000])
    level = plan.level.reshape(UNITS, -1)
    assert (level[:, :4] == 0).all()
    assert (level[:, -8:] == 0).all()
    inner = np.asarray(measured.w).reshape(UNITS, -1)[:, 4:-8]
    for row, w in zip(level[:, 4:-8], inner, strict=True):
        above = [w[row < m].min(initial=np.inf) for m in range(1, 4)]
        below = [w[row >= m].max(initial=0) for m in range(1, 4)]
        assert (np.array(above) >= 0.93 * np.array(below)).all()  # a code is right to 3 %
    number = np.stack([(level == m).sum(axis=1) for m in range(3)], axis=1)
    tokens = np.array(plan.room.page_tokens(plan.bits))
    room = -(-number // tokens) * tokens - number
    codes = np.asarray(worth.encode_worth(inner))
    for row, code, empty in zip(level[:, 4:-8], codes, room, strict=True):
        for m in range(3):  # those of one code enter together, or none of them
            left = code[row > m]
            assert not left.size or (left == left.max()).sum() > empty[m]
    used = np.array([(-(-number // tokens))[plan.device_of == d].sum() for d in range(2)])
    assert (used >= 0.7 * plan.room.num_pages).all()  # three pages a unit are a coarse measure


def test_uniform_bits_gives_all_tokens_the_same_where_they_fit(by_scorer):
    measured = by_scorer["sinks_recent"]
    ample, scarce = (make_plan(policy_of("uniform-bits"), measured, [n]) for n in (60_000, 9_000))
    assert len(np.unique(ample.level)) == 1
    assert ample.kept.all()
    kept = scarce.kept.reshape(UNITS, -1)
    assert not kept.all()
    assert (scarce.level[scarce.kept] == len(scarce.bits) - 1).all()
    assert kept[:, :4].all()
    assert kept[:, -16:].all()


def test_sinks_recent_keeps_the_ends(small_model, context):
    measured = measure.prefill(small_model, context, "sinks_recent")
    plan = make_plan(policy_of("sinks-recent"), measured, [12_000])
    for row, n in zip(plan.kept.reshape(UNITS, -1), plan.entries, strict=True):
        assert row[:4].all()
        assert row[4 - n :].all()


def test_full_keeps_everything_whatever_the_budget(measured):
    assert make_plan(policy_of("full"), measured, [1, 1]).kept.all()


def test_prefill_is_the_models_own(small_model: Llama, context, measured):
    _, (k, v) = nnx.jit(lambda m, x: m.hidden(x, None, prefill_attention))(
        small_model, context[None]
    )
    np.testing.assert_allclose(measured.k, k[:, 0], atol=1e-5)
    np.testing.assert_allclose(measured.v, v[:, 0], atol=1e-5)
    assert measured.error.shape == (4, 3, len(measure.counts(len(context))))
    # Not exactly monotone: a kept token may pull the output away from where the rest would leave it.
    assert (measured.error[..., -1] < 1e-9).all()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda m: policy_of("laddr"), "policy is 'laddr'"),
        (lambda m: make_plan(policy_of("ladder"), m, [500]), "budget is 500 bytes"),
        (
            lambda m: make_plan(policy_of("ladder"), m, [16_000, 8_000], 300),
            "300 new tokens",
        ),
    ],
)
def test_bad_input_is_named(measured, call, names):
    with pytest.raises(ValueError, match=r"policy|budget") as error:
        call(measured)
    assert names in str(error.value)


def test_a_context_shorter_than_the_window_is_named(small_model):
    with pytest.raises(ValueError, match="context has 100 tokens: at least 129"):
        measure.prefill(small_model, np.zeros(100, np.int32))
