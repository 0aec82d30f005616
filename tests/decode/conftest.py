"""A small model with distinct answers, as a decoder, and what it says by dense attention."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jbalance import adapters
from tests.support.small_models import GROUPED, VOCAB, greedy_alone, make_sharp, small_llama

PROMPT = np.random.default_rng(2).integers(0, VOCAB, 300).astype(np.int32)


@pytest.fixture(scope="session")
def sharp():
    return make_sharp()


@pytest.fixture(scope="session")
def decoder(sharp):
    return adapters.decoder(sharp, sharp.attention_specs)


@pytest.fixture(scope="session")
def dense(sharp):
    """Greedy tokens after a prompt, remembered."""

    @functools.cache
    def of(prompt, steps):
        return greedy_alone(sharp, np.array(prompt, np.int32), steps)

    return lambda prompt, steps: of(tuple(np.asarray(prompt).tolist()), steps)


@pytest.fixture(scope="session")
def grouped():
    """A decoder whose weights divide into groups."""
    model = small_llama(**GROUPED, max_positions=512)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: 6 * x if x.ndim > 2 else x, state))
    return adapters.decoder(model, model.attention_specs)
