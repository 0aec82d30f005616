"""A small random model and a context for it."""

import numpy as np
from flax import nnx

from experiments.models import Llama, LlamaConfig

SIZE = 200


def make_model() -> Llama:
    config = LlamaConfig(
        vocab_size=61,
        num_layers=4,
        embed_dim=20,
        hidden_dim=28,
        num_heads=6,
        num_kv_heads=3,
        head_dim=8,
        max_positions=512,
    )
    return Llama(config, rngs=nnx.Rngs(0))


def make_context() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 61, SIZE).astype(np.int32)
