"""What the kernels take on this accelerator, beside its own rates, JAX's kernels and dense attention.

    python -m experiments.compiled.measure [--json OUT] [--quick]

For a machine with an accelerator, in under eight minutes: what is not begun by then is left out, and
said. The rates are those that a product of matrices and a copy reach on the device in the same run;
times are medians of interleaved calls. Then the small SmolLM2 decodes within a part of the memory that
the device reports as free. With --quick, sizes that a CPU runs too.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import _report
from experiments.benchmarks._report import Row
from experiments.compiled import cases
from jbalance import allocate, attention, importance
from jbalance.cache import _cache, _pages
from jbalance.cache._attend import attend_pages
from jbalance.resources import device_budgets

SECONDS = 420  # after which nothing new begins


class Sizes(NamedTuple):
    """Of what is measured."""

    matrix: int  # of a product, for the rate of the matrix units
    copied_bytes: int
    tokens: int
    heads: int
    blocks: tuple[tuple[int, int], ...]  # of queries and keys
    cached: int  # tokens of a unit
    units: int
    ladder: int
    context: int  # of the model
    steps: int


FULL = Sizes(
    8192,
    1 << 30,
    8192,
    8,
    ((512, 512), (512, 16), (128, 128), (64, 16)),
    8192,
    256,
    1 << 20,
    2048,
    64,
)
QUICK = Sizes(256, 1 << 20, 512, 1, ((128, 128), (64, 16)), 256, 4, 1 << 10, 300, 2)
BITS, PAGES_BITS = (8, 4, 3), (16, 8, 4, 3)
DENSITIES = (1.0, 0.5, 0.25)
MEMORY, LEAST_BYTES = 0.25, 32 << 20  # of the free memory; where a device reports none


def main() -> None:
    _report.main("compiled.measure", __doc__, measure_all)


def measure_all(quick: bool) -> Iterator[Row]:
    """All rows, until the time is over."""
    sizes, end = QUICK if quick else FULL, time.monotonic() + SECONDS
    rates = _rates(sizes)
    yield Row("device", "matmul_tflops", rates.flops / 1e12)
    yield Row("device", "copy_gbps", rates.bytes / 1e9)
    parts: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        *(
            (f"tiles, D={d}", functools.partial(_tiles, sizes, rates, d))
            for d in ((64,) if quick else (128, 64))
        ),
        *(
            (f"pages of {bits} bits", functools.partial(_pages_rows, sizes, rates, bits))
            for bits in PAGES_BITS
        ),
        ("choice of tiles", functools.partial(_choice, sizes)),
        ("ladder", functools.partial(_ladder, sizes)),
        ("decoding", functools.partial(_decoding, sizes)),
    ]
    for name, part in parts:
        if time.monotonic() > end:
            print(f"left out, the time is over: {name}", file=sys.stderr)
            continue
        yield from part()


class Rates(NamedTuple):
    """What the device reaches, a second."""

    flops: float
    bytes: float


def _rates(sizes: Sizes) -> Rates:
    x = jnp.ones((sizes.matrix, sizes.matrix), jnp.bfloat16)
    y = jnp.ones(sizes.copied_bytes // 4, jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    copy = jax.jit(lambda y: y + 1)
    took = _report.interleaved({"product": lambda: product(x), "copy": lambda: copy(y)})
    return Rates(2 * sizes.matrix**3 / took["product"], 2 * sizes.copied_bytes / took["copy"])


def _tiles(sizes: Sizes, rates: Rates, head_dim: int) -> Iterator[Row]:
    """Causal attention and its gradient over parts of the tiles, beside dense attention and splash."""
    shape = (1, sizes.tokens, sizes.heads, head_dim)
    q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
    dense = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))
    calls = {"dense": lambda: dense(q, k, v)}
    if jax.default_backend() == "gpu":
        cudnn = jax.jit(
            functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        )
        calls["cudnn"] = lambda: cudnn(q, k, v)
    if jax.default_backend() == "tpu":
        splash = jax.jit(_splash(sizes, head_dim))
        calls["splash"] = lambda: splash(q, k, v)
    work = {}
    for block_q, block_k in sizes.blocks:
        tiling = attention.Tiling(sizes.tokens, sizes.tokens, block_q, block_k)
        score = jax.random.uniform(jax.random.key(3), (1, sizes.heads, *tiling.shape))
        for density in DENSITIES:
            always = _always(tiling, sizes.heads)
            number = max(int(density * sizes.heads * tiling.num_tiles), always)
            plan = attention.choose(score, number, tiling)
            name = f"{block_q}x{block_k}_density{density:g}"
            work[name] = 4 * head_dim * block_q * block_k * int(jnp.sum(plan.count))
            calls[name] = functools.partial(_attend, q, k, v, plan)
    block = sizes.blocks[0]
    tiling = attention.Tiling(sizes.tokens, sizes.tokens, *block)
    plan = attention.choose(
        jnp.ones((1, sizes.heads, *tiling.shape)), sizes.heads * tiling.num_tiles, tiling
    )
    calls["gradient"] = functools.partial(_gradient, q, k, v, plan)
    took = _report.interleaved(calls)
    label = f"tiles_D{head_dim}"
    for name, flops in work.items():
        yield Row(f"{label}_{name}", "ms", 1e3 * took[name])
        yield Row(f"{label}_{name}", "part_of_matmul_rate", flops / took[name] / rates.flops)
        for peer in ("dense", "cudnn", "splash"):
            if peer in took:
                yield Row(f"{label}_{name}", f"speed_over_{peer}", took[peer] / took[name])
    forward = took[f"{block[0]}x{block[1]}_density1"]
    yield Row(f"{label}_gradient", "over_forward", took["gradient"] / forward)


def _always(tiling: attention.Tiling, heads: int) -> int:
    """Tiles that are always chosen: of the queries' own positions, and the first of each row."""
    own = -(-tiling.block_q // tiling.block_k)
    return (own + 1) * tiling.shape[0] * heads


def _splash(sizes: Sizes, head_dim: int) -> Callable[..., jax.Array]:
    run = cases.splash_kernel(1024, 1024, 512, sizes.tokens, sizes.heads)

    def call(q, k, v):
        q, k, v = (jnp.swapaxes(x[0], 0, 1) for x in (q / head_dim**0.5, k, v))
        return run(q.astype(jnp.bfloat16), k, v)

    return call


@jax.jit
def _attend(q, k, v, plan):
    return attention.attend(q, k, v, plan, causal=True).y


@jax.jit
def _gradient(q, k, v, plan):
    def total(q, k, v):
        return jnp.sum(_attend(q, k, v, plan).astype(jnp.float32))

    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)


def _pages_rows(sizes: Sizes, rates: Rates, bits: int) -> Iterator[Row]:
    """A token's queries over packed pages, beside dense attention over a bfloat16 cache."""
    head_dim, queries = 64 if sizes is QUICK else 128, 4
    token = _pages.token_bytes(head_dim, bits)
    size = _cache.page_bytes_for(token * sizes.cached * sizes.units, sizes.units, head_dim, (bits,))
    layout = _pages.PageLayout.within(size, head_dim, bits)
    pages = -(-sizes.cached // layout.page_tokens)
    arena = _pages.empty(pages * sizes.units, sizes.units, head_dim, (bits,), size)
    arena, short = _pages.reallocate(arena, jnp.full((sizes.units, 1), pages))
    assert int(short) == 0
    arena = jax.tree.map(jnp.asarray, arena)
    full = jnp.full((sizes.units, 1), sizes.cached, jnp.int32)
    arena = jax.tree.unflatten(
        jax.tree.structure(arena),
        [full if x.shape == full.shape else x for x in jax.tree.leaves(arena)],
    )
    q = jax.random.normal(jax.random.key(0), (sizes.units, queries, head_dim))
    shape = (sizes.units, sizes.cached, 1, head_dim)
    k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in (1, 2))
    ours = jax.jit(lambda q, arena: attend_pages(q, arena, jnp.arange(sizes.units)).y)
    dense = jax.jit(jax.nn.dot_product_attention)
    given = q.astype(jnp.bfloat16)[:, None]
    took = _report.interleaved(
        {"ours": lambda: ours(q, arena), "dense": lambda: dense(given, k, v)}
    )
    held = sizes.units * sizes.cached * token
    yield Row(f"pages_{bits}bits", "ms", 1e3 * took["ours"])
    yield Row(f"pages_{bits}bits", "part_of_copy_rate", held / took["ours"] / rates.bytes)
    yield Row(f"pages_{bits}bits", "speed_over_dense_cache", took["dense"] / took["ours"])


def _choice(sizes: Sizes) -> Iterator[Row]:
    """Scoring and choosing half of the tiles, over attention to all of them."""
    shape = (1, sizes.tokens, sizes.heads, 64)
    q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
    tiling = attention.Tiling(sizes.tokens, sizes.tokens, *sizes.blocks[0])
    every, always = sizes.heads * tiling.num_tiles, _always(tiling, sizes.heads)
    plan = attention.choose(jnp.ones((1, sizes.heads, *tiling.shape)), every, tiling)

    @jax.jit
    def chosen(q, k, v):
        return attention.choose(
            importance.tile_sketch(q, k, v, tiling), max(every // 2, always), tiling
        ).blocks

    took = _report.interleaved(
        {"choice": lambda: chosen(q, k, v), "attention": lambda: _attend(q, k, v, plan)}
    )
    yield Row("choice_of_tiles", "over_attention", took["choice"] / took["attention"])


def _ladder(sizes: Sizes) -> Iterator[Row]:
    """One price over many units, in sorts of as many numbers."""
    values = jnp.cumsum(jax.random.uniform(jax.random.key(0), (sizes.ladder, 4)), axis=1)
    run = jax.jit(lambda x: allocate.ladder(x, jnp.array([0, 2, 4, 8]), 3 * sizes.ladder).level)
    sort = jax.jit(jnp.sort)
    took = _report.interleaved({"ladder": lambda: run(values), "sort": lambda: sort(values[:, 0])})
    yield Row("ladder", "ms", 1e3 * took["ladder"])
    yield Row("ladder", "over_sort", took["ladder"] / took["sort"])


def _decoding(sizes: Sizes) -> Iterator[Row]:
    """Tokens a second of the main job's model within a part of what the device reports as free."""
    from experiments.harness import texts
    from experiments.models import load_gguf, smollm2_path
    from experiments.models.worth import decoder_of
    from jbalance import decode

    device = jax.devices()[0]
    try:
        (budget,) = device_budgets([device], MEMORY)
    except ValueError:  # a CPU reports none
        budget = LEAST_BYTES
    _, model, tokenizer = load_gguf(smollm2_path())
    decoder = decoder_of(model)
    prompt = np.array(texts.encode(tokenizer, texts.text_of("lcet10"))[: sizes.context], np.int32)
    state: Any = decode.join(decoder, decode.create(decoder, [budget]), 0, prompt)
    _, state = decode.step(decoder, state)  # compiles
    start = time.perf_counter()
    for _ in range(sizes.steps):
        _, state = decode.step(decoder, state)
    jax.block_until_ready(state.tokens)
    yield Row("decoding", "tokens_per_s", sizes.steps / (time.perf_counter() - start))
    yield Row("decoding", "budget_mib", budget / 2**20)
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        yield Row("decoding", "peak_mib", stats["peak_bytes_in_use"] / 2**20)


if __name__ == "__main__":
    main()
