"""Llama models from a Hugging Face directory on disk: one safetensors file or shards."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

from experiments.models.llama import Llama, LlamaConfig
from experiments.models.rotary import RopeScaling
from experiments.models.weights import assemble

TENSOR_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "output": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
# Key of config.json -> the only value that is implemented, which is also its default.
FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "quantization_config": None,
}


def load_hf_directory(
    directory: str | Path, *, dtype: Any = jnp.float32
) -> tuple[LlamaConfig, Llama, Tokenizer | None]:
    """Reads and assembles.

    Args:
      directory: holds config.json, and model.safetensors or shards with an index; tokenizer.json if
        there is one.
      dtype: of the parameters, whatever the file's.

    Returns:
      (config, model, tokenizer), the tokenizer None where the directory has no tokenizer.json.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {directory}")
    config = _config(json.loads((directory / "config.json").read_text()))
    file_of = _files(directory)
    with contextlib.ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(directory / file, framework="numpy"))
            for file in sorted(set(file_of.values()))
        }
        held = {file: set(handle.keys()) for file, handle in opened.items()}
        present = {name for name, file in file_of.items() if name in held[file]}
        # Some writers store a buffer, or a copy of the tied embedding; neither is a weight.
        unused = {name for name in present if name.endswith("rotary_emb.inv_freq")}
        unused |= {TENSOR_NAMES["head"]} if config.tied_embeddings else set()

        def read(name: str) -> np.ndarray:
            return opened[file_of[name]].get_tensor(name)

        model = assemble(config, read, present - unused, TENSOR_NAMES, dtype=dtype)
    file = directory / "tokenizer.json"
    return config, model, Tokenizer.from_file(str(file)) if file.is_file() else None


def _files(directory: Path) -> dict[str, str]:
    """Tensor name -> the file that holds it."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        for file in sorted(set(file_of.values())):
            if not (directory / file).is_file():
                raise ValueError(
                    f"{index.name} names the shard {file!r}, which is not in {directory}"
                )
        return file_of
    if not single.is_file():
        raise FileNotFoundError(f"neither {single.name} nor {index.name} in {directory}")
    with safe_open(single, framework="numpy") as file:
        return dict.fromkeys(file.keys(), single.name)


def _config(raw: dict[str, Any]) -> LlamaConfig:
    for key, supported in {"model_type": "llama", **FIXED}.items():
        value = raw.get(key, FIXED.get(key))
        if value != supported:
            raise ValueError(
                f"unsupported {key}={value!r} in config.json: only {supported!r} is implemented"
            )
    heads, embed_dim = _required(raw, "num_attention_heads"), _required(raw, "hidden_size")
    # Newer writers gather the rotary settings here, older ones in rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or {}
    return LlamaConfig(
        vocab_size=_required(raw, "vocab_size"),
        num_layers=_required(raw, "num_hidden_layers"),
        embed_dim=embed_dim,
        hidden_dim=_required(raw, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or embed_dim // heads,
        rope_base=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_positions=raw.get("max_position_embeddings", 2048),
        rope_scaling=_rope_scaling(rope or raw.get("rope_scaling") or {}),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(_required(rope, "factor")))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(_required(rope, "factor")),
            float(_required(rope, "low_freq_factor")),
            float(_required(rope, "high_freq_factor")),
            int(_required(rope, "original_max_position_embeddings")),
        )
    raise ValueError(
        f"unsupported rope_scaling rope_type={kind!r} in config.json: "
        "'default', 'linear' and 'llama3' are implemented"
    )


def _required(raw: dict[str, Any], key: str) -> Any:
    if key not in raw:
        raise ValueError(f"config.json lacks {key!r}, which a Llama model needs")
    return raw[key]
