"""What a decoder offers, so that it can be decoded within memories: four functions and their arrays.

    x = embed(params, tokens, positions)             [B, T] -> [B, T, E]
    q, k, v = qkv(layer, x, positions)               of each layer, rotated, unscaled
    x = finish(layer, x, y)                          y [B, T, H, D], what attention returned
    logits = logits(params, x)                       [B, T, E] -> [B, T, V]

A program is compiled for each kind of layers (parameters of one structure, the same functions and
attention) and runs all of them, whatever their number. `adapters.decoder` makes a `Model` of a Flax
module with methods of these names, or with functions beside it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks
from jbalance.cache._sight import MOST_WINDOW, NO_WINDOW, Limits
from jbalance.importance.predicted_worth import WorthWeights
from jbalance.resources import kv_entry_bytes


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
            checks.static_float("scale", self.scale, -checks.SCALE_MAX, checks.SCALE_MAX)
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

    @property
    def rotary(self) -> np.ndarray | None:
        """[D/2] float32: `frequencies` as an array."""
        return None if self.frequencies is None else np.asarray(self.frequencies, np.float32)

    @property
    def limits(self) -> Limits:
        """What a query sees."""
        return Limits(self.window, self.soft_cap)


class Functions(NamedTuple):
    """What of a model and a kind of its layers is static: the key of their programs."""

    embed: Callable[..., jax.Array]
    qkv: Callable[..., tuple[jax.Array, ...]]
    finish: Callable[..., jax.Array]
    logits: Callable[..., jax.Array]
    spec: AttentionSpec

    @property
    def limits(self) -> Limits:
        """Of the layer's attention."""
        return self.spec.limits


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder as pure functions, which must be hashable, and their arrays.

    Attributes:
      params: what `embed` and `logits` need.
      layers: the parameters of each of the L layers.
      attention: of each layer.
      embed: (params, tokens [B, T], positions [B, T]) -> x [B, T, E].
      qkv: (layer, x, positions) -> q [B, T, H, D], k and v [B, T, K, D]; one for all layers, or a tuple
        of each layer's.
      finish: (layer, x, y [B, T, H, D]) -> x; one, or a tuple of each layer's.
      logits: (params, x) -> [B, T, V].
      worth: of each layer, what predicts what is asked of a prompt's tokens, by `decode.fit_worth`; None
        for layers, or a model, where it is estimated from a sketch (`importance.token_worth`).
    """

    params: Any
    layers: tuple[Any, ...]
    attention: tuple[AttentionSpec, ...]
    embed: Callable[..., jax.Array]
    qkv: Callable[..., tuple[jax.Array, ...]] | tuple[Callable[..., tuple[jax.Array, ...]], ...]
    finish: Callable[..., jax.Array] | tuple[Callable[..., jax.Array], ...]
    logits: Callable[..., jax.Array]
    worth: tuple[WorthWeights | None, ...] | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def num_kv_heads(self) -> int:
        """K, of all layers."""
        return self.attention[0].num_kv_heads

    @property
    def head_dim(self) -> int:
        """D, of all layers."""
        return self.attention[0].head_dim

    @property
    def learned(self) -> bool:
        """Whether what tokens are worth is learned in all layers that see all of them (`fit_worth`)."""
        worth = () if self.worth is None else self.worth
        return bool(worth) and all(
            w is not None for w, spec in zip(worth, self.attention, strict=True) if not spec.window
        )

    @property
    def windows(self) -> tuple[int | None, ...] | None:
        """Of each layer; None if no layer has one."""
        return windows_of(self.attention)

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return sum(x.nbytes for x in jax.tree.leaves((self.params, self.layers)))

    def dense_bytes(self, num_tokens: int, *, bits: int = 16) -> int:
        """Bytes of a dense cache of one request; a layer with a window keeps only that."""
        num_tokens = checks.static_int("num_tokens", num_tokens)
        return sum(
            spec.num_kv_heads
            * min(num_tokens, spec.window or num_tokens)
            * kv_entry_bytes(spec.head_dim, bits)
            for spec in self.attention
        )

    def functions(self, layer: int) -> Functions:
        """What is static of a layer: those of one kind share their programs."""
        qkv = self.qkv[layer] if isinstance(self.qkv, tuple) else self.qkv
        finish = self.finish[layer] if isinstance(self.finish, tuple) else self.finish
        return Functions(self.embed, qkv, finish, self.logits, self.attention[layer])


def token_ids(name: str, x: Any, model: Model, least: int = 1) -> np.ndarray:
    """Ids [S] in int32 on the host; ValueError unless they are the model's, and so many at least."""
    checks.instance("model", model, Model)
    checks.rank(name, x, 1, "[S]")
    if np.size(x) < least:
        many = f"has {np.size(x)} tokens" if np.size(x) else "is empty"
        raise ValueError(f"{name} {many}: at least {least} are needed")
    return np.asarray(in_vocabulary(name, checks.whole(name, x), model))


def vocabulary_of(model: Model) -> int:
    """V, of its logits."""
    leaves, tree = jax.tree.flatten(model.params)
    shapes = tuple((x.shape, x.dtype) for x in leaves)
    return _vocabulary(model.functions(0), tree, shapes)


@functools.lru_cache(maxsize=32)
def _vocabulary(functions: Functions, tree: Any, shapes: tuple[Any, ...]) -> int:
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*x) for x in shapes])
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def logits(params, tokens):
        return functions.logits(params, functions.embed(params, tokens, tokens))

    return jax.eval_shape(logits, params, one).shape[-1]


def in_vocabulary(name: str, tokens: Any, model: Model) -> Any:
    """`tokens`; ValueError for concrete ids that the model has no logit for, and so no embedding.

    JAX reads another row, or NaN, for an index beyond an array.
    """
    if checks.is_concrete(tokens) and np.size(tokens):
        checks.index_below(name, tokens, vocabulary_of(model))
    return tokens


def check_numbers(what: str, logits: Any) -> None:
    """ValueError for logits, or what follows from them, with NaN: the model's weights are none, say."""
    if bool(jnp.any(jnp.isnan(logits))):
        raise ValueError(
            f"model gives NaN {what}: its parameters hold numbers that are not finite, or its type is "
            f"too narrow for what it computes"
        )


def budgets_of(budgets_bytes: Any) -> list[int]:
    """Bytes of each device; ValueError unless they are whole and >= 0, one or more."""
    given = checks.items("budgets_bytes", budgets_bytes, "bytes of each device")
    if not given:
        raise ValueError("budgets_bytes is empty: give the bytes of each device")
    return [checks.static_int(f"budgets_bytes[{d}]", x, 0, 2**62) for d, x in enumerate(given)]


def windows_of(attention: Sequence[AttentionSpec]) -> tuple[int | None, ...] | None:
    """Of each layer; None if no layer has one."""
    windows = tuple(spec.window for spec in attention)
    return None if all(w is None for w in windows) else windows


def in_windows(
    windows: tuple[int | None, ...] | None, num_kv_heads: int, num_tokens: int
) -> np.ndarray | None:
    """[L K, S]: the tokens in each layer's window behind the last; None if no layer has a window."""
    if windows is None:
        return None
    age = num_tokens - np.arange(num_tokens)
    seen = [age < (NO_WINDOW if w is None else w) for w in windows]
    return np.repeat(np.stack(seen), num_kv_heads, axis=0)


def check_model(model: Model) -> None:
    """ValueError for a model whose attention cannot be decoded here, which names the layer and why."""
    checks.instance("model", model, Model)
    if not model.attention:
        raise ValueError("model.attention is empty: give the AttentionSpec of each layer")
    if len(model.attention) != model.num_layers:
        raise ValueError(
            f"model.attention has {len(model.attention)} entries for {model.num_layers} layers"
        )
    for name in ("qkv", "finish"):
        given = getattr(model, name)
        if isinstance(given, tuple) and len(given) != model.num_layers:
            raise ValueError(
                f"model.{name} has {len(given)} functions for {model.num_layers} layers: give one for "
                f"all, or one for each"
            )
    check_attention(model.attention)
    if model.worth is not None:
        _check_worth(model.worth, model.attention)


def _check_worth(given: Sequence[Any], attention: Sequence[AttentionSpec]) -> None:
    """ValueError for weights that are not those of the model's layers."""
    if len(given) != len(attention):
        raise ValueError(f"model.worth has {len(given)} entries for {len(attention)} layers")
    for i, (worth, spec) in enumerate(zip(given, attention, strict=True)):
        if worth is None:
            continue
        checks.instance(f"model.worth[{i}]", worth, WorthWeights)
        if spec.window is not None:
            raise ValueError(f"model.worth[{i}] must be None: layer {i} has a window")
        heads = spec.num_kv_heads
        got = tuple(np.shape(part)[-1] for part in worth)
        if got != (heads,) * 3 or np.shape(worth.features) != (5 + 2 * heads, heads):
            raise ValueError(
                f"model.worth[{i}] has weights of shapes {[np.shape(part) for part in worth]}: layer "
                f"{i} has {heads} key/value heads"
            )


def check_attention(attention: Sequence[AttentionSpec]) -> None:
    """ValueError for layers whose attention cannot share a cache, which names the layer and why."""
    for i, spec in enumerate(attention):
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            own, first = getattr(spec, name), getattr(attention[0], name)
            if own != first:
                raise ValueError(
                    f"layer {i} has {name} = {own} and layer 0 {first}: all layers must have the same "
                    f"heads; their windows, frequencies, scales and caps may differ"
                )
        if spec.window is not None and spec.window > MOST_WINDOW:
            raise ValueError(
                f"layer {i} has window = {spec.window}: windows up to {MOST_WINDOW} are decoded within "
                f"a budget; give None if no text is longer"
            )
