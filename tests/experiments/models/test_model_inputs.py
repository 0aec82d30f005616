"""Bad inputs of the model and of greedy decoding are named before anything is computed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import greedy

IDS = np.zeros((2, 5), int)

REFUSED = {
    "one sequence without a batch axis": (IDS[0], 4, None, [r"\[B, T\]", r"\[5\]"]),
    "token outside the vocabulary": (IDS + 61, 4, None, ["61", r"\[0, 61\)"]),
    "negative token": (IDS - 1, 4, None, ["-1"]),
    "no steps": (IDS, 0, None, ["steps=0"]),
    "more than the model's positions": (IDS, 60, None, ["max_positions=64", "steps=60"]),
    "length beyond the prompt": (IDS, 4, [5, 6], ["lengths", "T=5", "6"]),
    "empty prompt": (IDS, 4, [0, 5], ["lengths", "0"]),
    "one length for two prompts": (IDS, 4, [5], ["lengths", r"\[2\]"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_greedy_refuses(model, case):
    tokens, steps, lengths, expected = REFUSED[case]
    with pytest.raises(ValueError, match=expected[0]) as error:
        greedy(model, tokens, steps, lengths=lengths)
    for words in expected[1:]:
        assert words.replace("\\", "") in str(error.value)


@pytest.mark.parametrize(
    "tokens", [jnp.zeros((2, 5)), jnp.zeros(5, int), jnp.zeros((1, 2, 3), int)]
)
def test_embed_refuses(model, tokens):
    with pytest.raises(ValueError, match=r"integers \[B, T\]"):
        model.embed(tokens)


@pytest.mark.parametrize("index", [-1, 3])
def test_layer_refuses_an_index_outside(model, index):
    with pytest.raises(ValueError, match=rf"\[0, 3\), got {index}"):
        model.layer(index)


def test_an_attention_of_the_wrong_shape_is_named(model, tokens):
    def merged_heads(q, k, v, state):
        return q.reshape(*q.shape[:2], -1), state

    with pytest.raises(ValueError, match=r"y \[B, T, H, D\] = \[2, 9, 6, 8\], got \[2, 9, 48\]"):
        model.hidden(tokens, attention=merged_heads)
