"""Attention straight from the packed pages of an arena, a tile of tokens at a time.

Only pages that hold tokens are read; their number is data. Each block of pages gives its own softmax,
which is merged into that of its unit. The levels of the codes are whole numbers: a page is unpacked into
one byte per coordinate, nothing is looked up, and the norms multiply logits and weights, not vectors.

Products along the vectors' last axis in memory are those of 8-bit integers, where a query, or a row of
weights, is the sum of three 8-bit digits, which keep the 24 bits of a float32; products along the other
axis are in float32. Each is about twice as fast there as the other is (on a CPU, for few rows).

Method: Dao et al., FlashAttention (arXiv:2205.14135), the softmax by tiles.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance.attention.partial import EMPTY, NO_TOP, Partial, merge
from jbalance.cache import codec, paged_gpu, paged_tpu, pages
from jbalance.cache.pages import Arena

BLOCK_TOKENS = 128  # small pages of one unit are joined to about so many tokens
TILE_TOKENS = 2048  # of all blocks of one iteration, at most
_TILE_LOGITS = 1 << 17
_SMALL_TILE_BLOCKS = 4
# The TPU kernel is not chosen by itself: XLA copies the arena for it on every call, `paged_tpu`.
_KERNELS = {"gpu": paged_gpu, "tpu": paged_tpu}
_LARGEST_WHOLE = 127 << 16  # a row's largest entry in units of the lowest of its three digits
_SHIFTS = np.array([16, 8, 0], np.int32).reshape(3, 1, 1)
_ROUNDING = np.array([0x8080, 0x80, 0], np.int32).reshape(3, 1, 1)


class _Level(NamedTuple):
    """What is known of a level when it is compiled."""

    bits: int
    page_tokens: int
    block_pages: int
    tile_blocks: int


def attend_pages(
    q: jax.Array,
    arena: Arena,
    units: jax.Array,
    *,
    key_gain: tuple[float, ...] | None = None,
    backend: str | None = None,
) -> Partial:
    """Attention of queries over all tokens of their units, whatever their levels.

    y_u = softmax(g q_u k_u^T / sqrt(D)) v_u over the tokens of unit u, all of which every query sees.
    Counts and pages are data: changed, they do not compile anew.

    Args:
      q: [N, T, D] float queries of N units (a unit's T holds its group of heads and its tokens).
      arena: where the units are.
      units: [N] int32, indices into the arena's units.
      key_gain: [M] g of each level, 1 for None; 1 / (1 - error) undoes what `codec.encode` shrinks.
      backend: "gpu", "tpu" or "xla", static; None for the GPU kernel on CUDA where it can read the
        arena, else XLA. The kernels run on their own platform only, so export for several platforms at
        once needs "xla".

    Returns:
      `Partial` with y [N, T, D] and lse [N, T], float32; a unit without tokens gives y = 0.

    Raises:
      ValueError: shapes that do not fit; an unknown back end, or one that cannot read this arena.
    """
    gain = _check(q, arena, units, key_gain)
    _check_backend(backend, arena)
    if 0 in q.shape:
        return Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], EMPTY))
    units = jnp.asarray(units, jnp.int32)
    turned = codec.rotate(q) / math.sqrt(arena.head_dim)
    total = _over_pages(turned, arena, units, gain, backend)
    return Partial(codec.unrotate(total.y), total.lse)


def _check_backend(backend: str | None, arena: Arena) -> None:
    """ValueError for a back end that is unknown or cannot read the arena."""
    if backend not in (None, "xla", *_KERNELS):
        raise ValueError(f"backend is {backend!r}: it must be 'gpu', 'tpu', 'xla' or None")
    if backend in _KERNELS and (reason := _KERNELS[backend].unsupported(arena)):
        raise ValueError(f"backend is {backend!r}, which cannot read this arena: {reason}")


def _over_pages(q, arena, units, gain, backend) -> Partial:
    """Attention of rotated and scaled queries by one back end."""
    if backend in _KERNELS:
        return _KERNELS[backend].attend_rotated(q, arena, units, gain)
    xla = functools.partial(_attend_xla, gain=gain)
    if backend == "xla" or paged_gpu.unsupported(arena):
        return xla(q, arena, units)
    gpu = functools.partial(paged_gpu.attend_rotated, gain=gain)
    return lax.platform_dependent(q, arena, units, cuda=gpu, default=xla)


def _attend_xla(q, arena, units, gain) -> Partial:
    """All levels by the loops below, merged."""
    levels = (
        _attend_level(q * g, arena, units, i, _level(arena, i, q.shape)) for i, g in enumerate(gain)
    )
    return functools.reduce(merge, levels)


def attend_decoded(
    q: jax.Array,
    arena: Arena,
    units: jax.Array,
    *,
    key_gain: tuple[float, ...] | None = None,
) -> Partial:
    """`attend_pages` by its definition: decode everything, then dense attention."""
    gain = _check(q, arena, units, key_gain)

    def one_unit(q, unit):
        held = [pages.read(arena, unit, level) for level in range(len(arena.bits))]
        k = jnp.concatenate([h.k * g for h, g in zip(held, gain, strict=True)])
        v, valid = (jnp.concatenate([h[i] for h in held]) for i in (1, 2))
        logits = jnp.matmul(q.astype(jnp.float32), k.T, precision="highest")
        logits = jnp.where(valid, logits / math.sqrt(arena.head_dim), -jnp.inf)
        some = jnp.any(valid)
        lse = jnp.where(some, jax.nn.logsumexp(logits, axis=-1), EMPTY)
        weight = jnp.exp(logits - lse[:, None])
        return Partial(jnp.matmul(weight, v, precision="highest"), lse)

    return jax.vmap(one_unit)(q, jnp.asarray(units, jnp.int32))


def _check(q, arena, units, key_gain):
    """The gain of each level; ValueError for shapes that do not fit."""
    checks.rank("q", q, 3, "[N, T, D]")
    checks.rank("units", units, 1, "[N]")
    checks.same_length("units", units, "q", q)
    if q.shape[-1] != arena.head_dim:
        raise ValueError(f"q has shape {q.shape}: its last axis must be D = {arena.head_dim}")
    if key_gain is None:
        return (1.0,) * len(arena.bits)
    if len(key_gain) != len(arena.bits):
        raise ValueError(
            f"key_gain has {len(key_gain)} entries: it must have one for each of arena.bits = "
            f"{arena.bits}"
        )
    return key_gain


def _level(arena, index, shape):
    """Static sizes: about TILE_TOKENS at once, fewer if the arena has fewer pages for these units."""
    page_tokens = arena.page_tokens[index]
    block_pages = max(1, round(BLOCK_TOKENS / page_tokens))
    tokens = min(TILE_TOKENS, max(256, _TILE_LOGITS // shape[1]))
    share = -(-arena.num_pages * shape[0] // (2 * arena.count.shape[0] * block_pages))
    tile_blocks = min(max(1, round(tokens / (page_tokens * block_pages))), max(shape[0], share))
    return _Level(arena.bits[index], page_tokens, block_pages, tile_blocks)


def _attend_level(q, arena, units, index, level):
    """Queries [N, T, D], rotated and scaled, over one level's tokens; y is in the rotated basis."""
    bits, page_tokens, block_pages, tile_blocks = level
    block_tokens = page_tokens * block_pages
    begin = arena.offset[units * len(arena.bits) + index]
    count = arena.count[units, index]
    # Blocks of all units lie one after the other, so that small groups share an iteration.
    ends = jnp.cumsum(-(-count // block_tokens))
    starts = ends - (-(-count // block_tokens))
    query = _rows(q, bits, contract_tokens=False), 0.5 * jnp.sum(q, axis=-1, keepdims=True)
    of_unit = jnp.arange(units.shape[0])

    def step(start, number, carry):
        """The softmax of `number` blocks from `start` on merged into the carry."""
        block = start + jnp.arange(number)
        unit = jnp.sum(block[:, None] >= ends[:-1], axis=1)
        first = (block - starts[unit]) * block_pages
        left = jnp.where(block < ends[-1], count[unit] - first * page_tokens, 0)
        place = (begin[unit] + first)[:, None] + jnp.arange(block_pages)
        # Beyond a group's last page there is another's, or none: read, but masked.
        ids = arena.order[jnp.minimum(place, arena.num_pages - 1)]
        there = jnp.arange(block_tokens) < left[:, None]
        tile = _Tile(arena.data, ids, bits, arena.head_dim, page_tokens)
        y, mass, top = _softmax_blocks(jax.tree.map(lambda x: x[unit], query), tile, there)
        own = (unit == of_unit[:, None]) & (left > 0)
        return _merge_blocks(carry, y, mass, top, own)

    shape = q.shape[:2]
    empty = jnp.zeros(q.shape), jnp.zeros(shape), jnp.full(shape, EMPTY)
    # Whole tiles, then what is left by smaller ones: most of a tile beyond the end would be lost work.
    small = min(tile_blocks, _SMALL_TILE_BLOCKS)
    done = ends[-1] // tile_blocks * tile_blocks
    carry = lax.fori_loop(
        0, done // tile_blocks, lambda i, c: step(i * tile_blocks, tile_blocks, c), empty
    )
    rest = -(-(ends[-1] - done) // small)
    y, mass, top = lax.fori_loop(0, rest, lambda i, c: step(done + i * small, small, c), carry)
    some = mass > 0
    mass = jnp.where(some, mass, 1.0)
    return Partial(jnp.where(some[..., None], y / mass[..., None], 0.0), top + jnp.log(mass))


class _Tile(NamedTuple):
    """The pages of some blocks."""

    data: jax.Array  # [P, page_bytes] uint8
    ids: jax.Array  # [B, pages of a block]
    bits: int
    head_dim: int
    page_tokens: int

    def part(self, index, first=0, width=None):
        """Bytes first .. first + width - 1 per token of one part, [B, pages of a block, bytes]."""
        widths = [w for w, _ in pages.widths(self.head_dim, self.bits)]
        width = widths[index] if width is None else width
        start = self.page_tokens * (sum(widths[:index]) + first)
        at = jnp.stack([self.ids, jnp.full_like(self.ids, start)], axis=-1)
        numbers = lax.GatherDimensionNumbers(
            offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
        )
        size = (1, self.page_tokens * width)
        return lax.gather(self.data, at, numbers, size, mode="promise_in_bounds")

    def vectors(self, index):
        """Keys (0) or values (1) for norm 1: [B, tokens, D], or [B, D, tokens] below 8 bits.

        Integer levels in int8; bfloat16 at 16 bits.
        """
        part, blocks = self.part(index), self.ids.shape[0]
        if self.bits == pages.WIDE_BITS:
            pairs = part.reshape(blocks, -1, self.head_dim, 2)
            return lax.bitcast_convert_type(pairs, jnp.bfloat16)
        if self.bits == 8:
            return codec.integer_levels(part.reshape(blocks, -1, self.head_dim), 8)
        part = part.reshape(*part.shape[:2], -1, self.page_tokens)
        joined = jnp.concatenate([part[:, i] for i in range(part.shape[1])], axis=-1)
        levels = codec.integer_levels(joined.reshape(blocks, -1), self.bits)
        return levels.reshape(blocks, self.head_dim, -1)

    def norms(self, index):
        """Norms of the keys (0) or values (1): [B, tokens] float32."""
        low, high = (
            self.part(2 + index, byte, 1).reshape(self.ids.shape[0], -1).astype(jnp.uint16)
            for byte in (0, 1)
        )
        return lax.bitcast_convert_type(low | (high << 8), jnp.float16).astype(jnp.float32)


def _softmax_blocks(query, tile, there):
    """The softmax of each block alone: y [B, T, D], not normalised, its mass and top [B, T]."""
    bits = tile.bits
    logits = jnp.where(there[:, None], _logits(query, tile, there[0, 0]), EMPTY)
    top = jnp.maximum(jnp.max(logits, axis=-1), NO_TOP)
    weight = jnp.exp(logits - top[..., None])
    mass = jnp.sum(weight, axis=-1)
    # What lies behind the last token may decode to NaN.
    values = tile.vectors(1)
    if bits == pages.WIDE_BITS:
        values = jnp.where(there[..., None], values, 0)
    else:
        weight = jnp.where(weight > 0, weight * tile.norms(1)[:, None], 0)
    y = _product(_rows(weight, bits, contract_tokens=True), values, contract_tokens=True, bits=bits)
    if bits == 8:
        y += 0.5 * jnp.sum(weight, axis=-1, keepdims=True)
    return y if bits == pages.WIDE_BITS else y * codec.step(tile.head_dim, bits), mass, top


def _logits(query, tile, some):
    """Logits [B, T, tokens] of a tile, of which `some` tokens are there: always, but that is data."""
    rows, half = query
    bits = tile.bits
    if bits == pages.WIDE_BITS:
        return _product(rows, tile.vectors(0), contract_tokens=False, bits=bits)
    norms = (tile.norms(0) * codec.step(tile.head_dim, bits))[:, None]
    if bits == 8:
        return (_product(rows, tile.vectors(0), contract_tokens=False, bits=bits) + half) * norms
    # Unpacked by itself, in lanes of 8 bits: XLA would fuse it with the conversion, in lanes of 32 bits,
    # which takes twice as long. It does not fuse across branches.
    shape = *tile.ids.shape[:1], tile.head_dim, norms.shape[-1]
    levels = lax.cond(some, lambda: tile.vectors(0), lambda: jnp.zeros(shape, jnp.int8))
    keys = levels.astype(jnp.float32) * norms
    return _product(rows, keys, contract_tokens=False, bits=bits)


def _rows(x, bits, *, contract_tokens):
    """Rows [B, T, X] as `_product` takes them: float32, or digits [B, 3, T, X] int8 and their scale."""
    if not _in_integers(bits, contract_tokens):
        return x
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    largest = jnp.maximum(largest, 1e-30)
    whole = jnp.round(x * (np.float32(_LARGEST_WHOLE) / largest)).astype(jnp.int32)
    digits = ((whole[:, None] + _ROUNDING) >> _SHIFTS).astype(jnp.int8)
    return digits, largest * np.float32(1 / _LARGEST_WHOLE)


def _in_integers(bits, contract_tokens):
    """Whether the product's axis is the last of the vectors: tokens below 8 bits, D at 8."""
    return bits != pages.WIDE_BITS and contract_tokens == (bits < 8)


def _product(rows, vectors, *, contract_tokens, bits):
    """Rows [B, T, X] of `_rows` times vectors: over D, or over tokens; float32."""
    across = bits < 8  # vectors are [B, D, tokens]
    spec = "brx,bxy->bry" if across != contract_tokens else "brx,byx->bry"
    if not _in_integers(bits, contract_tokens):
        return jnp.einsum(spec, rows, vectors.astype(jnp.float32), precision="highest")
    digits, scale = rows
    flat = digits.reshape(digits.shape[0], -1, digits.shape[-1])
    out = jnp.einsum(spec, flat, vectors, preferred_element_type=jnp.int32)
    out = out.reshape(*digits.shape[:3], -1).astype(jnp.float32)
    return (out[:, 0] * 65536 + out[:, 1] * 256 + out[:, 2]) * scale


def _merge_blocks(carry, y, mass, top, own):
    """The softmax of units [N, T, ...] with that of their `own` [N, B] blocks [B, T, ...]."""
    old_y, old_mass, old_top = carry
    own = own[..., None]
    new_top = jnp.maximum(old_top, jnp.max(jnp.where(own, top, EMPTY), axis=1))
    part = jnp.where(own, jnp.exp(top - new_top[:, None]), 0)
    decay = jnp.exp(old_top - new_top)
    return (
        old_y * decay[..., None] + jnp.einsum("nbt,btd->ntd", part, y, precision="highest"),
        old_mass * decay + jnp.sum(part * mass, axis=1),
        new_top,
    )
