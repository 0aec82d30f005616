"""SmolLM2, loaded once by each process that runs tests."""

from __future__ import annotations

import pytest

from experiments.models import load


@pytest.fixture(scope="session")
def smollm2_loaded():
    """SmolLM2 with its tokenizer and chat template."""
    return load("smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_loaded):
    """(config, model, tokenizer)"""
    found = smollm2_loaded
    return found.config, found.model, found.tokenizer


@pytest.fixture
def loaded_once(smollm2_loaded, monkeypatch):
    """The commands get the model that is there already."""
    monkeypatch.setattr("experiments.models.options.loaded", lambda options: smollm2_loaded)
