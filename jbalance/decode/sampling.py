"""The next token of each request: greedy, or by temperature, top-k and top-p with a seed of its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbalance import checks


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Attributes:
      temperature: of the softmax; 0 is greedy.
      top_k: only so many most likely tokens; 0 for all.
      top_p: only the most likely tokens that together have this probability; 1 for all.
      seed: of the request: its tokens do not depend on what other requests do.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.static_float("temperature", self.temperature, 0, checks.FLOAT32_MAX)
        checks.static_int("top_k", self.top_k, hint="it must be at least 0, which is all tokens")
        checks.static_float("top_p", self.top_p, 0, 1, open_low=True)
        checks.static_int("seed", self.seed)


class Samplers(NamedTuple):
    """`Sampling` of B requests, as data."""

    temperature: Any  # [B] float32
    top_k: Any  # [B] int32
    top_p: Any  # [B] float32
    seed: Any  # [B] int32

    @classmethod
    def greedy(cls, num_requests: int) -> Samplers:
        """Of requests that have not said otherwise."""
        return _greedy(num_requests)

    def replaced(self, request: int, one: Sampling) -> Samplers:
        """With one request's."""
        return _replaced(self, request, Samplers(*(getattr(one, name) for name in self._fields)))


@functools.partial(jax.jit, static_argnums=0)
def _greedy(num_requests):
    whole = jnp.zeros(num_requests, jnp.int32)
    return Samplers(jnp.zeros(num_requests), whole, jnp.ones(num_requests), whole)


@jax.jit
def _replaced(samplers, request, one):
    """All tables by one program: without jit a prompt waits for each."""
    return jax.tree.map(lambda x, own: x.at[request].set(own), samplers, one)


@jax.jit  # or each prompt's first token compiles a program of its own, which stays
def sample(logits: jax.Array, samplers: Samplers, positions: jax.Array) -> jax.Array:
    """Nucleus and top-k sampling by the Gumbel maximum; greedy where the temperature is 0.

    Args:
      logits: [B, V] float32.
      samplers: of the requests.
      positions: [B] int32 of the tokens that are chosen: with the seed they decide the noise.

    Returns:
      [B] int32; -1 where the logits hold NaN.

    Reference: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn():
        chosen = jax.vmap(_sample_one)(logits, samplers, positions)
        return jnp.where(samplers.temperature > 0, chosen, best)

    chosen = lax.cond(jnp.any(samplers.temperature > 0), drawn, lambda: best)
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, chosen)


def _sample_one(logits, sampler, position):
    """The token of one request."""
    scaled = logits / jnp.where(sampler.temperature > 0, sampler.temperature, 1)
    ordered = -jnp.sort(-scaled)
    mass = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
    rank = jnp.arange(logits.shape[0])
    kept = (mass < sampler.top_p) & ((sampler.top_k == 0) | (rank < sampler.top_k))
    least = jnp.min(jnp.where(kept, ordered, jnp.inf))
    key = jax.random.fold_in(jax.random.key(sampler.seed), position)
    noise = jax.random.gumbel(key, logits.shape)
    return jnp.argmax(jnp.where(scaled >= least, scaled + noise, -jnp.inf)).astype(jnp.int32)
