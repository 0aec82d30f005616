"""Fine-tuning over some tiles: one trace, dense where all tiles are allowed, finite gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.harness import optimisers
from experiments.tiles import finetuning
from experiments.tiles.finetune import main, no_tiles, truncated
from tests.support.small_models import VOCAB, small_llama

TOKENS, STEPS = 512, 4


@pytest.fixture(scope="module")
def start():
    return nnx.split(small_llama(num_layers=2, max_positions=TOKENS), nnx.Param, ...)


def trained(start, policy, density):
    """Losses, tiles and traces of a few steps."""
    graph, parameters, fixed = start
    plan_of = finetuning.policy_plan(policy, density)
    step = finetuning.make_step(graph, plan_of, optimisers.adamw(STEPS, 1e-2), frozen=[fixed])
    state, losses, tiles = step.init(parameters), [], []
    text = {"a": (np.arange(4 * TOKENS) ** 2 % VOCAB).astype(np.int32)}
    for ids in finetuning.batches(text, TOKENS, STEPS):
        parameters, state, loss, used = step.train(parameters, state, jnp.asarray(ids))
        losses.append(float(loss))
        tiles.append(float(used))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(parameters))
    return np.array(losses), np.array(tiles), len(step.traces)


@pytest.mark.slow
def test_all_tiles_train_as_dense_attention_does(start):
    want, _, _ = trained(start, "dense", 1.0)
    got, _, _ = trained(start, "ladder", 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert want[-1] < want[0]


@pytest.mark.slow
def test_half_of_the_tiles_are_computed_and_new_plans_trace_nothing(start):
    _, all_tiles, _ = trained(start, "ladder", 1.0)
    losses, tiles, traces = trained(start, "ladder", 0.5)
    assert np.isfinite(losses).all()
    assert traces == 1
    np.testing.assert_allclose(tiles / all_tiles, 0.5, atol=0.01)


def test_only_the_scored_tokens_count(start):
    graph, parameters, fixed = start
    ids = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, TOKENS), jnp.int32)
    plan_of = finetuning.policy_plan("dense", 1.0)
    optimiser = optimisers.adamw(STEPS, 1e-2)
    make = functools.partial(finetuning.make_step, graph, plan_of, optimiser, frozen=[fixed])
    logits = nnx.merge(*start)(ids[None])[0]
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), ids[1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(make().loss(parameters, ids), each.mean(), rtol=1e-5)
    np.testing.assert_allclose(make(scored=7).loss(parameters, ids), each[-7:].mean(), rtol=1e-5)


def test_a_truncated_model_has_the_first_layers(start):
    model = nnx.merge(*start)
    short = truncated(model, 1)
    ids = jnp.arange(9)[None]
    x = model.layer(0)
    positions = jnp.arange(9)
    q, k, v = x.qkv(model.embed(ids), positions)
    mask = jnp.tril(jnp.ones((9, 9), bool))
    y = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
    want = model.logits(x.finish(model.embed(ids), y))
    np.testing.assert_allclose(short(ids), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_is_frozen_stays(start):
    of_layers = nnx.All(nnx.PathContains("layers"), nnx.Param)
    graph, layers, *rest = nnx.split(nnx.merge(*start), of_layers, ...)
    plan_of = finetuning.policy_plan("ladder", 0.5)
    step = finetuning.make_step(graph, plan_of, optimisers.adamw(STEPS, 1e-2), frozen=rest)
    ids = jnp.arange(TOKENS) % VOCAB
    after, _, loss, _ = step.train(layers, step.init(layers), ids)
    whole = finetuning.make_step(
        start[0], plan_of, optimisers.adamw(STEPS, 1e-2), frozen=[start[2]]
    )
    np.testing.assert_allclose(loss, whole.loss(start[1], ids), rtol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(layers)


def test_a_plan_without_tiles_is_no_attention():
    q = jnp.ones((1, TOKENS, 4, 8))
    assert int(no_tiles(q, q, q).num_tiles) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "nothing"], "--policies is 'nothing'"),
        (["--density", "0"], "--density is 0"),
        (["--tokens", "1000"], "--tokens is 1000: a multiple of 64"),
        (["--steps", "1"], "--steps is 1: at least 4"),
    ],
)
def test_a_bad_option_is_one_line(options, message, capsys):
    assert main(options) == 2
    assert message in capsys.readouterr().err
