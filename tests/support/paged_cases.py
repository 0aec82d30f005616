"""Arenas of random tokens, and queries for them, for the tests of every back end."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jbalance.attention import Partial
from jbalance.cache import pages


def filled(head_dim, bits, page_bytes, num_units=4, num_pages=40, seed=0, behind=None):
    """An arena of random tokens: groups empty, without pages, and half full.

    `behind` is the byte behind the last token of a group; None for any.
    """
    rng = np.random.default_rng(seed)
    groups = num_units * len(bits)
    budget = num_pages * (page_bytes + 4) + 4 * (2 * groups + 1)
    at = pages.create(budget, num_units, head_dim, bits, page_bytes)
    want = rng.multinomial(num_pages - 2, np.ones(groups) / groups).reshape(num_units, -1)
    want[1, 0] = want[3] = 0
    order = rng.permutation(num_pages).astype(np.int32)
    offset = np.append(0, np.cumsum(want)).astype(np.int32)
    capacity = want * np.array(at.page_tokens)
    count = rng.integers(0, capacity + 1) * (rng.random(capacity.shape) < 0.8)
    data = np.zeros(at.data.shape, np.uint8)
    for group in range(groups):
        unit, level = divmod(group, len(bits))
        for i, page in enumerate(order[offset[group] : offset[group + 1]]):
            used = count[unit, level] - i * at.page_tokens[level]
            data[page] = random_page(rng, head_dim, bits[level], page_bytes, used, behind)
    return dataclasses.replace(
        at,
        data=jnp.asarray(data),
        order=jnp.asarray(order),
        offset=jnp.asarray(offset),
        count=jnp.asarray(count, jnp.int32),
    )


def random_page(rng, head_dim, bits, page_bytes, used, behind):
    """Bytes of a page by its description: random codes and norms of `used` tokens."""
    size = pages.tokens_per_page(page_bytes, head_dim, bits)
    out = []
    for width, across in pages.widths(head_dim, bits):
        if bits == 16 and width > 1:
            part = np.asarray(rng.normal(size=(size, head_dim)), jnp.bfloat16).view(np.uint8)
        elif width == 2 and across and len(out) > 1:
            longest = (
                3 if bits == 8 else head_dim**0.5
            )  # its norm is that of the largest coordinate
            part = rng.uniform(0.3, longest, (size, 1)).astype(np.float16).view(np.uint8)
        else:
            part = rng.integers(0, 256, (size, width)).astype(np.uint8)
        if behind is not None:
            part[max(0, used) :] = behind
        out.append((part.T if across else part).ravel())
    out = np.concatenate(out)
    return np.append(out, rng.integers(0, 256, page_bytes - out.size)).astype(np.uint8)


def queries(num_units, rows, head_dim, seed=1):
    x = np.random.default_rng(seed).normal(size=(num_units, rows, head_dim))
    return jnp.asarray(x, jnp.float32)


def assert_close(got: Partial, want: Partial, atol=1e-5):
    np.testing.assert_allclose(got.y, want.y, atol=atol)
    np.testing.assert_allclose(got.lse, want.lse, atol=atol)
