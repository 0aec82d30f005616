"""Aggregators in training steps: the optax protocol, state, sharding, and weights from losses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jbalance import multitask
from tests.support.gradients import conflicting

K = 3
ALL = {
    "mean": multitask.mean(),
    "random": multitask.random(jax.random.key(0)),
    "dwa": multitask.dwa(),
    "importance": multitask.by_importance(np.eye(K), floor=0.1),
    "uncertainty": multitask.uncertainty(),
    "gradnorm": multitask.gradnorm(),
    "famo": multitask.famo(),
    "pcgrad": multitask.pcgrad(jax.random.key(0)),
    "upgrad": multitask.upgrad(),
    "fair": multitask.fair(1.0),
}


def problem():
    """Losses [K] >= 0 of parameters, which pull in different directions and have a common minimum."""
    rng = np.random.default_rng(0)
    goal = {"a": jnp.asarray(rng.normal(size=4), jnp.float32), "b": jnp.float32(0.5)}
    scale = jnp.asarray(rng.uniform(0.1, 3, size=(K, 4)), jnp.float32)

    def losses(parameters):
        off = (parameters["a"] - goal["a"]) * scale
        return jnp.sum(off**2, axis=1) + jnp.arange(1.0, K + 1) * (parameters["b"] - goal["b"]) ** 2

    return losses, {"a": jnp.zeros(4), "b": jnp.zeros(())}


@pytest.mark.parametrize("name", ALL)
def test_a_chain_with_an_optimizer_trains_in_one_trace(name):
    losses, parameters = problem()
    chain = optax.chain(multitask.aggregator(ALL[name], K), optax.adam(0.05))
    state = chain.init(parameters)
    chex.clear_trace_counter()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(parameters, state):
        gradients = jax.jacrev(losses)(parameters)
        updates, state = chain.update(gradients, state, parameters, losses=losses(parameters))
        return optax.apply_updates(parameters, updates), state

    first = losses(parameters)
    for _ in range(300):
        parameters, state = step(parameters, state)
    assert (np.asarray(losses(parameters)) < 0.05 * np.asarray(first)).all()
    assert np.isfinite(state[0].weights).all()
    jax.block_until_ready(chain.init(parameters))  # what a step was given was the state's own


def test_the_update_is_the_weighted_sum_in_each_leafs_dtype():
    gradients = {"a": jnp.ones((K, 2, 3), jnp.bfloat16), "b": jnp.arange(float(K))}
    made = multitask.aggregator(multitask.mean(), K)
    got, state = made.update(gradients, made.init(None))
    assert got["a"].dtype == jnp.bfloat16
    assert got["a"].shape == (2, 3)
    assert float(got["b"]) == pytest.approx(1.0)
    np.testing.assert_allclose(state.weights, 1 / 3)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_sharded_parameters_give_the_same_weights_and_send_little(devices):
    gradients = jnp.asarray(conflicting(K, 64, 100.0))
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    made = multitask.aggregator(multitask.upgrad(), K, axis_name="d")

    def update(gradients):
        got, state = made.update(gradients, made.init(None))
        return got, state.weights

    spec = PartitionSpec(None, "d")
    sharded = jax.jit(
        jax.shard_map(
            update,
            mesh=mesh,
            in_specs=spec,
            out_specs=(PartitionSpec("d"), PartitionSpec()),
        )
    )
    got, weights = sharded(gradients)
    alone = multitask.aggregator(multitask.upgrad(), K)
    want, state = alone.update(gradients, alone.init(None))
    np.testing.assert_allclose(weights, state.weights, rtol=1e-3)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
    if devices > 1:
        text = sharded.lower(gradients).compile().as_text()
        reduced = [line for line in text.splitlines() if " all-reduce(" in line]
        assert len(reduced) == 2
        assert sum(f"f32[{K},{K}]" in line for line in reduced) == 1
        assert sum(f"s32[{K}]" in line for line in reduced) == 1  # what the gradients are scaled by
        assert "all-gather(" not in text


def run(weighting, losses, gram=None):
    """Weights of each step, for losses [steps, K]."""
    state, out = weighting.init(losses.shape[1]), []
    for row in losses:
        weights, state = weighting.weigh(multitask.TaskStats(gram, jnp.asarray(row)), state)
        out.append(np.asarray(weights))
    return np.array(out)


def test_dwa_is_its_formula():
    losses = np.array([[1.0, 1.0], [0.5, 0.9], [0.4, 0.9], [0.4, 0.8]], np.float32)
    got = run(multitask.dwa(2.0), losses)
    np.testing.assert_allclose(got[:2], 0.5)
    for i in (2, 3):
        ratio = losses[i - 1] / losses[i - 2]
        np.testing.assert_allclose(got[i], np.exp(ratio / 2) / np.exp(ratio / 2).sum(), rtol=1e-5)


def test_uncertainty_comes_to_rest_at_the_inverse_losses():
    losses = np.tile(np.float32([0.5, 2.0, 8.0]), (3000, 1))
    np.testing.assert_allclose(
        run(multitask.uncertainty(0.02), losses)[-1], [2, 0.5, 0.125], rtol=0.02
    )


def test_gradnorm_makes_weighted_gradients_alike_where_none_lags():
    gram = jnp.diag(jnp.array([1.0, 16.0, 100.0]))
    got = run(multitask.gradnorm(1.5, 0.01), np.ones((2000, 3), np.float32), gram)[-1]
    assert got.sum() == pytest.approx(3, abs=1e-4)
    scaled = got * [1, 4, 10]
    np.testing.assert_allclose(scaled / scaled.mean(), 1, atol=0.1)


def test_gradnorm_and_famo_give_more_to_the_task_that_lags():
    falling = np.float32([[0.97**i, 1.0] for i in range(200)])
    for weighting in (multitask.gradnorm(), multitask.famo(0.2)):
        got = run(weighting, falling, jnp.eye(2))
        relative = got * falling if weighting.needs_gram is False else got
        assert relative[-1, 1] > 1.5 * relative[-1, 0]


def test_importance_is_the_methods_share():
    association = np.array([[0.6, 0.4], [0.4, 0.6]])
    got = run(multitask.by_importance(association), np.float32([[0.5, 0.3]]))[0]
    np.testing.assert_allclose(got, [0.525, 0.475], rtol=1e-6)  # METHOD section 3
    floored = run(multitask.by_importance(np.eye(2), floor=0.3), np.float32([[0.0, 5.0]]))[0]
    np.testing.assert_allclose(floored, [0.3, 0.7], rtol=1e-5)


def test_random_weights_differ_from_step_to_step_and_sum_to_one():
    got = run(multitask.random(jax.random.key(1)), np.zeros((50, 4), np.float32))
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-5)
    assert len(np.unique(got[:, 0])) == 50


@pytest.mark.parametrize(
    ("gradients", "losses", "names"),
    [
        ({"a": jnp.ones((2, 3))}, jnp.ones(K), ("2 tasks", "not 3")),
        ({"a": jnp.ones((K, 3)), "b": jnp.ones(2)}, jnp.ones(K), ("[2, 3]", "[K, ...]")),
        ({}, jnp.ones(K), ("first axes are []",)),
        ({"a": jnp.ones((K, 3))}, None, ("losses is None",)),
        ({"a": jnp.ones((K, 3))}, jnp.ones(2), ("losses has shape (2,)", "(3,)")),
    ],
)
def test_bad_updates_are_named(gradients, losses, names):
    made = multitask.aggregator(multitask.dwa(), K)
    with pytest.raises(ValueError, match=r"is|has") as error:
        made.update(gradients, made.init(None), losses=losses)
    for name in names:
        assert name in str(error.value)


def test_no_tasks_are_an_error():
    with pytest.raises(ValueError, match="tasks is 0"):
        multitask.aggregator(multitask.mean(), 0)
