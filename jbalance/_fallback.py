"""What is said where a kernel of an accelerator could run, but for a reason that its user can remove."""

from __future__ import annotations

import warnings

import jax

LEAST_CAPABILITY = 8.0  # of a GPU, from which on it multiplies bfloat16


def say(what: str, reason: str) -> None:
    """A warning that loops of XLA's run in place of a kernel; Python shows each of them once."""
    warnings.warn(
        f"{what} runs as loops of XLA's on this {jax.default_backend().upper()}, not as a kernel: "
        f"{reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def old_gpu() -> str | None:
    """Why kernels cannot run on the GPUs here, or None.

    They multiply bfloat16. For a T4 (compute capability 7.5) Triton's compiler makes single numbers of
    it, which do not fit into the registers.
    """
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None or float(capability) >= LEAST_CAPABILITY:
        return None
    return f"its compute capability is {capability}: it must be at least {LEAST_CAPABILITY}"
