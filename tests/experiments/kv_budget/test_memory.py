"""The comparison of one memory for both with a memory for one of them: all arms keep to the bytes."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from experiments.kv_budget import evaluate, memory
from experiments.models import Transformer
from experiments.models.worth import decoder_of
from jbalance import decode
from tests.support.small_models import GROUPED, VOCAB, small_config

TOKENS = np.random.default_rng(0).integers(0, VOCAB, 512)


@pytest.fixture(scope="module")
def model():
    return Transformer(small_config(**GROUPED, max_positions=512), rngs=nnx.Rngs(0))


def test_all_arms_keep_to_the_bytes(model, monkeypatch):
    monkeypatch.setattr(memory, "CONTEXT", 300)
    monkeypatch.setattr(memory, "CONTINUATION", 20)
    decoder = decoder_of(model)
    losses = decode.memory_losses(decoder, TOKENS, parts=(0.25, 0.5))
    dense, sixteen = decoder.dense_bytes(320), memory.sixteen_bits(decoder)
    assert 2 * sixteen == decoder.nbytes
    context, follow = TOKENS[:300], TOKENS[300:321]
    full = evaluate.reference(model, context, follow[:-1])
    for total in list(memory.totals(decoder, losses).values())[1::2]:
        found = {arm: made() for arm, made in memory.arms(decoder, losses, total).items()}
        assert found["one price"].model.nbytes + found["one price"].cache_bytes == total
        assert found["weights alone"].model.nbytes + dense <= total
        assert found["weights alone"].cache_bytes is None
        bits = found["weights alone"].about["bits"]
        assert memory.bytes_in(losses, bits) == found["weights alone"].model.nbytes
        assert ("cache alone" in found) == (total > sixteen)
        if "cache alone" in found:
            assert sixteen + found["cache alone"].cache_bytes == total
    assert memory.kl_of(memory.Arm(decoder, None, {}), context, follow, full) < 1e-6
