"""A Hugging Face directory's tokenizer; what its package would panic over is found first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from experiments.harness import files
from experiments.models.chat import Chat, end_ids
from experiments.models.settings import Settings, json_object


def read_tokenizer(directory: Path, vocab_size: int) -> Tokenizer | None:
    """That of tokenizer.json, which must be whole and agree with tokenizer_config.json.

    Args:
      directory: of the checkpoint.
      vocab_size: of the model, whose ids are 0..vocab_size-1.

    Returns:
      The tokenizer, None if there is no file.

    Raises:
      ValueError: that names the file and the field.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    raw = json_object(path)
    added = raw.get("added_tokens")
    if isinstance(added, list):
        raw["added_tokens"] = [x for x in added if not _is_of_images(x, vocab_size)]
    _check(path, raw, vocab_size)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(raw))
    except BaseException as error:  # a panic of the package is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{path} is no tokenizer: {error}") from None
    tokenizer.no_truncation()  # of a caller long ago
    tokenizer.no_padding()
    _check_ends(directory / "tokenizer_config.json", tokenizer)
    return tokenizer


def _is_of_images(token: Any, vocab_size: int) -> bool:
    """Whether it is Gemma 3's token of images, which is behind the vocabulary of its models of text."""
    return (
        isinstance(token, dict)
        and token.get("content") == "<image_soft_token>"
        and token.get("id") == vocab_size
    )


def hf_chat(directory: Path, tokenizer: Tokenizer, vocab_size: int) -> Chat:
    """Chat template, and the tokens that end a turn.

    Args:
      directory: of the checkpoint; tokenizer_config.json, chat_template.jinja and generation_config.json
        are read where they are there.
      tokenizer: of its texts.
      vocab_size: of the model.

    Raises:
      ValueError: that names the file and the key.
    """
    about = _optional(directory / "tokenizer_config.json")
    tokens = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        named = about.values.get(key)
        named = named.get("content") if isinstance(named, dict) else named
        if named is not None:
            if type(named) is not str:
                raise about.wrong(key, "a token")
            tokens[key] = named
    written = directory / "chat_template.jinja"
    if written.is_file():
        try:
            template: str | None = files.decoded(files.read_bytes(written))
        except UnicodeDecodeError as error:
            raise ValueError(f"{written} is no UTF-8 text: {error}") from None
        template = None if template is None else template.lstrip("\ufeff")
    else:
        template = _template(about)
    ends = [tokenizer.token_to_id(tokens["eos_token"])] if "eos_token" in tokens else []
    for file in ("generation_config.json", "config.json"):
        settings = _optional(directory / file)
        value = settings.values.get("eos_token_id")
        several = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in several):
            raise settings.wrong("eos_token_id", f"ids in 0..{vocab_size - 1}")
        ends += several
    return Chat(
        where=str(directory),
        tokenizer=tokenizer,
        template=template,
        tokens=tokens,
        end_ids=end_ids(tokenizer, [i for i in ends if i is not None]),
    )


def _template(about: Settings) -> str | None:
    """The one, or that of the name "default"."""
    value = about.values.get("chat_template")
    if isinstance(value, list):
        named = {x.get("name"): x.get("template") for x in value if isinstance(x, dict)}
        value = named.get("default")
    if value is not None and type(value) is not str:
        raise about.wrong("chat_template", "text, or a list of names and templates")
    return value


def _optional(path: Path) -> Settings:
    return Settings(str(path), json_object(path) if path.is_file() else {})


def _check(path: Path, raw: dict[str, Any], vocab_size: int) -> None:
    """Tokens and ids, and the merges of a BPE model."""
    model = raw.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path} is no tokenizer: model is {model!r}, it must be an object")
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # of a unigram model: [token, score] by id
        named = [
            (pair[0] if isinstance(pair, list) and pair else pair, i)
            for i, pair in enumerate(vocab)
        ]
    elif isinstance(vocab, dict):
        named = list(vocab.items())
    else:
        raise ValueError(f"{path} is no tokenizer: model.vocab must be tokens and their ids")
    for token, index in named:
        _check_token(f"{path}: model.vocab", token, index, vocab_size)
    ids = [index for _, index in named]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: model.vocab gives one id to several tokens")
    added = raw.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{path}: added_tokens must be a list of objects")
    for token in added:
        _check_token(f"{path}: added_tokens", token.get("content"), token.get("id"), vocab_size)
    if model.get("type", "BPE") == "BPE":
        _check_merges(f"{path}: model.merges", model, {token for token, _ in named})


def _check_token(where: str, token: Any, index: Any, vocab_size: int) -> None:
    if not isinstance(token, str) or type(index) is not int or not 0 <= index < vocab_size:
        raise ValueError(
            f"{where} has the token {token!r} with the id {index!r}: it must be text, and an id in "
            f"0..{vocab_size - 1}"
        )


def _check_merges(where: str, model: dict[str, Any], vocabulary: set[str]) -> None:
    """Each of two tokens whose union is a token."""
    prefix = model.get("continuing_subword_prefix") or ""
    merges = model.get("merges", [])
    if not isinstance(merges, list) or not isinstance(prefix, str):
        raise ValueError(f"{where} must be a list, and continuing_subword_prefix text")
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        whole = isinstance(parts, list) and [type(x) for x in parts] == [str, str]
        if not whole or not {*parts, parts[0] + parts[1].removeprefix(prefix)} <= vocabulary:
            raise ValueError(
                f"{where}[{i}] is {merge!r}: it must be two tokens whose union is a token"
            )


def _check_ends(path: Path, tokenizer: Tokenizer) -> None:
    """Refuses tokens at the beginning or end of texts that the tokenizer itself does not put there."""
    if not path.is_file():
        return
    settings = Settings(str(path), json_object(path))
    added = tokenizer.encode("").tokens
    for key, token, at in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
        named = settings.values.get(token)
        named = named.get("content") if isinstance(named, dict) else named
        is_added = bool(added) and added[at] == named
        if settings.has(key) and settings.flag(key, False) != is_added:
            raise ValueError(
                f"{key}={settings.values[key]} in {path}: tokenizer.json "
                f"{'adds' if is_added else 'does not add'} the {token} {named!r}"
            )
