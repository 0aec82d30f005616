"""Two tasks that read one picture, sound and caption: which caption it is, and which category."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.models.packed_encoder import BLOCK, Layer, Packed
from experiments.multimodal import tokens
from experiments.multimodal.data import CATEGORIES
from experiments.multimodal.tokens import CAPTION, MODALITIES
from jbalance import attention

WIDTH, HEADS, HIDDEN = 64, 4, 128
TASKS = ("retrieval", "category")
RETRIEVAL, CATEGORY = range(2)


class Embed(nnx.Module):
    """Tokens of all modalities to vectors."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        start = nnx.initializers.normal(0.1)
        self.picture = nnx.Linear(tokens.VALUES, width, rngs=rngs)
        self.sound = nnx.Linear(tokens.VALUES, width, rngs=rngs)
        self.grams = nnx.Embed(tokens.BUCKETS, width, embedding_init=start, rngs=rngs)
        self.place = nnx.Embed(tokens.PLACES, width, embedding_init=start, rngs=rngs)

    def __call__(self, batch: Packed) -> Array:
        """[N, width]."""
        values, grams, place = (batch.fields[x] for x in ("values", "grams", "place"))
        there = (grams > 0)[..., None]
        words = jnp.sum(jnp.where(there, self.grams(grams), 0), axis=1)
        words /= jnp.sqrt(jnp.maximum(jnp.sum(there, axis=1), 1))
        x = self.place(place)
        for own, given in zip(
            claims(place), (self.picture(values), self.sound(values), words), strict=True
        ):
            x += own[:, None] * given
        return x


def claims(place: Array) -> Array:
    """[modalities, N] 1 where a token is of a modality, by its place."""
    first = jnp.asarray(tokens.FIRST)[:, None]
    return ((place >= first[:-1]) & (place < first[1:])).astype(jnp.float32)


class Read(nnx.Module):
    """Attention of a learned query of each example to its tokens."""

    def __init__(self, rngs: nnx.Rngs):
        self.query = nnx.Param(rngs.normal((HEADS, WIDTH // HEADS)))
        self.inward = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: Array, example: Array, number: int, shares: Array | None = None) -> Array:
        """[N, WIDTH] -> [number, HEADS, D], or [number, units, HEADS, D] with shares [units, N]."""
        k, v = (
            part.reshape(1, len(x), HEADS, -1) for part in jnp.split(self.inward(x), 2, axis=-1)
        )
        q = jnp.broadcast_to(self.query[...], (1, number, *self.query.shape))
        ids = jnp.arange(number)[None], example[None]
        plan = attention.segments(*ids, attention.Tiling(number, len(x), number, BLOCK, False))
        return attention.attend(q, k, v, plan, segment_ids=ids, task_shares=shares).y[0]


class Reader(nnx.Module):
    """Packed tokens to logits [B, CATEGORIES], and to where the caption lies [B, dimensions].

    What tells captions apart reads none: their tokens see, and are seen by, their own alone, and none of
    their attention goes to this task. Heads are divided by their length over a task's modalities, or
    the mass of the captions in a common softmax would tell.

    Args:
      dimensions: of the captions' space.
      shares: [tasks, modalities], the part of each modality's attention that goes to each task, for one
        read of everything; None for one read of each modality.
    """

    def __init__(self, dimensions: int, shares: Array | None, rngs: nnx.Rngs):
        self.shares = None if shares is None else nnx.Variable(jnp.asarray(shares))
        self.embed = Embed(WIDTH, rngs)
        self.layer = Layer(WIDTH, HEADS, HIDDEN, rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.reads = nnx.List([Read(rngs) for _ in (MODALITIES if shares is None else "1")])
        self.caption = nnx.Linear(WIDTH * len(MODALITIES), dimensions, rngs=rngs)
        self.category = nnx.Linear(WIDTH * len(MODALITIES), CATEGORIES, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)

    def __call__(self, batch: Packed, key: Array | None = None) -> tuple[Array, Array]:
        rngs = None if key is None else nnx.Rngs(dropout=key)

        def drop(x: Array) -> Array:
            return self.dropout(x, deterministic=key is None, rngs=rngs)

        own = claims(batch.fields["place"])
        x = self._encoded(batch, own[CAPTION].astype(jnp.int32), drop)
        y = drop(self._read(x, batch, own))
        return self.category(y[:, CATEGORY]), self.caption(y[:, RETRIEVAL])

    def _encoded(self, batch: Packed, is_caption: Array, drop: Callable[[Array], Array]) -> Array:
        apart = 2 * batch.example + is_caption
        tiling = attention.Tiling(apart.size, apart.size, BLOCK, BLOCK, causal=False)
        plan = attention.segments(apart[None], apart[None], tiling)
        return self.norm(self.layer(drop(self.embed(batch)), plan, apart, drop))

    def _read(self, x: Array, batch: Packed, own: Array) -> Array:
        """[B, tasks, modalities * WIDTH]."""
        number = len(batch.labels)
        if self.shares is None:
            # Every read has the tokens of its own modality; the others are in no example.
            ids = (jnp.where(m > 0, batch.example, number) for m in own)
            parts = [read(x, e, number) for read, e in zip(self.reads, ids, strict=True)]
            y = jnp.stack(parts, axis=1)[:, None].repeat(len(TASKS), axis=1)
            y = y.at[:, RETRIEVAL, CAPTION].set(0)
        else:
            # Units are the pairs of a task and a modality: [tasks, modalities, N].
            shares = self.shares[...][:, :, None] * own
            y = self.reads[0](x, batch.example, number, shares.reshape(-1, len(x)))
            y = y.reshape(number, len(TASKS), len(MODALITIES), HEADS, -1)
        length = jnp.sqrt(jnp.mean(jnp.square(y), axis=(2, 4), keepdims=True) + 1e-12)
        return (y / length).reshape(number, len(TASKS), -1)


class Scorer(nnx.Module):
    """The same tasks by one sum of the tokens' vectors for each, weighted by a softmax: `mass`."""

    WIDTH = 16

    def __init__(self, dimensions: int, rngs: nnx.Rngs):
        self.embed = Embed(self.WIDTH, rngs)
        self.logits = nnx.Linear(self.WIDTH, len(TASKS), rngs=rngs)
        self.caption = nnx.Linear(self.WIDTH, dimensions, rngs=rngs)
        self.category = nnx.Linear(self.WIDTH, CATEGORIES, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)

    def mass(self, x: Array, batch: Packed) -> Array:
        """[N, tasks] of embedded tokens; that of an example's tokens sums to 1."""
        number = len(batch.labels) + 1  # the last one has the places without a token
        logits = self.logits(jax.nn.relu(x))
        captions = claims(batch.fields["place"])[CAPTION] > 0
        logits = logits.at[:, RETRIEVAL].add(jnp.where(captions, -jnp.inf, 0))
        most = jax.ops.segment_max(jax.lax.stop_gradient(logits), batch.example, number)
        most = jnp.maximum(most, jnp.finfo(jnp.float32).min)  # of captions alone: no mass
        mass = jnp.exp(logits - most[batch.example])
        total = jax.ops.segment_sum(mass, batch.example, number)
        return mass / jnp.maximum(total, 1e-9)[batch.example]

    def __call__(self, batch: Packed, key: Array | None = None) -> tuple[Array, Array]:
        x = self.embed(batch)
        each = self.mass(x, batch)[:, :, None] * x[:, None]
        y = jax.ops.segment_sum(each, batch.example, len(batch.labels))
        rngs = None if key is None else nnx.Rngs(dropout=key)
        y = self.dropout(y, deterministic=key is None, rngs=rngs)
        return self.category(y[:, CATEGORY]), self.caption(y[:, RETRIEVAL])

    def misled(self, batch: Packed) -> Array:
        """The mean over examples and tasks of the mass on noisy tokens."""
        mass = self.mass(self.embed(batch), batch)
        noise = mass * batch.fields["noisy"][:, None]
        return jnp.sum(noise) / (len(batch.labels) * len(TASKS))
