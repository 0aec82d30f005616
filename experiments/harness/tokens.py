"""Tokenizers of the experiments' own texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


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
