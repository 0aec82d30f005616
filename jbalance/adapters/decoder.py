"""A Flax nnx model as a `decode.Model`: four methods, and parameters stacked over the layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jbalance.decode.model import AttentionSpec, Model, check_model

_METHODS = {"model": ("embed", "logits"), "layer": ("qkv", "finish")}


class _Method:
    """A method of a module as a function of its arrays; equal for modules of one structure.

    It takes the leaves of the state: to flatten a state costs more than a small program. The hash is
    kept, since every call of a program asks for it.
    """

    def __init__(self, graph: nnx.GraphDef, tree: Any, name: str) -> None:
        self.key = graph, tree, name
        self.hash = hash(self.key)

    def __call__(self, arrays: Any, *args: jax.Array) -> Any:
        graph, tree, name = self.key
        return getattr(nnx.merge(graph, jax.tree.unflatten(tree, arrays)), name)(*args)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Method) and self.key == other.key)


def decoder(
    model: nnx.Module,
    attention: AttentionSpec | Sequence[AttentionSpec],
    *,
    layers: str = "layers",
) -> Model:
    """The decoder of an nnx model that computes everything but attention in four methods.

    The model has `embed(tokens, positions)` and `logits(x)`; each of its layers has `qkv(x, positions)`,
    which gives q [B, T, H, D], k and v [B, T, K, D] after the rotary embedding, and `finish(x, y)`,
    which gives the next layer's x from attention's output y [B, T, H, D].

    Args:
      model: with the layers either in a list, all of one structure, or stacked in one module whose
        parameters have a first axis of L, which are copied once.
      attention: of all layers, or of each.
      layers: name of the attribute that holds them.

    Returns:
      `Model`, which shares the other parameters.

    Raises:
      ValueError: methods that are missing, layers of different structure, or a number of `attention`
        that is not theirs.
    """
    held = getattr(model, layers, None)
    if held is None:
        raise ValueError(
            f"model has no attribute {layers!r}: say with layers= what holds its layers"
        )
    one, states = _layers(held, layers)
    for thing, what in ((model, "model"), (one, "layer")):
        missing = [name for name in _METHODS[what] if not callable(getattr(thing, name, None))]
        if missing:
            raise ValueError(f"{what} {type(thing).__name__} has no method {', '.join(missing)}")
    graph, state = nnx.split(model)
    state = jax.tree.map_with_path(lambda path, x: _NOTHING if _is_in(path, layers) else x, state)
    specs = (attention,) * len(states) if isinstance(attention, AttentionSpec) else tuple(attention)
    params, tree = jax.tree.flatten(state)
    of_model = functools.partial(_Method, graph, tree)
    of_layer = functools.partial(_Method, nnx.split(one)[0], jax.tree.structure(states[0]))
    out = Model(
        tuple(params),
        tuple(tuple(jax.tree.leaves(layer)) for layer in states),
        specs,
        of_model("embed"),
        of_layer("qkv"),
        of_layer("finish"),
        of_model("logits"),
    )
    check_model(out)
    return out


_NOTHING = np.zeros(0, np.float32)  # in the place of the layers' parameters in the model's own


def _is_in(path, name) -> bool:
    """Whether a leaf's path begins with the attribute."""
    first = path[0]
    return getattr(first, "key", getattr(first, "name", None)) == name


def _layers(held, name) -> tuple[nnx.Module, list[Any]]:
    """One layer, and the state of each."""
    if isinstance(held, nnx.Module) and not isinstance(held, nnx.List):
        sizes = {x.shape[:1] for x in jax.tree.leaves(nnx.state(held))}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(
                f"model.{name} has parameters with first axes {sorted(sizes)}: a stack of layers has one"
            )
        state = nnx.split(held)[1]
        return held, [jax.tree.map(lambda x, i=i: x[i], state) for i in range(sizes.pop()[0])]
    parts = [nnx.split(layer) for layer in held]
    if not parts:
        raise ValueError(f"model.{name} is empty")
    for i, (graph, _) in enumerate(parts):
        if graph != parts[0][0]:
            raise ValueError(f"model.{name}[{i}] differs in structure from model.{name}[0]")
    return held[0], [state for _, state in parts]
