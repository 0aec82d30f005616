"""Every policy keeps every device's bytes; what it keeps is what it said."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.kv_budget import measure
from experiments.kv_budget.decode import place_caches
from experiments.kv_budget.policies import POLICIES, make_plan, policy_of
from experiments.models import Llama, prefill_attention

UNITS, ENTRY = 12, 2 * 8 * 2
REDUCING = [name for name in POLICIES if name != "full" and ":" not in name]


@pytest.mark.parametrize("name", REDUCING)
@pytest.mark.parametrize(
    "budgets", [[20_000], [16_000, 8_000], [12_000, 6_000, 3_000, 3_000], [70_000, 7_000]]
)
@pytest.mark.parametrize("tail_tokens", [0, 5])
def test_live_bytes_stay_within_each_device(measured, name, budgets, tail_tokens):
    plan = make_plan(policy_of(name), measured, budgets, tail_tokens)
    caches = place_caches(measured, plan, jax.devices()[: len(budgets)], tail_tokens)
    np.testing.assert_array_equal(plan.kept.sum(-1).ravel(), plan.entries)
    for d, (held, budget) in enumerate(zip(caches, budgets, strict=True)):
        arrays = jax.tree.leaves(held)
        assert sum(x.nbytes for x in arrays) == held.nbytes <= budget
        assert all(x.devices() == {jax.devices()[d]} for x in arrays)
        assert held.context.num_entries == plan.entries[plan.device_of == d].sum()
    assert sum(held.context.num_entries for held in caches) == plan.entries.sum()


def test_the_same_bytes_are_used_up(measured):
    """No policy gains by holding more: whole amounts leave less than an entry, the ladder one step."""
    used = {
        name: make_plan(policy_of(name), measured, [16_000, 8_000]).entries.sum()
        for name in REDUCING
    }
    most = max(used.values())
    assert used["uniform"] == used["sinks-recent"] == used["proportional"] == most
    assert used["ladder"] >= 0.9 * most


def test_uniform_gives_every_head_of_a_device_the_same(measured):
    plan = make_plan(policy_of("uniform"), measured, [16_000, 8_000])
    for d in range(2):
        own = plan.entries[plan.device_of == d]
        assert own.max() - own.min() <= 1


def test_the_ladder_has_prices_and_spends_where_the_error_is(measured):
    ladder, uniform = (
        make_plan(policy_of(name), measured, [20_000]) for name in ("ladder", "uniform")
    )
    assert ladder.price is not None
    assert (ladder.price > 0).all()
    counts = np.array(measure.counts(measured.w.shape[-1]))
    error = np.asarray(measured.error).reshape(UNITS, -1)

    def cost(entries):
        return sum(np.interp(n, counts, e) for n, e in zip(entries, error, strict=True))

    assert cost(ladder.entries) < cost(uniform.entries)


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
