"""Architectures of GGUF files: how the keys of each are read, and what it calls its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from experiments.models.config import TransformerConfig
from experiments.models.families import MOST_LAYERS
from experiments.models.rotary import RopeScaling
from experiments.models.settings import MOST, Settings

LAYER = "blk.{}."
TENSOR_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": LAYER + "attn_norm.weight",
    "query": LAYER + "attn_q.weight",
    "key": LAYER + "attn_k.weight",
    "value": LAYER + "attn_v.weight",
    "query_bias": LAYER + "attn_q.bias",
    "key_bias": LAYER + "attn_k.bias",
    "value_bias": LAYER + "attn_v.bias",
    "query_norm": LAYER + "attn_q_norm.weight",
    "key_norm": LAYER + "attn_k_norm.weight",
    "output": LAYER + "attn_output.weight",
    "post_attention_norm": LAYER + "post_attention_norm.weight",
    "mlp_norm": LAYER + "ffn_norm.weight",
    "gate": LAYER + "ffn_gate.weight",
    "up": LAYER + "ffn_up.weight",
    "down": LAYER + "ffn_down.weight",
    "post_mlp_norm": LAYER + "post_ffw_norm.weight",
}
PHI_FUSED = {
    LAYER + "attn_qkv.weight": ("query", "key", "value"),
    LAYER + "ffn_up.weight": ("gate", "up"),
}
# Divisors of the rotary frequencies, [rotated / 2] each; not stored by layer.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# Of the largest models, whose scale is no key: it follows from the width there.
GEMMA2_LAYERS_27B, GEMMA3_LAYERS_27B = 46, 62


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Models of one `general.architecture`.

    Attributes:
      options: (keys, sizes) -> fields of `TransformerConfig` besides the sizes.
      is_interleaved: whether features 2i and 2i + 1 of queries and keys rotate together in the file.
      has_partial_rope: whether a part of each head's features may rotate.
      fused: tensor -> the parameters whose rows it holds.
    """

    options: Callable[[Keys, Mapping[str, Any]], dict[str, Any]]
    is_interleaved: bool = False
    has_partial_rope: bool = False
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


class Keys(Settings):
    """The keys of a file; "*" stands for its architecture."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        super().__init__(where, values)
        self.architecture = ""

    def own(self, key: str) -> str:
        """The key of this architecture."""
        return f"{self.architecture}.{key}"


def read_config(
    keys: Keys,
    factors: Mapping[str, tuple[float, ...]],
    *,
    tied_embeddings: bool,
    max_positions: int | None = None,
) -> tuple[Architecture, TransformerConfig]:
    """Architecture and config of a file.

    Args:
      keys: of the file; their architecture is set.
      factors: the tensors `ROPE_FACTORS`, `LONG_FACTORS` and `SHORT_FACTORS` that the file has.
      tied_embeddings: whether it lacks a head.
      max_positions: the longest context; None for that of training.

    Raises:
      ValueError: another architecture, keys that are missing or wrong, or change what the model computes
        and are not implemented.
    """
    keys.only("general.architecture", *ARCHITECTURES)
    keys.architecture = keys.get("general.architecture")
    architecture = ARCHITECTURES[keys.architecture]
    own = keys.own
    keys.only("general.type", "model")
    keys.only("split.count", 1, 0)
    keys.only(own("expert_count"), 0)
    for key in ("logit_scale", "residual_scale", "embedding_scale"):
        keys.only(own(key), 1.0)
    keys.only(own("attention.causal"), True)
    heads = keys.whole(own("attention.head_count"), 1, MOST)
    embed_dim = keys.whole(own("embedding_length"), 1, MOST)
    vocab_size = len(keys.several("tokenizer.ggml.tokens", str))
    if not keys.has(own("attention.key_length")) and embed_dim % heads:
        raise keys.wrong(own("embedding_length"), f"a multiple of the head count, {heads}")
    head_dim = keys.whole(own("attention.key_length"), 1, MOST, embed_dim // heads)
    keys.only(own("attention.value_length"), head_dim)
    keys.only(own("vocab_size"), vocab_size)
    trained = keys.whole(own("context_length"), 1, MOST)
    rotated = head_dim
    if architecture.has_partial_rope:
        rotated = keys.whole(own("rope.dimension_count"), 2, head_dim, head_dim)
    else:
        keys.only(own("rope.dimension_count"), head_dim)
    for name, numbers in factors.items():
        if 2 * len(numbers) != rotated:
            raise ValueError(
                f"{keys.where}: tensor {name!r} has {len(numbers)} numbers: it must have one for each "
                f"of the {rotated // 2} pairs of features that rotate"
            )
    sizes = {
        "vocab_size": vocab_size,
        "num_layers": keys.whole(own("block_count"), 0, MOST_LAYERS),
        "embed_dim": embed_dim,
        "hidden_dim": keys.whole(own("feed_forward_length"), 1, MOST),
        "num_heads": heads,
        "num_kv_heads": keys.whole(own("attention.head_count_kv"), 1, MOST, heads),
        "head_dim": head_dim,
        "rope_base": keys.positive(own("rope.freq_base"), 10_000.0),
        "norm_eps": keys.positive(own("attention.layer_norm_rms_epsilon")),
        "tied_embeddings": tied_embeddings,
        "max_positions": trained if max_positions is None else max_positions,
        "rope_scaling": _scaling(keys, factors, trained),
        "rotated_features": None if rotated == head_dim else rotated,
    }
    return architecture, keys.made(TransformerConfig, **sizes | architecture.options(keys, sizes))


def _scaling(
    keys: Keys, factors: Mapping[str, tuple[float, ...]], trained: int
) -> RopeScaling | None:
    """Divisors that are tensors, or a kind and a factor."""
    own = keys.own
    kind = own("rope.scaling.type")
    original = own("rope.scaling.original_context_length")
    if LONG_FACTORS in factors or SHORT_FACTORS in factors:
        for name in (LONG_FACTORS, SHORT_FACTORS):
            if name not in factors:
                raise ValueError(f"{keys.where}: the checkpoint lacks the tensor {name!r}")
        keys.only(kind, "longrope", "none")
        of_scale = own("rope.scaling.attn_factor")
        positions = keys.whole(original, 2, MOST)
        return keys.made(
            RopeScaling,
            kind="longrope",
            factor=trained / positions,
            original_positions=positions,
            attention_factor=keys.positive(of_scale) if keys.has(of_scale) else None,
            short_factors=factors[SHORT_FACTORS],
            long_factors=factors[LONG_FACTORS],
        )
    keys.only(own("rope.scaling.attn_factor"), 1.0)
    if ROPE_FACTORS in factors:
        keys.only(kind, "none")
        both = factors[ROPE_FACTORS]
        return keys.made(
            RopeScaling,
            kind="longrope",
            attention_factor=1.0,
            short_factors=both,
            long_factors=both,
        )
    keys.only(kind, "none", "linear", "yarn")
    if keys.has(kind) and keys.get(kind) == "yarn":
        return keys.made(
            RopeScaling,
            kind="yarn",
            factor=keys.positive(own("rope.scaling.factor")),
            original_positions=keys.whole(original, 1, MOST, trained),
            beta_fast=keys.positive(own("rope.scaling.yarn_beta_fast"), 32.0),
            beta_slow=keys.positive(own("rope.scaling.yarn_beta_slow"), 1.0),
        )
    keys.has(original)  # of no use to the others
    return _linear(keys, kind)


def _linear(keys: Keys, kind: str) -> RopeScaling | None:
    """A factor without a type is linear, as llama.cpp has it."""
    factor, legacy = keys.own("rope.scaling.factor"), keys.own("rope.scale_linear")
    given, present = keys.has(kind), keys.has(factor) or keys.has(legacy)
    keys.has(legacy)  # what an older writer has instead
    if not keys.has(factor) and keys.has(legacy):
        factor = legacy
    if (given and keys.get(kind) == "none") or not (given or present):
        return None
    stretch = keys.positive(factor)
    return None if stretch == 1 else RopeScaling("linear", stretch)


def _llama(keys: Keys, sizes: Mapping[str, Any]) -> dict[str, Any]:
    del sizes
    keys.has(keys.own("tensor_data_layout"))
    return {}


def _phi3(keys: Keys, sizes: Mapping[str, Any]) -> dict[str, Any]:
    if not keys.has(keys.own("attention.sliding_window")):
        return {}
    window = keys.whole(keys.own("attention.sliding_window"), 0, MOST)
    return {"windows": (window,) * sizes["num_layers"]} if window else {}


def _gemma(keys: Keys, sizes: Mapping[str, Any], every: int, large: int) -> dict[str, Any]:
    """All but every n-th layer have a window; the embedding is scaled, norms stand around each block."""
    window, layers = keys.whole(keys.own("attention.sliding_window"), 1, MOST), sizes["num_layers"]
    is_large = layers == large
    scaled = sizes["embed_dim"] / sizes["num_heads"] if is_large else sizes["head_dim"]
    return {
        "windows": tuple(None if (i + 1) % every == 0 else window for i in range(layers)),
        "scale": scaled**-0.5,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": sizes["embed_dim"] ** 0.5,
    }


def _gemma2(keys: Keys, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return _gemma(keys, sizes, 2, GEMMA2_LAYERS_27B) | {
        "attention_soft_cap": keys.positive(keys.own("attn_logit_softcapping"), 50.0),
        "logits_soft_cap": keys.positive(keys.own("final_logit_softcapping"), 30.0),
    }


def _gemma3(keys: Keys, sizes: Mapping[str, Any]) -> dict[str, Any]:
    cap = keys.own("final_logit_softcapping")
    every = keys.whole(keys.own("attention.sliding_window_pattern"), 1, MOST, 6)
    return _gemma(keys, sizes, every, GEMMA3_LAYERS_27B) | {
        "qk_norm": True,
        "local_rope_base": keys.positive(keys.own("rope.freq_base_swa"), 10_000.0),
        "logits_soft_cap": keys.positive(cap) if keys.has(cap) else None,
    }


ARCHITECTURES = {
    "llama": Architecture(_llama, is_interleaved=True),
    "qwen2": Architecture(lambda keys, sizes: {"qkv_bias": True}),
    "qwen3": Architecture(lambda keys, sizes: {"qk_norm": True}),
    "gemma2": Architecture(_gemma2),
    "gemma3": Architecture(_gemma3),
    "phi3": Architecture(_phi3, has_partial_rope=True, fused=PHI_FUSED),
}
