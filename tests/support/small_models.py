"""One small random Llama, and a context for it."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.models import Transformer, TransformerConfig

VOCAB, SIZE = 61, 200
# All matrices divide into groups of 64 weights.
GROUPED = {"embed_dim": 64, "hidden_dim": 128, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16}


def small_config(**changes: Any) -> TransformerConfig:
    """Uneven sizes, so that a swapped axis cannot pass."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_layers": 3,
        "embed_dim": 20,
        "hidden_dim": 28,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_positions": 64,
    }
    return TransformerConfig(**sizes | changes)


def small_llama(**changes: Any) -> Transformer:
    return Transformer(small_config(**changes), rngs=nnx.Rngs(0))


def make_model() -> Transformer:
    """Three key/value heads: neither two nor four devices divide them."""
    return small_llama(num_layers=4, num_kv_heads=3, max_positions=512)


def make_context() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, SIZE).astype(np.int32)


def make_sharp() -> Transformer:
    """`make_model`, sharpened."""
    return sharpened(make_model())


def sharpened(model: Transformer) -> Transformer:
    """The model with larger weights, so that its most likely tokens differ."""
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: 12 * x if x.ndim > 2 else x, state))
    return model


def greedy_alone(model: Transformer, prompt: np.ndarray, steps: int) -> np.ndarray:
    """The most likely tokens after a prompt, by dense attention over all tokens each time."""
    size = len(prompt) + steps
    tokens = np.zeros(-(-size // 128) * 128, np.int32)
    tokens[: len(prompt)] = prompt
    for i in range(len(prompt), size):
        tokens[i] = np.argmax(_logits(model, tokens[None])[0, i - 1])
    return tokens[len(prompt) : size]


@nnx.jit
def _logits(model, tokens):
    return model(tokens)
