"""The fixed rotations: rows of a Hadamard matrix with pseudo-random signs, of a vector or of its halves.

Method: Ashkboos et al., QuaRot (arXiv:2404.00456); Sylvester and Paley, the matrices.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MOST_HEAD_DIM = 4096  # the matrix of larger ones takes a GiB and more while it is made
_SIGN_PRIME = 10007  # the signs are its quadratic residues: fixed for all versions


def rotate(x: jax.Array) -> jax.Array:
    """x R in float32: the basis in which values are stored; [..., D] to [..., D]."""
    return _product(x, rotation(x.shape[-1]))


def unrotate(x: jax.Array) -> jax.Array:
    """x Rᵀ in float32, the inverse of `rotate`; [..., D] to [..., D]."""
    return _product(x, rotation(x.shape[-1]).T)


def rotate_keys(x: jax.Array) -> jax.Array:
    """The basis in which keys are stored: each half of x [..., D] rotated; all of it if not `halved`."""
    return _product(x, _of_keys(x.shape[-1]))


def unrotate_keys(x: jax.Array) -> jax.Array:
    """The inverse of `rotate_keys`."""
    return _product(x, _of_keys(x.shape[-1]).T)


def joined(x: jax.Array) -> jax.Array:
    """The halves a and b of x [..., D] as (a + b, a - b) / √2 in float32, where D is `halved`.

    After `rotate_keys` this is a Hadamard rotation of all of x. It is its own inverse.
    """
    if not halved(x.shape[-1]):
        return x
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a + b, a - b], axis=-1) * np.float32(math.sqrt(0.5))


@functools.lru_cache
def halved(head_dim: int) -> bool:
    """Whether keys of D coordinates have two halves: of whole bytes, and a known rotation each."""
    return head_dim % 16 == 0 and _hadamard(head_dim // 2) is not None


@functools.lru_cache
def rotation(head_dim: int, name: str = "head_dim") -> np.ndarray:
    """R [D, D] float32: rows of a Hadamard matrix with fixed pseudo-random signs, orthonormal.

    Raises:
      ValueError: `head_dim` is not a multiple of 8, or of an order without a construction here, or above
        `MOST_HEAD_DIM`.
    """
    if head_dim > MOST_HEAD_DIM:
        raise ValueError(f"{name} is {head_dim}: it must be at most {MOST_HEAD_DIM}")
    if head_dim % 8 or head_dim <= 0 or _hadamard(head_dim) is None:
        known = [d for d in range(8, head_dim + 65, 8) if _hadamard(d) is not None]
        near = sorted(sorted(known, key=lambda d: abs(d - head_dim))[:2])
        raise ValueError(
            f"{name} is {head_dim}: it must be a multiple of 8 that is the order of a Sylvester or "
            f"Paley Hadamard matrix; {' and '.join(map(str, near))} are"
        )
    return _signed(head_dim)


@functools.lru_cache
def _of_keys(head_dim):
    """The rotation of keys, [D, D]."""
    return (
        np.kron(np.eye(2), _signed(head_dim // 2)).astype(np.float32)
        if halved(head_dim)
        else rotation(head_dim)
    )


def _signed(order):
    """The orthonormal matrix of an order that has one."""
    signs = _residue(np.arange(1, order + 1), _SIGN_PRIME)
    return (signs[:, None] * _hadamard(order) / math.sqrt(order)).astype(np.float32)


def _product(x, matrix):
    return jnp.matmul(x.astype(jnp.float32), matrix, precision=lax.Precision.HIGHEST)


def _residue(a, prime):
    """Legendre symbol of each of a: 0 for multiples of the prime, 1 for squares, -1 for others."""
    squares = np.zeros(prime, np.int64) - 1
    squares[np.arange(prime) ** 2 % prime] = 1
    squares[0] = 0
    return squares[a % prime]


def _hadamard(order):
    """A Hadamard matrix of ±1 by the constructions of Sylvester and Paley, or None."""
    if order == 1:
        return np.ones((1, 1), np.int64)
    half = _hadamard(order // 2) if order % 2 == 0 else None
    if half is not None:
        return np.kron([[1, 1], [1, -1]], half)
    for prime, double in ((order - 1, False), (order // 2 - 1, True)):
        if order % 4 or not _is_prime(prime) or (prime % 4 == 1) != double:
            continue
        n = np.arange(prime)
        core = np.ones((prime + 1, prime + 1), np.int64)
        core[0, 0] = 0
        core[1:, 1:] = _residue(n[:, None] - n, prime)
        if double:
            one = np.eye(prime + 1, dtype=np.int64)
            return np.kron(core, [[1, 1], [1, -1]]) + np.kron(one, [[1, -1], [-1, -1]])
        core[1:, 0] = -1
        return core + np.eye(order, dtype=np.int64)
    return None


def _is_prime(n):
    """Whether n is prime, by trial division."""
    return n > 2 and all(n % i for i in range(2, math.isqrt(n) + 1))
