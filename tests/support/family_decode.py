"""The checkpoints of `family_checkpoints` with heads that the cache's codec knows, and longer texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import Transformer, load_hf_directory
from tests.support import family_checkpoints
from tests.support.family_files import write_family

HEAD_DIM, WINDOW, MOST = 16, 80, 512


def family_model(directory: Path, name: str) -> Transformer:
    """The family's checkpoint with heads of 16 and windows of 80, for contexts up to 512."""
    made = family_checkpoints.CASES[name]
    config = made.config | {"head_dim": HEAD_DIM, "max_position_embeddings": MOST}
    if config.get("sliding_window") is not None:
        config["sliding_window"] = WINDOW
    scaling = config.get("rope_scaling") or {}
    if "long_factor" in scaling:
        pairs = int(HEAD_DIM * config.get("partial_rotary_factor", 1.0)) // 2
        stretched = {x: np.linspace(1, 3, pairs).tolist() for x in ("short_factor", "long_factor")}
        config["rope_scaling"] = scaling | stretched
    changed = f"{name}, decoded"
    family_checkpoints.CASES[changed] = dataclasses.replace(made, config=config)
    try:
        path = write_family(directory, changed)
    finally:
        del family_checkpoints.CASES[changed]
    return load_hf_directory(path, max_positions=MOST)[1]


@nnx.jit
def _logits(model, tokens):
    return model(tokens)


def regrets(model: Transformer, prompt: np.ndarray, found: np.ndarray) -> np.ndarray:
    """How far below the most likely token each of those found is, in deviations of the logits."""
    tokens = np.zeros(MOST, np.int32)
    size = len(prompt) + len(found)
    tokens[:size] = np.concatenate([prompt, found])
    logits = np.asarray(_logits(model, jnp.asarray(tokens[None])))[0, len(prompt) - 1 : size - 1]
    lost = logits.max(axis=1) - logits[np.arange(len(found)), found]
    return lost / logits.std()
