"""A pruned classifier as it would be shipped: the exported program, and what it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments.harness import runs, training
from jbalance import adapters


def judged(
    model: Any, pixels: np.ndarray, labels: np.ndarray, batch: int, of: str, left: Sequence[int]
) -> Mapping[str, Any]:
    """A run's figures and cases: accuracy of the exported program, what a picture takes, its bytes.

    Args:
      model: that takes pixels.
      pixels: of held-out pictures.
      labels: of each.
      batch: pictures at a time.
      of: what was pruned, such as "heads".
      left: of these in each layer.
    """
    hits, flops, size = exported(model, pixels, labels, batch)
    return {
        "figures": {
            "accuracy": float(hits.mean()),
            of: float(sum(left)),
            "MFLOP a picture": flops / batch / 1e6,
            "kB exported": size / 1e3,
        },
        f"{of} of layers": list(left),
        "cases": {"accuracy": runs.packed(hits)},
    }


def exported(
    model: Any, pixels: np.ndarray, labels: np.ndarray, batch: int
) -> tuple[np.ndarray, float, int]:
    """Which pictures the exported program knows, what it computes for a batch, and its bytes."""
    graph, parameters = nnx.split(model)

    def predict(pixels: Array) -> Array:
        return jnp.argmax(nnx.merge(graph, parameters)(pixels), -1)

    example = pixels[:batch]
    flops = training.flops_of(jax.jit(predict).lower(example).compile())
    content = adapters.serialize(predict, example)
    call = jax.jit(jax.export.deserialize(bytearray(content)).call)
    hits = np.zeros(len(labels), bool)
    for row in training.rows(len(labels), batch):
        given = np.zeros_like(example)
        given[: len(row)] = pixels[row]
        hits[row] = np.asarray(call(given))[: len(row)] == labels[row]
    return hits, flops, len(content)
