"""A decoder in Flax nnx: stacked layers, one scan over them, one replaceable attention.

Shape letters: B batch, T tokens, L layers, H query heads, K key/value heads, D head dim,
E embedding, F MLP, X experts, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments.models.attention import Scoring, causal_attention
from experiments.models.config import ACTIVATIONS, NO_WINDOW, TransformerConfig
from experiments.models.experts import Gated, gated, mixture
from experiments.models.rotary import rotate
from jbalance.decode import AttentionSpec

Attention = Callable[..., tuple[Array, Any]]
"""(q [B, T, H, D], k [B, T, K, D], v [B, T, K, D], layer_state) -> (y [B, T, H, D], layer_state).

q and k come rotated and q unscaled: the attention applies 1/sqrt(D) itself. What it needs besides
(positions, lengths, the layer's index) it closes over or finds in `layer_state`. Models with windows, a
scale of their own or a soft cap hand it `scoring`, a keyword argument, and refuse attentions without.
"""


class Fixed(nnx.Variable):
    """What differs between layers and is not trained: rotary frequencies and windows."""


def fixed_arrays(config: TransformerConfig) -> dict[str, np.ndarray]:
    """The `Fixed` variables of the stacked layers by name, each with a first axis L."""
    arrays = {"frequency": config.frequencies}
    if config.has_amplitudes:
        arrays["amplitude"] = config.amplitudes
    if config.windows is not None:
        windows = [NO_WINDOW if window is None else window for window in config.windows]
        arrays["window"] = np.asarray(windows, np.int32)
    return arrays


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> nnx.Param[Array]:
    return nnx.Param(_drawn(rngs.params(), shape, dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x [..., E] over its root mean square, in float32 whatever x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale


class TransformerLayer(nnx.Module):
    """Decoder layers around an attention that the caller runs between `qkv` and `finish`.

    It is made with a first axis of L in every variable, to scan over; its methods are those of one
    layer, which a scan or `Transformer.layer` makes of it.

    Args:
      config: the sizes and options.
      dtype: of parameters and computation.
    """

    frequency: Fixed
    amplitude: Fixed
    window: Fixed

    def __init__(
        self, config: TransformerConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        c, self.config = config, config

        def normal(*shape: int) -> nnx.Param[Array]:
            return _normal(rngs, (c.num_layers, *shape), dtype)

        def filled(value: float, *shape: int) -> nnx.Param[Array]:
            return nnx.Param(jnp.full((c.num_layers, *shape), value, dtype))

        self.attention_norm = filled(1, c.embed_dim)
        self.query = normal(c.embed_dim, c.num_heads, c.head_dim)
        self.key = normal(c.embed_dim, c.num_kv_heads, c.head_dim)
        self.value = normal(c.embed_dim, c.num_kv_heads, c.head_dim)
        self.output = normal(c.num_heads, c.head_dim, c.embed_dim)
        self.mlp_norm = filled(1, c.embed_dim)
        experts = (c.num_experts,) if c.num_experts else ()
        self.gate = normal(*experts, c.embed_dim, c.hidden_dim)
        self.up = normal(*experts, c.embed_dim, c.hidden_dim)
        self.down = normal(*experts, c.hidden_dim, c.embed_dim)
        if experts:
            self.router = normal(c.embed_dim, c.num_experts)
        if c.qkv_bias:
            self.query_bias = filled(0, c.num_heads, c.head_dim)
            self.key_bias = filled(0, c.num_kv_heads, c.head_dim)
            self.value_bias = filled(0, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            self.query_norm = filled(1, c.head_dim)
            self.key_norm = filled(1, c.head_dim)
        if c.post_norms:
            self.post_attention_norm = filled(1, c.embed_dim)
            self.post_mlp_norm = filled(1, c.embed_dim)
        for name, array in fixed_arrays(c).items():
            setattr(self, name, Fixed(jnp.asarray(array)))

    @property
    def scoring(self) -> Scoring:
        """How the layer's attention weighs what it sees."""
        c = self.config
        window = None if c.windows is None else self.window[...]
        return Scoring(c.scale, c.attention_soft_cap, window)

    def qkv(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Attention inputs of x [B, T, E] at positions [T] or [B, T].

        Returns:
          Rotated q [B, T, H, D], rotated k [B, T, K, D], v [B, T, K, D].
        """
        c = self.config
        x = self._norm(x, self.attention_norm)
        q = jnp.einsum("bte,ehd->bthd", x, self.query[...])
        k = jnp.einsum("bte,ekd->btkd", x, self.key[...])
        v = jnp.einsum("bte,ekd->btkd", x, self.value[...])
        if c.qkv_bias:
            q, k, v = q + self.query_bias[...], k + self.key_bias[...], v + self.value_bias[...]
        if c.qk_norm:
            q, k = self._norm(q, self.query_norm), self._norm(k, self.key_norm)
        amplitude = self.amplitude[...] if c.has_amplitudes else None
        turn = functools.partial(
            rotate, positions=positions, frequency=self.frequency[...], amplitude=amplitude
        )
        return turn(q), turn(k), v

    def finish(self, x: Array, y: Array) -> Array:
        """Residual x [B, T, E], attention output y [B, T, H, D] -> the next layer's x [B, T, E]."""
        c = self.config
        expected = (*x.shape[:2], c.num_heads, c.head_dim)
        if y.shape != expected:
            raise ValueError(
                f"attention must return y [B, T, H, D] = {list(expected)}, got {list(y.shape)}"
            )
        # One axis of H D to sum over: for two XLA would transpose the weights at every call.
        output = self.output[...].reshape(-1, c.embed_dim)
        attended = y.reshape(*x.shape[:2], -1).astype(x.dtype) @ output
        if c.post_norms:
            attended = self._norm(attended, self.post_attention_norm)
        x = x + attended
        passed = self._mlp(self._norm(x, self.mlp_norm))
        return x + (self._norm(passed, self.post_mlp_norm) if c.post_norms else passed)

    def _mlp(self, h: Array) -> Array:
        c, mlp = self.config, Gated(self.gate[...], self.up[...], self.down[...])
        activation = ACTIVATIONS[c.activation]
        if not c.num_experts:
            return gated(h, mlp, activation)
        number, normalized = c.experts_per_token, c.normalized_experts
        return mixture(
            h, self.router[...], mlp, activation, per_token=number, normalized=normalized
        )

    def _norm(self, x: Array, scale: nnx.Param[Array]) -> Array:
        return _rms_norm(x, scale[...], self.config.norm_eps)


def _check_takes_scoring(attention: Attention) -> None:
    """Refuses an attention that would score every token alike where the model does not."""
    parameters = inspect.signature(attention).parameters.values()
    if not any(p.name == "scoring" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"attention {getattr(attention, '__name__', attention)!r} takes no `scoring`: this model "
            f"has windows, a scale of its own or a soft cap, which it must honor"
        )


class Transformer(nnx.Module):
    """The decoder. Call it under jit (`nnx.jit`, or `nnx.split` once and a pure function): an eager
    call compiles its scan anew.

    Args:
      config: the sizes.
      dtype: of parameters and computation; norms, rotary angles, softmax and logits are float32 in
        any case.
      rngs: for the random initial parameters.
    """

    frequency: Fixed
    amplitude: Fixed
    window: Fixed

    def __init__(
        self, config: TransformerConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.embedding = _normal(rngs, (config.vocab_size, config.embed_dim), dtype)
        self.layers = TransformerLayer(config, dtype=dtype, rngs=rngs)
        self.final_norm = nnx.Param(jnp.ones((config.embed_dim,), dtype))
        if not config.tied_embeddings:
            self.head = _normal(rngs, (config.vocab_size, config.embed_dim), dtype)

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """What `jbalance.adapters.decoder` asks about the attention of each layer."""
        c = self.config
        sizes = c.num_heads, c.num_kv_heads, c.head_dim
        windows = c.windows or (None,) * c.num_layers
        return tuple(
            AttentionSpec(*sizes, tuple(row.tolist()), c.scale, window, c.attention_soft_cap)
            for row, window in zip(c.frequencies, windows, strict=True)
        )

    @property
    def attention_spec(self) -> AttentionSpec:
        """That of all layers.

        Raises:
          ValueError: layers differ.
        """
        first, *others = self.attention_specs
        for i, spec in enumerate(others, 1):
            if spec != first:
                raise ValueError(
                    f"layer {i} attends with {spec} and layer 0 with {first}: no one specification "
                    f"holds for all layers, take attention_specs"
                )
        return first

    def embed(self, tokens: Array, positions: Array | None = None) -> Array:
        """tokens [B, T] -> x [B, T, E]; positions enter with the rotary embedding of the layers."""
        del positions
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers [B, T], got {tokens.dtype} {list(tokens.shape)}"
            )
        x = self.embedding[...][tokens]
        scale = self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

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
          positions: [T] or [B, T]; None counts from 0, up to the config's `max_positions`.
          attention: see `Attention`.
          state: pytree whose leaves have a leading axis L, of which each attention gets its slice.

        Returns:
          (residual stream after the last layer [B, T, E], the layer_states that the attention
          returned, stacked on a leading axis L; their structure may differ from the given one).
        """
        if positions is None:
            if x.shape[1] > self.config.max_positions:
                raise ValueError(
                    f"{x.shape[1]} tokens are more than max_positions={self.config.max_positions}: load "
                    f"the model with max_positions for longer contexts than those of its training"
                )
            positions = jnp.arange(x.shape[1])
        graphdef, parameters = nnx.split(self.layers)
        is_plain = self.config.scores_plainly
        if not is_plain:
            _check_takes_scoring(attention)

        def step(x: Array, scanned: tuple[nnx.State, Any]) -> tuple[Array, Any]:
            layer = nnx.merge(graphdef, scanned[0])
            more = {} if is_plain else {"scoring": layer.scoring}
            y, layer_state = attention(*layer.qkv(x, positions), scanned[1], **more)
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
        logits = jnp.einsum("bte,ve->btv", h, head[...], preferred_element_type=jnp.float32)
        cap = self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def __call__(
        self, tokens: Array, positions: Array | None = None, attention: Attention = causal_attention
    ) -> Array:
        """tokens [B, T] -> float32 logits [B, T, V]."""
        return self.logits(self.hidden(tokens, positions, attention)[0])
