"""Families of decoders: how the config.json of each is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from experiments.models.config import TransformerConfig
from experiments.models.hf_names import GEMMA_NAMES, MIXTRAL_NAMES, PHI_FUSED, QWEN_EXPERT_NAMES
from experiments.models.rope_settings import rope_options
from experiments.models.settings import MOST, Settings

MOST_LAYERS = 10_000
SILU = ("silu", "swish")
GELU = ("gelu_pytorch_tanh",)
# Keys that change what other models compute, and what they are where they change nothing; the first
# value is that of a file without the key.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": SILU,
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), (1.0,)
    ),
    "is_decoder": (True, False),
}
NO_EXPERTS: dict[str, tuple[Any, ...]] = dict.fromkeys(("num_experts", "num_local_experts"), (1, 0))
# Keys of all models' files that say nothing about what a decoder computes after training.
HARMLESS = {
    *("_name_or_path", "transformers.js_config", "is_llama_config", "name_or_path", "language"),
    *("torch_dtype", "dtype", "use_cache", "initializer_range", "pretraining_tp", "auto_map"),
    *("attention_dropout", "hidden_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("sep_token_id", "decoder_start_token_id", "return_dict", "task_specific_params", "prefix"),
    *("min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams"),
    *("num_beam_groups", "repetition_penalty", "length_penalty", "num_return_sequences"),
    *("problem_type", "chunk_size_feed_forward", "tie_encoder_decoder", "tokenizer_class"),
    *("diversity_penalty", "encoder_no_repeat_ngram_size", "no_repeat_ngram_size", "max_length"),
    *("remove_invalid_values", "output_scores", "unsloth_fixed", "early_stopping", "id2label"),
    *("label2id", "resid_pdrop", "embd_pdrop", "cache_implementation", "output_router_logits"),
    *("router_aux_loss_coef", "router_jitter_noise"),
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    Attributes:
      architecture: the class that writers name.
      options: (settings, number of layers) -> fields of `TransformerConfig` besides the sizes.
      defaults: what a key is where the file lacks it.
      fixed: as `FIXED`, for this family.
      names: tensors that have other names than in `hf_names.TENSOR_NAMES`.
      fused: tensor -> the parameters whose rows it holds.
      norm_offset: added to the weights of all norms.
      has_local_rope: whether layers with windows have a rotary base of their own.
      has_partial_rope: whether a part of each head's features may rotate.
    """

    architecture: str
    options: Callable[[Settings, int], dict[str, Any]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    norm_offset: float = 0.0
    has_local_rope: bool = False
    has_partial_rope: bool = False


def read_config(
    raw: Settings, max_positions: int | None = None
) -> tuple[Family, TransformerConfig]:
    """Family and config of a config.json.

    Args:
      raw: the file.
      max_positions: the longest context; None for that of training.

    Raises:
      ValueError: another model, settings that are missing or wrong, or change what the model computes
        and are not implemented.
    """
    if raw.text("model_type") not in FAMILIES:
        raise raw.wrong(
            "model_type", f"that of a causal decoder which is implemented: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[raw.values["model_type"]]
    raw = raw.with_defaults(family.defaults)
    raw.only("architectures", [family.architecture])
    for key, supported in (FIXED | dict(family.fixed)).items():
        raw.only(key, *supported)
    heads = raw.whole("num_attention_heads", 1, MOST)
    embed_dim = raw.whole("hidden_size", 1, MOST)
    if not raw.has("head_dim") and embed_dim % heads:
        raise raw.wrong("hidden_size", f"a multiple of num_attention_heads, {heads}")
    head_dim = raw.whole("head_dim", 1, MOST, embed_dim // heads)
    layers = raw.whole("num_hidden_layers", 0, MOST_LAYERS)
    trained = raw.whole("max_position_embeddings", 1, MOST, 2048)
    options = family.options(raw, layers) | rope_options(
        raw,
        head_dim,
        trained,
        has_local=family.has_local_rope,
        has_partial=family.has_partial_rope,
    )
    sizes = {
        "vocab_size": raw.whole("vocab_size", 1, MOST),
        "num_layers": layers,
        "embed_dim": embed_dim,
        "hidden_dim": raw.whole("intermediate_size", 1, MOST),
        "num_heads": heads,
        "num_kv_heads": raw.whole("num_key_value_heads", 1, MOST, heads),
        "head_dim": head_dim,
        "norm_eps": raw.positive("rms_norm_eps", 1e-6),
        "tied_embeddings": raw.flag("tie_word_embeddings", False),
        "max_positions": trained if max_positions is None else max_positions,
    }
    config = raw.made(TransformerConfig, **sizes | options)
    raw.none_left(lambda key: key in HARMLESS or key.endswith("_version"))
    return family, config


def _plain(raw: Settings, layers: int) -> dict[str, Any]:
    return _windows(raw, layers, [FULL] * layers)


def _one_window(raw: Settings, layers: int) -> dict[str, Any]:
    """`sliding_window` holds in every layer."""
    return _windows(raw, layers, [SLIDING if raw.has("sliding_window") else FULL] * layers)


def _later_windows(raw: Settings, layers: int) -> dict[str, Any]:
    """`sliding_window` holds from the layer `max_window_layers` on, if it is used at all."""
    first = raw.whole("max_window_layers", 0, MOST, 28)
    is_used = raw.flag("use_sliding_window", False) and raw.has("sliding_window")
    types = [SLIDING if is_used and i >= first else FULL for i in range(layers)]
    return _windows(raw, layers, types, may_differ=is_used)


def _qwen3(raw: Settings, layers: int) -> dict[str, Any]:
    return _later_windows(raw, layers) | {"qk_norm": True}


def _smollm3(raw: Settings, layers: int) -> dict[str, Any]:
    """Some layers do not rotate; where `sliding_window` is used, it holds in those."""
    every = raw.whole("no_rope_layer_interval", 1, MOST, 4)
    rotated = [int((i + 1) % every != 0) for i in range(layers)]
    if raw.has("no_rope_layers"):
        rotated = raw.several("no_rope_layers", int)
        if len(rotated) != layers or not set(rotated) <= {0, 1}:
            raise raw.wrong("no_rope_layers", f"1 or 0 for each of {layers} layers")
    raw.has("max_window_layers")  # which is of no use here
    is_used = raw.flag("use_sliding_window", False) and raw.has("sliding_window")
    types = [SLIDING if is_used and not x else FULL for x in rotated]
    windows = _windows(raw, layers, types, may_differ=is_used)
    return windows | {"rotated_layers": None if all(rotated) else tuple(map(bool, rotated))}


def _gemma(raw: Settings, layers: int, every: int) -> dict[str, Any]:
    """All but every n-th layer have a window; the embedding is scaled, norms stand around each block."""
    types = [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    return _windows(raw, layers, types, may_differ=True) | {
        "scale": raw.positive("query_pre_attn_scalar", 256) ** -0.5,
        "logits_soft_cap": _cap(raw, "final_logit_softcapping"),
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": raw.whole("hidden_size", 1, MOST) ** 0.5,
    }


def _gemma2(raw: Settings, layers: int) -> dict[str, Any]:
    return _gemma(raw, layers, 2) | {"attention_soft_cap": _cap(raw, "attn_logit_softcapping")}


def _gemma3(raw: Settings, layers: int) -> dict[str, Any]:
    raw.has("_sliding_window_pattern")  # what some writers call it
    every = raw.whole("_sliding_window_pattern", 1, MOST, 6)
    every = raw.whole("sliding_window_pattern", 1, MOST, every)
    return _gemma(raw, layers, every) | {"qk_norm": True}


def _mixtral(raw: Settings, layers: int) -> dict[str, Any]:
    return _one_window(raw, layers) | {
        "num_experts": raw.whole("num_local_experts", 1, MOST, 8),
        "experts_per_token": raw.whole("num_experts_per_tok", 1, MOST, 2),
    }


def _qwen3_moe(raw: Settings, layers: int) -> dict[str, Any]:
    raw.only("use_sliding_window", False)
    for key in ("sliding_window", "max_window_layers", "intermediate_size"):
        raw.has(key)  # of no use then, or of layers without experts
    return _windows(raw, layers, [FULL] * layers) | {
        "qk_norm": True,
        "hidden_dim": raw.whole("moe_intermediate_size", 1, MOST),
        "num_experts": raw.whole("num_experts", 1, MOST, 128),
        "experts_per_token": raw.whole("num_experts_per_tok", 1, MOST, 8),
        "normalized_experts": raw.flag("norm_topk_prob", False),
    }


def _windows(
    raw: Settings, layers: int, types: list[str], may_differ: bool = False
) -> dict[str, Any]:
    """The window of each layer, by the kinds of layers that the file names or implies."""
    if raw.has("layer_types"):
        given = raw.several("layer_types", str)
        if len(given) != layers or not set(given) <= {SLIDING, FULL}:
            raise raw.wrong("layer_types", f"{SLIDING!r} or {FULL!r} for each of {layers} layers")
        if given != types and not may_differ:
            raise raw.wrong("layer_types", f"{types[0]!r} for every layer of this model")
        types = given
    if SLIDING not in types:
        raw.has("sliding_window")  # it says nothing then
        return {}
    window = raw.whole("sliding_window", 1, MOST)
    return {"windows": tuple(window if kind == SLIDING else None for kind in types)}


def _cap(raw: Settings, key: str) -> float | None:
    return raw.positive(key) if raw.has(key) else None


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _plain, fixed=NO_EXPERTS | {"sliding_window": (None, 0)}),
    "mistral": Family(
        "MistralForCausalLM",
        _one_window,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        fixed=NO_EXPERTS,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda raw, layers: _later_windows(raw, layers) | {"qkv_bias": True},
        defaults={"sliding_window": 4096, "num_key_value_heads": 32},
        fixed=NO_EXPERTS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _qwen3,
        defaults={"sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
        fixed=NO_EXPERTS,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma2,
        defaults={
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        fixed=NO_EXPERTS | {"hidden_act": GELU, "hidden_activation": GELU},
        names=GEMMA_NAMES,
        norm_offset=1.0,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3,
        defaults={
            "head_dim": 256,
            "num_key_value_heads": 4,
            "rope_local_base_freq": 10_000.0,
            "rope_theta": 1_000_000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        fixed=NO_EXPERTS
        | {"hidden_act": GELU, "hidden_activation": GELU, "attn_logit_softcapping": (None,)},
        names=GEMMA_NAMES,
        norm_offset=1.0,
        has_local_rope=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _one_window,
        defaults={"original_max_position_embeddings": 4096},
        fixed=NO_EXPERTS
        | {"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)},
        fused=PHI_FUSED,
        has_partial_rope=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3,
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
        },
        fixed=NO_EXPERTS,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixtral,
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
        fixed={"num_experts": (1, 0)},
        names=MIXTRAL_NAMES,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        defaults={"num_key_value_heads": 4},
        fixed={"num_local_experts": (1, 0), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
        names=QWEN_EXPERT_NAMES,
    ),
}
