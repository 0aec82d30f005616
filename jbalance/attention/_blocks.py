"""The blocks of attention's operands: how a loop over tiles reads, masks and accumulates them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbalance._exp2 import LOG2_E
from jbalance.attention import _operands
from jbalance.attention._operands import Operands, Rules, Visibility
from jbalance.attention._slices import (
    add_slice,
    concatenate,
    div_mod,
    iota,
    read_entry,
    read_slice,
    write_slice,
)
from jbalance.attention._varying import axes_of
from jbalance.attention.partial import EMPTY

_NOWHERE = 2**30  # position of a key that is not there
JOINED_KEYS = 128  # of the key blocks of one iteration, unless one alone has more


class Row(NamedTuple):
    """A block of queries of the heads that are computed together."""

    batch: Any
    head: Any  # the first of them
    kv_head: Any
    block: Any
    list_place: tuple  # of its list in the plan
    count: Any
    plain: Any  # tiles at the begin of the list that no mask touches


class Tile(NamedTuple):
    """A row and the key blocks that one iteration takes together."""

    row: Row
    blocks: tuple
    key_positions: Any  # positions of their keys if some element may be masked, else None


class Sums(NamedTuple):
    """Gradients that many rows add to, of padded shapes, in float32."""

    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    relative_bias: jax.Array | None


class Problem:
    """Padded operands, and how to read and write their blocks."""

    def __init__(self, operands: Operands, where: Visibility, rules: Rules):
        self.operands, self.where, self.rules = operands, where, rules
        self.plan = where.plan
        self.q_shape = operands.q.shape
        heads, kv_heads = operands.q.shape[2], operands.k.shape[2]
        self.group = heads // kv_heads
        # Heads of a row: all that share keys, if they share a plan too.
        self.together = self.group if self.plan.count.shape[1] == 1 else 1
        # Narrow key blocks of one iteration: fewer, larger products.
        self.joined = max(1, min(JOINED_KEYS // self.plan.block_k, self.plan.capacity))
        self.num_rows = operands.q.shape[0] * (heads // self.together) * self.plan.num_query_blocks
        self.plain = self._count_plain()
        cap = rules.soft_cap
        self.logit_scale = rules.scale * LOG2_E if cap is None else rules.scale / cap
        leaves = jax.tree.leaves((operands, where))
        self.axes = frozenset().union(*(axes_of(x) for x in leaves))

    def _count_plain(self):
        """How many tiles at the begin of each list have no masked element; None if unknown.

        Lists ascend, so those that the causal mask or the end of the keys touches come last.
        """
        plan, where = self.plan, self.where
        if self.rules.window is not None or where.q_ids is not None:
            return None
        bound: Any = plan.num_keys // plan.block_k
        if self.rules.causal:
            first = iota(plan.num_query_blocks) * plan.block_q
            seen = (first + _operands.first_position(where) + 1) // plan.block_k
            bound = jnp.minimum(bound, seen)[:, None]
        listed = iota(plan.capacity) < plan.count[..., None]
        return jnp.sum(listed & (plan.blocks < bound), axis=-1, dtype=jnp.int32)

    def varying(self, tree):
        """Constants as the loops need them inside of `shard_map`."""
        axes = tuple(self.axes)
        return jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), tree) if axes else tree

    def row(self, r) -> Row:
        num_q, num_heads = self.plan.num_query_blocks, self.q_shape[2] // self.together
        rest, block = div_mod(r.astype(jnp.int32), num_q)  # under x64 loops count in int64
        batch, head = div_mod(rest, num_heads)
        head = head * self.together
        lists = self.plan.count.shape
        place = (0 if lists[0] == 1 else batch, 0 if lists[1] == 1 else head, block)
        plain = None if self.plain is None else read_entry(self.plain, place)
        count = read_entry(self.plan.count, place)
        return Row(batch, head, div_mod(head, self.group)[0], block, place, count, plain)

    def over_tiles(self, row, step, carry):
        """`step(tile, carry)` over a row's tiles: those without a mask, then the others."""
        width = self.joined
        keys = self.plan.block_k * width
        listed = self._listed_keys(row) if width > 1 else None

        def loop(first, end, masked, carry):
            def body(i, carry):
                places = [i * width + c for c in range(width)]
                if masked and width > 1:  # behind the list, its last block again: read, but masked
                    places = [jnp.minimum(c, row.count - 1) for c in places]
                blocks = tuple(read_entry(self.plan.blocks, (*row.list_place, c)) for c in places)
                if not masked:
                    positions = None
                elif listed is None:
                    positions = self._nowhere_behind(blocks[0] * keys + iota(keys))
                else:
                    positions = read_slice(listed, (i * keys,), (keys,))
                return step(Tile(row, blocks, positions), carry)

            return lax.fori_loop(first, end, body, carry)

        ends = div_mod(row.count + (width - 1), width)[0]
        if row.plain is None:
            return loop(0, ends, True, carry)
        plain = div_mod(row.plain, width)[0]
        carry = loop(0, plain, False, carry)
        some = width > 1 or self.rules.causal or self.plan.num_keys % self.plan.block_k
        return loop(plain, ends, True, carry) if some else carry

    def _listed_keys(self, row):
        """Positions of the keys of a row's list, in whole tiles; `_NOWHERE` if not in the list.

        Made once for a row: XLA would make those of a tile as often as they are compared.
        """
        plan = self.plan
        places = iota(-(-plan.capacity // self.joined) * self.joined)
        blocks = read_slice(plan.blocks, (*row.list_place, 0), (1, 1, 1, plan.capacity)).reshape(-1)
        blocks = jnp.pad(blocks, (0, places.size - plan.capacity))
        positions = self._nowhere_behind(blocks[:, None] * plan.block_k + iota(plan.block_k))
        return jnp.where((places < row.count)[:, None], positions, _NOWHERE).reshape(-1)

    def _nowhere_behind(self, positions):
        """Positions, `_NOWHERE` behind the last key."""
        plan = self.plan
        inside = positions < plan.num_keys
        return jnp.where(inside, positions, _NOWHERE) if plan.num_keys % plan.block_k else positions

    def read(self, x, row):
        """A row of x [B, T, H, ...] as [bq G, ...]."""
        start = (row.batch, row.block * self.plan.block_q, row.head, *(0,) * (x.ndim - 3))
        size = (1, self.plan.block_q, self.together, *x.shape[3:])
        return read_slice(x, start, size).reshape(-1, *x.shape[3:])

    def write(self, x, values, row):
        """x [B, T, H, ...] with a row replaced."""
        start = (row.batch, row.block * self.plan.block_q, row.head, *(0,) * (x.ndim - 3))
        values = values.reshape(1, self.plan.block_q, self.together, *x.shape[3:])
        return write_slice(x, values.astype(x.dtype), start)

    def queries(self, row, scale):
        return self.read(self.operands.q, row).astype(jnp.float32) * scale

    def keys(self, tile):
        return self._block(self.operands.k, tile)

    def values(self, tile):
        return self._block(self.operands.v, tile)

    def _block(self, x, tile):
        size = 1, self.plan.block_k, 1, x.shape[3]
        parts = [read_slice(x, start, size)[0, :, 0] for start in self._key_places(tile)]
        return concatenate(parts, 0).astype(jnp.float32)

    def _key_places(self, tile):
        """Where the blocks of a tile begin in [B, S, K, D]."""
        return [(tile.row.batch, b * self.plan.block_k, tile.row.kv_head, 0) for b in tile.blocks]

    def logits(self, tile, x, keys_first=False):
        """Products of a tile [bq G, bk], or turned, as logits in base 2; the cap's slope or None."""
        slope = None
        if self.rules.soft_cap is not None:
            x = jnp.tanh(x)
            slope = 1 - x * x
            x = x * (self.rules.soft_cap * LOG2_E)
        for bias in self._biases(tile):
            parts = self._parts(x, keys_first) + _order(bias, keys_first) * LOG2_E
            x = parts.reshape(x.shape)
        if tile.key_positions is not None:
            x = jnp.where(self._seen(tile, keys_first), x, EMPTY)
        return x, slope

    def _parts(self, x, keys_first):
        """[bq G, bk] as [bq, G, bk], or turned as [bk, bq, G]."""
        heads = self.plan.block_q, self.together
        return x.reshape(-1, *heads) if keys_first else x.reshape(*heads, -1)

    def _seen(self, tile, keys_first):
        """Which elements [bq G, bk] of a tile the masks leave, or turned. (XLA is slow in 3 axes.)"""
        plan, where, axes = self.plan, self.where, (1, 0) if keys_first else (0, 1)
        rows = iota(plan.block_q * self.together) // self.together
        query_positions = jnp.expand_dims(rows + tile.row.block * plan.block_q, axes[1])
        positions = jnp.expand_dims(tile.key_positions, axes[0])
        seen = _operands.visible(
            self.rules, query_positions + _operands.first_position(where), positions
        )
        if self.joined > 1 or plan.num_keys % plan.block_k:
            seen &= positions < _NOWHERE
        if where.q_ids is not None and where.k_ids is not None:
            place = tile.row.batch, tile.row.block * plan.block_q
            q_ids = read_slice(where.q_ids, place, (1, plan.block_q))[0]
            places = [(tile.row.batch, b * plan.block_k) for b in tile.blocks]
            k_ids = concatenate(
                [read_slice(where.k_ids, x, (1, plan.block_k))[0] for x in places], 0
            )
            q_ids = jnp.expand_dims(jnp.repeat(q_ids, self.together), axes[1])
            seen &= q_ids == jnp.expand_dims(k_ids, axes[0])
        return seen

    def _biases(self, tile):
        """The tile's biases, each [bq|1, G|1, bk|1]."""
        bias, line = self.operands.bias, self.operands.relative_bias
        if bias is not None:
            # Blocks of keys that share one bias are one.
            blocks = tile.blocks[:1] if bias.shape[3] == 1 else tile.blocks
            parts = [read_slice(bias, *self._bias_place(bias, tile.row, b)) for b in blocks]
            yield concatenate([jnp.swapaxes(x[0], 0, 1) for x in parts], 2)
        if line is not None:
            parts = [read_slice(line, *self._line_place(line, tile.row, b)) for b in tile.blocks]
            yield concatenate([self._from_line(x) for x in parts], 2)

    def _bias_place(self, bias, row, block):
        """Start and size of a block's tile in the bias, whose axes of size 1 all tiles share."""
        block_q, block_k = self.plan.block_q, self.plan.block_k
        place = row.batch, row.head, row.block * block_q, block * block_k
        size = 1, self.together, block_q, block_k
        shared = [n == 1 for n in bias.shape]
        start = [0 if one else x for x, one in zip(place, shared, strict=True)]
        return start, [1 if one else n for n, one in zip(size, shared, strict=True)]

    def _line_place(self, line, row, block):
        """Start and size of a block's bq + bk - 1 distances in the padded relative bias."""
        plan, heads = self.plan, line.shape[0]
        behind = plan.num_key_blocks - 1 - block
        start = row.block * plan.block_q + behind * plan.block_k
        size = 1 if heads == 1 else self.together
        return [0 if heads == 1 else row.head, start], [size, plan.block_q + plan.block_k - 1]

    def _from_line(self, line):
        """Distances [G|1, bq + bk - 1] as a tile [bq, G|1, bk]: entry q - k + bk - 1."""
        heads, length = line.shape
        block_q, block_k = self.plan.block_q, self.plan.block_k
        # Rows of length - 1 cut from copies of the reversed line begin one entry earlier each.
        copies = jnp.broadcast_to(line[:, None, ::-1], (heads, block_q, length))
        flat = copies.reshape(heads, -1)[:, block_q - 1 :][:, : block_q * (length - 1)]
        tile = flat.reshape(heads, block_q, length - 1)[:, :, :block_k]
        return jnp.swapaxes(tile, 0, 1)

    def zero_sums(self) -> Sums:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), self.operands[1:])
        return self.varying(Sums(*zeros))

    def add_keys(self, x, tile, values):
        """x [B, S, K, D] with those of a tile's keys added."""
        for start, part in zip(self._key_places(tile), self._apart(values), strict=True):
            x = add_slice(x, start, part[None, :, None])
        return x

    def _apart(self, x):
        """What belongs to each block of x [keys of a tile, ...]."""
        return jnp.split(x, self.joined) if self.joined > 1 else [x]

    def add_biases(self, sums, tile, dlogits):
        """The gradient with that of a tile's biases added, from [bk, bq G]."""
        if sums.bias is None and sums.relative_bias is None:
            return sums
        for block, part in zip(tile.blocks, self._apart(dlogits), strict=True):
            sums = self._add_biases(sums, tile.row, block, part)
        return sums

    def _add_biases(self, sums, row, block, dlogits):
        """`add_biases` for one block."""
        rows = jnp.moveaxis(self._parts(dlogits, keys_first=True), 0, 2)
        if sums.bias is not None:
            start, size = self._bias_place(sums.bias, row, block)
            tile = jnp.swapaxes(rows, 0, 1)[None]
            shared = tuple(axis for axis, n in enumerate(size) if n != tile.shape[axis])
            tile = jnp.sum(tile, axis=shared, keepdims=True)
            sums = sums._replace(bias=add_slice(sums.bias, start, tile))
        if sums.relative_bias is not None:
            start, size = self._line_place(sums.relative_bias, row, block)
            if size[0] == 1:
                rows = jnp.sum(rows, axis=1, keepdims=True)
            # Of an array, not of its shape: inside of `shard_map` it varies as the rows do.
            like = self.varying(jnp.zeros(size, jnp.float32))
            (line,) = jax.linear_transpose(self._from_line, like)(rows)
            sums = sums._replace(relative_bias=add_slice(sums.relative_bias, start, line))
        return sums

    def cut_biases(self, sums):
        """The gradients of the biases without padding."""
        plan, bias, line = self.plan, sums.bias, sums.relative_bias
        if bias is not None:
            bias = bias[:, :, : plan.num_queries, : plan.num_keys]
        if line is not None:
            first = plan.num_key_blocks * plan.block_k - plan.num_keys
            line = line[:, first : first + plan.num_queries + plan.num_keys - 1]
        return bias, line


def _order(x, keys_first):
    """[bq, G, bk], or [bk, bq, G]."""
    return jnp.moveaxis(x, 2, 0) if keys_first else x
