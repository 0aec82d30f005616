"""Whisper in Flax nnx: an encoder of audio frames, and a decoder that attends to them.

Shape letters: B recordings, T tokens, N places of a self-attention cache, S frames, L layers of the
decoder, H heads, D head dim, E width, V vocabulary. Cross-attention is a function that the caller gives,
so that its keys and values lie wherever the caller keeps them.

Radford et al., Robust speech recognition via large-scale weak supervision (2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

EPSILON = 1e-5  # of the layer norms
CrossAttention = Callable[[Array, Array], Array]
"""(layer [], q [B, T, H, D], unscaled) -> y [B, T, H, D]."""


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """The sizes of a model; those of tiny.en."""

    width: int = 384
    num_heads: int = 6
    encoder_layers: int = 4
    decoder_layers: int = 4
    num_mels: int = 80
    num_frames: int = 1500  # behind the second convolution, of 30 s
    num_positions: int = 448
    vocab_size: int = 51864

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.num_heads


class Kept(NamedTuple):
    """Keys and values of the tokens so far, dense."""

    k: Array  # [L, B, N, H, D]
    v: Array  # [L, B, N, H, D]


class Attention(nnx.Module):
    """The projections of an attention, whose products the layers compute."""

    def __init__(self, config: WhisperConfig, rngs: nnx.Rngs) -> None:
        def linear() -> nnx.Linear:
            return nnx.Linear(config.width, config.width, rngs=rngs)

        self.heads = config.num_heads
        self.query, self.key, self.value, self.out = (linear() for _ in range(4))

    def split(self, x: Array) -> Array:
        """[..., E] to [..., H, D]."""
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def joined(self, y: Array) -> Array:
        """[..., H, D] through the output's projection."""
        return self.out(y.reshape(*y.shape[:-2], -1))


class Layer(nnx.Module):
    """A layer of the encoder, or of the decoder with `cross`."""

    def __init__(self, config: WhisperConfig, rngs: nnx.Rngs, *, cross: bool) -> None:
        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(config.width, epsilon=EPSILON, rngs=rngs)

        self.norm, self.attention = norm(), Attention(config, rngs)
        if cross:
            self.cross_norm, self.cross = norm(), Attention(config, rngs)
        self.mlp_norm = norm()
        self.up = nnx.Linear(config.width, 4 * config.width, rngs=rngs)
        self.down = nnx.Linear(4 * config.width, config.width, rngs=rngs)

    def qkv(self, x: Array) -> tuple[Array, Array, Array]:
        """[B, T, H, D] each, of self-attention."""
        own, h = self.attention, self.norm(x)
        return own.split(own.query(h)), own.split(own.key(h)), own.split(own.value(h))

    def feed_forward(self, x: Array) -> Array:
        """x and the layer's feed-forward part."""
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False))


class Whisper(nnx.Module):
    """The model; `encode`, `memory` and `decode` in turn."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs) -> None:
        c, self.config = config, config
        side = ((1, 1),)
        self.conv1 = nnx.Conv(c.num_mels, c.width, (3,), padding=side, rngs=rngs)
        self.conv2 = nnx.Conv(c.width, c.width, (3,), strides=2, padding=side, rngs=rngs)
        self.encoder_positions = nnx.Param(jnp.zeros((c.num_frames, c.width)))
        self.encoder = _stacked(c, rngs, c.encoder_layers, cross=False)
        self.encoder_norm = nnx.LayerNorm(c.width, epsilon=EPSILON, rngs=rngs)
        self.embedding = nnx.Embed(c.vocab_size, c.width, rngs=rngs)
        self.decoder_positions = nnx.Param(jnp.zeros((c.num_positions, c.width)))
        self.decoder = _stacked(c, rngs, c.decoder_layers, cross=True)
        self.decoder_norm = nnx.LayerNorm(c.width, epsilon=EPSILON, rngs=rngs)

    def encode(self, mel: Array) -> Array:
        """Frames [B, S, E] of log-mel spectrograms [B, 2 S, mels]."""
        x = jax.nn.gelu(self.conv1(mel), approximate=False)
        x = jax.nn.gelu(self.conv2(x), approximate=False) + self.encoder_positions[...]
        graph, layers = nnx.split(self.encoder)

        def one(x, state):
            layer = nnx.merge(graph, state)
            x = x + layer.attention.joined(attend_dense(*layer.qkv(x)))
            return layer.feed_forward(x), None

        return self.encoder_norm(jax.lax.scan(one, x, layers)[0])

    def memory(self, frames: Array) -> tuple[Array, Array]:
        """Keys and values [L, B, S, H, D] of cross-attention in every layer of the decoder."""
        graph, layers = nnx.split(self.decoder.cross)

        def one(_, state):
            cross = nnx.merge(graph, state)
            return None, (cross.split(cross.key(frames)), cross.split(cross.value(frames)))

        return jax.lax.scan(one, None, layers)[1]

    def empty(self, requests: int, places: int) -> Kept:
        """Self-attention caches of so many tokens, which hold nothing."""
        c = self.config
        shape = (c.decoder_layers, requests, places, c.num_heads, c.head_dim)
        return Kept(jnp.zeros(shape), jnp.zeros(shape))

    def decode(
        self, tokens: Array, start: Array | int, kept: Kept, cross: CrossAttention
    ) -> tuple[Array, Kept, Array]:
        """Tokens [B, T] from position `start` on, which see those before them.

        Returns:
          Logits [B, T, V], the caches with the tokens, and cross-attention's queries [L, B, T, H, D].
        """
        places, size = kept.k.shape[2], tokens.shape[1]
        position = start + jnp.arange(size)
        x = self.embedding(tokens) + self.decoder_positions[...][position]
        seen = jnp.arange(places) <= position[:, None]
        graph, layers = nnx.split(self.decoder)

        def one(x, row):
            i, state, kept = row
            layer = nnx.merge(graph, state)
            q, *new = layer.qkv(x)
            kept = Kept(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, part, start, axis=1)
                    for old, part in zip(kept, new, strict=True)
                )
            )
            x = x + layer.attention.joined(attend_dense(q, *kept, seen))
            q = layer.cross.split(layer.cross.query(layer.cross_norm(x)))
            x = x + layer.cross.joined(cross(i, q))
            return layer.feed_forward(x), (kept, q)

        rows = jnp.arange(self.config.decoder_layers), layers, kept
        x, (kept, queries) = jax.lax.scan(one, x, rows)
        return self.embedding.attend(self.decoder_norm(x)), kept, queries


def _stacked(config: WhisperConfig, rngs: nnx.Rngs, number: int, *, cross: bool) -> Layer:
    """So many layers in one module, whose variables have a first axis for them."""

    @nnx.split_rngs(splits=number)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return Layer(config, rngs, cross=cross)

    return make(rngs)


def attend_dense(q: Array, k: Array, v: Array, seen: Array | None = None) -> Array:
    """Attention [B, T, H, D] over k and v [B, S, H, D], where seen [T, S]."""
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def assemble(tensors: Mapping[str, np.ndarray], where: str) -> Whisper:
    """The model of a CTranslate2 checkpoint, in float32.

    Args:
      tensors: by the file's names.
      where: the file's name, for errors.

    Raises:
      ValueError: a tensor or a setting that is missing, left over, of another shape or type, or not
        finite.
    """
    config = _config_of(tensors, where)
    model = nnx.eval_shape(lambda: Whisper(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    left, filled = dict(tensors), {}
    for path, abstract in nnx.to_flat_state(state):
        names, rows = _sources(tuple(map(str, path)), config)
        shape = abstract.shape[-abstract.ndim + (len(names) > 1) :]
        arrays = []
        for name in names:
            array = _part(tensors, name, rows, where)
            array = array.T if path[-1] == "kernel" else array
            if array.shape != shape:
                raise ValueError(f"{where}: {name} is {array.shape}: it must be {shape}")
            arrays.append(array)
            left.pop(name, None)
        array = np.stack(arrays) if len(names) > 1 else arrays[0]
        filled[path] = abstract.replace(jnp.asarray(array))
    more = [x for x in left if x not in _READ_ELSEWHERE]
    if more:
        raise ValueError(f"{where} holds tensors that are not read: {', '.join(sorted(more)[:5])}")
    return nnx.merge(graph, nnx.from_flat_state(filled))


_FLAGS = {  # settings that the file has besides, as this model computes
    "decoder/activation": 3,
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
_READ_ELSEWHERE = {
    *_FLAGS,
    *("encoder/num_heads", "decoder/num_heads"),
    # Which heads tell the time of words, and a copy of the embedding.
    *("decoder/alignment_heads", "decoder/alignment_layer", "decoder/projection/weight"),
}
_NORMS = {"scale": "gamma", "bias": "beta"}
_PARTS: dict[str, tuple[str, tuple[int, int] | None]] = {
    "attention/query": ("self_attention/linear_0", (0, 3)),
    "attention/key": ("self_attention/linear_0", (1, 3)),
    "attention/value": ("self_attention/linear_0", (2, 3)),
    "attention/out": ("self_attention/linear_1", None),
    "cross/query": ("attention/linear_0", None),
    "cross/key": ("attention/linear_1", (0, 2)),
    "cross/value": ("attention/linear_1", (1, 2)),
    "cross/out": ("attention/linear_2", None),
    "norm": ("self_attention/layer_norm", None),
    "cross_norm": ("attention/layer_norm", None),
    "mlp_norm": ("ffn/layer_norm", None),
    "up": ("ffn/linear_0", None),
    "down": ("ffn/linear_1", None),
}
_WHOLE = {
    "conv1": "encoder/conv1",
    "conv2": "encoder/conv2",
    "encoder_norm": "encoder/layer_norm",
    "decoder_norm": "decoder/layer_norm",
    "embedding": "decoder/embeddings",
    "encoder_positions": "encoder/position_encodings/encodings",
    "decoder_positions": "decoder/position_encodings/encodings",
}


def _part(tensors, name: str, rows: tuple[int, int] | None, where: str) -> np.ndarray:
    """A tensor in float32, or one of so many projections whose rows lie one after the other in it."""
    if name not in tensors:
        raise ValueError(f"{where} lacks the tensor {name!r}")
    if not np.issubdtype(tensors[name].dtype, np.floating):
        raise ValueError(
            f"{where}: {name} has the type {tensors[name].dtype}: without a scale it is no weight"
        )
    array = np.asarray(tensors[name], np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: {name} holds numbers that are not finite")
    if rows is None:
        return array
    if not array.ndim or array.shape[0] % rows[1]:
        raise ValueError(f"{where}: {name} is {array.shape}: it must be {rows[1]} parts of rows")
    return np.split(array, rows[1])[rows[0]]


def _sources(
    path: tuple[str, ...], config: WhisperConfig
) -> tuple[list[str], tuple[int, int] | None]:
    """The file's names of a parameter, one for each layer, and which part of how many it is in them."""
    first, last = path[0], path[-1]
    if len(path) == 1:
        return [_WHOLE[first]], None
    rows = None
    if first in _WHOLE:
        bases = [_WHOLE[first]]
    else:
        own, rows = _PARTS["/".join(path[1:-1])]
        number = config.encoder_layers if first == "encoder" else config.decoder_layers
        bases = [f"{first}/layer_{i}/{own}" for i in range(number)]
    names = _NORMS if bases[0].endswith("norm") else {"kernel": "weight", "embedding": "weight"}
    return [f"{base}/{names.get(last, last)}" for base in bases], rows


def _config_of(tensors: Mapping[str, np.ndarray], where: str) -> WhisperConfig:
    """The sizes, from the tensors' shapes."""
    wanted: tuple[str, ...] = ("encoder/conv1/weight", "encoder/num_heads", "decoder/num_heads")
    wanted += tuple(f"{x}/position_encodings/encodings" for x in ("encoder", "decoder"))
    wanted += ("decoder/embeddings/weight", *_FLAGS)
    for name in wanted:
        if name not in tensors:
            raise ValueError(f"{where} lacks the tensor {name!r}")
    for name, value in _FLAGS.items():
        if int(tensors[name]) != value:
            raise ValueError(f"{where}: {name} is {int(tensors[name])}: it must be {value}")
    heads = int(tensors["encoder/num_heads"]), int(tensors["decoder/num_heads"])
    shapes = [tensors[x].shape for x in (wanted[0], *wanted[3:6])]
    if heads[0] != heads[1] or [len(x) for x in shapes] != [3, 2, 2, 2]:
        raise ValueError(f"{where}: heads {heads} and shapes {shapes} are not those of a Whisper")
    (width, mels, _), (frames, _), (positions, _), (vocab, _) = shapes
    if heads[0] < 1 or width % heads[0]:
        raise ValueError(f"{where}: {heads[0]} heads do not divide the width {width}")

    def layers(side: str) -> int:
        of = {x.split("/")[1] for x in tensors if x.startswith(f"{side}/layer_")}
        return len(of - {"layer_norm"})

    return WhisperConfig(
        width, heads[0], layers("encoder"), layers("decoder"), mels, frames, positions, vocab
    )
