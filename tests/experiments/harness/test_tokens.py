"""The text of each token."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from experiments.harness.tokens import byte_level_bpe, pieces

TEXT = "Zoë said: 日本語 is ten tokens or more, 🙂 four bytes — and so on, and so on.\n" * 3


def metaspace():
    """Words whose space is lost where a word is decoded alone, as in SentencePiece models."""
    words = {f"▁{word}": i for i, word in enumerate(["the", "cat", "sat", "on", "mat"])}
    tokenizer = Tokenizer(models.WordLevel(words | {"?": 5}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("vocabulary", [256, 280])
def test_pieces_add_up_to_the_text(vocabulary):
    tokenizer = byte_level_bpe([TEXT], vocabulary, prefix_space=False)
    ids = tokenizer.encode(TEXT).ids
    found = pieces(tokenizer, np.array(ids))
    assert len(found) == len(ids)
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)
    assert vocabulary > 256 or {"日", "🙂"} <= set(found)


def test_words_keep_their_spaces():
    ids = [0, 1, 2, 3, 0, 4] * 10
    found = pieces(metaspace(), ids)
    assert found[:6] == ["the", " cat", " sat", " on", " the", " mat"]
    assert found[6:] == [" the", *found[1:6]] * 9


def test_a_text_that_ends_within_a_character():
    tokenizer = byte_level_bpe([TEXT], 256, prefix_space=False)
    ids = tokenizer.encode("a日").ids[:-1]
    assert pieces(tokenizer, ids) == ["a", "", "\ufffd"]
