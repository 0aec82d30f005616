"""Training curves, histograms and maps of a balanced model, for the trackers that people use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jbalance import checks

_TENSORBOARD = ("add_scalar", "add_histogram", "add_image")


def track(
    writer: Any, step: int, values: Mapping[str, Any], *, maps: Mapping[str, Any] | None = None
) -> None:
    """Write scalars, histograms and images of one training step to TensorBoard or Weights & Biases.

    Every leaf of `values` is written under its path: a number as a scalar, a larger array as a histogram
    of its entries. So `track(log, step, {"loss": loss, "tiles": adapters.budgets_of(model)})` shows what
    each layer was given. `maps` are pictures: attention over keys, budgets over layers and heads.

    Args:
      writer: with `add_scalar`, `add_histogram` and `add_image`, as tensorboardX's and torch's, or a run
        of `wandb`, offline or not, with `log`. To import jbalance takes neither.
      step: >= 0.
      values: a pytree of arrays and numbers, by name.
      maps: by name, [H, W] of any range, drawn from their least entry, black, to their largest, white.

    Raises:
      ValueError: a writer with neither, a name twice, an array that is empty, no numbers or not finite,
        a map that is not [H, W].
    """
    step = checks.static_int("step", step)
    maps = {} if maps is None else maps
    for name, given in (("values", values), ("maps", maps)):
        checks.instance(name, given, Mapping)
    found = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(dict(values))}
    numbers = {name: checks.host_numbers(f"values {name!r}", x) for name, x in found.items()}
    pictures = {name: _picture(name, x) for name, x in maps.items()}
    for name, x in numbers.items():
        checks.non_empty(f"values {name!r}", x)
        if name in pictures:
            raise ValueError(
                f"maps has {name!r}, which values has too: give one of them another name"
            )
    if all(hasattr(writer, name) for name in _TENSORBOARD):
        for name, x in numbers.items():
            if x.size == 1:
                writer.add_scalar(name, x.item(), step)
            else:
                writer.add_histogram(name, x.reshape(-1), step)
        for name, x in pictures.items():
            writer.add_image(name, x[None], step)
    elif hasattr(writer, "log"):
        _wandb(writer, step, numbers, pictures)
    else:
        raise ValueError(
            f"writer is a {type(writer).__name__}: it must have {', '.join(_TENSORBOARD)} "
            f"(TensorBoard), or log (a run of wandb)"
        )


def _wandb(run: Any, step: int, numbers: Mapping[str, np.ndarray], pictures: Mapping) -> None:
    """One row of a run: histograms as counts and edges, which need no class of the tracker's."""
    import wandb

    row: dict[str, Any] = {
        name: x.item() if x.size == 1 else wandb.Histogram(np_histogram=np.histogram(x, bins=64))
        for name, x in numbers.items()
    }
    run.log(row | {name: wandb.Image(x) for name, x in pictures.items()}, step=step)


def _name(path: tuple[Any, ...]) -> str:
    """The path of a leaf, as trackers group names: a/b/0."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _picture(name: str, x: Any) -> np.ndarray:
    """[H, W] uint8."""
    checks.rank(f"maps {name!r}", x, 2, "[H, W]")
    x = checks.host_numbers(f"maps {name!r}", x)
    checks.non_empty(f"maps {name!r}", x)
    above = x.astype(np.float64) - x.min()
    span = above.max()
    return np.round(255 * above / (span if span > 0 else 1)).astype(np.uint8)
