"""Model, optimiser and balance saved together in mid-training go on as if nothing had happened."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from jbalance.adapters import NnxBalance, Tiles
from tests.support.versions import NEWER_FLAX

T, WIDTH = 64, 16


class Model(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attend(x, is_causal=True)


def begun(seed):
    model = Model(nnx.Rngs(seed))
    balance = NnxBalance(model, 0.6, Tiles(16, 8, 4))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param), balance


@nnx.jit
def step(model, optimiser, balance, x):
    loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x[:, ::-1]) ** 2))(model)
    optimiser.update(model, gradient)
    balance.update(model)
    return loss


def losses(parts, first, last):
    return [
        float(step(*parts, jax.random.normal(jax.random.key(i), (1, T, WIDTH))))
        for i in range(first, last)
    ]


@NEWER_FLAX
def test_training_goes_on_from_a_checkpoint(tmp_path):
    parts = begun(0)
    losses(parts, 0, 3)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", nnx.state(parts))
    want = losses(parts, 3, 6)
    other = begun(1)
    with ocp.StandardCheckpointer() as saver:
        nnx.update(other, saver.restore(tmp_path / "state", nnx.state(other)))
    np.testing.assert_array_equal(losses(other, 3, 6), want)
