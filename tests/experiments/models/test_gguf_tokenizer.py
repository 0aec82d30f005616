"""Tokenizers of GGUF files against their rules written out: SentencePiece's merges, cuts of text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from experiments.models.gguf_tokenizer import (
    BYTE,
    CONTROL,
    CUTS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    gguf_tokenizer,
)
from experiments.models.settings import Settings

BYTES = [f"<0x{i:02X}>" for i in range(256)]


def pieces_of(seed, letters="ab▁c", longest=5, number=60):
    """Random tokens with random scores, and a few of every type."""
    rng = np.random.default_rng(seed)
    found = {*letters}
    while len(found) < number:
        found.add("".join(rng.choice(list(letters), rng.integers(2, longest + 1))))
    normal = sorted(found)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *normal, "<tag>", "\n\n"]
    kinds = [2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(normal), *[USER_DEFINED] * 2]
    scores = rng.permutation(len(tokens)).astype(float) - len(tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores.tolist(),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def written_out(fields, text):
    """The pair of the best union first, the leftmost of equals; what no token holds as bytes."""
    index = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    kinds, scores = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.scores"]
    pieces = list(text)
    while True:
        unions = [
            (-scores[index[a + b]], at)
            for at, (a, b) in enumerate(itertools.pairwise(pieces))
            if a + b in index and kinds[index[a + b]] == NORMAL
        ]
        if not unions:
            break
        at = min(unions)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    known = [[x] if x in index else [f"<0x{b:02X}>" for b in x.encode()] for x in pieces]
    return [index[x] for group in known for x in group]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("has_prefix", [True, False])
def test_pieces_are_merged_by_score(seed, has_prefix):
    fields = pieces_of(seed) | {"tokenizer.ggml.add_space_prefix": has_prefix}
    tokenizer = gguf_tokenizer(Settings("it", fields))
    rng = np.random.default_rng(seed)
    for _ in range(100):
        text = "".join(rng.choice(list("aab c cb é"), rng.integers(1, 40)))
        prefixed = ("▁" if has_prefix else "") + text.replace(" ", "▁")
        ids = tokenizer.encode(text).ids
        assert ids == [1, *written_out(fields, prefixed)], text
        assert tokenizer.decode(ids) == text


def test_control_and_user_defined_tokens_are_cut_out_first():
    fields = pieces_of(0) | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = gguf_tokenizer(Settings("it", fields))
    index = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ids = tokenizer.encode("a<tag>\n\n\n<s>").ids
    assert ids == [1, index["a"], index["<tag>"], index["\n\n"], index["<0x0A>"], 1]
    assert tokenizer.encode("<0x0A>").ids == [1, *(index[f"<0x{b:02X}>"] for b in b"<0x0A>")]


PIECES_REFUSED = {
    "scores of others": ({"scores": [0.0]}, "tokenizer.ggml.scores in it has 1 entries for 321"),
    "whole scores": ({"scores": [1] * 321}, "a list of float"),
    "a tie": ({"scores": [0.0] * 321}, "which is merged first must be known"),
    "a byte less": (
        {"token_type": [2, 3, 3, *[BYTE] * 255, *[NORMAL] * 61, 4, 4]},
        "6 for each of the 256 bytes, as <0xFF>",
    ),
    "a token of no use": (
        {"token_type": [2, 3, UNUSED, *[BYTE] * 256, *[NORMAL] * 62]},
        "without 5",
    ),
}


@pytest.mark.parametrize("case", PIECES_REFUSED)
def test_pieces_are_checked(case):
    changes, words = PIECES_REFUSED[case]
    fields = pieces_of(0) | {f"tokenizer.ggml.{key}": x for key, x in changes.items()}
    with pytest.raises(ValueError, match=r"\S") as error:
        gguf_tokenizer(Settings("it", fields))
    assert words in str(error.value)


TEXT = "I'LL pay 12345 €, ok?\r\n\n  xÀ\tfoo_bar 3x"
CUT = {
    "gpt-2": "I|'|LL| pay| 12345| €,| ok|?|\r\n\n | xÀ|\t|foo|_|bar| 3|x",
    "smollm": "I|'|LL| pay| |1|2|3|4|5| €,| ok|?|\r\n\n | xÀ|\t|foo|_|bar| |3|x",
    "llama-bpe": "I|'LL| pay| |123|45| €,| ok|?\r\n\n| | xÀ|\tfoo|_bar| |3|x",
    "qwen2": "I|'LL| pay| |1|2|3|4|5| €,| ok|?\r\n\n| | xÀ|\tfoo|_bar| |3|x",
}


def byte_level(pre, extra=(), merges=()):
    from tokenizers import pre_tokenizers

    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] + [NORMAL] * (len(tokens) - 1),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 0,
    }


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_the_family_has_it(pre):
    tokenizer = gguf_tokenizer(Settings("it", byte_level(pre)))
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[slice(*at)] for _, at in cut] == CUT[pre].split("|")
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


def test_llama_3_takes_whole_words_and_begins_every_text():
    """A word that is a token is one, even where no merges lead to it."""
    fields = byte_level("llama-bpe", ["abc", "ab"], ["a b"])
    tokenizer = gguf_tokenizer(Settings("it", fields))
    assert tokenizer.encode("abc").tokens == ["<|end|>", "abc"]
    assert tokenizer.encode("abcd").tokens == ["<|end|>", "ab", "c", "d"]
    fields |= {"tokenizer.ggml.add_bos_token": False}
    assert gguf_tokenizer(Settings("it", fields)).encode("abc").tokens == ["abc"]
    assert gguf_tokenizer(Settings("it", byte_level("gpt-2", ["abc"]))).encode("abc").tokens == [
        *"abc"
    ]


def test_qwen_composes_characters():
    tokenizer = gguf_tokenizer(Settings("it", byte_level("qwen2")))
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids


def test_what_follows_a_control_token_of_phi_is_stripped():
    fields = byte_level("gpt-2") | {"tokenizer.ggml.bos_token_id": 1}
    plain, strips = (gguf_tokenizer(Settings("it", fields), strips_right=x) for x in (False, True))
    assert plain.encode("<|end|>\n a").tokens == ["<|end|>", "Ċ", "Ġ", "a"]
    assert strips.encode("<|end|>\n a").ids == [0, plain.token_to_id("a")]
