"""Structured head pruning: the heads of least worth per parameter are removed, the arrays shrink."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jbalance import allocate, checks
from jbalance.adapters.modules import kv_heads_of, layer_by_layer


def head_gradients(model: nnx.Module, gradients: nnx.State) -> list[jax.Array]:
    """dL/dξ of a gate ξ = 1 on the output of each head, from the gradient that a step has anyway.

    The output of a head goes through its rows of the output kernel alone, so the gate's gradient is the
    sum of kernel times gradient over these rows. The mean of its square or size over some batches is
    what leaving the head out does to the loss, to first order.

    Args:
      model: with `nnx.MultiHeadAttention` in it.
      gradients: of a loss with respect to the model's parameters, as `nnx.grad` returns them.

    Returns:
      [K] float32 for each attention in the order of the graph: of the groups of query heads that share
      a key/value head.

    Raises:
      ValueError: layers stacked in one module, gradients of another model.

    Reference: Michel, Levy and Neubig, Are sixteen heads really better than one? (arXiv:1905.10650).
    """
    importances = []
    for path, layer in layer_by_layer(model):
        kernel, gradient = layer.out.kernel[...], _gradient_at(gradients, (*path, "out", "kernel"))
        if np.shape(gradient) != kernel.shape:
            raise ValueError(
                f"gradients has {np.shape(gradient)} at {path}: the kernel there is {kernel.shape}"
            )
        each = jnp.sum(kernel * gradient, axis=(1, 2))
        importances.append(jnp.sum(each.reshape(kv_heads_of(layer), -1), axis=1))
    return importances


def _gradient_at(gradients: Any, path: tuple[Any, ...]) -> Any:
    """The gradient of a parameter."""
    at = gradients
    for name in path:
        try:
            at = at[name]
        except (KeyError, TypeError, IndexError):
            raise ValueError(
                f"gradients has nothing at {path}: give what nnx.grad returns for this model"
            ) from None
    return at[...] if isinstance(at, nnx.Variable) else at


def heads_to_keep(model: nnx.Module, worth: Sequence[jax.Array], part: float) -> list[np.ndarray]:
    """The heads of most worth per parameter, one price for all layers (METHOD section 4).

    Args:
      model: with `nnx.MultiHeadAttention` in it.
      worth: [K] >= 0 for each attention, such as the mean square of `head_gradients`.
      part: of the parameters of all heads, in 0..1.

    Returns:
      [K] bool for each attention. A layer may lose all of its heads: its attention is then gone.

    Raises:
      ValueError: layers stacked in one module, worth that does not fit the model, is negative or not
        finite, a part outside 0..1.
    """
    layers, sizes, given = _of_each("worth", worth, model)
    numbers = [checks.non_negative(f"worth[{i}]", x) for i, x in enumerate(given)]
    part = checks.static_float("part", part, 0, 1)
    cost = np.concatenate(
        [np.full(n, _head_parameters(x), np.int64) for x, (n,) in zip(layers, sizes, strict=True)]
    )
    values = jnp.concatenate([jnp.asarray(x) for x in numbers])
    levels = allocate.ladder(
        jnp.stack([jnp.zeros_like(values), values], axis=1),
        np.stack([np.zeros_like(cost), cost], axis=1),
        int(part * cost.sum()),
    ).level
    ends = np.cumsum([n for (n,) in sizes])[:-1]
    return [np.asarray(x) > 0 for x in np.split(np.asarray(levels), ends)]


def prune_heads(model: nnx.Module, keep: Sequence[np.ndarray]) -> None:
    """Take heads out of a model: its arrays become smaller; changed in place.

    Args:
      model: with `nnx.MultiHeadAttention` in it.
      keep: [K] bool for each attention, of `heads_to_keep`.

    Raises:
      ValueError: layers stacked in one module, a keep that does not fit the model.
    """
    layers, sizes, given = _of_each("keep", keep, model)
    for i, (kept, size) in enumerate(zip(given, sizes, strict=True)):
        checks.booleans(f"keep[{i}]", kept, size, "[K]")
    for layer, kept in zip(layers, given, strict=True):
        group = layer.num_heads // kv_heads_of(layer)
        groups = np.flatnonzero(kept)
        heads = (groups[:, None] * group + np.arange(group)).reshape(-1)
        for name, chosen in (("query", heads), ("key", groups), ("value", groups)):
            projection = getattr(layer, name)
            _take(projection, "kernel", chosen, axis=1)
            _take(projection, "bias", chosen, axis=0)
            projection.out_features = (len(chosen), layer.head_dim)
        _take(layer.out, "kernel", heads, axis=0)
        layer.out.in_features = (len(heads), layer.head_dim)
        layer.num_heads, layer.num_kv_heads = len(heads), len(groups)
        layer.qkv_features = len(heads) * layer.head_dim
        if not len(heads):
            layer.attention_fn = _nothing


def _of_each(
    name: str, given: Any, model: nnx.Module
) -> tuple[list[nnx.MultiHeadAttention], list[tuple[int]], list[Any]]:
    """The attentions, their [K], and what is given of each; ValueError for other shapes."""
    layers = [layer for _, layer in layer_by_layer(model)]
    sizes = [(kv_heads_of(layer),) for layer in layers]
    given = checks.items(name, given, "[K] for each attention")
    if [np.shape(x) for x in given] != sizes:
        raise ValueError(
            f"{name} has shapes {[np.shape(x) for x in given]}: the model's attentions need {sizes}"
        )
    return layers, sizes, given


def _take(projection: Any, name: str, chosen: np.ndarray, axis: int) -> None:
    variable = getattr(projection, name)
    if variable is not None and variable.get_value() is not None:
        variable.set_value(jnp.take(variable[...], chosen, axis=axis))


def _nothing(query: jax.Array, key: jax.Array, value: jax.Array, **_: Any) -> jax.Array:
    """Attention without heads."""
    return query


def _head_parameters(layer: nnx.MultiHeadAttention) -> int:
    """Of one key/value head and the query heads that share it."""
    group = layer.num_heads // kv_heads_of(layer)
    query = layer.in_features + layer.use_bias
    key_value = 2 * (layer.in_kv_features + layer.use_bias)
    return layer.head_dim * (group * (query + layer.out_features) + key_value)
