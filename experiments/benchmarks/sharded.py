"""What the stages exchange and compute on 1 to 8 devices, read from the compiled programs.

    python -m experiments.benchmarks.sharded [--json OUT] [--quick]

The devices are simulated and share the machine's cores, so nothing here is timed. A case is
`<stage>_<scaling>_g<devices>`: `strong` keeps the whole problem, `weak` the part of each device.

- `collective_bytes`, `collectives`: the results of all collectives of the program on one device; those
  in a search count once for each of the most passes that it can make (`jbalance._search.MOST_PASSES`).
- `flops`: of one device, as XLA counts them: the body of a loop once, so that they compare over devices
  but not with a clock. Of attention over tiles those of the tiles of the fullest device, and
  `flops_over_mean` over the mean device's.
- `memory_bytes`: arguments, results and temporaries of one device.

`ladder_n<units>_g8` has `scalars_per_solve`: what one device receives in one solve of a ladder under the
budgets of 8 devices and one of all together, and `scalars_per_solve_near_2_32` where the costs of all
steps sum to nearly 2^32 blocks, which takes two numbers a pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from experiments.benchmarks import _report
from experiments.benchmarks._report import Bar, Row
from experiments.harness import cli, collectives
from jbalance import attention, importance, place, sharded
from jbalance._search import MOST_PASSES

DEVICES = (1, 2, 4, 8)
AXIS = "device"
UNITS, LADDER_UNITS = 1_000_000, (10_000, 1_000_000)
COSTS = np.array([0, 2, 4, 8], np.int32)
TOKENS, BLOCK, HEADS, KV_HEADS, HEAD_DIM, DENSITY = 8192, 128, 16, 8, 64, 0.5
DOCUMENTS = 5
LAYERS, REQUESTS, PART_BYTES, RING_TOKENS = 4, 8, 2_000_000, 64
MOST_SCALARS = 64
GRADIENT_FLOPS = 3.5  # of the forward pass: that once more, and five products for two


class Program(NamedTuple):
    """A function, and pytrees of the shapes and shardings of what it is called with."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]


def main() -> None:
    cli.simulated_devices(max(DEVICES))
    _report.main("benchmarks.sharded", __doc__, measure)


def measure(quick: bool) -> Iterator[Row]:
    for size in LADDER_UNITS:
        yield from _ladder_rows(size)
    devices = DEVICES[::3] if quick else DEVICES
    for name, make in STAGES.items():
        for scaling in ("strong", "weak"):
            for number in devices if scaling == "strong" else devices[1:]:
                yield from _stage_rows(f"{name}_{scaling}_g{number}", make, number, scaling)
    for scaling in ("strong", "weak"):
        for number in devices if scaling == "strong" else devices[1:]:
            yield from _attention_rows(number, scaling)


def _mesh(number: int) -> Mesh:
    devices = jax.devices()[:number]
    return jax.make_mesh((number,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def _array(mesh: Mesh, shape: tuple[int, ...], where: jax.P, dtype: Any = jnp.float32) -> Any:
    """One that lies where it belongs already."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, where))


def _compiled(program: Program) -> Any:
    return jax.jit(program.run).lower(*program.arguments).compile()


def _ladder_rows(units: int) -> Iterator[Row]:
    number = max(DEVICES)
    mesh = _mesh(number)
    hlo = _compiled(_ladder(mesh, units)).as_text()
    case = f"ladder_n{units}_g{number}"
    usual, most = (
        collectives.traffic(hlo, passes=MOST_PASSES, branches=branches).numbers
        for branches in (False, True)
    )
    yield Row(case, "scalars_per_solve", usual, Bar(MOST_SCALARS))
    yield Row(case, "scalars_per_solve_near_2_32", most)


def _stage_rows(
    case: str, make: Callable[..., Program], number: int, scaling: str
) -> Iterator[Row]:
    mesh = _mesh(number)
    parts = number if scaling == "weak" else max(DEVICES)
    yield from _rows(case, _compiled(make(mesh, parts)))


def _rows(case: str, compiled: Any) -> Iterator[Row]:
    sent = collectives.traffic(compiled.as_text(), passes=MOST_PASSES, branches=False)
    memory = compiled.memory_analysis()
    yield Row(case, "collective_bytes", sent.bytes)
    yield Row(case, "collectives", sent.collectives)
    yield Row(case, "flops", compiled.cost_analysis()["flops"])
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    yield Row(case, "memory_bytes", total)


def _ladder(mesh: Mesh, units: int) -> Program:
    number, levels = mesh.shape[AXIS], COSTS.size

    def run(values, budgets, total):
        return sharded.ladder(values, COSTS, budgets, total_budget=total, mesh=mesh, axis_name=AXIS)

    split = jax.P(AXIS)
    values = _array(mesh, (units, levels), split)
    budgets = _array(mesh, (number,), split, jnp.int32)
    return Program(run, (values, budgets, _array(mesh, (), jax.P(), jnp.int32)))


def _scaled_ladder(mesh: Mesh, parts: int) -> Program:
    return _ladder(mesh, UNITS // max(DEVICES) * parts)


def _of_units(call: Callable[..., Any]) -> Callable[[Mesh, int], Program]:
    def make(mesh: Mesh, parts: int) -> Program:
        units = UNITS // max(DEVICES) * parts
        run = functools.partial(call, mesh=mesh, axis_name=AXIS)
        return Program(run, (_array(mesh, (units,), jax.P(AXIS)),))

    return make


def _of_heads(call: Callable[..., Any]) -> Callable[[Mesh, int], Program]:
    """q, k, v of so many key/value heads."""

    def make(mesh: Mesh, parts: int) -> Program:
        kv_heads = KV_HEADS // max(DEVICES) * parts
        heads, where = kv_heads * HEADS // KV_HEADS, jax.P(None, None, AXIS)
        shapes = [(1, TOKENS, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads)]
        run = functools.partial(call, mesh=mesh, heads=AXIS)
        return Program(run, tuple(_array(mesh, shape, where) for shape in shapes))

    return make


def _choose(mesh: Mesh, parts: int) -> Program:
    heads, blocks = HEADS // max(DEVICES) * parts, TOKENS // BLOCK

    def run(score):
        tiles = int(DENSITY * heads * blocks * (blocks + 1) / 2)
        return sharded.choose(
            score, tiles, attention.Tiling(TOKENS, TOKENS, BLOCK, BLOCK), mesh=mesh, heads=AXIS
        )

    return Program(run, (_array(mesh, (1, heads, blocks, blocks), jax.P(None, AXIS)),))


def _cache_step(split: str) -> Callable[[Mesh, int], Program]:
    """One layer's attention of a decode step; of each request or of each head."""

    def make(mesh: Mesh, parts: int) -> Program:
        requests = REQUESTS // max(DEVICES) * parts if split == "requests" else REQUESTS
        kv_heads = KV_HEADS // max(DEVICES) * parts if split == "heads" else KV_HEADS
        heads = kv_heads * HEADS // KV_HEADS
        cache = sharded.cache.create(
            PART_BYTES * parts // mesh.shape[AXIS],
            LAYERS,
            kv_heads,
            HEAD_DIM,
            mesh=mesh,
            axis_name=AXIS,
            split=split,
            num_requests=requests,
            recent_tokens=RING_TOKENS,
        )

        def run(cache, q, k, v):
            return sharded.cache.step(cache, 0, q, k, v)

        held = jax.tree.map(lambda x: _array(mesh, x.shape, jax.P(AXIS), x.dtype), cache)
        where = jax.P(AXIS) if split == "requests" else jax.P(None, AXIS)
        shapes = [(requests, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads)]
        return Program(run, (held, *(_array(mesh, shape, where) for shape in shapes)))

    return make


def _attention_rows(number: int, scaling: str) -> Iterator[Row]:
    """Attention within packed documents, heads or blocks of queries on the devices."""
    mesh, part = _mesh(number), number / max(DEVICES) if scaling == "weak" else 1
    for way, axis in (("heads", 2), ("queries_in_order", 1), ("queries_placed", 1)):
        by_heads = way == "heads"
        heads = int(HEADS * part) if by_heads else HEADS
        tokens = TOKENS if by_heads else int(TOKENS * part)
        ids = _documents(tokens)
        plan = attention.segments(ids[None], ids[None], attention.Tiling(tokens, tokens))
        tiles = np.asarray(plan.count)[0, 0]  # of each block of queries
        options: dict[str, Any] = {"heads" if by_heads else "queries": AXIS}
        load = np.full(number, tiles.sum() / number)
        if way == "queries_in_order":
            load = np.bincount(np.arange(tiles.size) * number // tiles.size, tiles)
        elif way == "queries_placed":
            # By what the blocks cost, as many blocks on each device.
            each = tiles.size // number
            placed = place.pack(tiles.astype(np.float32), number, max_count=each)
            load, block_at = np.asarray(placed.load), sharded.block_order(placed.device_of, number)
            ids = ids.reshape(-1, BLOCK)[np.asarray(block_at)].reshape(-1)
            options["block_at"] = block_at
        attend = functools.partial(
            sharded.attend,
            plan=plan,
            mesh=mesh,
            causal=True,
            segment_ids=(ids[None], ids[None]),
            **options,
        )

        def loss(q, k, v, attend=attend):
            return jnp.sum(attend(q, k, v).y)

        where = jax.P(*(AXIS if i == axis else None for i in range(3)))
        shapes = [(1, tokens, n, HEAD_DIM) for n in (heads, *[heads * KV_HEADS // HEADS] * 2)]
        arguments = tuple(_array(mesh, shape, where) for shape in shapes)
        flops = 4 * BLOCK * BLOCK * HEAD_DIM * heads * float(load.max())
        for name, run, times in (
            (way, attend, 1.0),
            (f"{way}_gradient", jax.grad(loss, (0, 1, 2)), GRADIENT_FLOPS),
        ):
            rows = _rows(
                f"attention_{name}_{scaling}_g{number}", _compiled(Program(run, arguments))
            )
            counted = {"flops": flops * times, "flops_over_mean": float(load.max() / load.mean())}
            for row in rows:
                if row.metric not in counted:
                    yield row
            yield from (Row(row.case, metric, x) for metric, x in counted.items())


def _documents(tokens: int) -> Any:
    """[tokens] the document of each token."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.choice(tokens, DOCUMENTS - 1, replace=False))
    return np.searchsorted(ends, np.arange(tokens), side="right").astype(np.int32)


STAGES: dict[str, Callable[[Mesh, int], Program]] = {
    "pool": _of_units(lambda w, **over: sharded.blend(w, w, 0.5, **over)),
    "shares": _of_units(sharded.shares),
    "whole": _of_units(lambda w, **over: sharded.whole(w, 64_000_000, **over)),
    "ladder": _scaled_ladder,
    "token_importance": _of_heads(functools.partial(sharded.token_importance, importance.window)),
    "tile_importance": _of_heads(
        functools.partial(
            sharded.tile_importance,
            importance.tile_sketch,
            tiling=attention.Tiling(TOKENS, TOKENS, BLOCK, BLOCK),
        )
    ),
    "choose": _choose,
    "cache_requests": _cache_step("requests"),
    "cache_heads": _cache_step("heads"),
}


if __name__ == "__main__":
    main()
