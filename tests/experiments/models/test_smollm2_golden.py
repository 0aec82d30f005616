"""SmolLM2 against what transformers recorded (experiments/peers/record_logits.py)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import greedy

GOLDEN = Path(__file__).resolve().parent / "golden"
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())["prompts"]
TOKENS = json.loads((GOLDEN / "smollm2_tokens.json").read_text())
STEPS = 64
# One compiled program for the short prompts, one for the long one.
PADDED_TOKENS = {name: 336 if name == "long" else 48 for name in PROMPTS}
pytestmark = pytest.mark.full_effort  # as recorded; and these programs run longer than they compile


@nnx.jit
def continuation_logprobs(model, tokens, start):
    """Log-probabilities [STEPS, V] of the tokens after position `start`, by one full forward."""
    h, _ = model.hidden(tokens)
    h = jax.lax.dynamic_slice_in_dim(h, start, STEPS, axis=1)
    return jax.nn.log_softmax(model.logits(h)[0])


def padded(ids, size):
    return np.pad(ids, (0, size - len(ids)))


@pytest.fixture(scope="module")
def continuations(smollm2, golden):
    """Prompts of one padded size go through greedy decoding as one batch."""
    found = {}
    for size in set(PADDED_TOKENS.values()):
        names = [name for name in PROMPTS if PADDED_TOKENS[name] == size]
        prompts = [golden[f"{name}.prompt"] for name in names]
        tokens = np.stack([padded(prompt, size) for prompt in prompts])
        lengths = [len(prompt) for prompt in prompts]
        found |= zip(names, greedy(smollm2[1], tokens, STEPS, lengths=lengths), strict=True)
    return found


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_continuation_is_identical(continuations, golden, name):
    np.testing.assert_array_equal(continuations[name], golden[f"{name}.continuation"])


@pytest.mark.parametrize("name", PROMPTS)
def test_logprobs_are_close(smollm2, golden, name):
    _, model, _ = smollm2
    prompt = golden[f"{name}.prompt"]
    ids = np.concatenate([prompt, golden[f"{name}.continuation"]])
    tokens = padded(ids, PADDED_TOKENS[name] + STEPS)[None]
    logprobs = continuation_logprobs(model, tokens, len(prompt) - 1)
    top = jnp.take_along_axis(logprobs, golden[f"{name}.top_ids"], axis=-1)
    np.testing.assert_allclose(top, golden[f"{name}.top_logprobs"], rtol=0, atol=2e-3)
    fixed = logprobs[:, golden["fixed_ids"]]
    np.testing.assert_allclose(fixed, golden[f"{name}.fixed_logprobs"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_tokens(smollm2, golden, name):
    assert smollm2[2].encode(PROMPTS[name]).ids == golden[f"{name}.prompt"].tolist()


@pytest.mark.parametrize("text", TOKENS)
def test_tokenizer(smollm2, text):
    tokenizer = smollm2[2]
    assert tokenizer.encode(text).ids == TOKENS[text]
    assert tokenizer.decode(TOKENS[text], skip_special_tokens=False) == text


@pytest.mark.parametrize("numeral", ["7", "½", "٣", "Ⅷ"])
def test_every_numeral_stands_alone(smollm2, numeral):
    """Also those outside ASCII, where transformers' conversion of GGUF leaves the split out."""
    tokenizer = smollm2[2]
    alone = [i for text in (" ", numeral, numeral, "x") for i in tokenizer.encode(text).ids]
    assert tokenizer.encode(f" {numeral}{numeral}x").ids == alone


def test_special_tokens_are_dropped_on_request(smollm2):
    tokenizer = smollm2[2]
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "user\nhi"
