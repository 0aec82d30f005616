"""Models as the library decodes them, with what was learned of their tokens' worth.

The files in `learned/` are written by `python -m experiments.kv_budget.fit_worth`. A file belongs to all
models with the same norms, which stay in float32 however the other weights were rounded.
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
_PARTS = decode.WorthWeights._fields

Worth = tuple[decode.WorthWeights | None, ...]


def decoder_of(model: Transformer, *, learned: bool = True) -> decode.Model:
    """The model as the library decodes it, with what was learned of its tokens' worth, if it was."""
    worth = _kept().get(fingerprint(model)) if learned else None
    return dataclasses.replace(adapters.decoder(model, model.attention_specs), worth=worth)


def fingerprint(model: Transformer) -> str:
    """Of a model's norms."""
    norms = model.layers.attention_norm, model.layers.mlp_norm, model.final_norm
    return files.digest(b"".join(np.asarray(x[...], np.float32).tobytes() for x in norms))


@functools.cache
def _kept() -> dict[str, Worth]:
    """Of all files, by the models' fingerprints."""
    return dict(read(path) for path in sorted(FOLDER.glob("*.npz")))


def read(path: Path) -> tuple[str, Worth]:
    """A model's fingerprint, and what was learned."""
    arrays = files.read_npz(path)
    layers = {
        int(layer): decode.WorthWeights(
            *(jnp.asarray(arrays[part][i], jnp.float32) for part in _PARTS)
        )
        for i, layer in enumerate(arrays["layers"])
    }
    worth = tuple(layers.get(layer) for layer in range(int(arrays["num_layers"])))
    return str(arrays["fingerprint"]), worth


def write(path: Path, model: Transformer, worth: Worth) -> None:
    """Keeps what was learned, in float16."""
    layers = [i for i, weights in enumerate(worth) if weights is not None]
    arrays = {
        part: np.stack([np.asarray(getattr(worth[i], part), np.float16) for i in layers])
        for part in _PARTS
    }
    more = {"layers": np.asarray(layers), "num_layers": np.int64(len(worth))}
    files.write_npz(path, arrays | more | {"fingerprint": np.asarray(fingerprint(model))})
