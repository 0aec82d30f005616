"""From checkpoint tensors to a Llama, with the checks that every file format shares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models.llama import Llama, LlamaConfig


def assemble(
    config: LlamaConfig,
    read: Callable[[str], np.ndarray],
    present: Collection[str],
    names: Mapping[str, str],
    *,
    dtype: Any = jnp.float32,
) -> Llama:
    """Fills a Llama from a checkpoint.

    Args:
      config: the sizes, which every tensor is checked against.
      read: tensor name -> array in the checkpoint's layout, [out, in] for matrices.
      present: the names of all tensors that the checkpoint holds.
      names: parameter -> tensor name, in which a layer's parameter has "{}" for the layer's index.
      dtype: of the parameters.

    Returns:
      The model.
    """
    # eval_shape: the random initial values are never computed.
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    parameters = nnx.to_flat_state(state)
    sources = {path: _sources(path, names, config.num_layers) for path, _ in parameters}
    _check_names({name for group in sources.values() for name in group}, present)
    filled = {}
    for path, abstract in parameters:
        stacked = path[0] == "layers"
        shape = abstract.shape[1:] if stacked else abstract.shape
        arrays = [_fit(read(name), name, str(path[-1]), shape) for name in sources[path]]
        array = np.stack(arrays) if stacked else arrays[0]
        filled[path] = abstract.replace(jnp.asarray(array, dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _sources(path: tuple[Any, ...], names: Mapping[str, str], num_layers: int) -> list[str]:
    """The tensors that fill the parameter at `path`, one per layer where it is stacked."""
    name = names[path[-1]]
    return [name.format(i) for i in range(num_layers)] if path[0] == "layers" else [name]


def _check_names(wanted: set[str], present: Collection[str]) -> None:
    """Refuses left-over tensors too: a bias not applied would give wrong logits silently."""
    missing, left_over = sorted(wanted - set(present)), sorted(set(present) - wanted)
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors of a Llama model under this config, "
            f"the first is {missing[0]!r}"
        )
    if left_over:
        raise ValueError(
            f"the checkpoint has {len(left_over)} tensors that a Llama model has no use for, "
            f"the first is {left_over[0]!r}; only models without biases, adapters and experts fit"
        )


def _fit(array: np.ndarray, name: str, parameter: str, shape: tuple[int, ...]) -> np.ndarray:
    """A checkpoint matrix [out, in] laid out as the parameter's `shape`, input axes first."""
    if parameter in ("embedding", "head") or len(shape) == 1:
        expected, target = shape, array
    else:
        inputs = int(np.prod(shape[:-1])) if parameter == "output" else shape[0]
        expected, target = (int(np.prod(shape)) // inputs, inputs), array.T
    if array.shape != expected:
        raise ValueError(
            f"tensor {name!r} must have shape {list(expected)} under this config, "
            f"got {list(array.shape)}"
        )
    return target.reshape(shape)
