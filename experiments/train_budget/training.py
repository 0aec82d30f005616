"""One run: a decoder of Flax's own modules, balanced in place, and what it loses on held-out text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from experiments.harness import logs
from experiments.kv_budget import data
from experiments.models.decoder import Decoder, DecoderConfig, num_parameters
from experiments.prefill_budget.policies import BLOCK_K, BLOCK_Q, POLICIES
from jbalance import adapters

TEXTS = ("lcet10", "plrabn12", "alice29", "hamlet", "lear")
VOCABULARY, HELD_OUT, HELD_OUT_PIECES = 2048, 0.1, 64
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 100, 0.1
LOGGED = 20  # steps between two points of the training curve


def _dense(model: Decoder, density: float) -> None:
    adapters.balance_nnx(model, adapters.attention_fn())


def _swap(policy: str) -> Callable[[Decoder, float], None]:
    def swap(model: Decoder, density: float) -> None:
        def plan_of(q: jax.Array, k: jax.Array, v: jax.Array, /, *, causal: bool) -> Any:
            return POLICIES[policy](*jax.lax.stop_gradient((q, k, v)), density)

        adapters.balance_nnx(model, adapters.attention_fn(plan_of))

    return swap


def _balanced(rule: str, model: Decoder, density: float) -> adapters.NnxBalance:
    tiles, balancer = adapters.Tiles(BLOCK_Q, BLOCK_K), adapters.TileBalancer(rule)
    return adapters.NnxBalance(model, density, tiles, balancer)


ARMS: dict[str, Callable[[Decoder, float], adapters.NnxBalance | None]] = {
    "dense": _dense,
    "window": _swap("window"),  # and the first keys
    "uniform": _swap("uniform"),  # most attention, the same part of every query block and head
    "ladder": functools.partial(_balanced, "uniform"),  # one price in a layer, the layers alike
    "ladder over layers": functools.partial(_balanced, "priced"),  # one price for all layers
    "proportional": functools.partial(_balanced, "proportional"),
}


@functools.cache
def texts() -> tuple[np.ndarray, np.ndarray, Tokenizer]:
    """Token ids for training and for validation, which is the end of each text, and the tokenizer.

    Byte-level BPE, trained on the training part alone.
    """
    parts = []
    for name in TEXTS:
        text = data.text_of(name)
        cut = int(len(text) * (1 - HELD_OUT))
        parts.append((text[:cut], text[cut:]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([own for own, _ in parts], trainer)
    own, held = (
        np.concatenate([data.encode(tokenizer, text) for text in side])
        for side in zip(*parts, strict=True)
    )
    return own, held, tokenizer


def train(
    arm: str, seed: int, steps: int, tokens: int, density: float, advance: Callable[[], None]
) -> dict[str, Any]:
    """Train one arm from the seed's parameters on the seed's pieces, the same for every arm.

    Args:
      arm: a name in `ARMS`.
      seed: of parameters and pieces.
      steps: of one piece each.
      tokens: of a piece.
      density: part of the causal tiles.
      advance: called after each step.

    Returns:
      Losses per token on held-out pieces, and what was computed.
    """
    own, held, _ = texts()
    model = Decoder(DecoderConfig(VOCABULARY, tokens), rngs=nnx.Rngs(seed))
    balance = ARMS[arm](model, density)
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(WARM_UP, steps // 2), steps)
    chain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=WEIGHT_DECAY)
    )
    optimiser = nnx.Optimizer(model, chain, wrt=nnx.Param)
    traces: list[int] = []

    @nnx.jit
    def step(model: Decoder, optimiser: Any, balance: Any, ids: jax.Array) -> jax.Array:
        traces.append(1)
        loss, gradient = nnx.value_and_grad(lambda model: _losses(model, ids).mean())(model)
        optimiser.update(model, gradient)
        if balance is not None:
            balance.update(model)
        return loss

    rng = np.random.default_rng(seed)
    with logs.writer("train_budget", arm, seed) as writer:
        for i in range(steps):
            start = rng.integers(0, len(own) - tokens)
            piece = jnp.asarray(own[None, start : start + tokens + 1])
            loss = step(model, optimiser, balance, piece)
            if i % LOGGED == 0:
                writer.add_scalar("loss", float(loss), i)
            advance()
    losses = nnx.jit(_losses)
    starts = np.linspace(0, len(held) - tokens - 1, HELD_OUT_PIECES).astype(int)
    each = np.stack([losses(model, jnp.asarray(held[None, s : s + tokens + 1]))[0] for s in starts])
    shares = [round(float(x.share), 3) for x in adapters.budgets_of(model)]
    figures = {
        "held_out": float(each.mean()),
        "held_out_second_half": float(each[:, tokens // 2 :].mean()),
        "traces": len(traces),
    }
    return {"figures": figures, "parameters": num_parameters(model), "layer_shares": shares}


def _losses(model: Decoder, ids: jax.Array) -> jax.Array:
    """[B, T]."""
    return optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:])
