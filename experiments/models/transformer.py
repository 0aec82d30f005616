"""A decoder in Flax nnx: stacked layers, one scan over them, one replaceable attention.

Shape letters: B batch, T tokens, L layers, H query heads, K key/value heads, D head dim,
E embedding, F MLP, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments.models.attention import causal_attention
from experiments.models.rotary import RopeScaling, frequencies, rotate
from jbalance.decode import AttentionSpec

Attention = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""(q [B, T, H, D], k [B, T, K, D], v [B, T, K, D], layer_state) -> (y [B, T, H, D], layer_state).

q and k come rotated and q unscaled: the attention applies 1/sqrt(D) itself. What it needs besides
(positions, lengths, the layer's index) it closes over or finds in `layer_state`.
"""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and constants of a decoder; hashable, so that it is static under jit."""

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

    def __post_init__(self) -> None:
        for name in (*(field.name for field in dataclasses.fields(self)[:7]), "max_positions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("rope_base", "norm_eps"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(
                    f"{name} must be a finite number above 0, got {getattr(self, name)}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary embedding rotates pairs of features"
            )

    @property
    def frequencies(self) -> np.ndarray:
        """Radians per position of each rotated pair of features, float32 [D/2]."""
        return frequencies(self.head_dim, self.rope_base, self.rope_scaling)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> nnx.Param[Array]:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x [..., E] over its root mean square, in float32 whatever x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale


class TransformerLayer(nnx.Module):
    """One decoder layer around an attention that the caller runs between `qkv` and `finish`.

    Args:
      config: the sizes.
      stack: leading axes of every parameter; () for one layer, (L,) for a stack to scan over.
      dtype: of parameters and computation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        stack: tuple[int, ...] = (),
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        c, self.config = config, config
        self.attention_norm = nnx.Param(jnp.ones((*stack, c.embed_dim), dtype))
        self.query = _normal(rngs, (*stack, c.embed_dim, c.num_heads, c.head_dim), dtype)
        self.key = _normal(rngs, (*stack, c.embed_dim, c.num_kv_heads, c.head_dim), dtype)
        self.value = _normal(rngs, (*stack, c.embed_dim, c.num_kv_heads, c.head_dim), dtype)
        self.output = _normal(rngs, (*stack, c.num_heads, c.head_dim, c.embed_dim), dtype)
        self.mlp_norm = nnx.Param(jnp.ones((*stack, c.embed_dim), dtype))
        self.gate = _normal(rngs, (*stack, c.embed_dim, c.hidden_dim), dtype)
        self.up = _normal(rngs, (*stack, c.embed_dim, c.hidden_dim), dtype)
        self.down = _normal(rngs, (*stack, c.hidden_dim, c.embed_dim), dtype)

    def qkv(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Attention inputs of x [B, T, E] at positions [T] or [B, T].

        Returns:
          Rotated q [B, T, H, D], rotated k [B, T, K, D], v [B, T, K, D].
        """
        c = self.config
        frequency = c.frequencies
        x = _rms_norm(x, self.attention_norm[...], c.norm_eps)
        q = jnp.einsum("bte,ehd->bthd", x, self.query[...])
        k = jnp.einsum("bte,ekd->btkd", x, self.key[...])
        v = jnp.einsum("bte,ekd->btkd", x, self.value[...])
        return rotate(q, positions, frequency), rotate(k, positions, frequency), v

    def finish(self, x: Array, y: Array) -> Array:
        """Residual x [B, T, E], attention output y [B, T, H, D] -> the next layer's x [B, T, E]."""
        expected = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        if y.shape != expected:
            raise ValueError(
                f"attention must return y [B, T, H, D] = {list(expected)}, got {list(y.shape)}"
            )
        x = x + jnp.einsum("bthd,hde->bte", y.astype(x.dtype), self.output[...])
        h = _rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        return x + (jax.nn.silu(h @ self.gate[...]) * (h @ self.up[...])) @ self.down[...]


class Transformer(nnx.Module):
    """The decoder. Call it under jit (`nnx.jit`, or `nnx.split` once and a pure function): an eager
    call compiles its scan anew.

    Args:
      config: the sizes.
      dtype: of parameters and computation; norms, rotary angles, softmax and logits are float32 in
        any case.
      rngs: for the random initial parameters.
    """

    def __init__(
        self, config: TransformerConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.embedding = _normal(rngs, (config.vocab_size, config.embed_dim), dtype)
        self.layers = TransformerLayer(config, stack=(config.num_layers,), dtype=dtype, rngs=rngs)
        self.final_norm = nnx.Param(jnp.ones((config.embed_dim,), dtype))
        if not config.tied_embeddings:
            self.head = _normal(rngs, (config.vocab_size, config.embed_dim), dtype)

    @property
    def attention_spec(self) -> AttentionSpec:
        """What `jbalance.adapters.decoder` asks about the attention of the layers."""
        c = self.config
        return AttentionSpec(c.num_heads, c.num_kv_heads, c.head_dim, tuple(c.frequencies.tolist()))

    def embed(self, tokens: Array, positions: Array | None = None) -> Array:
        """tokens [B, T] -> x [B, T, E]; positions enter with the rotary embedding of the layers."""
        del positions
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers [B, T], got {tokens.dtype} {list(tokens.shape)}"
            )
        return self.embedding[...][tokens]

    def layer(self, index: int) -> TransformerLayer:
        """Layer `index`, its parameters un-stacked, to run layer by layer (on several devices)."""
        if not 0 <= index < self.config.num_layers:
            raise ValueError(f"layer index must lie in [0, {self.config.num_layers}), got {index}")
        graphdef, parameters = nnx.split(self.layers)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], parameters))

    def run_layers(
        self,
        x: Array,
        positions: Array | None = None,
        attention: Attention = causal_attention,
        state: Any = None,
    ) -> tuple[Array, Any]:
        """All layers by one scan.

        Args:
          x: embedded tokens [B, T, E].
          positions: [T] or [B, T]; None counts from 0.
          attention: see `Attention`.
          state: pytree whose leaves have a leading axis L, of which each attention gets its slice.

        Returns:
          (residual stream after the last layer [B, T, E], the layer_states that the attention
          returned, stacked on a leading axis L; their structure may differ from the given one).
        """
        positions = jnp.arange(x.shape[1]) if positions is None else positions
        graphdef, parameters = nnx.split(self.layers)

        def step(x: Array, scanned: tuple[nnx.State, Any]) -> tuple[Array, Any]:
            layer = nnx.merge(graphdef, scanned[0])
            y, layer_state = attention(*layer.qkv(x, positions), scanned[1])
            return layer.finish(x, y), layer_state

        return jax.lax.scan(step, x, (parameters, state))

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        attention: Attention = causal_attention,
        state: Any = None,
    ) -> tuple[Array, Any]:
        """tokens [B, T] -> (h [B, T, E], state): `run_layers` of the embedded tokens.

        h is the residual stream before the final norm, which `logits` applies.
        """
        return self.run_layers(self.embed(tokens), positions, attention, state)

    def logits(self, h: Array) -> Array:
        """h [B, T, E] of `hidden` or of the last `layer` -> float32 logits [B, T, V].

        The final norm is applied here.
        """
        h = _rms_norm(h, self.final_norm[...], self.config.norm_eps)
        head = self.embedding if self.config.tied_embeddings else self.head
        return jnp.einsum("bte,ve->btv", h, head[...], preferred_element_type=jnp.float32)

    def __call__(
        self, tokens: Array, positions: Array | None = None, attention: Attention = causal_attention
    ) -> Array:
        """tokens [B, T] -> float32 logits [B, T, V]."""
        return self.logits(self.hidden(tokens, positions, attention)[0])
