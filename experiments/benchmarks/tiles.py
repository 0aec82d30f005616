"""Benchmark of attention over tiles: speed beside dense attention and plain products, at any density.

    python -m experiments.benchmarks.tiles [--json OUT] [--quick] [--all-cores] [--peers]

A case `tT_dF` is causal attention of 8 heads, D = 64, over T tokens in float32, with the fraction F of
its causal tiles: each query block's own, and others at random. Times are medians of interleaved
calls, ratios are those of one run. A rate counts the products of the tiles in the plan, 2 a tile
forward and 7 forward and backward, as a fraction of that of a product of 2048 x 2048 matrices;
`time_over_proportional` is the time as a multiple of F times that of all causal tiles; `plan_share` is
that of choosing tiles by a sketch of the keys and 8 rows of each query block (or 4), as a part of that
of the attention over as many; `plan_share_exact` that by the logits of these rows. Tiles are 128 x 128,
or 64 x 16 in what is named narrow.

All run on one core, peers too; --all-cores says what dense attention gains from more, `attend` being one
loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import _peers, _report
from experiments.benchmarks._peers import Peer
from experiments.benchmarks._report import Bar, Row
from jbalance import attention, importance
from jbalance.attention import TilePlan

HEADS, HEAD_DIM, BLOCK, PRODUCT = 8, 64, 128, 2048
SIZES, QUICK_SIZES = (1024, 2048, 4096, 8192, 16384), (1024,)
DENSITIES = (1.0, 0.5, 0.25, 0.1)
LARGEST_DENSE = 8192  # 16k tokens would take 8.6 GB for the scores
BAR_SIZE = 4096
BARS = {
    "speedup_vs_jax_dpa_fwd": Bar(5, at_least=True),
    "speedup_vs_sdpa_fwd": Bar(0.95, at_least=True),
    "speedup_vs_flex_fwd": Bar(1.7, at_least=True),
    "matmul_rate_fraction_fwd": Bar(0.7, at_least=True),
    "matmul_rate_fraction_fwdbwd": Bar(0.6, at_least=True),
}
PROPORTIONAL_BARS = {
    "time_over_proportional": Bar(1.25),
    "speedup_vs_flex_fwd": Bar(1.7, at_least=True),
}
WIDE, NARROW = (BLOCK, BLOCK), (64, 16)  # the latter is what choosing by real attention wants
PLANNED, PLAN_BAR_SIZE = 0.25, 8192
PROBES: dict[str, tuple[Callable[..., jax.Array], int]] = {
    "plan_share": (importance.tile_sketch, 8),
    "plan_share_rows4": (importance.tile_sketch, 4),
    "plan_share_exact": (importance.tile_error, 8),
}


class Inputs(NamedTuple):
    """Queries, keys, values and the gradient of y, each [1, T, H, D]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    dy: jax.Array


def main() -> None:
    _keep_freed_memory()
    _report.main("benchmarks.tiles", __doc__, measure_all, _peers.add_options)


def measure_all(quick: bool, peers: bool) -> Iterator[Row]:
    for size in QUICK_SIZES if quick else SIZES:
        yield from _sized(size, peers)


def inputs(size: int) -> Inputs:
    """Standard normal."""
    shape = 4, 1, size, HEADS, HEAD_DIM
    return Inputs(*jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32))


def tile_mask(size: int, density: float, blocks: tuple[int, int] = WIDE) -> np.ndarray:
    """[1, H, I, J] bool: so many of the causal tiles, those of a block's own positions among them."""
    block_q, block_k = blocks
    first = np.arange(-(-size // block_q))[:, None] * block_q
    keys = np.arange(-(-size // block_k)) * block_k
    causal = keys < first + block_q
    own = causal & (keys + block_k > first)
    worth = np.random.default_rng(1).random((1, HEADS, *causal.shape))
    worth = np.where(causal, worth + own, -1.0)
    number = max(HEADS * own.sum(), round(density * HEADS * causal.sum()))
    return worth >= np.sort(worth, axis=None)[-number]


@functools.cache
def _plan(size: int, density: float, blocks: tuple[int, int] = WIDE) -> TilePlan:
    tiling = attention.Tiling(size, size, *blocks)
    return attention.from_mask(jnp.asarray(tile_mask(size, density, blocks)), tiling)


class _Compiled:
    """Forward, and forward and backward, jitted, with what was traced."""

    def __init__(self) -> None:
        self.traces = 0
        self.forward = jax.jit(self._forward)
        self.both = jax.jit(self._both)

    def _forward(self, x: Inputs, plan: TilePlan) -> jax.Array:
        self.traces += 1
        return attention.attend(x.q, x.k, x.v, plan, causal=True).y

    def _both(self, x: Inputs, plan: TilePlan) -> Any:
        def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return self._forward(Inputs(q, k, v, x.dy), plan)

        return jax.vjp(forward, x.q, x.k, x.v)[1](x.dy)


def _sized(size: int, peers: bool) -> list[Row]:
    """All densities of one size, and what they are held against, in one interleaved run."""
    x, compiled = inputs(size), _Compiled()
    square = jnp.asarray(np.random.default_rng(2).normal(size=(PRODUCT, PRODUCT)), jnp.float32)
    calls: dict[Any, Callable[[], Any]] = {"product": functools.partial(_product, square)}
    if size <= LARGEST_DENSE:
        calls["dense"] = functools.partial(_dense, x)
    for density in DENSITIES:
        plan = _plan(size, density)
        calls["fwd", density] = functools.partial(compiled.forward, x, plan)
        calls["fwdbwd", density] = functools.partial(compiled.both, x, plan)
        plan = _plan(size, density, NARROW)
        calls["narrow", density] = functools.partial(_Compiled().forward, x, plan)
    for metric, blocks in itertools.product(PROBES, (WIDE, NARROW)):
        number = int(_plan(size, PLANNED, blocks).num_tiles)
        calls[metric, blocks] = functools.partial(_choose, x, number, blocks=blocks, metric=metric)
    with contextlib.ExitStack() as stack:
        if peers and size <= LARGEST_DENSE:
            peer = stack.enter_context(_peer(size, x))
            calls["sdpa"] = peer.call("sdpa")
            calls |= {("flex", d): peer.call(f"flex {d:g}") for d in DENSITIES}
        seconds: dict[Any, float] = _report.interleaved(
            calls, 3 if size > LARGEST_DENSE else _report.REPETITIONS
        )
    # What was traced while plans changed: each of the two functions once.
    traced = compiled.traces
    rows = [row for density in DENSITIES for row in _rows(size, density, seconds)]
    for metric, blocks in itertools.product(PROBES, (WIDE, NARROW)):
        share = seconds[metric, blocks] / seconds[_kind(blocks), PLANNED]
        bar = Bar(0.05) if size == PLAN_BAR_SIZE else None
        label = f"t{size}_d{PLANNED:g}" + ("" if blocks == WIDE else "_narrow")
        rows.append(Row(label, metric, share, bar))
    return [*rows, *_memory(x, compiled), Row(f"t{size}", "traces", traced, Bar(2))]


def _kind(blocks: tuple[int, int]) -> str:
    return "fwd" if blocks == WIDE else "narrow"


def _peer(size: int, x: Inputs) -> Peer:
    masks = {f"{d:g}": tile_mask(size, d) for d in DENSITIES}
    return Peer("attention.py", {"q": x.q, "k": x.k, "v": x.v, "block": BLOCK, **masks})


def _rows(size: int, density: float, seconds: dict[Any, float]) -> list[Row]:
    label, dense = f"t{size}_d{density:g}", seconds.get("dense")
    rate = 2 * PRODUCT**3 / seconds["product"]
    tiles, all_tiles = (int(_plan(size, d).num_tiles) for d in (density, 1.0))
    values = {"milliseconds_fwd": 1e3 * seconds["fwd", density]}
    if dense is not None:
        values["speedup_vs_jax_dpa_fwd"] = dense / seconds["fwd", density]
    if "sdpa" in seconds:
        values["speedup_vs_sdpa_fwd"] = seconds["sdpa"] / seconds["fwd", density]
        values["speedup_vs_flex_fwd"] = seconds["flex", density] / seconds["fwd", density]
    values["narrow_over_wide_fwd"] = seconds["narrow", density] / seconds["fwd", density]
    for kind, products in (("fwd", 2), ("fwdbwd", 7)):
        operations = tiles * products * 2 * BLOCK * BLOCK * HEAD_DIM
        values[f"matmul_rate_fraction_{kind}"] = operations / seconds[kind, density] / rate
    bars: dict[str, Bar] = {}
    if size == BAR_SIZE:
        bars = BARS if density == 1 else PROPORTIONAL_BARS
    if density < 1:
        for kind, metric in (("fwd", ""), ("fwdbwd", "_fwdbwd")):
            proportional = seconds[kind, 1.0] * tiles / all_tiles
            values[f"time_over_proportional{metric}"] = seconds[kind, density] / proportional
    return [Row(label, metric, value, bars.get(metric)) for metric, value in values.items()]


def _memory(x: Inputs, compiled: _Compiled) -> list[Row]:
    """Temporary bytes beside a bar that grows as T D does."""
    size, rows = x.q.shape[1], []
    for kind, function in (("", compiled.forward), ("_fwdbwd", compiled.both)):
        memory: Any = function.lower(x, _plan(size, 1.0)).compile().memory_analysis()
        bytes_, bar = memory.temp_size_in_bytes, Bar(2 * x.q.nbytes)
        rows.append(Row(f"t{size}_d1", f"temp_bytes{kind}", bytes_, bar))
    return rows


@functools.partial(jax.jit, static_argnames=("blocks", "metric"))
def _choose(x: Inputs, number: jax.Array, blocks: tuple[int, int], metric: str) -> TilePlan:
    scorer, rows = PROBES[metric]
    tiling = attention.Tiling(x.q.shape[1], x.k.shape[1], *blocks)
    return attention.balanced_plan(x.q, x.k, x.v, number, tiling, scorer=scorer, rows=rows)


@jax.jit
def _product(x: jax.Array) -> jax.Array:
    return x @ x


@jax.jit
def _dense(x: Inputs) -> jax.Array:
    return jax.nn.dot_product_attention(x.q, x.k, x.v, is_causal=True)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed, for all that is measured here.

    Otherwise the pages of every result are faulted in anew, a cost that is the same for all plans,
    varies with what ran before, and is not there inside a larger program.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


if __name__ == "__main__":
    main()
