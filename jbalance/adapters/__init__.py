"""Balanced attention in Flax models.

`attention_fn()` is what `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`
take as theirs; `set_attention_fn` puts it into a model that is there already. `NnxBalance` and, for
linen, `LinenBalancedAttention` with a `TileBalancer` move a budget of tiles between the layers while the
model trains. Parameters stay as they were.
"""

from jbalance.adapters.attention_fn import PlanOf, attention_fn
from jbalance.adapters.backend import AttentionBackend, CachePool
from jbalance.adapters.decoder import decoder
from jbalance.adapters.decoding import LinenCachedAttention, NnxCache
from jbalance.adapters.forward import forward
from jbalance.adapters.forward_batch import BatchMetadata, ForwardBatch
from jbalance.adapters.modules import (
    BalancedAttention,
    BalanceVariable,
    LinenBalancedAttention,
    NnxBalance,
    budgets_of,
    set_attention_fn,
)
from jbalance.adapters.patch import patch_dot_product_attention
from jbalance.adapters.prune import head_gradients, heads_to_keep, prune_heads
from jbalance.adapters.serve import serialize
from jbalance.adapters.tile_budget import Tiles, attend_within
from jbalance.adapters.track import track
from jbalance.attention import TileBalancer, TileBudget

__all__ = [  # noqa: RUF022  (from one call to a model that adapts)
    "PlanOf",
    "attention_fn",
    "set_attention_fn",
    "patch_dot_product_attention",
    # a budget of tiles
    "Tiles",
    "TileBudget",
    "TileBalancer",
    "attend_within",
    "BalanceVariable",
    "BalancedAttention",
    "LinenBalancedAttention",
    "NnxBalance",
    "budgets_of",
    "track",
    # decoding over a cache of fixed bytes
    "decoder",
    "forward",
    "NnxCache",
    "LinenCachedAttention",
    # a serving engine's attention
    "AttentionBackend",
    "CachePool",
    "ForwardBatch",
    "BatchMetadata",
    # heads that leave
    "head_gradients",
    "heads_to_keep",
    "prune_heads",
    # elsewhere
    "serialize",
]
