"""Random attention problems, and a loss that looks at y and lse, for the tests of every back end."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import attention
from jbalance.attention import tiles_gpu, tiles_tpu

KERNELS = {"gpu": tiles_gpu, "tpu": tiles_tpu}
DISPATCH = importlib.import_module(
    "jbalance.attention.attend"
)  # the module; the name is a function's


def interpreted_kernels() -> dict[str, Any]:
    """The kernels as back ends that run on a CPU, and take blocks that only hardware refuses."""
    return {
        name: types.SimpleNamespace(
            PLATFORM=None,
            unsupported=lambda operands, where, rules, method: None,
            forward=functools.partial(kernel.forward, interpret=True),
            backward=functools.partial(kernel.backward, interpret=True),
        )
        for name, kernel in KERNELS.items()
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """What is static in a problem. Axes given as None stay as wide as the problem."""

    queries: int = 90
    keys: int = 100
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    batch: int = 2
    block_q: int = 16
    block_k: int = 32
    one_plan: bool = False  # for all heads and examples
    bias: tuple[int | None, ...] | None = None  # of B, H, T, S
    relative_heads: int | None = None
    tasks: int | None = None
    segments: bool = False
    options: tuple[tuple[str, Any], ...] = ()


CASES = {
    "plain": Case(),
    "causal": Case(options=(("causal", True),)),
    "causal, more queries than keys": Case(keys=40, options=(("causal", True),)),
    "whole blocks": Case(96, 96, 2, 2, options=(("causal", True), ("scale", 0.3))),
    "heads of one plan together": Case(one_plan=True, heads=4, kv_heads=2),
    "key bias": Case(bias=(1, 1, 1, None), one_plan=True),
    "full bias": Case(bias=(None, None, None, None)),
    "query bias of each example": Case(bias=(None, 1, None, 1), options=(("window", 40),)),
    "head bias": Case(bias=(1, None, 1, None), one_plan=True, heads=4, kv_heads=2),
    "relative bias": Case(relative_heads=4, one_plan=True, heads=4, kv_heads=2),
    "one relative bias, causal": Case(relative_heads=1, options=(("causal", True),)),
    "soft cap": Case(bias=(1, 1, 1, None), options=(("soft_cap", 2.0),)),
    "segments": Case(segments=True, one_plan=True, options=(("causal", True), ("window", 30))),
    "offset": Case(options=(("causal", True), ("offset", 25))),
    "tasks": Case(tasks=3, options=(("causal", True),)),
    "blocks larger than all": Case(9, 7, block_q=16, block_k=32),
    "blocks too wide to be joined": Case(keys=300, block_k=128, options=(("causal", True),)),
    "more narrow blocks than are joined": Case(keys=300, block_k=16, options=(("causal", True),)),
    "narrow blocks with everything": Case(
        keys=300, block_k=16, bias=(1, None, None, None), relative_heads=2, segments=True
    ),
}


def problem(case: Case, seed: int, dtype: Any = jnp.float32) -> tuple[dict, dict]:
    """What is differentiated by, and plan and masks, as keyword arguments of `attend`."""
    rng = np.random.default_rng(seed)
    batch, queries, keys, heads = case.batch, case.queries, case.keys, case.heads

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32)).astype(dtype)

    floats = {
        "q": normal(batch, queries, heads, case.head_dim, dtype=dtype),
        "k": normal(batch, keys, case.kv_heads, case.head_dim, dtype=dtype),
        "v": normal(batch, keys, case.kv_heads, case.head_dim, dtype=dtype),
    }
    if case.bias is not None:
        full = batch, heads, queries, keys
        floats["bias"] = normal(*(n or m for n, m in zip(case.bias, full, strict=True)))
    if case.relative_heads is not None:
        floats["relative_bias"] = normal(case.relative_heads, queries + keys - 1)
    if case.tasks is not None:
        shares = rng.random((case.tasks, keys))
        floats["task_shares"] = jnp.asarray(shares / shares.sum(axis=0), jnp.float32)
    tiling = attention.Tiling(queries, keys, case.block_q, case.block_k, causal=False)
    shape = (1, 1) if case.one_plan else (batch, heads)
    density = rng.choice([0.15, 0.5, 0.9])  # at the least, some queries see nothing
    mask = rng.random((*shape, *tiling.shape)) < density
    rest = {"plan": attention.from_mask(jnp.asarray(mask), tiling)}
    if case.segments:
        ids = (np.sort(rng.integers(0, 4, (batch, n))) for n in (queries, keys))
        rest["segment_ids"] = tuple(jnp.asarray(x, jnp.int32) for x in ids)
    return floats, rest


def loss(floats: dict, rest: dict, seed: int = 0, **options: Any) -> tuple[jax.Array, Any]:
    """A number that every entry of y and lse moves, and what `attend` returned."""
    out = attention.attend(**floats, **rest, **options)
    keys = jax.random.split(jax.random.key(seed))
    some = out.lse > 0.5 * attention.EMPTY
    y = out.y.astype(jnp.float32) * jax.random.normal(keys[0], out.y.shape)
    lse = jnp.where(some, out.lse, 0.0) * jax.random.normal(keys[1], out.lse.shape)
    return jnp.sum(y) + jnp.sum(lse), out


def assert_near(got, want, tolerance):
    """Equal up to a tolerance relative to the largest entry, 1 at the least."""

    def near(got, want):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=tolerance * max(1, np.abs(want).max()), rtol=0)

    jax.tree.map(near, got, want)
