"""What transformers recorded of SmolLM2, and a small random model."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tests.support.small_models import small_config, small_llama

GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="session")
def golden():
    with np.load(GOLDEN / "smollm2_logits.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def config():
    return small_config()


@pytest.fixture(scope="session")
def model():
    return small_llama()


@pytest.fixture(scope="session")
def tokens(config):
    return jax.random.randint(jax.random.key(1), (2, 9), 0, config.vocab_size)


@pytest.fixture(scope="session")
def logits(model, tokens):
    return nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
