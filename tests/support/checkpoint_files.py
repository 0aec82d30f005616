"""Writes a model as the checkpoint files that the loaders read: Hugging Face directories, GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from experiments.models import Transformer, TransformerConfig
from experiments.models.gguf_config import TENSOR_NAMES as GGUF_NAMES
from experiments.models.hf_names import TENSOR_NAMES as HF_NAMES


def hf_config(config: TransformerConfig, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
        **changes,
    }


def checkpoint_tensors(
    model: Transformer, names: dict[str, str] = HF_NAMES
) -> dict[str, np.ndarray]:
    """The model's parameters in a checkpoint's names and layout, [out, in] for matrices."""
    c, tensors = model.config, {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, array = str(path[-1]), np.asarray(variable[...])
        if path[0] != "layers":
            tensors[names[name]] = array
            continue
        for index, layer in enumerate(array):
            if layer.ndim > 1:
                inputs = c.num_heads * c.head_dim if name == "output" else layer.shape[0]
                layer = np.ascontiguousarray(layer.reshape(inputs, -1).T)
            tensors[names[name].format(index)] = layer
    return tensors


def write_hf(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    """A checkpoint directory as the Hugging Face tools write it."""
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def gguf_fields(config: TransformerConfig, **changes: Any) -> dict[str, Any]:
    """Keys and values of a GGUF file; a key that is changed to None is left out."""
    tokens = ["<|end|>", *"abcdefghij0123456789", "ab"]
    tokens += [f"unused{i}" for i in range(config.vocab_size - len(tokens))]
    fields = {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_positions,
        "llama.embedding_length": config.embed_dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.freq_base": config.rope_base,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["a b"],
    }
    return {key: value for key, value in (fields | changes).items() if value is not None}


def write_gguf(
    path: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    head_dim: int | None,
    architecture: str = "llama",
) -> Path:
    """A float32 GGUF file; q and k rows are interleaved in heads of so many features, if any."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add |= {bool: writer.add_bool}
        add.get(type(value), writer.add_array)(key, value)
    for name, array in tensors.items():
        if head_dim is not None and name.endswith(("attn_q.weight", "attn_k.weight")):
            halves = array.reshape(-1, 2, head_dim // 2, array.shape[1])
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Transformer) -> dict[str, np.ndarray]:
    return checkpoint_tensors(model, GGUF_NAMES)
