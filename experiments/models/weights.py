"""From checkpoint tensors to a Llama, with the checks that every file format shares."""

from __future__ import annotations

import dataclasses
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
) -> Transformer:
    """Fills a Llama from a checkpoint; nothing is built before all shapes are those of the config.

    Args:
      config: the sizes, which every tensor is checked against.
      tensors: all that the checkpoint holds, by name.
      names: parameter -> tensor name, in which a layer's parameter has "{}" for the layer's index.
      where: the checkpoint's name, for errors.
      dtype: of the parameters, a floating one.

    Returns:
      The model.

    Raises:
      ValueError: tensors that are missing or left over, have another shape, hold NaN or infinity, or
        numbers beyond the range of `dtype`.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}: weights must be of a floating type")
    shapes = _shapes(config)
    _check(config, tensors, names, shapes, where)
    # eval_shape: the random initial values are never computed.
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    filled = {}
    fixed = fixed_arrays(config)
    for path, abstract in nnx.to_flat_state(state):
        parameter, stacked = str(path[-1]), path[0] == "layers"
        if isinstance(abstract, Fixed):
            filled[path] = abstract.replace(jnp.asarray(fixed[parameter]))
            continue
        shape = abstract.shape[1:] if stacked else abstract.shape
        sources = _sources(parameter, names, config.num_layers)
        arrays = [_fit(_numbers(where, x, tensors[x], dtype), parameter, shape) for x in sources]
        array = np.stack(arrays) if stacked else arrays[0]
        filled[path] = abstract.replace(jnp.asarray(array, dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _shapes(c: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Of the parameters in a checkpoint."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (c.vocab_size, c.embed_dim)}
    shapes |= {"final_norm": (c.embed_dim,)}
    shapes |= {} if c.tied_embeddings else {"head": (c.vocab_size, c.embed_dim)}
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


def _check(config, tensors, names, shapes, where) -> None:
    """The checkpoint's tensors are those of the config, of its shapes."""
    if config.num_layers > len(tensors):
        raise ValueError(
            f"{where} has {len(tensors)} tensors: they cannot be the {config.num_layers} layers of "
            f"its settings"
        )
    expected = {
        name: shape
        for parameter, shape in shapes.items()
        for name in _sources(parameter, names, config.num_layers)
    }
    _check_names(where, set(expected), tensors)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{where}: tensor {name!r} must have shape {list(shape)} under this config, "
                f"got {list(tensors[name].shape)}"
            )


def _numbers(where: str, name: str, tensor: Stored, dtype: Any) -> np.ndarray:
    """A tensor's numbers, finite as they are and in `dtype`."""
    array = tensor.read()
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


def _sources(parameter: str, names: Mapping[str, str], num_layers: int) -> list[str]:
    """The tensors that fill a parameter, one for each layer where it is stacked."""
    name = names[parameter]
    return [name.format(i) for i in range(num_layers)] if "{}" in name else [name]


def _check_names(where: str, wanted: set[str], present: Collection[str]) -> None:
    """Refuses left-over tensors too: a bias not applied would give wrong logits silently."""
    missing, left_over = sorted(wanted - set(present)), sorted(set(present) - wanted)
    if missing:
        raise ValueError(
            f"{where}: the checkpoint lacks {len(missing)} tensors of a Llama model under this config, "
            f"the first is {missing[0]!r}"
        )
    if left_over:
        raise ValueError(
            f"{where}: the checkpoint has {len(left_over)} tensors that a Llama model has no use for, "
            f"the first is {left_over[0]!r}; only models without biases, adapters and experts fit"
        )


def _fit(array: np.ndarray, parameter: str, shape: tuple[int, ...]) -> np.ndarray:
    """A checkpoint matrix [out, in] laid out as the parameter's `shape`, input axes first."""
    is_as_stored = parameter in ("embedding", "head") or len(shape) == 1
    return (array if is_as_stored else array.T).reshape(shape)
