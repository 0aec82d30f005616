"""SmolLM2, loaded once by each process that runs tests."""

from __future__ import annotations

import pytest

from experiments.models import load_gguf, smollm2_path


@pytest.fixture(scope="session")
def smollm2():
    """(config, model, tokenizer)"""
    return load_gguf(smollm2_path())


@pytest.fixture
def loaded_once(smollm2, monkeypatch):
    """The commands get the model that is there already."""
    monkeypatch.setattr("experiments.models.load_gguf", lambda path: smollm2)
