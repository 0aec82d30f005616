"""Export by `jax.export`: a balanced step as bytes, which runs without this library."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
from jax.experimental import checkify

from jbalance import checks

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def serialize(
    step: Callable[..., Any], *args: Any, platforms: Sequence[str] | None = None
) -> bytes:
    """`step` for arguments of these shapes, for `jax.export.deserialize(...).call(*args)`.

    The library's debug checks, which no exported program can hold, are left out.

    Args:
      step: jittable; what it closes over is a part of the bytes. Arguments and results of types that
        another process does not know (a cache, a model's state) go in and out as lists of their leaves.
      args: arrays, or `jax.ShapeDtypeStruct`.
      platforms: to run on, such as ("cuda",); None for this machine's. For several at once,
        `attention.attend(backend="xla")`, in adapters `Tiles(backend="xla")`.

    Raises:
      ValueError: a platform that there is not.
      ImportError: without flatbuffers, which `jax.export` writes with (the extra `export`).
    """
    checks.function("step", step)
    if platforms is not None:
        platforms = checks.items("platforms", platforms, "names such as 'cuda'")
        for i, name in enumerate(platforms):
            checks.choice(f"platforms[{i}]", name, dict.fromkeys(_PLATFORMS))
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError('serialize needs flatbuffers: pip install "jbalance[export]"')

    def without_checks(*args: Any) -> Any:
        return checkify.checkify(step, errors=frozenset())(*args)[1]

    exported = jax.export.export(jax.jit(without_checks), platforms=platforms)(*args)
    return bytes(exported.serialize())
