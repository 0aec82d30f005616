"""What a decoder computes, as its options: families differ in these alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jax import Array

from experiments.models.rotary import RopeScaling, frequencies

NO_WINDOW = 2**31 - 1
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of a decoder; hashable, so that it is static under jit.

    Attributes:
      vocab_size, num_layers, embed_dim, hidden_dim, num_heads, num_kv_heads, head_dim: V, L, E, F, H, K
        and D; F of one expert where there are several.
      rope_base: of the rotary embedding; `local_rope_base` instead, unscaled, in layers with a window.
      norm_eps: added to the mean square in every norm.
      tied_embeddings: whether the embedding is the head too.
      max_positions: the longest context.
      rope_scaling: how the rotary frequencies are stretched.
      rotated_features: of each head, None for all. The features of queries and keys are ordered so that
        feature i and i + D/2 are a pair in any case; the pairs behind do not rotate.
      rotated_layers: whether a layer's queries and keys rotate, [L]; None for all.
      windows: how many of the latest tokens a token sees in each layer, None for all of them, [L].
      scale: of the attention's logits; None for 1 / sqrt(D).
      attention_soft_cap, logits_soft_cap: c of c tanh(logit / c); None for none.
      qkv_bias: whether queries, keys and values have biases.
      qk_norm: whether the queries and keys of each head are normalized before they rotate.
      post_norms: whether what attention and the MLP give is normalized before it is added.
      activation: of the MLP's gate.
      embedding_scale: what embedded tokens are multiplied by.
      num_experts, experts_per_token: of a mixture in the place of each MLP; 0 for none.
      normalized_experts: whether the chosen experts' probabilities are made to sum to 1.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = True
    max_positions: int = 2048
    rope_scaling: RopeScaling | None = None
    local_rope_base: float | None = None
    rotated_features: int | None = None
    rotated_layers: tuple[bool, ...] | None = None
    windows: tuple[int | None, ...] | None = None
    scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    normalized_experts: bool = True

    def __post_init__(self) -> None:
        sizes = [field.name for field in dataclasses.fields(self)[:7]]
        for name in (*sizes, "max_positions"):
            _check_whole(name, getattr(self, name), 1)
        for name in ("num_experts", "experts_per_token"):
            _check_whole(name, getattr(self, name), 0)
        for name in ("norm_eps", "embedding_scale"):
            _check_positive(name, getattr(self, name))
        for name in ("rope_base", "local_rope_base"):
            base = getattr(self, name)
            if base is not None and not 1 <= base < np.inf:
                raise ValueError(f"{name} must be a finite number from 1 on, got {base}")
        for name in ("scale", "attention_soft_cap", "logits_soft_cap"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary embedding rotates pairs of features"
            )
        if not bool(self.num_experts) <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie in 1..num_experts="
                f"{self.num_experts}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {list(ACTIVATIONS)}")
        self._check_rotary()
        self._check_layers()

    def _check_rotary(self) -> None:
        rotated = self.num_rotated
        if rotated % 2 or not 2 <= rotated <= self.head_dim:
            raise ValueError(
                f"rotated_features={rotated} must be even, in 2..head_dim={self.head_dim}"
            )
        kind = None if self.rope_scaling is None else self.rope_scaling.kind
        if kind == "dynamic" and rotated < 4:
            raise ValueError(f"rotated_features={rotated} must be at least 4 under 'dynamic'")
        if kind == "yarn" and self.rope_base <= 1:
            raise ValueError(f"rope_base={self.rope_base} must be above 1 under 'yarn'")
        if self.rope_scaling is not None and kind == "longrope":
            factors = len(self.rope_scaling.short_factors)
            if 2 * factors != rotated:
                raise ValueError(
                    f"short_factors and long_factors have {factors} entries each: they must have one "
                    f"for each of the {rotated // 2} pairs of features that rotate"
                )

    def _check_layers(self) -> None:
        for name in ("rotated_layers", "windows"):
            value = getattr(self, name)
            if value is not None and len(value) != self.num_layers:
                raise ValueError(
                    f"{name} has {len(value)} entries for num_layers={self.num_layers}: it needs one "
                    f"for each layer"
                )
        for window in self.windows or ():
            if window is not None:
                _check_whole("windows", window, 1)

    @property
    def num_rotated(self) -> int:
        """Features of a head that rotate."""
        return self.head_dim if self.rotated_features is None else self.rotated_features

    @property
    def has_amplitudes(self) -> bool:
        """Whether rotated queries and keys are multiplied by something."""
        return self.rope_scaling is not None and self.rope_scaling.amplitude != 1

    @property
    def frequencies(self) -> np.ndarray:
        """Radians per position of each pair of features, float32 [L, D/2]; 0 where nothing rotates."""
        table = np.zeros((self.num_layers, self.head_dim // 2), np.float32)
        for i, row in enumerate(table):
            if self._rotates(i):
                base, scaling = self._rope_of(i)
                row[: self.num_rotated // 2] = frequencies(
                    self.num_rotated, base, scaling, self.max_positions
                )
        return table

    @property
    def amplitudes(self) -> np.ndarray:
        """What each pair of features of a rotated query or key is multiplied by, float32 [L, D/2]."""
        table = np.ones((self.num_layers, self.head_dim // 2), np.float32)
        for i, row in enumerate(table):
            scaling = self._rope_of(i)[1]
            if self._rotates(i) and scaling is not None:
                row[: self.num_rotated // 2] = scaling.amplitude
        return table

    def _rotates(self, layer: int) -> bool:
        return self.rotated_layers is None or self.rotated_layers[layer]

    def _rope_of(self, layer: int) -> tuple[float, RopeScaling | None]:
        """Base and scaling of a layer."""
        is_local = self.windows is not None and self.windows[layer] is not None
        if is_local and self.local_rope_base is not None:
            return self.local_rope_base, None
        return self.rope_base, self.rope_scaling

    @property
    def scores_plainly(self) -> bool:
        """Whether every layer attends to all tokens before, with softmax(q k / sqrt(D))."""
        return self.windows is None and self.scale is None and self.attention_soft_cap is None

    @property
    def pair_order(self) -> np.ndarray | None:
        """Where each of a head's D features stands in a checkpoint; None for where it stands here.

        In a checkpoint the rotated features come first, feature i beside i + rotated / 2.
        """
        if self.num_rotated == self.head_dim:
            return None
        half, others = self.num_rotated // 2, (self.head_dim - self.num_rotated) // 2
        behind = self.num_rotated + np.arange(others)
        first = np.concatenate([np.arange(half), behind])
        return np.concatenate([first, np.arange(half, 2 * half), behind + others])


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < np.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
