"""Gemma 3 270M against what transformers recorded (experiments/peers/record_families.py).

Its weights are fetched on first use; only the slow tests want them.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.harness import packages
from experiments.models import chat_prompt, greedy, load
from tests.experiments.models.conftest import GOLDEN
from tests.support.together import ROOT

RECORDED = json.loads((GOLDEN / "gemma3_continuations.json").read_text())
STEPS = 64
pytestmark = [pytest.mark.full_effort, pytest.mark.slow]


@pytest.fixture(scope="module")
def gemma():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            return load("gemma3-270m")
        except ValueError as error:
            if "could not fetch" in str(error):
                pytest.skip(str(error))
            raise


@pytest.mark.parametrize("prompt", RECORDED["prompts"], ids=lambda prompt: prompt["text"][:12])
def test_greedy_continuation_is_identical(gemma, prompt):
    ids = np.asarray(prompt["tokens"])
    size = -(-len(ids) // 256) * 256 if len(ids) > 64 else 64
    tokens = np.pad(ids, (0, size - len(ids)))[None]
    got = greedy(gemma.model, tokens, STEPS, lengths=[len(ids)])[0]
    np.testing.assert_array_equal(got, prompt["continuation"])


@pytest.mark.parametrize("prompt", RECORDED["prompts"], ids=lambda prompt: prompt["text"][:12])
def test_prompt_tokens(gemma, prompt):
    assert gemma.tokenizer.encode(prompt["text"]).ids == prompt["tokens"]


@pytest.mark.parametrize("text", RECORDED["strings"])
def test_tokenizer(gemma, text):
    ids = RECORDED["strings"][text]
    assert gemma.tokenizer.encode(text).ids == ids
    decoded = gemma.tokenizer.decode(ids[1:], skip_special_tokens=False)
    assert decoded == text.replace("▁", " ")  # which SentencePiece writes for a space


def test_it_is_what_its_file_says(gemma):
    specs = gemma.model.attention_specs
    assert [spec.window for spec in specs] == [None if i % 6 == 5 else 512 for i in range(18)]
    assert specs[0].frequencies[-1] > specs[5].frequencies[-1]
    assert {gemma.tokenizer.id_to_token(i) for i in gemma.chat.end_ids} == {
        "<eos>",
        "<end_of_turn>",
    }
    assert gemma.chat.template is None
    begin, *others = chat_prompt(gemma.chat, "Is <eos> a token?", "A text.")
    assert begin == gemma.tokenizer.token_to_id("<bos>")
    assert not set(others) & set(gemma.chat.end_ids)
    assert gemma.tokenizer.decode(others) == "A text.\n\nIs <eos> a token?"


def test_the_file_is_kept_whole(gemma):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert gemma.where.parent == packages.CACHE
        assert gemma.where.stat().st_size == 253_113_024
