"""Marks of tests for what the oldest packages that are supported do not have; others run them."""

import inspect

import jax
import pytest
from flax import nnx

NEWER_JAX = pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="jax 0.8 does it otherwise")
NEWER_FLAX = pytest.mark.skipif(
    "num_kv_heads" not in inspect.signature(nnx.MultiHeadAttention.__init__).parameters,
    reason="nnx.MultiHeadAttention of this flax has neither num_kv_heads nor is_causal",
)
