"""What a decoder offers, so that it can be decoded within memories: four functions and their arrays.

    x = embed(params, tokens, positions)             [B, T] -> [B, T, E]
    q, k, v = qkv(layer, x, positions)               of each layer, rotated, unscaled
    x = finish(layer, x, y)                          y [B, T, H, D], what attention returned
    logits = logits(params, x)                       [B, T, E] -> [B, T, V]

Layers have parameters of one shape, so that a program is compiled for one layer and runs all of them,
whatever their number. `adapters.decoder` makes a `Model` of a Flax module with methods of these names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The attention of a layer; static.

    Attributes:
      num_heads: H, a multiple of K.
      num_kv_heads: K.
      head_dim: D.
      frequencies: [D/2] radians per position of each pair of features (half-split convention), with
        whatever scaling the model has; None without a rotary embedding.
      scale: of the logits; None for 1 / sqrt(D).
      window: how many of the latest tokens a token sees; None for all.
      soft_cap: c of c tanh(logit / c); None for none.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    frequencies: tuple[float, ...] | None = None
    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        checks.static_fields(self, "num_heads", "num_kv_heads", "head_dim")
        if self.window is not None:
            checks.static_fields(self, "window")
        if self.scale is not None:
            checks.static_float("scale", self.scale)
        if self.soft_cap is not None:
            checks.static_float("soft_cap", self.soft_cap, 0, checks.FLOAT32_MAX, open_low=True)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}: it must be a multiple of num_kv_heads = "
                f"{self.num_kv_heads}"
            )
        if self.frequencies is not None:
            own = tuple(float(f) for f in np.asarray(self.frequencies).reshape(-1))
            if 2 * len(own) != self.head_dim:
                raise ValueError(
                    f"frequencies has {len(own)} entries: it must have D/2 = {self.head_dim / 2:g}"
                )
            object.__setattr__(self, "frequencies", own)


class Functions(NamedTuple):
    """What of a model is static: the key of its programs."""

    embed: Callable[..., jax.Array]
    qkv: Callable[..., tuple[jax.Array, ...]]
    finish: Callable[..., jax.Array]
    logits: Callable[..., jax.Array]
    spec: AttentionSpec

    @property
    def frequencies(self) -> np.ndarray | None:
        """[D/2] float32 of the rotary embedding, or None."""
        own = self.spec.frequencies
        return None if own is None else np.asarray(own, np.float32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder as pure functions, which must be hashable, and their arrays.

    Attributes:
      params: what `embed` and `logits` need.
      layers: the parameters of each of the L layers, all of one structure.
      attention: of each layer.
      embed: (params, tokens [B, T], positions [B, T]) -> x [B, T, E].
      qkv: (layer, x, positions) -> q [B, T, H, D], k and v [B, T, K, D].
      finish: (layer, x, y [B, T, H, D]) -> x.
      logits: (params, x) -> [B, T, V].
    """

    params: Any
    layers: tuple[Any, ...]
    attention: tuple[AttentionSpec, ...]
    embed: Callable[..., jax.Array]
    qkv: Callable[..., tuple[jax.Array, ...]]
    finish: Callable[..., jax.Array]
    logits: Callable[..., jax.Array]

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def spec(self) -> AttentionSpec:
        """That of all layers."""
        return self.attention[0]

    @property
    def functions(self) -> Functions:
        """What is static."""
        return Functions(self.embed, self.qkv, self.finish, self.logits, self.spec)


def check_model(model: Model) -> None:
    """ValueError for a model whose attention cannot be decoded here, which names the layer and why."""
    if not model.attention:
        raise ValueError("model.attention is empty: give the AttentionSpec of each layer")
    if len(model.attention) != model.num_layers:
        raise ValueError(
            f"model.attention has {len(model.attention)} entries for {model.num_layers} layers"
        )
    kinds = [_kind(layer) for layer in model.layers]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"layer {i} has parameters {kind} and layer 0 {kinds[0]}: all layers must be alike"
            )
    for i, spec in enumerate(model.attention):
        for name in ("window", "soft_cap"):
            if getattr(spec, name) is not None:
                raise ValueError(
                    f"layer {i} has {name} = {getattr(spec, name)}: decoding within a budget supports "
                    f"layers without"
                )
        if spec != model.spec:
            raise ValueError(
                f"layer {i} has {spec} and layer 0 {model.spec}: all layers must have the same heads, "
                f"frequencies and scale"
            )


def _kind(layer) -> str:
    """The structure, shapes and types of a layer's parameters."""
    leaves, tree = jax.tree.flatten(layer)
    return f"{tree} {[(jnp.shape(x), str(jnp.result_type(x))) for x in leaves]}"
