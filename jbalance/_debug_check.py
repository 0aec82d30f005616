"""`checkify.debug_check` whose programs are the same in every process."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jax.experimental import checkify

try:
    from jax._src.checkify import FailedCheckError, _check_error, get_traceback, update_error

    _NUMBERED = True
except ImportError:  # another JAX: programs are then found less often in the compilation cache
    _NUMBERED = False


def debug_check(ok: jax.Array, message: str) -> None:
    """`checkify.debug_check(ok, message)`, with a number that follows from the message.

    checkify counts the checks of a process, and writes each one's number into the program. So the key
    of a program in JAX's persistent compilation cache would depend on all that was traced before it,
    and a notebook whose cells ran in another order would compile everything again.
    """
    template = message.replace("{", "{{").replace("}", "}}")  # of str.format
    if not _NUMBERED:
        checkify.debug_check(ok, template)
        return
    failed = FailedCheckError(get_traceback(), template)
    payload, metadata = jax.tree.flatten(failed)
    number = zlib.crc32(message.encode()) >> 1  # within int32; below 0 is no error
    error = update_error(
        checkify.init_error,
        jnp.logical_not(ok),
        number,
        {number: metadata},
        payload,
        failed.get_effect_type(),
    )
    _check_error(error, debug=True)
