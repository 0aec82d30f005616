"""Every policy keeps every device's bytes; what it keeps is what it said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.kv_budget import evaluate, measure
from experiments.kv_budget.policies import POLICIES, make_plan, pack, policy_of, window_bytes
from experiments.models import Transformer, prefill_attention
from experiments.models.worth import decoder_of
from jbalance.cache import _price
from jbalance.decode import Reserve

UNITS = 12
REDUCING = [name for name in POLICIES if name != "full" and ":" not in name]
EVICTING = [name for name in REDUCING if policy_of(name).bits == (16,)]
BUDGETS = [[30_000], [20_000, 12_000], [18_000, 10_000, 6_000, 6_000]]
NEW = np.random.default_rng(1).integers(0, 61, 9).astype(np.int32)


def test_every_precision_is_tried():
    assert set(EVICTING) == {"sinks-recent", "uniform", "proportional", "ladder-eviction-only"}


@pytest.mark.parametrize(
    ("name", "budgets", "reserve"),
    [
        *((name, BUDGETS[1], None) for name in REDUCING),
        *(
            pytest.param(name, [3 * b for b in budgets], Reserve(1, 5), marks=pytest.mark.slow)
            for name in REDUCING
            for budgets in BUDGETS
        ),
    ],
)
def test_live_bytes_stay_within_each_device(measured, name, budgets, reserve):
    policy, devices = policy_of(name), jax.devices()[: len(budgets)]
    plan = make_plan(policy, measured, budgets, reserve)
    context = pack(policy, measured, plan, devices)
    for d, (held, budget) in enumerate(zip(context.caches, budgets, strict=True)):
        assert held.nbytes == context.nbytes[d] <= budget
        assert int(held.arena.count.sum()) == plan.kept[plan.device_of == d].sum()


def entries(plan):
    """[U] tokens of each unit."""
    return plan.kept.sum(axis=-1).reshape(-1)


def test_the_same_bytes_are_used_up(measured):
    """No policy gains by holding more: all fill their pages but for what a page cannot divide."""
    used = {
        name: entries(make_plan(policy_of(name), measured, [40_000])).sum() for name in EVICTING
    }
    most = max(used.values())
    assert all(most - used[name] < 16 for name in ("uniform", "sinks-recent", "proportional"))
    assert used["ladder-eviction-only"] >= 0.85 * most


def test_uniform_gives_every_head_of_a_device_the_same(measured):
    plan = make_plan(policy_of("uniform"), measured, [20_000, 12_000])
    for d in range(2):
        own = entries(plan)[plan.room.device_of == d]
        assert own.max() - own.min() <= plan.room.page_tokens[0]


def test_the_ladder_has_prices_and_spends_where_the_error_is(measured):
    ladder, uniform = (
        make_plan(policy_of(name), measured, [30_000])
        for name in ("ladder-eviction-only", "uniform")
    )
    assert (ladder.price > 0).all()
    counts = np.array(measure.counts(measured.k.shape[1]))
    error = np.asarray(measured.error["combined"]).reshape(UNITS, -1)

    def cost(plan):
        return sum(np.interp(n, counts, e) for n, e in zip(entries(plan), error, strict=True))

    assert cost(ladder) < cost(uniform)


def test_the_ladder_fills_its_pages_with_the_best_tokens_of_every_head(measured):
    """Sinks and recent tokens highest; in each head, precision falls with worth; slots are filled."""
    plan = make_plan(policy_of("ladder"), measured, [16_000, 9_000])
    level = plan.level.reshape(UNITS, -1)
    assert (level[:, :4] == 0).all()
    assert (level[:, -8:] == 0).all()
    inner = np.asarray(measured.w["worth"]).reshape(UNITS, -1)[:, 4:-8]
    number = np.stack([(level == m).sum(axis=1) for m in range(3)], axis=1)
    tokens = np.array(plan.room.page_tokens)
    room = -(-number // tokens) * tokens - number
    codes = np.asarray(_price.encode_worth(inner))
    for row, code, empty in zip(level[:, 4:-8], codes, room, strict=True):
        for m in range(3):  # those of one code enter together, or none of them
            left = code[row > m]
            assert code[row <= m].min(initial=255) >= left.max(initial=0)
            assert not left.size or (left == left.max()).sum() > empty[m]


def test_uniform_bits_gives_all_tokens_the_same_where_they_fit(measured):
    ample, scarce = (make_plan(policy_of("uniform-bits"), measured, [n]) for n in (80_000, 14_000))
    assert len(np.unique(ample.level)) == 1
    assert ample.kept.all()
    kept = scarce.kept.reshape(UNITS, -1)
    assert not kept.all()
    assert (scarce.level[scarce.kept] == len(scarce.bits) - 1).all()
    assert kept[:, :4].all()
    assert kept[:, -16:].all()


def test_sinks_recent_keeps_the_ends(measured):
    plan = make_plan(policy_of("sinks-recent"), measured, [30_000])
    for row, n in zip(plan.kept.reshape(UNITS, -1), entries(plan), strict=True):
        assert row[:4].all()
        assert row[4 - n :].all()


def test_full_keeps_everything_whatever_the_budget(small_model, context, measured):
    """And predicts as dense attention does, but for bfloat16."""
    policy, devices = policy_of("full"), jax.devices()[:2]
    plan = make_plan(policy, measured, [1, 1])
    assert plan.kept.all()
    held = pack(policy, measured, plan, devices)
    got = evaluate.log_probs(decoder_of(small_model), held, devices, NEW)
    want = evaluate.reference(small_model, context, NEW)
    np.testing.assert_allclose(got, want, atol=0.01)


@pytest.mark.parametrize("name", ["ladder-eviction-only", "uniform"])
def test_evicting_equals_the_masked_model(small_model, context, measured, name):
    """New tokens see what each head kept, its centroids none, and each other."""
    policy, devices = policy_of(name), jax.devices()[:2]
    plan = make_plan(policy, measured, [20_000, 12_000])
    held = pack(policy, measured, plan, devices)
    got = evaluate.log_probs(decoder_of(small_model), held, devices, NEW)
    want = masked_logits(small_model, context, plan.kept, NEW)
    np.testing.assert_allclose(got, jax.nn.log_softmax(want), atol=0.01)


def masked_logits(model, context, kept, new):
    """The oracle: the whole sequence at once; the context's own outputs are those of full attention."""
    size, total = len(context), len(context) + len(new)
    causal = np.tril(np.ones((total, total), bool))
    mask = np.broadcast_to(causal, (*kept.shape[:2], total, total)).copy()
    mask[..., size:, :size] = kept[:, :, None]

    def attention(q, k, v, mask):
        group = q.shape[2] // k.shape[2]
        return jax.nn.dot_product_attention(
            q, k, v, mask=jnp.repeat(mask, group, axis=0)[None]
        ), None

    @nnx.jit
    def logits(model, tokens, mask):
        return model.logits(model.hidden(tokens, None, attention, mask)[0])

    tokens = np.concatenate([context, new])[None]
    return logits(model, tokens, jnp.asarray(mask))[0, size:]


def test_prefill_is_the_models_own(small_model: Transformer, context, measured):
    _, (k, v) = nnx.jit(lambda m, x: m.hidden(x, None, prefill_attention))(
        small_model, context[None]
    )
    np.testing.assert_allclose(measured.k, k[:, 0], atol=1e-5)
    np.testing.assert_allclose(measured.v, v[:, 0], atol=1e-5)
    error = measured.error["combined"]
    assert error.shape == (4, 3, len(measure.counts(len(context))))
    # Not exactly monotone: a kept token may pull the output away from where the rest would leave it.
    assert (error[..., -1] < 1e-9).all()


def test_quality_of_the_full_cache_is_perfect(small_model, context):
    full = evaluate.reference(small_model, context, NEW[:-1])
    same = evaluate.quality(full, full, NEW[1:])
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1 == 1
    assert same.nll == same.nll_full
    other = evaluate.quality(jax.nn.log_softmax(full * 0.5), full, NEW[1:])
    assert other.kl > 0


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda m: policy_of("laddr"), "policy is 'laddr'"),
        (lambda m: make_plan(policy_of("ladder"), m, [500]), "budgets_bytes[0] is 500"),
        (
            lambda m: make_plan(policy_of("ladder"), m, [16_000, 8_000], Reserve(1, 300)),
            "new tokens of its",
        ),
    ],
)
def test_bad_input_is_named(measured, call, names):
    with pytest.raises(ValueError, match=r"policy|budget") as error:
        call(measured)
    assert names in str(error.value)


def test_a_context_shorter_than_the_window_is_named(small_model):
    with pytest.raises(ValueError, match="context has 100 tokens: at least 129"):
        measure.prefill(small_model, np.zeros(100, np.int32), ("combined",))


@pytest.mark.parametrize("name", ["ladder", "uniform-bits", "sinks-recent"])
def test_windows_are_held_besides_the_budget(measured, name):
    """The budget is for the layers without; a window's tokens all stay, no older one does."""
    windows, budget, size = (None, 16, None, 300), 16_000, 200
    policy = policy_of(name)
    plan = make_plan(policy, measured, [budget], windows=windows)
    context = pack(policy, measured, plan, jax.devices()[:1])
    np.testing.assert_array_equal(plan.kept[1].sum(axis=-1), 15)  # a query sees itself, too
    np.testing.assert_array_equal(plan.level[1, :, -15:], 0)
    np.testing.assert_array_equal(plan.level[3], 0)
    assert 0 < plan.kept[[0, 2]].sum() <= 2 * 3 * size
    arena = context.caches[0].arena
    assert int(arena.count.sum()) == plan.kept.sum()
    beside = window_bytes(plan)
    assert 0.7 * budget < context.nbytes[0] - beside <= budget
    pages = np.asarray(arena.pages).reshape(4, -1).sum(axis=1)
    assert 0 <= beside - (arena.page_bytes + 4) * pages[[1, 3]].sum() < 6 * 400
