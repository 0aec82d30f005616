"""One memory for weights and cache: losses fall with bits, and the choice is near the best of all."""

import itertools

import jax
import numpy as np
import pytest

from jbalance import decode
from tests.decode.conftest import PROMPT


@pytest.fixture(scope="module")
def losses(grouped):
    steps = []
    found = decode.memory_losses(
        grouped, PROMPT[:256], parts=(0.25, 0.5), on_step=lambda *at: steps.append(at)
    )
    assert steps == [(i + 1, 22) for i in range(22)]  # 3 layers and tables by 5, 2 of the cache
    return found


def test_losses_fall_with_bits_and_bytes(losses):
    assert losses.bits == (3, 4, 5, 8, 16, None)
    for rows in (losses.layers, losses.table[None], losses.cache[None]):
        assert (np.diff(rows, axis=1) < 1e-7).all()  # of 16 bits it is that of float32
        assert (rows >= 0).all()
    for rows in (losses.layer_bytes, losses.table_bytes[None]):
        assert (np.diff(rows, axis=1) > 0).all()
    assert (losses.layers[:, -1] == 0).all()
    assert losses.table[-1] == 0


def test_small_losses_add_up(grouped, losses):
    """The divergence of all layers in 5 bits, and of tables, against the sum of each alone."""
    small = decode.quantize_weights(grouped, 5, 5)
    tokens = PROMPT[:256]
    want, got = (decode.memory.dense_log_probs(x, tokens, 128) for x in (grouped, small))
    together = float((np.exp(want) * (want - got)).sum(axis=-1).mean())
    alone = losses.layers[:, 2].sum() + losses.table[2]
    assert 0.5 * alone < together < 2 * alone


def drawn(seed):
    """Losses that are convex in bytes of different sizes."""
    rng = np.random.default_rng(seed)
    bits = np.array([3.25, 4.25, 5.25, 8.25, 16])
    size = rng.integers(2_000, 9_000, 4)[:, None] * bits
    loss = rng.gamma(1.0, size=(4, 1)) * 4.0**-bits
    loss[:, -1] = 0
    return decode.MemoryLosses(
        (3, 4, 5, 8, None),
        loss[:3],
        size[:3].astype(np.int64),
        loss[3],
        size[3].astype(np.int64),
        (0.125, 0.25, 0.5),
        rng.gamma(1.0) * np.array([1e-3, 1e-4, 1e-6]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_within_one_step_of_the_best_of_all(grouped, seed):
    losses, tokens = drawn(seed), 2_000
    dense = grouped.dense_bytes(tokens)
    sizes = [*losses.layer_bytes, losses.table_bytes, np.array(losses.parts) * dense]
    blocks = [np.ceil(x / 1024) for x in sizes]
    values = [*losses.layers, losses.table, losses.cache]
    costs = np.array([sum(x) for x in itertools.product(*blocks)])
    total = np.array([sum(x) for x in itertools.product(*values)])
    most = max(np.diff(x).max() for x in blocks)
    for budget in np.linspace(costs.min() + 1, costs.max(), 7).astype(int):
        fit = decode.fit_memory(grouped, losses, int(budget) * 1024, tokens)
        assert total[costs <= budget].min() <= fit.loss * (1 + 1e-5) + 1e-9
        less = max(budget - most, costs.min())
        assert fit.loss <= total[costs <= less].min() * (1 + 1e-5) + 1e-9
        assert fit.model.nbytes + fit.cache_bytes == budget * 1024


def test_it_decodes_within_the_memory(grouped, losses):
    dense = grouped.dense_bytes(200)
    fit = decode.fit_memory(grouped, losses, int(grouped.nbytes * 0.3) + dense, 200)
    assert None not in fit.layer_bits
    state = decode.create(fit.model, [fit.cache_bytes])
    state = decode.join(fit.model, state, 0, PROMPT[:180])
    tokens, state = decode.step(fit.model, state)
    assert fit.model.nbytes + sum(state.nbytes) <= int(grouped.nbytes * 0.3) + dense
    assert tokens.shape == (1,)
    ample = decode.fit_memory(grouped, losses, 2 * grouped.nbytes + dense, 200)
    assert ample.layer_bits == (None,) * 3
    assert ample.loss == pytest.approx(losses.cache[-1], rel=1e-5)
    for x, y in zip(
        jax.tree.leaves(ample.model.layers), jax.tree.leaves(grouped.layers), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_more_requests_need_more_of_the_memory(grouped, losses):
    budget = int(grouped.nbytes * 0.3) + grouped.dense_bytes(200)
    one, four = (
        decode.fit_memory(grouped, losses, budget, 200, num_requests=n).cache_bytes for n in (1, 4)
    )
    assert four >= one


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"budget_bytes": 1000}, "budget_bytes is 1000: the fewest bits of weights and cache take"),
        ({"budget_bytes": -1}, "budget_bytes"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_requests": 0}, "num_requests"),
        ({"losses": 3}, "losses is 3"),
    ],
)
def test_bad_fits_are_named(grouped, losses, changed, names):
    given = {"losses": losses, "budget_bytes": 10**7, "num_tokens": 100} | changed
    with pytest.raises(ValueError, match=names):
        decode.fit_memory(grouped, **given)


@pytest.mark.parametrize(
    ("tokens", "options", "names"),
    [
        (PROMPT[:100], {}, "tokens has 100 tokens: at least 128"),
        (PROMPT, {"parts": ()}, r"parts is \(\): one or more, ascending"),
        (PROMPT, {"parts": (0.5, 0.25)}, "ascending"),
        (PROMPT, {"parts": (0.5, 1.5)}, r"parts\[1\]"),
        (PROMPT, {"parts": 3}, "parts"),
        (PROMPT[:128], {"parts": (0.01,)}, r"parts\[0\] is 0.01, for a context of 64 tokens: "),
    ],
)
def test_bad_measurements_are_named(grouped, tokens, options, names):
    with pytest.raises(ValueError, match=names):
        decode.memory_losses(grouped, tokens, **options)


def test_losses_of_another_model_are_named(grouped, losses):
    other = losses._replace(layers=losses.layers[:2])
    with pytest.raises(ValueError, match="losses has 2 layers: the model has 3"):
        decode.fit_memory(grouped, other, 10**7, 100)
