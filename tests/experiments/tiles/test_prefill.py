"""The prefill within a budget of tiles: equal tiles for all, and dense where all are allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiles import policies
from experiments.tiles.prefill import compare, main
from jbalance import attention

SIZE, HEADS = 1024, 3


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, SIZE, HEADS, 16)) * 2
    k, v = rng.normal(size=(2, 1, SIZE, 1, 16))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


@pytest.mark.parametrize("density", [0.5, 0.25])
@pytest.mark.parametrize("name", ["window", "sliding-window", "uniform", "ladder"])
def test_every_policy_has_the_same_number_of_tiles_and_causal_ones_only(tokens, name, density):
    plan = jax.jit(policies.POLICIES[name], static_argnums=3)(*tokens, density)
    mask = np.asarray(attention.to_mask(plan))
    heads = HEADS // mask.shape[1]
    assert heads * mask.sum() == HEADS * policies.tiles_of(SIZE, density)
    assert not (mask & ~policies.tiling(SIZE).visible()).any()
    own = np.arange(SIZE) // policies.BLOCK_Q, np.arange(SIZE) // policies.BLOCK_K
    assert mask[:, :, *own].all()
    assert mask[..., 0].all()


def test_a_sliding_window_is_as_wide_for_every_query_block_that_has_so_many(tokens):
    plan = policies.sliding_window(*tokens, 0.5)
    width = np.asarray(attention.to_mask(plan))[0, 0].sum(axis=1)
    seen = policies.tiling(SIZE).visible().sum(axis=1)
    assert (width[width < seen] >= width.max() - 1).all()


def test_overlap_counts_the_tiles_of_both_among_those_of_either(tokens):
    plans = [policies.POLICIES[name](*tokens, 0.5) for name in ("ladder", "window")]
    a, b = (np.broadcast_to(attention.to_mask(x), (1, HEADS, 16, 64)) for x in plans)
    want = (a & b).sum() / (a | b).sum()
    assert 0.2 < want < 0.9
    np.testing.assert_allclose(policies.overlap(*plans), want, rtol=1e-6)
    assert policies.overlap(plans[1], plans[1]) == 1


def test_all_tiles_are_dense_attention(tokens):
    q, k, v = tokens
    want = attention.attend(q, k, v, policies.dense(q, k, v, 1.0), causal=True).y
    for name in ("window", "sliding-window", "uniform", "ladder"):
        plan = policies.POLICIES[name](q, k, v, 1.0)
        np.testing.assert_allclose(attention.attend(q, k, v, plan, causal=True).y, want, atol=1e-6)


@pytest.mark.slow
def test_the_ladder_loses_less_than_the_others(tokens):
    q, k, v = tokens
    dense = attention.attend(q, k, v, policies.dense(q, k, v, 1.0), causal=True).y
    lost = {}
    for name in ("window", "uniform", "ladder"):
        y = attention.attend(q, k, v, policies.POLICIES[name](q, k, v, 0.5), causal=True).y
        lost[name] = float(jnp.sum(jnp.square(y - dense)))
    assert lost["ladder"] < lost["uniform"] < lost["window"]


def test_a_density_below_what_every_query_block_must_have_is_refused(tokens):
    q, k, v = (x[:, :512] for x in tokens)
    for name in ("window", "sliding-window", "uniform", "ladder"):
        with pytest.raises(ValueError, match=r"is 0\.1|num_tiles is"):
            policies.POLICIES[name](q, k, v, 0.1)


def test_predictions_are_compared_on_their_last_tokens():
    full = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).normal(size=(6, 9))))
    answer = np.asarray(jnp.argmax(full[3:5], axis=-1))
    same = compare(full, full, np.zeros(12, int), answer)
    assert same == {"kl": 0.0, "passkey": True, "passkey_dense": True}
    other = compare(full, jnp.roll(full, 1, axis=1), np.zeros(12, int), answer)
    assert other["kl"] > 0
    assert not other["passkey"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "nothing"], "--policies is 'nothing'"),
        (["--density", "1.5"], "--density is 1.5"),
        (["--tokens", "1000"], "--tokens is 1000: a multiple of 64"),
    ],
)
def test_a_bad_option_is_one_line(options, message, capsys):
    assert main(options) == 2
    assert message in capsys.readouterr().err
