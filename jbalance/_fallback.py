"""What is said where a kernel of an accelerator could run, but for a reason that its user can remove."""

from __future__ import annotations

import warnings

import jax


def say(what: str, reason: str) -> None:
    """A warning that loops of XLA's run in place of a kernel; Python shows each of them once."""
    warnings.warn(
        f"{what} runs as loops of XLA's on this {jax.default_backend().upper()}, not as a kernel: "
        f"{reason}",
        RuntimeWarning,
        stacklevel=2,
    )
