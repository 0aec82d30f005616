"""A model's weights in a few bits each, decoded a layer at a time where they are used.

What stays in memory are the packed bits. A layer's program decodes its own weights; the table of tokens
is never decoded as a whole: an embedding takes the rows that it needs, the logits go through the
vocabulary in parts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.cache import _planes
from jbalance.decode.model import Model, check_model, vocabulary_of

GROUP = 64  # weights that share a scale
BITS = (3, 4, 5, 8, 16)
# Steps that are tried, of that whose codes just reach the largest value; rounded down the last does.
_RANGES = (*np.linspace(0.7, 1.0, 7), 1 + 2**-7)
_PART = 4096  # of the vocabulary, whose rows are decoded together
_TOLERANCE = 1e-4  # of logits and embeddings in parts, relative to the largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array of weights as codes: x ≈ (code - 2^(bits - 1)) · scale of its group."""

    packed: jax.Array  # [..., GROUP · bits / 8, M] uint8, of groups [..., M]
    scale: jax.Array  # [..., M] bfloat16, the step; negative where the largest value is positive
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def part(self, start: jax.Array, size: int) -> QuantizedArray:
        """Rows of a table from `start` on."""
        packed, scale = (
            lax.dynamic_slice_in_dim(x, start, size) for x in (self.packed, self.scale)
        )
        return dataclasses.replace(self, packed=packed, scale=scale, shape=(size, *self.shape[1:]))

    def rows(self, index: jax.Array) -> jax.Array:
        """Decoded rows [T, ...] of a table."""
        shape = (*index.shape, *self.shape[1:])
        return _decoded(self.packed[index], self.scale[index], self.bits, shape, self.dtype)

    def decoded(self) -> jax.Array:
        """All of it."""
        return _decoded(self.packed, self.scale, self.bits, self.shape, self.dtype)


@in_32_bits
def quantize_weights(
    model: Model,
    layer_bits: int | Sequence[int | None] | None,
    table_bits: int | None = None,
) -> Model:
    """Round-to-nearest weight quantization in groups of 64 along the axes that products sum.

    Matrices of the layers, and those of the embedding and the logits, become codes; vectors, and what
    does not divide into groups, stay. The model decodes as before, with a layer's weights decoded where
    they are used, which costs time in each step: it is for models that do not fit otherwise.

        small = decode.quantize_weights(model, 4, 8)
        state = decode.create(small, [budget])

    Args:
      model: the decoder.
      layer_bits: of all layers, or of each: 3, 4, 5, 8 or 16; None for a layer as it is. Layers of
        different bits have programs of their own.
      table_bits: of what `embed` and `logits` use; None for as it is.

    Returns:
      The `Model`; `Model.nbytes` says what it takes.

    Raises:
      ValueError: other bits; another number of layers; weights that are quantized already, or not
        finite; an embedding that is more than rows of a table, or logits that are not separate in the
        tokens of the vocabulary.
    """
    check_model(model)
    given = [layer_bits] * model.num_layers if _one(layer_bits) else layer_bits
    bits = checks.items("layer_bits", given, "bits of each layer, or one for all")
    if len(bits) != model.num_layers:
        raise ValueError(f"layer_bits has {len(bits)} entries for {model.num_layers} layers")
    for i, each in enumerate(bits):
        _check_bits(f"layer_bits[{i}]", each)
    _check_bits("table_bits", table_bits)
    check_plain(model)
    out = dataclasses.replace(
        model,
        layers=tuple(
            quantized(f"model.layers[{i}]", own, each)
            for i, (own, each) in enumerate(zip(model.layers, bits, strict=True))
        ),
        qkv=_wrapped(model.qkv),
        finish=_wrapped(model.finish),
    )
    if table_bits is None:
        return out
    vocabulary = vocabulary_of(model)
    out = dataclasses.replace(
        out,
        params=quantized("model.params", model.params, table_bits, rows=True),
        embed=_Embedding(model.embed, vocabulary),
        logits=_Logits(model.logits, vocabulary),
    )
    _check_parts(model, out, vocabulary)
    return out


def quantized(name: str, tree: Any, bits: int | None, *, rows: bool = False) -> Any:
    """A tree of arrays with those that divide into groups as codes; None leaves all as they are.

    `rows` is for tables whose rows are looked up: they have groups of their own.
    """
    if bits is None:
        return tree
    return jax.tree.map(lambda x: _quantized(name, x, bits, rows=rows), tree)


def decoded(tree: Any) -> Any:
    """A tree of arrays with the codes decoded."""
    return jax.tree.map(
        lambda x: x.decoded() if isinstance(x, QuantizedArray) else x, tree, is_leaf=_is_codes
    )


def check_plain(model: Model) -> None:
    """ValueError for a model of which some weights are codes."""
    for name, tree in (("params", model.params), ("layers", model.layers)):
        if any(map(_is_codes, jax.tree.leaves(tree, is_leaf=_is_codes))):
            raise ValueError(f"model.{name} is quantized already: give the model as it was")


def _is_codes(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _one(bits: Any) -> bool:
    if isinstance(bits, np.ndarray):
        return bits.ndim == 0
    return not isinstance(bits, list | tuple)


def _check_bits(name: str, bits: Any) -> None:
    whole = isinstance(bits, int | np.integer) and not isinstance(bits, bool)
    if bits is not None and not (whole and bits in BITS):
        raise ValueError(
            f"{name} is {reprlib.repr(bits)}: it must be one of {BITS}, or None for as it is"
        )


def _quantized(name: str, x: Any, bits: int, *, rows: bool) -> Any:
    shape = _groups_of(np.shape(x), rows)
    if shape is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    codes = _encode(x, shape, int(bits))
    if not np.all(np.isfinite(np.asarray(codes.scale, np.float32))):
        raise ValueError(f"{name} has a matrix {list(np.shape(x))} with values that are not finite")
    return codes


def _groups_of(shape: tuple[int, ...], rows: bool) -> tuple[int, ...] | None:
    """[..., GROUP, M]: a matrix with its groups along the axes that a product sums, or along rows.

    None for vectors, and for what does not divide.
    """
    if len(shape) < 2:
        return None
    if rows:
        size = math.prod(shape[1:])
        return None if size % GROUP else (shape[0], size // GROUP, GROUP, 1)
    for axes in range(1, len(shape) + 1):  # as few of the first ones as divide into groups
        size = math.prod(shape[:axes])
        if size % GROUP == 0:
            return size // GROUP, GROUP, math.prod(shape[axes:])
    return None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encode(x: jax.Array, shape: tuple[int, ...], bits: int) -> QuantizedArray:
    """Codes by the scale, of a few for each group, that has the least squared error.

    That error shrinks what it rounds; the scale is then the one for which x · x̂ = |x|², since what the
    errors of many weights have in common does not average out over the layers.
    """
    groups = x.astype(jnp.float32).reshape(shape)
    at = jnp.argmax(jnp.abs(groups), axis=-2, keepdims=True)
    most = -jnp.take_along_axis(groups, at, axis=-2)[..., 0, :] / 2 ** (bits - 1)
    most = jnp.where(most == 0, 1, most)  # zeros are zeros by any step but 0
    steps = jnp.stack([(most * r).astype(jnp.bfloat16) for r in _RANGES])

    def better(held, step):
        code = _codes(groups, step, bits)
        error = jnp.sum((_values(code, step, bits) - groups) ** 2, axis=-2)
        return (
            jnp.where(error < held[0], error, held[0]),
            jnp.where(error < held[0], step, held[1]),
        ), None

    held = jnp.full(most.shape, jnp.inf), steps[-1]
    (_, scale), _ = lax.scan(better, held, steps)
    code = _codes(groups, scale, bits)
    along = jnp.sum(groups * _values(code, scale, bits), axis=-2)
    longer = jnp.where(along > 0, jnp.sum(groups**2, axis=-2) / along, 1)
    scale = (scale.astype(jnp.float32) * longer).astype(jnp.bfloat16)
    # Not by the maximum, in which a NaN may be lost on CPUs.
    scale = jnp.where(jnp.all(jnp.isfinite(groups), axis=-2), scale, jnp.nan)
    code = jnp.swapaxes(code, -1, -2)
    parts = [_planes.pack([code >> 8 * i], _planes.whole(GROUP, own)) for i, own in _bytes(bits)]
    packed = jnp.swapaxes(jnp.concatenate(parts, axis=-1), -1, -2)
    return QuantizedArray(packed, scale, x.shape, bits, x.dtype)


def _bytes(bits: int) -> list[tuple[int, int]]:
    """Of each byte of a code, the lowest first: its index and its bits."""
    return [(i, min(8, bits - 8 * i)) for i in range(-(-bits // 8))]


def _codes(groups: jax.Array, step: jax.Array, bits: int) -> jax.Array:
    code = jnp.round(groups / step.astype(jnp.float32)[..., None, :]) + 2 ** (bits - 1)
    return jnp.clip(code, 0, 2**bits - 1).astype(jnp.int32)


def _values(code: jax.Array, step: jax.Array, bits: int) -> jax.Array:
    return (code - 2 ** (bits - 1)).astype(jnp.float32) * step.astype(jnp.float32)[..., None, :]


@functools.partial(jax.jit, static_argnames=("bits", "shape", "dtype"))
def _decoded(packed, scale, bits, shape, dtype) -> jax.Array:
    code = jnp.zeros((*scale.shape[:-1], GROUP, scale.shape[-1]), jnp.int32)
    for i, own in _bytes(bits):
        (part,) = _planes.whole(GROUP, own)
        for plane in part.planes:
            first = GROUP * i + plane.row
            byte = packed[..., first : first + plane.rows(GROUP), :][..., None, :, :]
            shifts = np.array([plane.bit(i) for i in range(plane.positions)], np.uint8)
            low = (byte >> shifts[:, None, None]) & np.uint8(2**plane.width - 1)
            code |= low.reshape(code.shape).astype(jnp.int32) << (plane.lowest + 8 * i)
    return _values(code, scale, bits).reshape(shape).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """A function of a layer's arrays, of which some are codes."""

    function: Callable[..., Any]

    def __call__(self, arrays: Any, *args: jax.Array) -> Any:
        return self.function(decoded(arrays), *args)


@dataclasses.dataclass(frozen=True)
class _Embedding:
    """An embedding that sees, of every table of the vocabulary, the rows of its tokens alone."""

    function: Callable[..., jax.Array]
    vocabulary: int

    def __call__(self, params: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        ids = tokens.reshape(-1)

        def rows(x):
            if x.shape[:1] != (self.vocabulary,):
                return x
            return x.rows(ids) if isinstance(x, QuantizedArray) else x[ids]

        few = jax.tree.map(rows, params, is_leaf=_is_codes)
        own = jnp.arange(ids.size, dtype=tokens.dtype).reshape(tokens.shape)
        return self.function(decoded(few), own, positions)


@dataclasses.dataclass(frozen=True)
class _Logits:
    """Logits of a part of the vocabulary after the other."""

    function: Callable[..., jax.Array]
    vocabulary: int

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        size = min(_PART, self.vocabulary)

        def of(start):
            def part(x):
                if x.shape[:1] != (self.vocabulary,):
                    return x
                codes = isinstance(x, QuantizedArray)
                return x.part(start, size) if codes else lax.dynamic_slice_in_dim(x, start, size)

            few = jax.tree.map(part, params, is_leaf=_is_codes)
            return self.function(decoded(few), x)

        def write(i, out):
            start = jnp.minimum(i * size, self.vocabulary - size)
            return lax.dynamic_update_slice_in_dim(out, of(start), start, axis=-1)

        found = jax.eval_shape(of, jnp.int32(0))
        empty = jnp.zeros((*found.shape[:-1], self.vocabulary), found.dtype)
        return lax.fori_loop(0, -(-self.vocabulary // size), write, empty)


def _wrapped(functions: Any) -> Any:
    return tuple(map(_Decoded, functions)) if isinstance(functions, tuple) else _Decoded(functions)


def _check_parts(model: Model, small: Model, vocabulary: int) -> None:
    """ValueError unless embedding and logits in parts are those of the whole tables."""
    tokens = jnp.array([[0, vocabulary - 1, vocabulary // 2]], jnp.int32)
    where = jnp.arange(3)[None]
    whole = decoded(small.params)
    wanted, got = (
        f(p, tokens, where) for f, p in ((model.embed, whole), (small.embed, small.params))
    )
    if not _near(wanted, got):
        raise ValueError(
            "table_bits: model.embed is not the rows of tables [vocabulary, ...]: give None"
        )
    if not _near(model.logits(whole, wanted), small.logits(small.params, wanted)):
        raise ValueError(
            "table_bits: model.logits are not those of each row of a table [vocabulary, ...]: give None"
        )


def _near(wanted: jax.Array, got: jax.Array) -> bool:
    if wanted.shape != got.shape:
        return False
    a, b = (np.asarray(x, np.float32) for x in (wanted, got))
    return bool(np.max(np.abs(a - b)) <= _TOLERANCE * np.max(np.abs(a)))
