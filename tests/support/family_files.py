"""The checkpoints of `family_checkpoints` as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support import family_checkpoints
from tests.support.checkpoint_files import write_gguf, write_hf

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_family(directory: Path, name: str) -> Path:
    """A Hugging Face directory, in the case's shards and type."""
    made = family_checkpoints.CASES[name]
    tensors = family_checkpoints.tensors_of(name)
    stored = {key: array.astype(STORED[made.stored]) for key, array in tensors.items()}
    for key, array in stored.items():
        np.testing.assert_array_equal(array.astype(np.float32), tensors[key], err_msg=key)
    return write_hf(directory, made.config, stored, made.shards)


ARCHITECTURES = {
    "llama2": "llama",
    "llama3": "llama",
    "llama linear": "llama",
    "mistral without window": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "phi3 long": "phi3",
    "phi3 short": "phi3",
}
# In the order of the Hugging Face names' parts; Gemma's norms are named otherwise.
PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, is_gemma: bool) -> str:
    for part, other in PARTS.items():
        name = name.replace(part, other)
    return name.replace(
        "post_attention_layernorm", "post_attention_norm" if is_gemma else "ffn_norm"
    )


def family_fields(name: str) -> dict[str, Any]:
    """Keys and values of the case's GGUF file."""
    config, kind = family_checkpoints.CASES[name].config, ARCHITECTURES[name]
    tokens = [*"abcdefghij0123456789", "ab"]
    tokens = ["<|end|>", *tokens, *(f"unused{i}" for i in range(config["vocab_size"] - 22))]
    fields: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.freq_base": config["rope_theta"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    optional = {
        "attention.sliding_window": config.get("sliding_window"),
        "attention.sliding_window_pattern": config.get("sliding_window_pattern"),
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "rope.freq_base_swa": config.get("rope_local_base_freq"),
    }
    scaling = config.get("rope_scaling") or {}
    if "linear" in scaling.values():
        optional |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    if "longrope" in scaling.values():
        optional["rope.scaling.original_context_length"] = config[
            "original_max_position_embeddings"
        ]
    if "partial_rotary_factor" in config:
        rotated = int(config["head_dim"] * config["partial_rotary_factor"])
        optional["rope.dimension_count"] = rotated
    fields |= {key: value for key, value in optional.items() if value is not None}
    return {f"{kind}.{key}": value for key, value in fields.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["a b"],
    }


def family_gguf_tensors(name: str) -> dict[str, np.ndarray]:
    """As the format has them: Gemma's norms with their 1, factors of rotary frequencies as tensors."""
    config, kind = family_checkpoints.CASES[name].config, ARCHITECTURES[name]
    is_gemma, out = kind.startswith("gemma"), {}
    for key, array in family_checkpoints.tensors_of(name).items():
        is_norm = key.endswith("norm.weight")
        out[gguf_name(key, is_gemma)] = array + np.float32(is_gemma and is_norm)
    scaling = config.get("rope_scaling") or {}
    if "llama3" in scaling.values():
        out["rope_freqs.weight"] = llama3_divisors(config)
    for length in ("long", "short"):
        if f"{length}_factor" in scaling:
            factors = np.asarray(scaling[f"{length}_factor"], np.float32)
            out[f"rope_factors_{length}.weight"] = factors
    return out


def llama3_divisors(config: dict[str, Any]) -> np.ndarray:
    """What Llama 3.1 divides each frequency by: 1 for short waves, the factor for long ones."""
    scaling, divisors = config["rope_scaling"], []
    original = scaling["original_max_position_embeddings"]
    for i in range(config["head_dim"] // 2):
        wave = 2 * np.pi * config["rope_theta"] ** (2 * i / config["head_dim"])
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if wave < original / high:
            divisors.append(1.0)
        elif wave > original / low:
            divisors.append(scaling["factor"])
        else:
            part = (original / wave - low) / (high - low)
            divisors.append(1 / ((1 - part) / scaling["factor"] + part))
    return np.asarray(divisors, np.float32)


def write_family_gguf(path: Path, name: str, **changes: Any) -> Path:
    """A GGUF file of the case; keys that are changed to None are left out."""
    config, kind = family_checkpoints.CASES[name].config, ARCHITECTURES[name]
    fields = family_fields(name) | changes
    fields = {key: value for key, value in fields.items() if value is not None}
    head_dim = config["head_dim"] if kind == "llama" else None
    return write_gguf(path, fields, family_gguf_tensors(name), head_dim, kind)
