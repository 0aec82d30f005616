"""Tiny random checkpoints of every family: their config.json, and their tensors from a seed.

It needs NumPy alone: experiments/peers/record_families.py, in an environment of its own, takes it by its
path and records what transformers computes with the very same numbers.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

VOCAB, WIDTH, HIDDEN, PROMPT, STEPS = 67, 32, 40, 28, 12
RECORDED = (0, 3, 11, 20, 27, 33, 38)  # positions whose logits are kept
GEMMA = ("gemma2", "gemma3_text")


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint.

    Attributes:
      config: config.json.
      stored: the type of its numbers in the file.
      shards: files.
      prompt: tokens of the prompt.
      max_positions: what the loader is asked for.
      grows: whether frequencies depend on the text's length, so that no continuation is recorded.
    """

    config: dict[str, Any]
    stored: str = "float32"
    shards: int = 1
    prompt: int = PROMPT
    max_positions: int | None = None
    grows: bool = False


def case(
    kind: str,
    *,
    stored: str = "float32",
    shards: int = 1,
    prompt: int = PROMPT,
    max_positions: int | None = None,
    grows: bool = False,
    **settings: Any,
) -> Case:
    """A checkpoint of four layers with four heads on two, changed by `settings`."""
    base = {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_theta": 1000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        # transformers' own are of other vocabularies
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return Case(base | settings, stored, shards, prompt, max_positions, grows)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.25, 4.0]}
CASES = {
    "llama2": case("llama", num_key_value_heads=4),
    "llama3": case(
        "llama", rope_scaling=LLAMA3, tie_word_embeddings=True, stored="bfloat16", shards=3
    ),
    "llama linear": case("llama", rope_scaling={"type": "linear", "factor": 3.0}, stored="float16"),
    "llama dynamic": case(
        "llama",
        rope_scaling={"type": "dynamic", "factor": 2.0},
        max_position_embeddings=16,
        max_positions=PROMPT,
        grows=True,
    ),
    "llama yarn": case("llama", rope_scaling=YARN | {"beta_fast": 8.0, "attention_factor": 1.3}),
    "mistral": case("mistral", sliding_window=5, head_dim=16, num_key_value_heads=1),
    "mistral without window": case("mistral", sliding_window=None, stored="bfloat16", shards=2),
    "qwen2": case("qwen2", tie_word_embeddings=True, use_sliding_window=False),
    "qwen2 windows": case(
        "qwen2",
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
        rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        stored="bfloat16",
    ),
    "qwen3": case("qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3 windows": case(
        "qwen3",
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_scaling=YARN | {"truncate": False},
        shards=2,
    ),
    "gemma2": case(
        "gemma2",
        sliding_window=5,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
        tie_word_embeddings=True,
    ),
    "gemma2 without caps": case(
        "gemma2",
        sliding_window=7,
        query_pre_attn_scalar=11,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        stored="bfloat16",
        shards=2,
    ),
    "gemma3": case(
        "gemma3_text",
        sliding_window=5,
        sliding_window_pattern=3,
        query_pre_attn_scalar=8,
        rope_theta=50_000.0,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        tie_word_embeddings=True,
    ),
    "gemma3 types": case(
        "gemma3_text",
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        query_pre_attn_scalar=5,
        num_key_value_heads=1,
        final_logit_softcapping=9.0,
        tie_word_embeddings=True,
        stored="bfloat16",
    ),
    "phi3": case("phi3", sliding_window=6, num_key_value_heads=4),
    "phi3 long": case(
        "phi3",
        rope_scaling=LONG,
        original_max_position_embeddings=16,
        partial_rotary_factor=0.5,
        sliding_window=None,
        tie_word_embeddings=True,
    ),
    "phi3 short": case(
        "phi3",
        rope_scaling=LONG,
        original_max_position_embeddings=48,
        partial_rotary_factor=0.5,
        max_positions=48,
        stored="bfloat16",
        shards=2,
    ),
    "smollm3": case("smollm3", tie_word_embeddings=True, rope_scaling=YARN),
    "smollm3 windows": case(
        "smollm3",
        no_rope_layers=[0, 1, 1, 0],
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    "mixtral": case("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "mixtral window": case(
        "mixtral",
        num_local_experts=3,
        num_experts_per_tok=1,
        sliding_window=6,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        stored="bfloat16",
        shards=3,
    ),
    "qwen3 experts": case(
        "qwen3_moe",
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    "qwen3 experts not normalized": case(
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        norm_topk_prob=False,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        shards=2,
    ),
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, as transformers has them."""
    kind, width, hidden = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head = config["head_dim"]
    queries, keys = (config[f"num_{x}_heads"] * head for x in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        if kind in GEMMA:
            layer |= {f"{x}_feedforward_layernorm": (width,) for x in ("pre", "post")}
        layer |= {f"self_attn.{x}": shape for x, shape in _attention(kind, width, queries, keys)}
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            layer |= {f"self_attn.{x}_norm": (head,) for x in "qk"}
        layer |= _mlp(kind, width, hidden, config)
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if kind == "qwen2":
            biases = {"q": (queries,), "k": (keys,), "v": (keys,)}
            shapes |= {f"model.layers.{i}.self_attn.{x}_proj.bias": y for x, y in biases.items()}
    return shapes


def _attention(kind: str, width: int, queries: int, keys: int) -> list[tuple[str, tuple[int, ...]]]:
    out = ("o_proj", (width, queries))
    if kind == "phi3":
        return [("qkv_proj", (queries + 2 * keys, width)), out]
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return [*((name, (size, width)) for name, size in rows.items()), out]


def _mlp(kind: str, width: int, hidden: int, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    up, down = (hidden, width), (width, hidden)
    if kind == "phi3":
        return {"mlp.gate_up_proj": (2 * hidden, width), "mlp.down_proj": down}
    if kind == "mixtral":
        number = config["num_local_experts"]
        parts = {"w1": up, "w2": down, "w3": up}
        experts = {
            f"block_sparse_moe.experts.{x}.{name}": shape
            for x in range(number)
            for name, shape in parts.items()
        }
        return {"block_sparse_moe.gate": (number, width)} | experts
    named = {"gate_proj": up, "up_proj": up, "down_proj": down}
    if kind == "qwen3_moe":
        number, own = config["num_experts"], config["moe_intermediate_size"]
        named = {"gate_proj": (own, width), "up_proj": (own, width), "down_proj": (width, own)}
        experts = {
            f"mlp.experts.{x}.{name}": shape for x in range(number) for name, shape in named.items()
        }
        return {"mlp.gate": (number, width)} | experts
    return {f"mlp.{name}": shape for name, shape in named.items()}


def tensors_of(name: str) -> dict[str, np.ndarray]:
    """Random numbers, float32, that the stored type of the case can hold."""
    config, stored = CASES[name].config, CASES[name].stored
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    made = {}
    for tensor, shape in tensor_shapes(config).items():
        numbers = rng.standard_normal(shape)
        if tensor.endswith("norm.weight"):
            numbers = 0.3 * numbers + (0 if config["model_type"] in GEMMA else 1)
        elif tensor.endswith("bias"):
            numbers = 0.5 * numbers
        else:
            numbers = 1.5 * numbers / shape[-1] ** 0.5
        made[tensor] = _held(numbers.astype(np.float32), stored)
    return made


def _held(x: np.ndarray, stored: str) -> np.ndarray:
    if stored == "bfloat16":
        bits = (x.view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)
    return x.astype(stored).astype(np.float32)


def prompt_of(name: str) -> np.ndarray:
    """Token ids [T]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    return rng.integers(3, VOCAB, CASES[name].prompt)


def recorded_positions(name: str) -> list[int]:
    """Of the prompt and its continuation, those whose logits are kept."""
    steps = 0 if CASES[name].grows else STEPS
    return [at for at in RECORDED if at < CASES[name].prompt + steps]
