"""Balanced attention in Flax models.

`attention_fn()` is what `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`
take as theirs; `balance_nnx` puts it into a model that is there already. Parameters stay as they were.
"""

from jbalance.adapters.attention_fn import PlanOf, attention_fn
from jbalance.adapters.modules import balance_nnx

__all__ = ["PlanOf", "attention_fn", "balance_nnx"]
