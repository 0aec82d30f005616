"""Heads leave a model: what it computes is what it computed with these heads' outputs at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jbalance import adapters
from tests.support.versions import NEWER_FLAX

pytestmark = NEWER_FLAX
T, WIDTH = 12, 16


class Model(nnx.Module):
    def __init__(self, rngs):
        given = {"decode": False, "rngs": rngs}
        self.attend = nnx.List(
            [
                nnx.MultiHeadAttention(4, WIDTH, bias_init=nnx.initializers.normal(), **given),
                nnx.MultiHeadAttention(4, WIDTH, num_kv_heads=2, use_bias=False, **given),
            ]
        )

    def __call__(self, x):
        for attend in self.attend:
            x += attend(x, is_causal=True)
        return x


def model_and_input():
    return Model(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, T, WIDTH))


@nnx.jit
def gradient(model, x):
    return nnx.grad(lambda model: jnp.mean((model(x) - x[:, ::-1]) ** 2))(model)


def flops(model, x):
    graph, state = nnx.split(adapters.set_attention_fn(model, nnx.dot_product_attention))
    lowered = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x)
    return lowered.cost_analysis()["flops"]


def gated(x, gates):
    """The loss with the rows of the output kernels scaled, group by group."""
    model, _ = model_and_input()
    for attend, gate in zip(model.attend, gates, strict=True):
        each = jnp.repeat(gate, attend.num_heads // attend.num_kv_heads)
        attend.out.kernel.set_value(attend.out.kernel[...] * each[:, None, None])
    return jnp.mean((model(x) - x[:, ::-1]) ** 2)


def test_a_gates_gradient_is_read_from_the_kernels():
    model, x = model_and_input()
    got = adapters.head_gradients(model, gradient(model, x))
    want = jax.jit(jax.grad(gated, argnums=1))(x, [jnp.ones(4), jnp.ones(2)])
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "keep", [([1, 0, 1, 1], [0, 1]), ([0, 0, 0, 0], [1, 1]), ([1, 1, 1, 1], [1, 1])]
)
def test_a_pruned_model_is_smaller_and_computes_the_rest(keep):
    model, x = model_and_input()
    keep = [np.array(k, bool) for k in keep]
    before = sum(p.size for p in jax.tree.leaves(nnx.state(model)))
    want = model_and_input()[0]
    for attend, kept in zip(want.attend, keep, strict=True):
        each = np.repeat(kept, attend.num_heads // attend.num_kv_heads)
        attend.out.kernel.set_value(attend.out.kernel[...] * each[:, None, None])
    adapters.prune_heads(model, keep)
    call = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(call(model, x), call(want, x), rtol=1e-5, atol=1e-5)
    after = sum(p.size for p in jax.tree.leaves(nnx.state(model)))
    lost = [np.sum(~k) for k in keep]
    assert flops(model, x) <= flops(want, x)
    assert (flops(model, x) < flops(want, x)) == any(lost)
    per_head = 4 * (4 * WIDTH + 3), 4 * (2 * 2 * WIDTH + 2 * WIDTH)
    assert before - after == np.dot(lost, per_head)


def test_one_price_for_the_heads_of_all_layers():
    model, _ = model_and_input()
    worth = [jnp.array([5.0, 0.1, 3.0, 0.2]), jnp.array([0.3, 9.0])]
    keep = adapters.heads_to_keep(model, worth, 0.6)
    assert [k.tolist() for k in keep] == [[True, False, True, False], [False, True]]
    none = adapters.heads_to_keep(model, worth, 0.0)
    assert not np.concatenate(none).any()
    assert np.concatenate(adapters.heads_to_keep(model, worth, 1.0)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: adapters.heads_to_keep(m, [jnp.ones(4)], 0.5), "worth has shapes"),
        (lambda m: adapters.heads_to_keep(m, [jnp.ones(4), jnp.ones(2)], 1.5), "part is 1.5"),
        (
            lambda m: adapters.prune_heads(m, [np.ones(3, bool), np.ones(2, bool)]),
            "keep has shapes",
        ),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_and_input()[0])
