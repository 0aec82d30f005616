"""What is compiled: kernels of the library, and those of JAX that do the same, at equal sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbalance import attention
from jbalance.cache import _pages
from jbalance.cache._rotation import rotate_keys
from jbalance.cache.backends import gpu, tpu

TOKENS, HEADS = 2048, 2
UNITS, QUERIES, PROMPT, PAGES, PAGE_BYTES = 16, 4, 4096, 4000, 16384
TYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


class Program(NamedTuple):
    """A function, the shapes of its arguments, and what a step of its loop does."""

    run: Callable[..., Any]
    shapes: tuple[Any, ...]
    work: float  # of a step: tiles of 128 x 128, or cached elements (keys and values) in thousands


class Case(NamedTuple):
    """One program for one platform."""

    name: str
    platform: str  # "tpu" or "gpu"
    make: Callable[[], Program]


def all_cases() -> dict[str, Case]:
    """By name."""
    found = [*_tiles(), *_splash(), *_pages_cases(), *_gpu_peers()]
    return {case.name: case for case in found}


def _tiles():
    sizes = (
        (512, 512),
        (512, 128),
        (256, 128),
        (128, 128),
        (512, 16),
        (256, 16),
        (128, 16),
        (64, 16),
    )
    for head_dim in (64, 128, 256):
        for queries, keys in sizes:
            name = f"tiles forward, {queries} x {keys}, D={head_dim}, bf16"
            yield Case(
                name, "tpu", functools.partial(tiles, "tpu", queries, keys, head_dim, "bf16")
            )
        for method, queries in (("forward", 128), ("backward", 128), ("backward", 512)):
            backward = method == "backward"
            for kind in ("bf16", "f32") if queries == 128 else ("bf16",):
                if (method, kind, queries) == ("forward", "bf16", 128):
                    continue
                name = f"tiles {method}, {queries} x {queries}, D={head_dim}, {kind}"
                sizes_of = (queries, queries, head_dim, kind, backward)
                yield Case(name, "tpu", functools.partial(tiles, "tpu", *sizes_of))
    for head_dim in (64, 128):
        for queries, keys in ((128, 128), (64, 64), (64, 16)):
            name = f"tiles forward, {queries} x {keys}, D={head_dim}, bf16, GPU"
            yield Case(
                name, "gpu", functools.partial(tiles, "gpu", queries, keys, head_dim, "bf16")
            )


def tiles(
    backend: str, queries: int, keys: int, head_dim: int, kind: str, backward: bool = False
) -> Program:
    """Causal attention over lists of tiles, or its gradient."""
    x = jax.ShapeDtypeStruct((1, TOKENS, HEADS, head_dim), TYPES[kind])
    rows, columns = TOKENS // queries, TOKENS // keys
    blocks = jax.ShapeDtypeStruct((1, HEADS, rows, columns), jnp.int32)
    count = jax.ShapeDtypeStruct((1, HEADS, rows), jnp.int32)

    def run(q, k, v, blocks, count):
        plan = attention.TilePlan(blocks, count, TOKENS, TOKENS, queries, keys)
        return attention.attend(q, k, v, plan, causal=True, backend=backend).y

    def gradient(q, k, v, blocks, count):
        def total(q, k, v):
            return jnp.sum(run(q, k, v, blocks, count).astype(jnp.float32))

        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    of_step = queries * (keys if backward or backend == "gpu" else max(keys, min(512, TOKENS)))
    return Program(gradient if backward else run, (x, x, x, blocks, count), of_step / 128**2)


def _splash():
    for head_dim in (64, 128, 256):
        for queries, keys, inner in ((512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024)):
            name = f"splash forward, {queries} x {keys} by {inner}, D={head_dim}, bf16"
            yield Case(name, "tpu", functools.partial(splash, queries, keys, inner, head_dim))
        for size in (512, 1024):
            name = f"splash backward, {size} x {size}, D={head_dim}, bf16"
            yield Case(name, "tpu", functools.partial(splash, size, size, size, head_dim, True))


def splash(queries: int, keys: int, inner: int, head_dim: int, backward: bool = False) -> Program:
    """JAX's own block-sparse attention for TPUs, causal, over all tiles."""
    kernel = splash_kernel(queries, keys, inner, TOKENS, HEADS)
    x = jax.ShapeDtypeStruct((HEADS, TOKENS, head_dim), jnp.bfloat16)

    def gradient(q, k, v):
        return jax.grad(lambda *qkv: jnp.sum(kernel(*qkv).astype(jnp.float32)), argnums=(0, 1, 2))(
            q, k, v
        )

    return Program(gradient if backward else kernel, (x, x, x), queries * keys / 128**2)


def splash_kernel(queries: int, keys: int, inner: int, tokens: int, heads: int) -> Any:
    """What computes it for q, k, v [heads, tokens, D]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as module

    mask = module.MultiHeadMask([module.CausalMask((tokens, tokens))] * heads)
    sizes = module.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=inner,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=inner,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    return module.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)


def _pages_cases():
    for head_dim in (64, 128, 256):
        for bits in (16, 8, 4, 3):
            for platform in ("tpu", "gpu"):
                name = f"pages, {bits} bits, D={head_dim}, {platform.upper()}"
                yield Case(name, platform, functools.partial(pages, platform, head_dim, bits))
    for platform in ("tpu", "gpu"):  # a second prompt over what the first has left
        name = f"pages, 4 bits, D=128, {PROMPT:,} queries, {platform.upper()}"
        yield Case(name, platform, functools.partial(pages, platform, 128, 4, PROMPT))


def pages(platform: str, head_dim: int, bits: int, queries: int = QUERIES) -> Program:
    """Attention of queries straight from packed pages of one precision."""
    at = arena(head_dim, (bits,))
    q = jax.ShapeDtypeStruct((UNITS, queries, head_dim), jnp.float32)
    units = jax.ShapeDtypeStruct((UNITS,), jnp.int32)
    kernel = {"tpu": tpu, "gpu": gpu}[platform]

    def run(q, data, order, offset, count, units):
        given = _pages.Arena(data, order, offset, count, head_dim, (bits,))
        return kernel.attend_rotated(rotate_keys(q), given, units)

    shapes = (q, at.data, at.order, at.offset, at.count, units)
    return Program(run, shapes, 2 * at.page_tokens[0] * head_dim / 1000)


def arena(head_dim: int, bits: tuple[int, ...]) -> Any:
    """An arena of shapes alone."""
    return jax.eval_shape(lambda: _pages.empty(PAGES, UNITS, head_dim, bits, PAGE_BYTES))


def _gpu_peers():
    for head_dim in (64, 128):
        name = f"JAX's attention (Pallas), 128 x 128, D={head_dim}, bf16, GPU"
        yield Case(name, "gpu", functools.partial(pallas_mha, head_dim))


def pallas_mha(head_dim: int) -> Program:
    """JAX's own dense attention for GPUs."""
    from jax.experimental.pallas.ops.gpu import attention as module

    sizes = module.BlockSizes(block_q=128, block_k=128)
    x = jax.ShapeDtypeStruct((1, TOKENS, HEADS, head_dim), jnp.bfloat16)

    def run(q, k, v):
        return module.mha(q, k, v, None, 1.0, True, sizes)

    return Program(run, (x, x, x), 1.0)
