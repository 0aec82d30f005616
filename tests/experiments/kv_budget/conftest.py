"""A small random model, and one context measured on it."""

from __future__ import annotations

import jax
import pytest

from experiments.kv_budget import measure
from experiments.kv_budget.policies import POLICIES
from tests.support.small_models import make_context, make_model

SCORERS = tuple({p.scorer for name, p in POLICIES.items() if ":" not in name})


@pytest.fixture(scope="session")
def small_model():
    return make_model()


@pytest.fixture(scope="session")
def context():
    return make_context()


@pytest.fixture(scope="session")
def measured(small_model, context):
    return jax.block_until_ready(measure.prefill(small_model, context, SCORERS))
