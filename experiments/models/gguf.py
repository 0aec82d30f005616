"""Decoders from GGUF files: sizes, weights and tokenizer all come from the one file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf.quants import dequantize
from tokenizers import Tokenizer

from experiments.models.chat import Chat
from experiments.models.config import TransformerConfig
from experiments.models.gguf_config import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    TENSOR_NAMES,
    Keys,
    read_config,
)
from experiments.models.gguf_file import TensorInfo, read_gguf
from experiments.models.gguf_tokenizer import gguf_chat, gguf_tokenizer
from experiments.models.transformer import Transformer
from experiments.models.weights import Stored, assemble, split_fused

# Types whose bytes say all of their numbers: integers would need a scale that is not in them.
READABLE = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
# Others are about the file.
READ_PARTS = ("tokenizer.", "split.", "adapter.", "general.type")
HARMLESS = {
    "tokenizer.ggml.scores",
    "tokenizer.ggml.precompiled_charsmap",
    "tokenizer.huggingface.json",
    "split.no",
    "split.tensors.count",
}


def load_gguf(
    path: str | Path, *, dtype: Any = jnp.float32, max_positions: int | None = None
) -> tuple[TransformerConfig, Transformer, Tokenizer]:
    """`load_gguf_chat` without what it takes to talk with the model."""
    return load_gguf_chat(path, dtype=dtype, max_positions=max_positions)[:3]


def load_gguf_chat(
    path: str | Path, *, dtype: Any = jnp.float32, max_positions: int | None = None
) -> tuple[TransformerConfig, Transformer, Tokenizer, Chat]:
    """Reads, de-quantises and assembles.

    Args:
      path: a GGUF file of one of the architectures in `gguf_config`.
      dtype: of the parameters.
      max_positions: the longest context; None for that of training. Rotary embeddings with long and
        short factors choose by it.

    Returns:
      (config, model, tokenizer, what it takes to talk with the model).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    where = str(path)
    fields, infos = read_gguf(Path(path))
    factors = {
        name: _factors(where, infos.pop(name))
        for name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
        if name in infos
    }
    keys = Keys(where, fields)
    tied = TENSOR_NAMES["head"] not in infos
    architecture, config = read_config(
        keys, factors, tied_embeddings=tied, max_positions=max_positions
    )
    tokenizer = gguf_tokenizer(keys, strips_right=keys.architecture == "phi3")
    chat = gguf_chat(keys, tokenizer)
    keys.none_left(functools.partial(_is_harmless, keys))
    heads = {"attn_q.": config.num_heads, "attn_k.": config.num_kv_heads}
    tensors = {
        name: _stored(where, info, heads if architecture.is_interleaved else {})
        for name, info in infos.items()
    }
    tensors = split_fused(config, tensors, TENSOR_NAMES, architecture.fused, where)
    model = assemble(config, tensors, TENSOR_NAMES, where, dtype=dtype)
    return config, model, tokenizer, chat


def _is_harmless(keys: Keys, key: str) -> bool:
    about_text = key.startswith("tokenizer.chat_template") or key.endswith(
        ("_token_id", "_token_ids")
    )
    is_about_file = not key.startswith((*READ_PARTS, keys.own("")))
    return (
        is_about_file or about_text or key in HARMLESS or key == keys.own("rope.scaling.finetuned")
    )


def _factors(where: str, info: TensorInfo) -> tuple[float, ...]:
    """Of rotary frequencies; what is not above 0 is named when they are used."""
    return tuple(np.ravel(_stored(where, info, {}).read()).tolist())


def _stored(where: str, info: TensorInfo, heads: dict[str, int]) -> Stored:
    """A tensor, in which the rows of so many heads are to be put into half-split order."""
    if info.kind.name not in READABLE:
        raise ValueError(
            f"{where}: tensor {info.name!r} has the type {info.kind.name}, which is not read here: "
            f"its bytes are no weights without a scale"
        )
    order: Callable[[np.ndarray], np.ndarray] | None = None
    for part, number in heads.items():
        if part in info.name:
            order = functools.partial(_half_split, heads=number)
    return Stored(info.shape, functools.partial(_read, info, order))


def _read(info: TensorInfo, order: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    with np.errstate(all="ignore"):  # what is not finite is named later
        rows = dequantize(info.data.reshape(*info.shape[:-1], -1), info.kind)
    array = np.asarray(rows, np.float32).reshape(info.shape)
    return array if order is None else order(array)


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads·D, E] from interleaved (2i and 2i+1 rotate together) to half-split order."""
    return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
