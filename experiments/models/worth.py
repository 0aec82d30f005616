"""Models as the library decodes them, with what was learned of their tokens' worth.

The files in `learned/` are written by `python -m experiments.kv_budget.fit_worth`. A file belongs to all
models with the same norms but for rounding: GGUF files keep them in float32 however the other weights
were rounded, checkpoints may have all of them in 16 bits.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.harness import files
from experiments.models.transformer import Transformer
from jbalance import adapters, decode

FOLDER = Path(__file__).with_name("learned")
ROUNDED = 2e-4  # relative, of a mean of some hundred numbers in bfloat16
_PARTS = decode.WorthWeights._fields

Worth = tuple[decode.WorthWeights | None, ...]


def decoder_of(model: Transformer, *, learned: bool = True) -> decode.Model:
    """The model as the library decodes it, with what was learned of its tokens' worth, if it was."""
    worth = learned_of(model) if learned else None
    return dataclasses.replace(adapters.decoder(model, model.attention_specs), worth=worth)


def learned_of(model: Transformer) -> Worth | None:
    """What was learned of the model; None if nothing was."""
    own = means_of_norms(model)
    for means, worth in _kept():
        if means.shape == own.shape and np.allclose(means, own, rtol=ROUNDED, atol=0):
            return worth
    return None


def means_of_norms(model: Transformer) -> np.ndarray:
    """[2 L + 1] mean of each norm's scales, which rounding hardly changes."""
    norms = model.layers.attention_norm, model.layers.mlp_norm, model.final_norm
    each = [np.asarray(x[...], np.float64).mean(axis=-1) for x in norms]
    return np.concatenate([np.atleast_1d(x) for x in each]).astype(np.float32)


@functools.cache
def _kept() -> tuple[tuple[np.ndarray, Worth], ...]:
    """Of all files, with `means_of_norms` of their models."""
    return tuple(read(path) for path in sorted(FOLDER.glob("*.npz")))


def read(path: Path) -> tuple[np.ndarray, Worth]:
    """`means_of_norms` of a model, and what was learned.

    Raises:
      ValueError: that names the file: arrays that are missing, do not fit together or are not finite.
    """
    arrays = files.read_npz(path)
    _check(path, arrays)
    layers = {
        int(layer): decode.WorthWeights(
            *(jnp.asarray(arrays[part][i], jnp.float32) for part in _PARTS)
        )
        for i, layer in enumerate(arrays["layers"])
    }
    worth = tuple(layers.get(layer) for layer in range(int(arrays["num_layers"])))
    return arrays["means_of_norms"], worth


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """ValueError for arrays that `write` did not write."""
    for name in (*_PARTS, "layers", "num_layers", "means_of_norms"):
        if name not in arrays:
            raise ValueError(f"{path} lacks the array {name!r}")
        x = arrays[name]
        whole = name in ("layers", "num_layers")
        if not np.issubdtype(x.dtype, np.integer if whole else np.floating):
            raise ValueError(f"{path}: array {name!r} has the type {x.dtype}")
        if not np.isfinite(x).all():
            raise ValueError(f"{path}: array {name!r} holds numbers that are not finite")
        if name in _PARTS and x.shape[:1] != arrays[_PARTS[0]].shape[:1]:
            raise ValueError(f"{path}: array {name!r} has shape {list(x.shape)}: not of its layers")
    layers, number = arrays["layers"], arrays["num_layers"]
    if number.ndim or layers.shape != arrays[_PARTS[0]].shape[:1]:
        raise ValueError(
            f"{path}: layers has shape {list(layers.shape)}: one for each of the weights"
        )
    if layers.size and not 0 <= layers.min() <= layers.max() < number:
        raise ValueError(f"{path}: layers are {layers.tolist()} of {number}")
    if arrays["means_of_norms"].shape != (2 * int(number) + 1,):
        raise ValueError(f"{path}: means_of_norms has shape {list(arrays['means_of_norms'].shape)}")


def write(path: Path, model: Transformer, worth: Worth) -> None:
    """Keeps what was learned, in float16."""
    layers = [i for i, weights in enumerate(worth) if weights is not None]
    arrays = {
        part: np.stack([np.asarray(getattr(worth[i], part), np.float16) for i in layers])
        for part in _PARTS
    }
    more = {"layers": np.asarray(layers), "num_layers": np.int64(len(worth))}
    files.write_npz(path, arrays | more | {"means_of_norms": means_of_norms(model)})
