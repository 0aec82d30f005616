"""The tokenizer in a GGUF file's keys: byte-level BPE, or SentencePiece's BPE by scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from experiments.models.chat import Chat, end_ids
from experiments.models.settings import Settings

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"
# How Llama 3 and Qwen2 cut text: contractions, words, numbers of so many digits, signs, line ends,
# spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How text is cut before byte-level BPE.

    Attributes:
      steps: pre-tokenizers, the last of which writes bytes as characters.
      takes_whole: whether a piece that is a token is one, whatever the merges.
      adds_bos: where the file does not say.
      is_composed: whether text is normalized (NFC) first.
    """

    steps: tuple[Any, ...]
    takes_whole: bool = False
    adds_bos: bool = False
    is_composed: bool = False


def _cut(pattern: str) -> tuple[Any, ...]:
    return (
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "smollm": Cut((pre_tokenizers.Digits(individual_digits=True), _GPT2)),
    "gpt-2": Cut((_GPT2,)),
    "llama-bpe": Cut(_cut(_WORDS % "{1,3}"), takes_whole=True, adds_bos=True),
    "qwen2": Cut(_cut(_WORDS % ""), is_composed=True),
}


def gguf_tokenizer(fields: Settings, *, strips_right: bool = False) -> Tokenizer:
    """That of the file's vocabulary.

    Args:
      fields: the file's keys.
      strips_right: whether spaces and line ends after a control token belong to it.

    Raises:
      ValueError: that names the key.
    """
    fields.only("tokenizer.ggml.model", "gpt2", "llama")
    is_pieces = fields.has("tokenizer.ggml.model") and (
        fields.get("tokenizer.ggml.model") == "llama"
    )
    tokens, kinds = _vocabulary(fields, is_pieces)
    tokenizer, adds_bos = (_pieces if is_pieces else _byte_level)(fields, tokens, kinds)
    begin = "tokenizer.ggml.bos_token_id"
    keeps = {tokens[fields.whole(begin, 0, len(tokens) - 1)]} if fields.has(begin) else set()
    keeps |= {"<unk>", "<|endoftext|>"}
    tokenizer.add_special_tokens(
        [
            AddedToken(
                token, special=True, normalized=False, rstrip=strips_right and token not in keeps
            )
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == USER_DEFINED
        ]
    )
    around = {
        name: fields.flag(f"tokenizer.ggml.add_{name}_token", adds_bos and name == "bos")
        for name in ("bos", "eos")
    }
    if any(around.values()):
        tokenizer.post_processor = _around(fields, tokens, around)
    return tokenizer


def gguf_chat(fields: Settings, tokenizer: Tokenizer) -> Chat:
    """Chat template, and the tokens that end a turn.

    Raises:
      ValueError: that names the key.
    """
    template = "tokenizer.chat_template"
    tokens = fields.several("tokenizer.ggml.tokens", str)
    index = {
        name: fields.whole(f"tokenizer.ggml.{name}_token_id", 0, len(tokens) - 1)
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
        if fields.has(f"tokenizer.ggml.{name}_token_id")
    }
    called = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    return Chat(
        where=fields.where,
        tokenizer=tokenizer,
        template=fields.text(template) if fields.has(template) else None,
        tokens={f"{called[name]}_token": tokens[i] for name, i in index.items() if name in called},
        end_ids=end_ids(tokenizer, [i for x, i in index.items() if x in ("eos", "eot", "eom")]),
    )


def _byte_level(fields: Settings, tokens: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    """(BPE over bytes, whether texts begin with a token where the file does not say)."""
    del kinds
    fields.only("tokenizer.ggml.pre", *CUTS)
    fields.only("tokenizer.ggml.add_space_prefix", False)
    cut = CUTS[fields.get("tokenizer.ggml.pre", next(iter(CUTS)))]
    merges = _merges(fields, set(tokens))
    tokenizer = Tokenizer(_bpe(fields, tokens, merges, ignore_merges=cut.takes_whole))
    if cut.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(cut.steps))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.adds_bos


def _pieces(fields: Settings, tokens: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    """SentencePiece's BPE: the pair whose union has the highest score is merged first.

    As ranks of pairs this is ordinary BPE. What no token holds becomes bytes.
    """
    fields.has("tokenizer.ggml.pre")  # of byte-level BPE
    missing = {f"<0x{i:02X}>" for i in range(256)} - {
        token for token, kind in zip(tokens, kinds, strict=True) if kind == BYTE
    }
    if missing:
        raise fields.wrong(
            "tokenizer.ggml.token_type", f"{BYTE} for each of the 256 bytes, as {min(missing)}"
        )
    if UNUSED in kinds:
        raise fields.wrong("tokenizer.ggml.token_type", f"without {UNUSED}, tokens of no use")
    merges = _merges_by_score(fields, tokens, kinds)
    model = _bpe(fields, tokens, merges, byte_fallback=True, fuse_unk=True, unk_token=None)
    tokenizer = Tokenizer(model)
    has_prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    after: list[Any] = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer, True


def _merges_by_score(
    fields: Settings, tokens: list[str], kinds: list[int]
) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is one, the union of the highest score first."""
    scores = fields.several("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.scores in {fields.where} has {len(scores)} entries for {len(tokens)} "
            f"tokens"
        )
    score_of = {
        token: score
        for token, kind, score in zip(tokens, kinds, scores, strict=True)
        if kind == NORMAL
    }
    merged = [
        (score, token[:at], token[at:])
        for token, score in score_of.items()
        for at in range(1, len(token))
        if token[:at] in score_of and token[at:] in score_of
    ]
    owner: dict[float, str] = {}
    for score, left, right in merged:
        if owner.setdefault(score, left + right) != left + right:
            raise ValueError(
                f"tokenizer.ggml.scores in {fields.where} gives {score} to {owner[score]!r} and "
                f"{left + right!r}: which is merged first must be known"
            )
    merged.sort(key=lambda merge: (-merge[0], len(merge[1])))
    return [(left, right) for _, left, right in merged]


def _bpe(
    fields: Settings, tokens: list[str], merges: list[tuple[str, str]], **options: Any
) -> models.BPE:
    try:
        return models.BPE({token: i for i, token in enumerate(tokens)}, merges, **options)
    except Exception as error:  # the package's errors have no other type
        raise ValueError(f"tokenizer.ggml.merges in {fields.where}: {error}") from None


def _vocabulary(fields: Settings, is_pieces: bool) -> tuple[list[str], list[int]]:
    """Tokens and their types, checked."""
    tokens = fields.several("tokenizer.ggml.tokens", str)
    kinds = fields.several("tokenizer.ggml.token_type", int)
    where = f"in {fields.where}"
    if len(kinds) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.token_type {where} has {len(kinds)} entries for {len(tokens)} tokens"
        )
    alphabet, seen = set(pre_tokenizers.ByteLevel.alphabet()), set[str]()
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if not NORMAL <= kind <= BYTE:
            raise ValueError(f"tokenizer.ggml.token_type[{i}]={kind} {where}: {NORMAL} to {BYTE}")
        is_written = is_pieces or kind != NORMAL or set(token) <= alphabet
        if not token or token in seen or not is_written:
            raise ValueError(
                f"tokenizer.ggml.tokens[{i}]={token!r} {where}: every token must be there once, and of "
                f"the characters that stand for bytes"
            )
        seen.add(token)
    return tokens, kinds


def _merges(fields: Settings, vocabulary: set[str]) -> list[tuple[str, str]]:
    """Pairs of tokens, the first merged first."""
    merges, seen = [], set[str]()
    for i, merge in enumerate(fields.several("tokenizer.ggml.merges", str)):
        parts = merge.split(" ")
        if len(parts) != 2 or merge in seen or not {*parts, "".join(parts)} <= vocabulary:
            raise ValueError(
                f"tokenizer.ggml.merges[{i}]={merge!r} in {fields.where}: it must be two tokens and a "
                f"space between them, whose union is a token, once"
            )
        seen.add(merge)
        merges.append((parts[0], parts[1]))
    return merges


def _around(fields: Settings, tokens: Sequence[str], around: dict[str, bool]) -> Any:
    """What begins and ends every text."""
    known = []
    for name in (name for name, is_added in around.items() if is_added):
        index = fields.whole(f"tokenizer.ggml.{name}_token_id", 0, len(tokens) - 1)
        known.append({"id": name, "ids": [index], "tokens": [tokens[index]]})
    single, pair = (
        [*(["bos"] if around["bos"] else []), text, *(["eos"] if around["eos"] else [])]
        for text in ("$A", "$B:1")
    )
    return processors.TemplateProcessing(single=single, pair=single + pair, special_tokens=known)
