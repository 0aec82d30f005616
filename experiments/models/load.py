"""One loader of models: a GGUF file, a Hugging Face directory, or a model that a package carries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tokenizers import Tokenizer

from experiments.models import gguf, packaged, safetensors
from experiments.models.chat import Chat
from experiments.models.config import TransformerConfig
from experiments.models.hf_tokenizer import hf_chat, read_tokenizer
from experiments.models.transformer import Transformer

PACKAGED = {"smollm2": packaged.smollm2_path, "gemma3-270m": packaged.gemma3_path}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what it takes to use it.

    Attributes:
      where: the file or directory.
      config: sizes and options.
      model: the decoder.
      tokenizer: of its texts; None where a directory has none.
      chat: its template, and the tokens that end a turn; None without a tokenizer.
    """

    where: Path
    config: TransformerConfig
    model: Transformer
    tokenizer: Tokenizer | None
    chat: Chat | None

    @property
    def spoken(self) -> Chat:
        """Its chat, with its tokenizer.

        Raises:
          ValueError: it has none.
        """
        if self.chat is None:
            raise ValueError(f"{self.where} has no tokenizer: give one with --tokenizer")
        return self.chat


def load(
    source: str | Path,
    *,
    dtype: Any = jnp.float32,
    max_positions: int | None = None,
    tokenizer: str | Path | None = None,
) -> Loaded:
    """Reads a model from the disk.

    Args:
      source: a GGUF file, a directory with config.json, or a name in `PACKAGED`.
      dtype: of the parameters.
      max_positions: the longest context; None for that of training. More is asked for here or refused;
        rotary embeddings of the kinds "dynamic" and "longrope" choose their frequencies by it.
      tokenizer: a tokenizer.json or a directory with one, in the place of the model's own.

    Raises:
      ValueError: there is no such model, or it is damaged, or computes what is not implemented: the
        message names the file and the field.
    """
    path = Path(source)
    if not path.exists():
        if str(source) not in PACKAGED:
            raise ValueError(
                f"there is no model {str(source)!r}: give a GGUF file, a directory with config.json "
                f"and safetensors, or one of {', '.join(PACKAGED)}"
            )
        path = PACKAGED[str(source)]()
    if max_positions is not None and max_positions < 1:
        raise ValueError(f"max_positions is {max_positions}: at least 1")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"no config.json in {path}: it is no directory of a model")
        config, model, own = safetensors.load_hf_directory(
            path, dtype=dtype, max_positions=max_positions
        )
        chat = None if own is None else hf_chat(path, own, config.vocab_size)
        found = Loaded(path, config, model, own, chat)
    else:
        parts = gguf.load_gguf_chat(path, dtype=dtype, max_positions=max_positions)
        found = Loaded(path, *parts)
    return found if tokenizer is None else _with_tokenizer(found, Path(tokenizer))


def _with_tokenizer(found: Loaded, path: Path) -> Loaded:
    """The model with another's tokenizer and chat template."""
    directory, vocab_size = path if path.is_dir() else path.parent, found.config.vocab_size
    own = None
    if path.is_dir() or path.name == "tokenizer.json":
        own = read_tokenizer(directory, vocab_size)
    if own is None:
        raise ValueError(
            f"there is no tokenizer at {str(path)!r}: give a tokenizer.json, or a directory with one"
        )
    chat = hf_chat(directory, own, vocab_size)
    return dataclasses.replace(found, tokenizer=own, chat=chat)
