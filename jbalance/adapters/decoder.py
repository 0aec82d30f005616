"""A Flax nnx model as a `decode.Model`: four functions, and the parameters of each layer.

This is how the library reaches a model's attention, whoever wrote the model: `qkv` hands over queries,
keys and values where the model has them, and `finish` takes the output where the model goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jbalance.decode.model import AttentionSpec, Model, check_model

_METHODS = {"model": ("embed", "logits"), "layer": ("qkv", "finish")}


class _Method:
    """A function of a module as one of its arrays; equal for modules of one structure.

    It takes the leaves of the state: to flatten a state costs more than a small program. The hash is
    kept, since every call of a program asks for it.
    """

    def __init__(self, graph: nnx.GraphDef, tree: Any, function: Callable[..., Any] | str) -> None:
        self.key = graph, tree, function
        self.hash = hash(self.key)

    def __call__(self, arrays: Any, *args: jax.Array) -> Any:
        graph, tree, function = self.key
        module = nnx.merge(graph, jax.tree.unflatten(tree, arrays))
        if isinstance(function, str):
            return getattr(module, function)(*args)
        return function(module, *args)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Method) and self.key == other.key)


def decoder(
    model: nnx.Module,
    attention: AttentionSpec | Sequence[AttentionSpec],
    *,
    layers: str = "layers",
    embed: Callable[..., jax.Array] | None = None,
    qkv: Callable[..., tuple[jax.Array, ...]] | None = None,
    finish: Callable[..., jax.Array] | None = None,
    logits: Callable[..., jax.Array] | None = None,
) -> Model:
    """The decoder of an nnx model that computes everything but attention in four functions.

    They are methods of the model and its layers, or functions that are given here for a model whose code
    is another's: `embed(model, tokens, positions)`, `qkv(layer, x, positions)` gives q [B, T, H, D], k
    and v [B, T, K, D] after the rotary embedding, `finish(layer, x, y)` the next layer's x from
    attention's output y [B, T, H, D], and `logits(model, x)`.

    Args:
      model: with the layers in a list, or stacked in one module whose parameters have a first axis of L,
        which are copied once.
      attention: of all layers, or of each.
      layers: name of the attribute that holds them.
      embed: None for the model's method `embed(tokens, positions)`.
      qkv: None for the layers' method `qkv(x, positions)`.
      finish: None for the layers' method `finish(x, y)`.
      logits: None for the model's method `logits(x)`.

    Returns:
      `Model`, which shares the other parameters.

    Raises:
      ValueError: functions that are neither given nor methods, or a number of `attention` that is not
        that of the layers.
    """
    held = getattr(model, layers, None)
    if held is None:
        raise ValueError(
            f"model has no attribute {layers!r}: say with layers= what holds its layers"
        )
    parts = _layers(held, layers)
    given = {"embed": embed, "qkv": qkv, "finish": finish, "logits": logits}
    of = {name: name if x is None else x for name, x in given.items()}
    for thing, what in ((model, "model"), (nnx.merge(*parts[0]), "layer")):
        missing = [
            name
            for name in _METHODS[what]
            if given[name] is None and not callable(getattr(thing, name, None))
        ]
        if missing:
            raise ValueError(
                f"{what} {type(thing).__name__} has no method {', '.join(missing)}: write it, or give "
                f"{missing[0]}= as a function of the {what}"
            )
    graph, state = nnx.split(model)
    state = jax.tree.map_with_path(lambda path, x: _NOTHING if _is_in(path, layers) else x, state)
    specs = (attention,) * len(parts) if isinstance(attention, AttentionSpec) else tuple(attention)
    params, tree = jax.tree.flatten(state)
    out = Model(
        tuple(params),
        tuple(tuple(jax.tree.leaves(state)) for _, state in parts),
        specs,
        _Method(graph, tree, of["embed"]),
        _of_layers(parts, of["qkv"]),
        _of_layers(parts, of["finish"]),
        _Method(graph, tree, of["logits"]),
    )
    check_model(out)
    return out


_NOTHING = np.zeros(0, np.float32)  # in the place of the layers' parameters in the model's own


def _of_layers(parts, function) -> Any:
    """One function, or one of each layer where their structures differ."""
    all_ = tuple(_Method(graph, jax.tree.structure(state), function) for graph, state in parts)
    return all_[0] if all(x == all_[0] for x in all_) else all_


def _is_in(path, name) -> bool:
    """Whether a leaf's path begins with the attribute."""
    first = path[0]
    return getattr(first, "key", getattr(first, "name", None)) == name


def _layers(held, name) -> list[tuple[nnx.GraphDef, Any]]:
    """The structure and the state of each layer."""
    if isinstance(held, nnx.Module) and not isinstance(held, nnx.List):
        sizes = {x.shape[:1] for x in jax.tree.leaves(nnx.state(held))}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(
                f"model.{name} has parameters with first axes {sorted(sizes)}: a stack of layers has one"
            )
        graph, state = nnx.split(held)
        number = sizes.pop()[0]
        return [(graph, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(number)]
    parts = [nnx.split(layer) for layer in held]
    if not parts:
        raise ValueError(f"model.{name} is empty")
    return parts
