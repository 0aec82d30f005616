"""SmolLM2, loaded once a session, and a small random model."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.models import Llama, LlamaConfig, load_gguf, smollm2_path

GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="session")
def smollm2():
    """(config, model, tokenizer)"""
    return load_gguf(smollm2_path())


@pytest.fixture(scope="session")
def golden():
    with np.load(GOLDEN / "smollm2_logits.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def config():
    """Uneven sizes, so that a swapped axis cannot pass."""
    return LlamaConfig(
        vocab_size=61,
        num_layers=3,
        embed_dim=20,
        hidden_dim=28,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        max_positions=64,
    )


@pytest.fixture(scope="session")
def model(config):
    return Llama(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def tokens(config):
    return jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)


@pytest.fixture(scope="session")
def logits(model, tokens):
    return nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
