"""Arrays that lie on a mesh under plain jit: right on Auto axes, refused by name on Explicit ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jbalance import allocate, attention, audit, importance, place, shares
from jbalance.attention import Tiling

W = np.arange(1, 9, dtype=np.float32)
Q = np.linspace(-1, 1, 4 * 8 * 2 * 8).astype(np.float32).reshape(4, 8, 2, 8)
OF = np.arange(8) % 2
TILING = Tiling(8, 8, 4, 4)
CALLS = {
    "whole": (lambda w: allocate.whole(w, 20).amount, W),
    "ladder": (lambda x: allocate.ladder(x, np.array([1, 2]), 12).level, np.stack([0 * W, W], 1)),
    "water_fill": (lambda w: allocate.water_fill(w, 20.0).amount, W),
    "softmax": (shares.softmax, W),
    "pack": (lambda w: place.pack(w, 2).device_of, W),
    "water_fill, other bounds": (lambda w: allocate.water_fill(w, 20.0, cap=W + 9).amount, W),
    "by_group": (lambda w: audit.by_group(w, OF, 2).parity, W),
    "anova": (lambda w: importance.anova(w[:, None], OF, num_classes=2), W),
    "worth_curve": (importance.worth_curve, W),
    "token_worth": (lambda q: importance.token_worth(q, q, q, frequencies=None), Q[0]),
    "attend": (lambda q: attention.attend(q, q, q, attention.dense(TILING), causal=True).y, Q),
}
WORK_ON_BOTH = {"water_fill", "softmax"}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", CALLS)
def test_an_array_on_a_mesh(name, axis_type):
    call, x = CALLS[name]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:4])
    placed = jax.device_put(jnp.asarray(x), NamedSharding(mesh, PartitionSpec("x")))
    with jax.set_mesh(mesh):
        if axis_type == AxisType.Auto or name in WORK_ON_BOTH:
            np.testing.assert_allclose(jax.jit(call)(placed), call(x), rtol=1e-6)
            return
        with pytest.raises(ValueError, match=r"split over explicit mesh axes.*jbalance\.sharded"):
            jax.jit(call)(placed)
