"""A step of the forward pass over tiles on TPUs: what it reads, and where its keys come from."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jbalance.attention._operands import Rules
from jbalance.attention._slices import concatenate

NOWHERE = 1 << 30  # the position of a key that no query sees


class Step(NamedTuple):
    """What is known when the kernel is compiled."""

    rules: Rules
    lists: tuple[int, ...]  # [B|1, H|1, I, C], C whole steps
    group: int  # query heads that share keys
    block_q: int
    block_k: int
    joined: int  # blocks of a step
    num_keys: int
    key_lanes: int  # of a key in its row; its values follow, or lie in the same lanes
    resident: bool  # whether all keys and values of a head are in vector memory

    @property
    def keys(self) -> int:
        """Of a step."""
        return self.joined * self.block_k

    def begins(self, blocks_ref, step) -> list[jax.Array]:
        """Where the keys of each block of a step begin."""
        first = step * self.joined
        return [
            pl.multiple_of(blocks_ref[0, first + j] * self.block_k, self.block_k)
            for j in range(self.joined)
        ]

    def position(self, blocks_ref, step, count) -> jax.Array:
        """[1, keys] int32: where each key of a step is; NOWHERE behind the end of the list."""
        column = lax.broadcasted_iota(jnp.int32, (1, self.keys), 1)
        at = column
        for j, begin in enumerate(self.begins(blocks_ref, step)):
            ahead = jnp.where(step * self.joined + j < count, begin - j * self.block_k, NOWHERE)
            at = jnp.where(column >= j * self.block_k, column + ahead, at)
        return at

    def along(self, ref, blocks_ref, step) -> jax.Array | None:
        """[1, keys]: what a row over all keys has for those of a step."""
        if ref is None:
            return None
        begins = self.begins(blocks_ref, step)
        return concatenate([ref[:, pl.ds(begin, self.block_k)] for begin in begins], 1)


class Read(NamedTuple):
    """What the kernel reads: arrays, specifications or references."""

    blocks: Any  # [B|1, H|1, I, 1, C + joined], a row's list and the next one's first step
    q: Any  # [B, H, T, D]
    kv: Any  # [B, K, S, D + E]; in the chip's main memory by blocks, [B, K, J, block_k, D + E]
    bias: Any  # [B|1, H|1, 1, S] or None
    q_ids: Any  # [B, 1, T] or None
    k_ids: Any  # [B, 1, S] or None


class Resident(NamedTuple):
    """The blocks of a step, from keys and values in vector memory."""

    step: Step
    x: Read

    def begin(self):
        pass

    def ready(self, s):
        return s

    def take(self, s):
        size, begins = self.step.block_k, self.step.begins(self.x.blocks, s)
        return concatenate([self.x.kv[pl.ds(begin, size)] for begin in begins], 0)

    def end(self, last):
        pass


class Copied(NamedTuple):
    """The blocks of a step, copied from the main memory while the step before is computed."""

    step: Step
    x: Read
    place: Any  # of the head's keys: example, key/value head
    steps: Any  # of the row
    buffers: Any  # [2, joined bk, D + E]
    slot: Any  # [1], of the buffers, that the row's first step lies in
    arrived: Any  # [2] semaphores

    def begin(self):
        self.slot[0] = 0
        self.copy(0, 0)

    def ready(self, s):
        slot, joined = lax.rem(self.slot[0] + s, 2), self.step.joined
        # Behind the last row its own first step is copied once more, and never looked at.
        more = s + 1 < self.steps
        self.copy(jnp.where(more, (s + 1) * joined, self.step.lists[3]), 1 - slot)
        self.wait(slot)
        return slot

    def take(self, slot):
        return self.buffers[slot]

    def end(self, last):
        slot = lax.rem(self.slot[0] + self.steps, 2)
        self.slot[0] = slot
        pl.when(last)(lambda: self.wait(slot))

    def copy(self, first, slot):
        size = self.step.block_k
        for j in range(self.step.joined):
            source = self.x.kv.at[(*self.place, self.x.blocks[0, first + j])]
            target = self.buffers.at[slot, pl.ds(j * size, size)]
            pltpu.make_async_copy(source, target, self.arrived.at[slot]).start()

    def wait(self, slot):  # for all blocks of a step at once
        buffer = self.buffers.at[slot]
        pltpu.make_async_copy(buffer, buffer, self.arrived.at[slot]).wait()


def buffers(step: Step, kv: jax.Array) -> tuple[Any, ...]:
    """Two buffers of a step's blocks, which of them the row's first step lies in, and semaphores."""
    two = pltpu.VMEM((2, step.keys, kv.shape[4]), kv.dtype)
    return two, pltpu.SMEM((1,), jnp.int32), pltpu.SemaphoreType.DMA((2,))
