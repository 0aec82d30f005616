"""A small model with distinct answers, as a decoder, and what it says by dense attention."""

import functools

import numpy as np
import pytest

from jbalance import adapters
from tests.support.small_models import VOCAB, greedy_alone, make_sharp

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
