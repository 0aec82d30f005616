"""A prompt and a long decode in constant bytes, as the command does it."""

import numpy as np
import pytest

from experiments.kv_budget import stream


@pytest.mark.parametrize("steps", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_a_long_decode_is_reported(small_model, context, steps):
    counted = []
    result = stream.stream(
        small_model, context, memory_bytes=30_000, new_tokens=steps, step=counted.append
    )
    assert sum(counted) == steps - 1
    assert len(result["tokens"]) == steps
    assert result["largest_resident_bytes"] <= 30_000 < result["full_cache_bytes"]
    assert result["compilations"] == 1
    assert result["tokens_seen"] == len(context) + steps - 1
    assert result["recent_tokens"] < steps  # the buffer was full, and entered the arena


def test_too_few_bytes_are_named(small_model):
    with pytest.raises(ValueError, match="budget_bytes is 5000"):
        stream.stream(
            small_model, np.arange(20), memory_bytes=5000, new_tokens=2, step=lambda n: None
        )
