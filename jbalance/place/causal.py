"""Load balance of causal context parallelism: query blocks weighed by the keys that they see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.place.pack import pack
from jbalance.place.types import Placement


def visible_keys(segment_ids: ArrayLike, block_q: int) -> jax.Array:
    """How many pairs of a query and a key that it sees each block of queries has.

    Args:
      segment_ids: [T] int, the document of each token; neighbors of one id are one document.
      block_q: queries of a block; the last one may be shorter.

    Returns:
      [ceil(T / block_q)] float32: query t of a document that starts at s sees t - s + 1 keys.

    Raises:
      ValueError: no tokens, ids that are not integers, block_q below 1, or T block_q above 2^31-1,
        the most that is counted exactly.
    """
    checks.rank("segment_ids", segment_ids, 1, "[T]")
    checks.non_empty("segment_ids", segment_ids)
    block_q = checks.static_int("block_q", block_q, 1)
    ids = jnp.asarray(checks.int_in_range("segment_ids", segment_ids))
    num_tokens = ids.shape[0]
    if num_tokens * block_q > checks.INT32_MAX:
        raise ValueError(
            f"block_q is {block_q}: {num_tokens} tokens allow blocks of "
            f"{checks.INT32_MAX // num_tokens} queries"
        )
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    starts = jnp.append(True, ids[1:] != ids[:-1])
    seen = token - lax.cummax(jnp.where(starts, token, 0)) + 1
    seen = jnp.pad(seen, (0, -num_tokens % block_q))
    return jnp.sum(seen.reshape(-1, block_q), axis=1).astype(jnp.float32)


@in_32_bits
def causal_tiles(
    segment_ids: ArrayLike, num_ranks: int, block_q: int = 128, *, swaps: int = 128
) -> Placement:
    """Blocks of queries of packed causal documents to ranks, as many tokens on each.

    Zigzag, the first block and the last to one rank and so on, balances one document; of several
    the blocks are to be weighed by what they see.

    Args:
      segment_ids: [T] int, the document of each token; neighbors of one id are one document.
      num_ranks: G.
      block_q: queries of a block.
      swaps: as in `pack`.

    Returns:
      A `Placement` of the [ceil(T / block_q)] blocks, whose loads are `visible_keys`.

    Raises:
      ValueError: as `visible_keys` and `pack`.

    Reference: ring attention's zigzag and striped orders (Brandon et al., arXiv:2311.09431).
    """
    loads = visible_keys(segment_ids, block_q)
    num_ranks = checks.static_int("num_ranks", num_ranks, 1)
    return pack(loads, num_ranks, max_count=-(-np.shape(loads)[0] // num_ranks), swaps=swaps)
