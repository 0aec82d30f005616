"""What a serving engine says of a batch, checked on the host, and what attention needs of it."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jbalance import checks

_MODES = {"extend": False, "decode": True}  # whether each request has one token


@dataclasses.dataclass(frozen=True)
class ForwardBatch:
    """A batch as an engine has it: the tokens of its requests one after the other, then the padding.

    Any object with these attributes will do.

    Attributes:
      forward_mode: "extend" (prompts, or further pieces of them) or "decode" (a token of each request),
        or an enum's member of this name.
      input_ids: [T] tokens, of which only the number is read. When decoding, T = R.
      req_pool_indices: [R] places of the requests, each in 0..B-1; -1 for padding.
      seq_lens: [R] tokens of each request with those of this batch; 0 for padding.
      extend_prefix_lens: [R] of these that came before; None when decoding.
      extend_seq_lens: [R] of these that are in the batch; None when decoding.
    """

    forward_mode: Any
    input_ids: Any
    req_pool_indices: Any
    seq_lens: Any
    extend_prefix_lens: Any = None
    extend_seq_lens: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchMetadata:
    """What all layers need of a batch: data, but for its kind and its size."""

    places: Any  # [R] int32 of the rows; B for padding
    starts: Any  # [R] int32, where the new tokens of a row begin among the T
    prefixes: Any  # [R] int32 tokens that came before
    lengths: Any  # [R] int32 new tokens
    num_rows: Any  # [] int32; of prompts, the padding comes behind so many rows
    active: Any  # [B] bool, places with a token in a decoding batch
    allowances: Any  # [B] int32 pages
    num_tokens: int = dataclasses.field(metadata={"static": True})  # T
    decodes: bool = dataclasses.field(metadata={"static": True})


class Rows(NamedTuple):
    """The rows of a batch, checked; NumPy [R] int32."""

    decodes: bool
    num_tokens: int
    places: np.ndarray  # -1 for padding
    prefixes: np.ndarray
    lengths: np.ndarray

    @property
    def real(self) -> np.ndarray:
        """[R] bool, rows that are no padding."""
        return self.places >= 0

    @property
    def begins(self) -> np.ndarray:
        """Places whose requests begin with this batch."""
        return self.places[self.real & (self.prefixes == 0)]

    def metadata(self, num_requests: int, allowances: np.ndarray) -> BatchMetadata:
        """As the layers read it."""
        order = (
            np.arange(self.places.size) if self.decodes else np.argsort(~self.real, kind="stable")
        )
        active = np.zeros(num_requests, bool)
        active[self.places[self.real]] = True
        starts = np.cumsum(self.lengths) - self.lengths
        places = np.where(self.real, self.places, num_requests)
        return BatchMetadata(
            places=places[order].astype(np.int32),
            starts=starts[order].astype(np.int32),
            prefixes=self.prefixes[order],
            lengths=self.lengths[order],
            num_rows=np.int32(self.real.sum()),
            active=active,
            allowances=allowances.astype(np.int32),
            num_tokens=self.num_tokens,
            decodes=self.decodes,
        )


def rows_of(batch: Any, held: np.ndarray) -> Rows:
    """The rows of a batch, whose requests hold [B] tokens so far; ValueError for what cannot be."""
    for field in dataclasses.fields(ForwardBatch)[:4]:
        if not hasattr(batch, field.name):
            raise ValueError(
                f"batch is {reprlib.repr(batch)}: it must be a ForwardBatch, or have its attributes; it "
                f"lacks {field.name}"
            )
    mode = getattr(batch.forward_mode, "name", batch.forward_mode)
    decodes = checks.choice("forward_mode", str(mode).lower(), _MODES)
    checks.rank("input_ids", batch.input_ids, 1, "[T]")
    num_tokens = np.shape(batch.input_ids)[0]
    places = _row("req_pool_indices", batch.req_pool_indices, -1, len(held) - 1)
    total = _row("seq_lens", batch.seq_lens, 0, checks.INT32_MAX, places.size)
    real = places >= 0
    if decodes:
        prefixes, lengths = total - real, real.astype(np.int32)
    else:
        prefixes, lengths = (
            _row(name, getattr(batch, name, None), 0, checks.INT32_MAX, places.size)
            for name in ("extend_prefix_lens", "extend_seq_lens")
        )
    rows = Rows(decodes, num_tokens, places, prefixes.astype(np.int32), lengths)
    _all("req_pool_indices", places, _first_of(places) | ~real, "another place for each request")
    for name, x in (("seq_lens", total), ("extend_seq_lens", lengths)):
        _all(name, x, real | (x == 0), "0 for padding, whose place is -1")
    (_check_decode if decodes else _check_extend)(rows, total, held)
    return rows


def _check_decode(rows, total, held):
    """ValueError unless each request has one token, behind what its place holds."""
    if rows.places.size != rows.num_tokens:
        raise ValueError(
            f"input_ids has {rows.num_tokens} tokens and req_pool_indices {rows.places.size} entries: a "
            f"batch that decodes has one token of each"
        )
    before = held[rows.places]
    begun = ~rows.real | (before > 0)
    _all("req_pool_indices", rows.places, begun, "a place with a prompt: the place is free")
    fits = ~rows.real | (rows.prefixes == before)
    _all("seq_lens", total, fits, "what the place holds and the new token", before + 1)


def _check_extend(rows, total, held):
    """ValueError unless lengths add up, and prefixes are what their places hold."""
    number = rows.lengths.sum(dtype=np.int64)
    if number > rows.num_tokens:
        raise ValueError(f"extend_seq_lens sum to {number}: input_ids has {rows.num_tokens} tokens")
    some = ~rows.real | (rows.lengths > 0)
    _all("extend_seq_lens", rows.lengths, some, "at least 1 where there is a request")
    sums = rows.prefixes.astype(np.int64) + rows.lengths
    _all("seq_lens", total, total == sums, "extend_prefix_lens + extend_seq_lens", sums)
    before = held[rows.places]
    _all(
        "extend_prefix_lens",
        rows.prefixes,
        ~rows.real | (rows.prefixes == 0) | (rows.prefixes == before),
        "0, or what the place holds, as prefixes of other requests are not shared",
        before,
    )


def _row(name, x, low, high, size=None):
    """[R] int32 on the host; ValueError for others."""
    if x is None:
        raise ValueError(f"{name} is None: a batch of prompts has one entry of it for each request")
    checks.rank(name, x, 1, "[R]")
    if size is not None:
        checks.length(name, x, size, "R")
    return np.asarray(checks.int_in_range(name, np.asarray(x), low, high))


def _first_of(places):
    """[R] bool: rows whose place no earlier row has."""
    first = np.zeros(places.size, bool)
    first[np.unique(places, return_index=True)[1]] = True
    return first


def _all(name, x, good, want, wanted=None):
    """ValueError for the first row that is not good."""
    if not np.all(good):
        i = int(np.argmin(good))
        value = "" if wanted is None else f", {wanted[i]}"
        raise ValueError(f"{name}[{i}] is {x[i]}: it must be {want}{value}")
