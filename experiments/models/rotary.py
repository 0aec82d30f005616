"""Rotary position embedding, half-split convention: feature i rotates with feature i + D/2."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies to longer contexts.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" divides only those whose
        wavelength exceeds `original_positions / low_frequency_factor`, keeps those below
        `original_positions / high_frequency_factor` and blends between.
      factor: the stretch.
      low_frequency_factor, high_frequency_factor: the blend's ends, for "llama3".
      original_positions: context length before stretching, for "llama3".
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if not 0 < value < np.inf:
                raise ValueError(f"{field.name}={value} must be a finite number above 0")
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"kind={self.kind!r} must be 'linear' or 'llama3'")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor={self.low_frequency_factor} must be below "
                f"high_frequency_factor={self.high_frequency_factor}: frequencies blend between both"
            )


def frequencies(head_dim: int, base: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [D/2].

    Computed on the host, so that it is a constant of the compiled program.
    """
    frequency = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = scaling.original_positions * frequency / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def rotate(x: Array, positions: Array, frequency: np.ndarray) -> Array:
    """Rotates x [B, T, H, D] by its tokens' positions [T] or [B, T].

    The angles are float32 in any dtype of x: bfloat16 cannot tell position 257 from 258.
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jax.lax.convert_element_type(rotated, x.dtype)
