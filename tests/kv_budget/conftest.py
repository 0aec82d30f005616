"""A small random model, and one context measured on it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.kv_budget import measure
from experiments.models import Llama, LlamaConfig, load_gguf, smollm2_path

SIZE = 200


@pytest.fixture(scope="session")
def smollm2():
    return load_gguf(smollm2_path())


@pytest.fixture
def loaded_once(smollm2, monkeypatch):
    """The commands get the model that is there already."""
    monkeypatch.setattr("experiments.models.load_gguf", lambda path: smollm2)


@pytest.fixture(scope="session")
def small_model():
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


@pytest.fixture(scope="session")
def context():
    return np.random.default_rng(0).integers(0, 61, SIZE).astype(np.int32)


@pytest.fixture(scope="session")
def measured(small_model, context):
    return jax.block_until_ready(measure.prefill(small_model, context))
