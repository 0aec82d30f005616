"""Devices of a pod as meshes, and arrays that lie on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from experiments.compiled import sizes


class Program(NamedTuple):
    """A function, the shapes of its arguments and where they lie, and which of them it may overwrite."""

    run: Callable[..., Any]
    shapes: tuple[Any, ...]
    donated: tuple[int, ...] = ()


def groups(devices: np.ndarray) -> tuple[Mesh, Callable[..., Any]]:
    """Groups of 8, and what says where an array lies."""
    mesh = Mesh(
        devices.reshape(-1, sizes.MODEL), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    return mesh, functools.partial(_array, mesh)


def line(devices: np.ndarray) -> tuple[Mesh, Callable[..., Any]]:
    """All along one axis."""
    mesh = Mesh(devices.reshape(-1), ("device",), axis_types=(AxisType.Auto,))
    return mesh, functools.partial(_array, mesh)


def _array(mesh, shape, dtype, *places):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P(*places)))


def as_on_tpus():
    """Sizes of pages as they are where a TPU is what computes."""
    return mock.patch.object(jax, "default_backend", return_value="tpu")
