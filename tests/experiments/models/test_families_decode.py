"""Every family decodes within given bytes through the one engine, as the model alone where all fits."""

import numpy as np
import pytest

from jbalance import adapters, decode
from jbalance.decode import devices
from tests.support.family_checkpoints import VOCAB
from tests.support.family_decode import family_model, regrets

LENGTHS, STEPS, AMPLE = (5, 60, 200, 256), 24, 300_000
TOKENS = np.random.default_rng(1).integers(3, VOCAB, 400).astype(np.int32)
FAMILIES = (
    *("gemma2", "llama2", "llama3", "mistral", "qwen2 windows", "qwen3", "gemma3"),
    *("phi3 long", "smollm3", "mixtral window", "qwen3 experts"),
)
ROUNDING = 0.15  # deviations of the logits: 8 bits may decide between two that are nearly alike


@pytest.mark.parametrize(
    "name", [x if x == "gemma2" else pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES]
)
def test_four_lengths_at_all_and_at_a_quarter_of_the_bytes(tmp_path, name):
    """At all of the bytes its own tokens; at a quarter within the bytes; one program for each."""
    model = family_model(tmp_path, name)
    decoder = adapters.decoder(model, model.attention_specs)
    prompts = [TOKENS[:size] for size in LENGTHS]
    dense, kinds = decoder.dense_bytes(max(LENGTHS) + STEPS), len(set(decoder.windows or [None]))
    for budget in (4 * max(dense, AMPLE), dense):  # of four requests
        before = devices._attend_token._cache_size()
        assert decode.create(decoder, [budget], num_requests=4).nbytes[0] <= budget
        found = decode.generate(decoder, prompts, [budget], max_new_tokens=STEPS)
        assert [len(x) for x in found] == [STEPS] * 4
        assert devices._attend_token._cache_size() <= before + kinds
        if budget > dense:
            lost = np.array([regrets(model, p, x) for p, x in zip(prompts, found, strict=True)])
            # Rounding may choose another expert, of which an answer hangs.
            most = 2 if model.config.num_experts else 0
            assert ((lost > ROUNDING).sum(axis=1) <= most).all()
