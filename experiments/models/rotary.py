"""Rotary position embedding, half-split convention: feature i rotates with feature i + D/2."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

RopeKind = Literal["linear", "llama3", "dynamic", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies to longer contexts.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" divides only those whose
        wavelength exceeds `original_positions / low_frequency_factor`, keeps those below
        `original_positions / high_frequency_factor` and blends between; "dynamic" raises the base for
        contexts longer than `original_positions` (NTK-aware); "yarn" keeps features that turn more than
        `beta_fast` times in `original_positions`, divides those of less than `beta_slow` turns, and
        blends between by feature (Peng et al. 2023, arXiv 2309.00071); "longrope" divides each frequency
        by a factor of its own, one list for contexts up to `original_positions` and one for longer ones
        (Ding et al. 2024, arXiv 2402.13753).
      factor: the stretch.
      low_frequency_factor, high_frequency_factor: the blend's ends, for "llama3".
      original_positions: context length before stretching, for all but "linear".
      attention_factor: what rotated queries and keys are multiplied by, each; None for the kind's own.
      beta_fast, beta_slow: the blend's ends, for "yarn".
      truncate: whether these ends are whole features, for "yarn".
      short_factors, long_factors: [D/2] divisors, for "longrope".
    """

    kind: RopeKind
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not 0 < number < np.inf and field.name != "truncate":
                    raise ValueError(f"{field.name}={number} must be a finite number above 0")
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(get_args(RopeKind))}")
        if self.kind == "longrope" and self.original_positions < 2:
            raise ValueError(
                f"original_positions={self.original_positions} must be at least 2 under 'longrope'"
            )
        for low, high in (
            ("low_frequency_factor", "high_frequency_factor"),
            ("beta_slow", "beta_fast"),
        ):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} must be below {high}={getattr(self, high)}: "
                    f"frequencies blend between both"
                )
        if len(self.short_factors) != len(self.long_factors) or (
            bool(self.short_factors) != (self.kind == "longrope")
        ):
            raise ValueError(
                f"short_factors and long_factors have {len(self.short_factors)} and "
                f"{len(self.long_factors)} entries under kind={self.kind!r}: 'longrope' alone needs "
                f"them, one for each pair of features"
            )

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied by, each."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn" and self.factor > 1:
            return 0.1 * math.log(self.factor) + 1
        if self.kind == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_positions))
        return 1.0


def frequencies(
    rotated: int, base: float, scaling: RopeScaling | None = None, positions: int = 0
) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [rotated / 2], computed on the host.

    Args:
      rotated: features of a head that rotate, an even number.
      base: of the exponential.
      scaling: of the checkpoint.
      positions: the longest context; "dynamic" and "longrope" choose by it.
    """
    frequency = base ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if scaling is None:
        return frequency.astype(np.float32)
    if scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind == "llama3":
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = scaling.original_positions * frequency / (2 * np.pi)
        frequency = _blend(frequency, scaling.factor, np.clip((turns - low) / (high - low), 0, 1))
    elif scaling.kind == "dynamic":
        stretch = max(positions / scaling.original_positions, 1.0)
        more = (1 + scaling.factor * (stretch - 1)) ** (rotated / (rotated - 2))
        frequency = (base * more) ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    elif scaling.kind == "yarn":
        frequency = _blend(frequency, scaling.factor, _kept_by_yarn(rotated, base, scaling))
    else:
        long = positions > scaling.original_positions
        factors = scaling.long_factors if long else scaling.short_factors
        frequency = frequency / np.asarray(factors)
    return frequency.astype(np.float32)


def _blend(frequency: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    return frequency * (kept + (1 - kept) / factor)


def _kept_by_yarn(rotated: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """The part of each frequency that is not stretched [rotated / 2]."""
    first, last = (
        rotated
        * math.log(scaling.original_positions / (turns * 2 * math.pi))
        / (2 * math.log(base))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    ramp = (np.arange(rotated // 2) - first) / max(last - first, 0.001)
    return 1 - np.clip(ramp, 0, 1)


def rotate(
    x: Array,
    positions: Array,
    frequency: np.ndarray | Array,
    amplitude: np.ndarray | Array | None = None,
) -> Array:
    """Rotates x [B, T, H, D] by its tokens' positions [T] or [B, T].

    Each pair of features is multiplied by its `amplitude` [D/2] too. The angles are float32 in any dtype
    of x: bfloat16 cannot tell position 257 from 258.
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if amplitude is not None:
        cos, sin = cos * amplitude, sin * amplitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jax.lax.convert_element_type(rotated, x.dtype)
