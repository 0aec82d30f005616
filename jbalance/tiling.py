"""The grid of attention tiles: blocks of queries against blocks of keys."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jbalance import checks

BLOCK_TOKENS = 128


class Positions(NamedTuple):
    """Where the blocks of a tiling lie among the keys."""

    first_query: np.ndarray  # [I, 1]
    last_query: np.ndarray  # [I, 1]
    first_key: np.ndarray  # [J]
    last_key: np.ndarray  # [J]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Tiling:
    """Grid of attention tiles: blocks of queries against blocks of keys.

    Static: it holds no arrays and is hashable, so that a jitted function may take it as an argument and
    is compiled once for each. The last block of queries or of keys may be shorter than the others.

    Attributes:
      num_queries: T.
      num_keys: S.
      block_q: queries of a tile.
      block_k: keys of a tile.
      causal: query t sees the keys s <= t + S - T only, so that the last query sees all of them.

    Raises:
      ValueError: a size below 1.

    >>> Tiling(512, 512, block_q=64, block_k=16).num_tiles
    144
    """

    num_queries: int
    num_keys: int
    block_q: int = BLOCK_TOKENS
    block_k: int = BLOCK_TOKENS
    causal: bool = True

    def __post_init__(self) -> None:
        checks.static_fields(self, "num_queries", "num_keys", "block_q", "block_k")

    @property
    def shape(self) -> tuple[int, int]:
        """(I, J), the numbers of query blocks and of key blocks."""
        return -(-self.num_queries // self.block_q), -(-self.num_keys // self.block_k)

    @property
    def num_tiles(self) -> int:
        """How many tiles of one head are visible: a budget is a part of these."""
        return int(self.visible().sum())

    def visible(self) -> np.ndarray:
        """[I, J] bool: the tiles in which some query sees some key."""
        if not self.causal:
            return np.ones(self.shape, bool)
        blocks = self.positions()
        return blocks.first_key <= blocks.last_query

    def positions(self) -> Positions:
        """Positions among the keys, of which the last query has the last."""
        num_query_blocks, num_key_blocks = self.shape
        first = np.arange(num_query_blocks)[:, None] * self.block_q
        last = np.minimum(first + self.block_q, self.num_queries) - 1
        keys = np.arange(num_key_blocks) * self.block_k
        shift = self.num_keys - self.num_queries
        last_key = np.minimum(keys + self.block_k, self.num_keys) - 1
        return Positions(first + shift, last + shift, keys, last_key)
