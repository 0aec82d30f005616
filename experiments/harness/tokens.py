"""Tokenizers of the experiments' own texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_BEHIND = 16  # tokens that are read before a token for its text


def byte_level_bpe(
    texts: Iterable[str],
    vocabulary: int,
    *,
    special: Sequence[str] = (),
    lower_case: bool = False,
    prefix_space: bool = True,
) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), trained on these texts alone.

    Args:
      texts: what it is trained on.
      vocabulary: tokens, the 256 of bytes and the special ones among them.
      special: tokens that stand for no text, the first ids.
      lower_case: whether texts are turned to lower case first.
      prefix_space: whether a text's first word is one like the others, with a space before it.
    """
    tokenizer = Tokenizer(models.BPE())
    if lower_case:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pieces(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text that each token adds to those before it; a character of several tokens is the last one's.

    A token alone would lose its space with some tokenizers, so each is read behind some before it.
    """
    ids, found = [int(i) for i in ids], []
    begin, known = 0, ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[begin : i + 1], skip_special_tokens=False)
        if text.endswith("\ufffd") and i + 1 < len(ids) and i - begin < 2 * _BEHIND:
            found.append("")
            continue
        found.append(text[len(known) :])
        known = text
        if i - begin >= _BEHIND:
            begin, known = i, tokenizer.decode(ids[i : i + 1], skip_special_tokens=False)
    return found
