"""A decoder's forward pass for training, with attention over a part of the tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jbalance import attention, checks
from jbalance.adapters.tile_budget import Tiles, attend_within
from jbalance.attention import TileBudget, Tiling
from jbalance.cache._step import scaled
from jbalance.decode.model import AttentionSpec, Model, check_model, in_vocabulary


def forward(
    model: Model,
    tokens: jax.Array,
    *,
    fraction: float | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Logits of a decoder whose attention is block-sparse: of each layer a part of the tiles.

    Call it inside of the loss, so that gradients reach the model's parameters:

        def loss_of(model, ids):
            logits = adapters.forward(adapters.decoder(model, spec), ids, fraction=0.5)
            return cross_entropy(logits[:, :-1], ids[:, 1:])

    Layers with a window compute all tiles of it, which are few already.

    Args:
      model: the decoder, such as `adapters.decoder` gives.
      tokens: [B, T] ids.
      fraction: of the causal tiles of each layer that sees all tokens before; in (0, 1]; None for all.
      tiles: how they are made; None for `Tiles()`.

    Returns:
      [B, T, V].

    Raises:
      ValueError: tokens of another shape, or outside of the vocabulary, a fraction outside of (0, 1].
    """
    check_model(model)
    checks.rank("tokens", tokens, 2, "[B, T]")
    if fraction is not None:
        fraction = checks.static_float("fraction", fraction, 0, 1, open_low=True)
    tiles = Tiles() if tiles is None else tiles
    checks.instance("tiles", tiles, Tiles)
    checks.non_empty("tokens", tokens)
    tokens = jnp.asarray(in_vocabulary("tokens", checks.whole("tokens", tokens), model))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = model.functions(0).embed(model.params, tokens, positions)
    for i, (weights, spec) in enumerate(zip(model.layers, model.attention, strict=True)):
        f = model.functions(i)
        q, k, v = f.qkv(weights, x, positions)
        q = scaled(q, spec.scale).astype(q.dtype)
        x = f.finish(weights, x, _attend(q, k, v, spec, fraction, tiles).astype(x.dtype))
    return model.functions(0).logits(model.params, x)


def _attend(q, k, v, spec: AttentionSpec, fraction, tiles: Tiles) -> jax.Array:
    """Causal attention of one layer, the queries scaled."""
    if fraction is not None and spec.window is None:
        _check_fraction(fraction, tiles.tiling(q.shape[1], q.shape[1], True))
        budget = TileBudget.of(fraction)
        given = {} if spec.soft_cap is None else {"soft_cap": spec.soft_cap}
        return attend_within(budget, q, k, v, tiles, is_causal=True, **given)[0]
    size = q.shape[1]
    tiling = Tiling(size, size, tiles.block_q, tiles.block_k)
    window = spec.window
    plan = attention.dense(tiling) if window is None else attention.window(window, tiling)
    return attention.attend(
        q,
        k,
        v,
        plan,
        causal=True,
        window=window,
        soft_cap=spec.soft_cap,
        backend=tiles.backend,
    ).y


def _check_fraction(fraction: float, tiling: Tiling) -> None:
    """ValueError for fewer tiles than every query must have."""
    visible, always = attention.candidates(tiling)
    least, most = int(always.sum()), int(visible.sum())
    if round(fraction * most) < least:
        raise ValueError(
            f"fraction is {fraction:g}: of {tiling.num_queries} tokens in tiles of {tiling.block_q} by "
            f"{tiling.block_k} every query needs its own and the first, {least / most:.3g} of all; give "
            f"more, or tiles= of smaller blocks"
        )
