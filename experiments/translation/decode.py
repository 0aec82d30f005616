"""Greedy translation with a cache, over the tiles that the price of the training chooses."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tokenizers import Tokenizer

from experiments.translation import data, tiles
from experiments.translation.data import END, FIRST_LANGUAGE, LANGUAGES, MOST_TOKENS, Side
from experiments.translation.model import Translator

ROWS = 64  # sentences that are translated together


class Translated(NamedTuple):
    """Tokens, and what the decoder's attention computed."""

    ids: Array  # [P, T] int32
    tiles: Array  # [] int32, of the plans of all steps
    candidates: Array  # [] int32, of the full budget


class _Encoding:
    """The encoder's attention: what a training step does, for sentences that are not packed."""

    def __init__(self, arm: str, side: Side, heads: int):
        self.arm, self.side, self.heads = arm, side, heads
        self.length = side.lengths
        self.seen = tiles.seen_by(self.length, self.length, MOST_TOKENS, MOST_TOKENS, causal=False)
        self.visible = (jnp.arange(MOST_TOKENS) < self.length[:, None])[:, None]

    def rows(self, x: Array) -> Array:
        return x.at[self.side.row].get(mode="fill", fill_value=0)

    def __call__(self, kind: str, layer: int, q: Array, k: Array, v: Array) -> Array:
        q, k, v = (self.rows(x) for x in (q, k, v))
        candidates = self.heads * jnp.sum(self.seen.tiles, dtype=jnp.int32)
        total = jnp.floor(tiles.part_of(self.arm) * candidates).astype(jnp.int32)
        values = tiles.tile_values(q[:, :: tiles.BLOCK], k, v, self.seen.keys)
        choice = tiles.ARMS[self.arm](values, self.seen, total)
        plan = tiles.plan_of(choice.tiles, MOST_TOKENS, MOST_TOKENS)
        y = tiles.attend(q, k, v, plan, self.visible, choice.tiles.size)
        flat = y.reshape(-1, *y.shape[2:])
        return flat.at[self.side.place].get(mode="fill", fill_value=0)


class _Decoding:
    """The decoder's attentions in one step; `caches` and `plans` are what the step hands on."""

    def __init__(
        self,
        arm: str,
        levels: dict[str, Array],
        encoding: _Encoding,
        at: Array,
        active: Array,
        carry: Any,
    ):
        self.arm, self.levels, self.encoding, self.at = arm, levels, encoding, at
        self.active = active[:, None, None, None]  # sentences that have not ended
        self.caches, self.plans = carry
        self.counts: list[tuple[Array, Array]] = []

    def __call__(self, kind: str, layer: int, q: Array, k: Array, v: Array) -> Array:
        size, name = jnp.arange(MOST_TOKENS), f"{kind}{layer}"
        block = self.at // tiles.BLOCK
        rows = q.shape[0]
        if kind == "decoder":
            old = self.caches[name]
            new = (c.at[:, self.at].set(x) for c, x in zip(old, (k, v), strict=True))
            self.caches[name] = k, v = tuple(new)
            length = jnp.full(rows, self.at + 1)
            own = (size[:: tiles.BLOCK] // tiles.BLOCK == block)[None]
            before = jnp.broadcast_to(size < block * tiles.BLOCK, (rows, 1, MOST_TOKENS))
        else:
            k, v = self.encoding.rows(k), self.encoding.rows(v)
            length = self.encoding.length
            own = jnp.zeros((1, MOST_TOKENS // tiles.BLOCK), bool)
            before = (size < length[:, None])[:, None]
        visible = (size < length[:, None])[:, None]
        seen = tiles.Seen((size[:: tiles.BLOCK] < length[:, None])[:, None, None], before, own)
        values = tiles.tile_values(q[:, None], k, v, before)
        level = self.levels[kind][layer]
        choice = tiles.ARMS[self.arm](values, seen, None, level, block)
        # The first query of a block chooses for the block.
        chosen = jnp.where(self.at % tiles.BLOCK == 0, choice.tiles, self.plans[name])
        chosen &= self.active
        self.plans[name] = chosen
        plan = tiles.plan_of(chosen, 1, MOST_TOKENS, block_q=1)
        candidates = jnp.sum(seen.tiles & self.active, dtype=jnp.int32)
        self.counts.append((plan.num_tiles, q.shape[1] * candidates))
        return tiles.attend(q[:, None], k, v, plan, visible, chosen.size)[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 2))
def translated(
    graph: nnx.GraphDef[Translator],
    parameters: Any,
    arm: str,
    levels: dict[str, Array],
    side: Side,
    language: Array,
) -> Translated:
    """The likeliest next token, again and again, of packed sentences.

    Args:
      graph, parameters: the model.
      arm: a name in `tiles.ARMS`.
      levels: "decoder" and "cross" [layers], prices that the arm's training ended with.
      side: the English sentences.
      language: [] int32, which of `LANGUAGES`.
    """
    model = nnx.merge(graph, parameters)
    config = model.config
    encoding = _Encoding(arm, side, config.heads)
    memory = model.encode(side.ids, side.position, encoding)
    rows, head_dim = side.row.shape[0], config.width // config.heads
    empty = jnp.zeros((rows, MOST_TOKENS, config.heads, head_dim))
    none = jnp.zeros((rows, config.heads, 1, MOST_TOKENS // tiles.BLOCK), bool)
    layers = range(config.decoder_layers)
    carry = (
        {f"decoder{i}": (empty, empty) for i in layers},
        {f"{kind}{i}": none for i in layers for kind in ("decoder", "cross")},
    )

    def step(carry: Any, at: Array) -> Any:
        ids, done, carry = carry
        handed_on = dict(carry[0]), dict(carry[1])
        attend = _Decoding(arm, levels, encoding, at, ~done, handed_on)
        h = model.decode(ids, jnp.full(rows, at), memory, attend)
        new = jnp.where(done, END, jnp.argmax(model.logits(h), axis=-1).astype(jnp.int32))
        counts = jnp.stack([jnp.stack(pair) for pair in attend.counts]).sum(axis=0)
        return (new, done | (new == END), (attend.caches, attend.plans)), (new, counts)

    first = jnp.full(rows, FIRST_LANGUAGE, jnp.int32) + language
    start = first, encoding.length == 0, carry  # rows without a sentence have ended
    _, (ids, counts) = jax.lax.scan(step, start, jnp.arange(MOST_TOKENS))
    return Translated(ids.T, *counts.sum(axis=0))


class Output(NamedTuple):
    """Translations, and the part of the decoder's full budget that was used."""

    texts: list[str]
    part: float


def translate(
    graph: nnx.GraphDef[Translator],
    parameters: Any,
    arm: str,
    levels: dict[str, Array],
    tokenizer: Tokenizer,
    english: list[str],
    language: str,
) -> Output:
    """Translations of English strings.

    Raises:
      ValueError: an unknown language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}: it must be one of {', '.join(LANGUAGES)}")
    texts: list[str] = []
    used = np.zeros(2, np.int64)
    for start in range(0, len(english), ROWS):
        own = [data.encode(tokenizer, text) for text in english[start : start + ROWS]]
        side = data.side_of(own, ROWS, ROWS * MOST_TOKENS)
        at = jnp.asarray(LANGUAGES.index(language), jnp.int32)
        out = translated(graph, parameters, arm, levels, side, at)
        used += np.array([out.tiles, out.candidates])
        for ids in np.asarray(out.ids)[: len(own)]:
            texts.append(tokenizer.decode(ids[: int(np.argmax(ids == END))].tolist()).strip())
    return Output(texts, float(used[0] / used[1]))
