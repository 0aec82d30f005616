"""From checkpoint tensors to a model, with the checks that every file format shares."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models.config import TransformerConfig
from experiments.models.transformer import Fixed, Transformer, fixed_arrays


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes:
      shape: [out, in] for matrices.
      read: () -> its numbers, of any floating type.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def assemble(
    config: TransformerConfig,
    tensors: Mapping[str, Stored],
    names: Mapping[str, str],
    where: str,
    *,
    dtype: Any = jnp.float32,
    norm_offset: float = 0.0,
) -> Transformer:
    """Fills a model from a checkpoint; nothing is built before all shapes are those of the config.

    Args:
      config: the sizes, which every tensor is checked against.
      tensors: all that the checkpoint holds, by name.
      names: parameter -> tensor name, in which a layer's parameter has "{}" for the layer's index, and
        an expert's another one for its own.
      where: the checkpoint's name, for errors.
      dtype: of the parameters, a floating one.
      norm_offset: added to the weights of norms.

    Returns:
      The model.

    Raises:
      ValueError: tensors that are missing or left over, have another shape, hold NaN or infinity, or
        numbers beyond the range of `dtype`.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}: weights must be of a floating type")
    shapes = stored_shapes(config)
    _check(config, tensors, names, shapes, where)
    # eval_shape: the random initial values are never computed.
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    filled = {}
    fixed = fixed_arrays(config)
    for path, abstract in nnx.to_flat_state(state):
        parameter = str(path[-1])
        if isinstance(abstract, Fixed):
            filled[path] = abstract.replace(jnp.asarray(fixed[parameter]))
            continue
        offset = norm_offset if parameter.endswith("norm") else 0.0
        arrays = [
            _laid_out(_numbers(where, name, tensors[name], dtype, offset), parameter, config)
            for name in _sources(parameter, names, config)
        ]
        array = arrays[0] if len(arrays) == 1 else np.stack(arrays)
        filled[path] = abstract.replace(jnp.asarray(array.reshape(abstract.shape), dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def stored_shapes(c: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Of the parameters in a checkpoint: of one layer, of one expert."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (c.vocab_size, c.embed_dim)}
    shapes |= {"final_norm": (c.embed_dim,)}
    shapes |= {} if c.tied_embeddings else {"head": (c.vocab_size, c.embed_dim)}
    if c.qkv_bias:
        shapes |= {"query_bias": (queries,), "key_bias": (keys,), "value_bias": (keys,)}
    if c.qk_norm:
        shapes |= {"query_norm": (c.head_dim,), "key_norm": (c.head_dim,)}
    if c.post_norms:
        shapes |= {"post_attention_norm": (c.embed_dim,), "post_mlp_norm": (c.embed_dim,)}
    if c.num_experts:
        shapes |= {"router": (c.num_experts, c.embed_dim)}
    return shapes | {
        "attention_norm": (c.embed_dim,),
        "down": (c.embed_dim, c.hidden_dim),
        "gate": (c.hidden_dim, c.embed_dim),
        "key": (keys, c.embed_dim),
        "mlp_norm": (c.embed_dim,),
        "output": (c.embed_dim, queries),
        "query": (queries, c.embed_dim),
        "up": (c.hidden_dim, c.embed_dim),
        "value": (keys, c.embed_dim),
    }


def split_fused(
    config: TransformerConfig,
    tensors: Mapping[str, Stored],
    names: Mapping[str, str],
    fused: Mapping[str, tuple[str, ...]],
    where: str,
) -> dict[str, Stored]:
    """Tensors that hold the rows of several parameters as those parameters' own.

    Args:
      config: the sizes.
      tensors: of the checkpoint, by name.
      names: as in `assemble`.
      fused: name -> the parameters whose rows it has, in order.
      where: the checkpoint's name, for errors.
    """
    shapes, out = stored_shapes(config), dict(tensors)
    for pattern, parameters in fused.items():
        rows = [shapes[parameter][0] for parameter in parameters]
        expected = (sum(rows), *shapes[parameters[0]][1:])
        ends = np.cumsum(rows)
        for i in range(config.num_layers):
            whole = out.pop(pattern.format(i), None)
            if whole is None:
                raise _missing(where, [pattern.format(i)])
            _check_shape(where, pattern.format(i), whole, expected)
            for parameter, end, number in zip(parameters, ends, rows, strict=True):
                read = functools.partial(_rows, whole, slice(end - number, end))
                out[names[parameter].format(i)] = Stored(shapes[parameter], read)
    return out


def _rows(whole: Stored, rows: slice) -> np.ndarray:
    return whole.read()[rows]


def _check(config, tensors, names, shapes, where) -> None:
    """The checkpoint's tensors are those of the config, of its shapes."""
    for what, number in (("layers", config.num_layers), ("experts", config.num_experts)):
        if number > len(tensors):
            raise ValueError(
                f"{where} has {len(tensors)} tensors: they cannot be the {number} {what} of its "
                f"settings"
            )
    expected = {
        name: shape
        for parameter, shape in shapes.items()
        for name in _sources(parameter, names, config)
    }
    _check_names(where, set(expected), tensors)
    for name, shape in expected.items():
        _check_shape(where, name, tensors[name], shape)


def _check_shape(where: str, name: str, tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{where}: tensor {name!r} must have shape {list(shape)} under this config, "
            f"got {list(tensor.shape)}"
        )


def _numbers(where: str, name: str, tensor: Stored, dtype: Any, offset: float) -> np.ndarray:
    """A tensor's numbers and an offset, finite as they are and in `dtype`."""
    array = tensor.read()
    if offset:
        array = array.astype(np.float32) + np.float32(offset)
    bad = ~np.isfinite(array)
    if bad.any():
        at = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(
            f"{where}: tensor {name!r} holds {int(bad.sum())} numbers that are not finite, the first "
            f"at {at}"
        )
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        most = float(np.max(np.abs(array.astype(np.float64))))
        raise ValueError(
            f"{where}: tensor {name!r} reaches {most:g}, beyond {jnp.dtype(dtype).name}, which ends at "
            f"{float(jnp.finfo(dtype).max):g}: load it in a wider dtype"
        )
    return cast


def _sources(parameter: str, names: Mapping[str, str], c: TransformerConfig) -> list[str]:
    """The tensors that fill a parameter: one for each layer where it is stacked, and each expert."""
    name = names[parameter]
    numbers = [range(c.num_layers), range(c.num_experts)][: name.count("{}")]
    return [name.format(*at) for at in itertools.product(*numbers)]


def _check_names(where: str, wanted: set[str], present: Collection[str]) -> None:
    """Refuses left-over tensors too: a bias not applied would give wrong logits silently."""
    missing, left_over = sorted(wanted - set(present)), sorted(set(present) - wanted)
    if missing:
        raise _missing(where, missing)
    if left_over:
        raise ValueError(
            f"{where}: the checkpoint has {len(left_over)} tensors that this model has no use for, the "
            f"first is {left_over[0]!r}; only biases, adapters and experts of its settings fit"
        )


def _missing(where: str, names: list[str]) -> ValueError:
    return ValueError(
        f"{where}: the checkpoint lacks {len(names)} tensors of this model under its config, the first "
        f"is {names[0]!r}"
    )


ROTATED = {"query", "key", "query_bias", "key_bias", "query_norm", "key_norm"}


def _laid_out(array: np.ndarray, parameter: str, c: TransformerConfig) -> np.ndarray:
    """A tensor as the parameter has it: rotated features in pairs, input axes first in a matrix."""
    if parameter in ROTATED and c.pair_order is not None:
        heads = array.reshape(-1, c.head_dim, *array.shape[1:])
        array = heads[:, c.pair_order].reshape(array.shape)
    return array if parameter in ("embedding", "head") else array.T
