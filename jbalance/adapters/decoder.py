"""A Flax model, nnx or linen, as a `decode.Model`: four functions, and the parameters of each layer.

This is how the library reaches a model's attention, whoever wrote the model: `qkv` hands over queries,
keys and values where the model has them, and `finish` takes the output where the model goes on.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jbalance import checks
from jbalance.decode.model import AttentionSpec, Model, check_model
from jbalance.importance import _rotary

_METHODS = {"model": ("embed", "logits"), "layer": ("qkv", "finish")}


class _Method:
    """A function of a module as one of its arrays; equal for modules of one structure.

    It takes the leaves of the state: to flatten a state costs more than a small program. The hash is
    kept, since every call of a program asks for it.
    """

    def __init__(self, static: Any, tree: Any, function: Callable[..., Any] | str) -> None:
        self.key = static, tree, function
        try:
            self.hash = hash(self.key)
        except TypeError:  # a module holds a configuration that can only be compared
            self.hash = hash((tree, function))

    def __call__(self, arrays: Any, *args: jax.Array) -> Any:
        static, tree, function = self.key
        return _call(function, _merged(static, jax.tree.unflatten(tree, arrays)), *args)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Method) and self.key == other.key)


@dataclasses.dataclass(frozen=True)
class _Rotated:
    """`qkv` followed by the rotary embedding of queries and keys."""

    qkv: Callable[..., Any] | str
    frequencies: tuple[float, ...] | None

    def __call__(self, layer: Any, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        q, k, v = _call(self.qkv, layer, x, positions)
        if self.frequencies is None:
            return q, k, v
        angle = positions[..., None, None] * jnp.asarray(self.frequencies, jnp.float32)
        q, k = (_rotary.turn(z.astype(jnp.float32), angle).astype(z.dtype) for z in (q, k))
        return q, k, v


def _call(function: Callable[..., Any] | str, module: Any, *args: jax.Array) -> Any:
    """A function of a module, or its method of that name."""
    return (
        getattr(module, function)(*args) if isinstance(function, str) else function(module, *args)
    )


def decoder(
    model: nnx.Module | linen.Module,
    attention: AttentionSpec | Sequence[AttentionSpec],
    *,
    layers: str = "layers",
    rotate: bool = False,
    embed: Callable[..., jax.Array] | None = None,
    qkv: Callable[..., tuple[jax.Array, ...]] | None = None,
    finish: Callable[..., jax.Array] | None = None,
    logits: Callable[..., jax.Array] | None = None,
) -> Model:
    """The decoder of a Flax model that computes everything but attention in four functions.

    They are methods of the model and its layers, or functions that are given here for a model whose code
    is another's: `embed(model, tokens, positions)`, `qkv(layer, x, positions)` gives q [B, T, H, D], k
    and v [B, T, K, D] after the rotary embedding, `finish(layer, x, y)` the next layer's x from
    attention's output y [B, T, H, D], and `logits(model, x)`.

    Args:
      model: with the layers in a list; in nnx also stacked in one module whose parameters have a first
        axis of L, which are copied once. A linen model with its variables, `model.bind(variables)`,
        whose layers `setup` makes.
      attention: of all layers, or of each.
      layers: name of the attribute that holds them.
      rotate: whether `qkv` leaves the rotary embedding out, which is then applied to q and k here, with
        each layer's `AttentionSpec.frequencies` (half-split convention).
      embed: None for the model's method `embed(tokens, positions)`.
      qkv: None for the layers' method `qkv(x, positions)`.
      finish: None for the layers' method `finish(x, y)`.
      logits: None for the model's method `logits(x)`.

    Returns:
      `Model`, which shares the other parameters.

    Raises:
      ValueError: functions that are neither given nor methods, fail, or give other shapes than
        `attention` says, a linen model that is not bound, or a number of `attention` that is not that of
        the layers.
    """
    if not isinstance(model, nnx.Module | linen.Module):
        raise ValueError(f"model is {reprlib.repr(model)}: it must be a module of nnx or linen")
    if not isinstance(layers, str):
        raise ValueError(f"layers is {reprlib.repr(layers)}: it must be an attribute's name")
    if isinstance(model, linen.Module) and model.scope is None:
        raise ValueError(
            f"model is a linen {type(model).__name__} without variables: give model.bind(variables)"
        )
    held = getattr(model, layers, None)
    if held is None:
        raise ValueError(
            f"model has no attribute {layers!r}: say with layers= what holds its layers"
        )
    parts = _layers(held, layers)
    given = {"embed": embed, "qkv": qkv, "finish": finish, "logits": logits}
    of = {name: name if x is None else x for name, x in given.items()}
    for name, x in given.items():
        if x is not None:
            checks.function(name, x)
    for thing, what in ((model, "model"), (_merged(*parts[0]), "layer")):
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
    alike = isinstance(attention, AttentionSpec)
    specs = tuple(
        [attention] * len(parts) if alike else checks.items("attention", attention, "AttentionSpec")
    )
    for i, spec in enumerate(specs):
        checks.instance(f"attention[{i}]", spec, AttentionSpec)
    if rotate and all(spec.frequencies is None for spec in specs):
        raise ValueError("rotate is True: no AttentionSpec has frequencies to rotate by")
    qkv_of = [_Rotated(of["qkv"], spec.frequencies) if rotate else of["qkv"] for spec in specs]
    static, state = _split(model)
    state = _without(model, state, layers, parts)
    params, tree = jax.tree.flatten(state)
    out = Model(
        tuple(params),
        tuple(tuple(jax.tree.leaves(own)) for _, own in parts),
        specs,
        _Method(static, tree, of["embed"]),
        _of_layers(parts, qkv_of),
        _of_layers(parts, [of["finish"]] * len(parts)),
        _Method(static, tree, of["logits"]),
    )
    check_model(out)
    _check_functions(out)
    return out


def _check_functions(model: Model) -> None:
    """ValueError for functions that fail, or give other shapes than the attention's; nothing is run."""
    one = jax.ShapeDtypeStruct((1, 1), np.int32)
    x = _shape_of("embed", model.embed, model.params, one, one)
    seen = set()
    for i, (own, spec) in enumerate(zip(model.layers, model.attention, strict=True)):
        f = model.functions(i)
        if (f.qkv, f.finish, spec) in seen:
            continue
        seen.add((f.qkv, f.finish, spec))
        got = _shape_of(f"qkv of layer {i}", f.qkv, own, x, one)
        heads = spec.num_heads, spec.num_kv_heads, spec.num_kv_heads
        want = [(1, 1, number, spec.head_dim) for number in heads]
        if not isinstance(got, tuple | list) or [np.shape(z) for z in got] != want:
            raise ValueError(
                f"qkv of layer {i} gives {[np.shape(z) for z in jax.tree.leaves(got)]} for one token: "
                f"by its AttentionSpec q, k and v [B, T, heads, D] must be {want}"
            )
        after = _shape_of(f"finish of layer {i}", f.finish, own, x, got[0])
        if np.shape(after) != np.shape(x):
            raise ValueError(
                f"finish of layer {i} gives {np.shape(after)}: it must be x as embed gives it, "
                f"{np.shape(x)}"
            )
    _shape_of("logits", model.logits, model.params, x)


def _shape_of(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Shapes of what a function of the model gives."""
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:  # the model's own, of any kind
        raise ValueError(
            f"{what} cannot be called on one token: {type(error).__name__}: {str(error)[:300]}"
        ) from error


_NOTHING = np.zeros(0, np.float32)  # in the place of the layers' parameters in the model's own


def _split(module: Any) -> tuple[Any, Any]:
    """What of a module is static, and its arrays."""
    return module.unbind() if isinstance(module, linen.Module) else nnx.split(module)


def _merged(static: Any, state: Any) -> Any:
    """The module again."""
    return static.bind(state) if isinstance(static, linen.Module) else nnx.merge(static, state)


def _of_layers(parts, functions) -> Any:
    """One function, or one of each layer where their structures differ.

    Equal ones are one object: to compare structures costs more than a small program.
    """
    kinds: list[_Method] = []
    each = []
    for (static, state), function in zip(parts, functions, strict=False):  # `check_model` counts
        own = _Method(static, jax.tree.structure(state), function)
        found = next((x for x in kinds if x == own), own)
        if found is own:
            kinds.append(own)
        each.append(found)
    return kinds[0] if len(kinds) == 1 else tuple(each)


def _without(model, state, layers, parts) -> Any:
    """The state of a model without its layers' parameters."""
    if isinstance(model, linen.Module):  # which may call its layers otherwise than the attribute
        theirs = {id(x) for _, own in parts for x in jax.tree.leaves(own)}
        return jax.tree.map(lambda x: _NOTHING if id(x) in theirs else x, state)
    return jax.tree.map_with_path(lambda path, x: _NOTHING if _is_in(path, layers) else x, state)


def _is_in(path, name) -> bool:
    """Whether a leaf's path begins with the attribute."""
    first = path[0]
    return getattr(first, "key", getattr(first, "name", None)) == name


@jax.jit
def _layer_of(stacked, index):
    """The arrays of one layer of a stack, all by one program."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)


def _layers(held, name) -> list[tuple[Any, Any]]:
    """What is static of each layer, and its arrays."""
    if isinstance(held, linen.Module):
        raise ValueError(
            f"model.{name} is one linen {type(held).__name__}: a list of layers is needed, without "
            f"nn.scan; for stacked parameters make a decode.Model, layer by layer"
        )
    if isinstance(held, Mapping | nnx.Dict):
        raise ValueError(f"model.{name} is a mapping: the layers' order is that of a list")
    if isinstance(held, nnx.Module) and not isinstance(held, nnx.List):
        sizes = {x.shape[:1] for x in jax.tree.leaves(nnx.state(held))}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(
                f"model.{name} has parameters with first axes {sorted(sizes)}: a stack of layers has one"
            )
        static, state = nnx.split(held)
        number = sizes.pop()[0]
        return [(static, _layer_of(state, i)) for i in range(number)]
    parts = [_split(layer) for layer in checks.items(f"model.{name}", held, "layers")]
    if not parts:
        raise ValueError(f"model.{name} is empty")
    return parts
