"""One run: a language model, balanced in place, and what it loses on held-out text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from experiments.harness import logs, optimisers
from experiments.harness.texts import encode, text_of
from experiments.harness.tokens import byte_level_bpe
from experiments.models.decoder import num_parameters
from experiments.tiles.model import Config, LanguageModel
from experiments.tiles.policies import BLOCK_K, BLOCK_Q, POLICIES
from jbalance import adapters

TEXTS = ("lcet10", "plrabn12", "alice29", "hamlet", "lear")
VOCABULARY, HELD_OUT, HELD_OUT_PIECES = 2048, 0.1, 64
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 0.05, 0.1
LOGGED = 20  # steps between two points of the training curve


def _dense(model: LanguageModel, density: float) -> None:
    adapters.set_attention_fn(model, adapters.attention_fn())


def _swap(policy: str) -> Callable[[LanguageModel, float], None]:
    def swap(model: LanguageModel, density: float) -> None:
        def plan_of(q: jax.Array, k: jax.Array, v: jax.Array, /, *, causal: bool | None) -> Any:
            return POLICIES[policy](*jax.lax.stop_gradient((q, k, v)), density)

        adapters.set_attention_fn(model, adapters.attention_fn(plan_of))

    return swap


def _balanced(rule: str, model: LanguageModel, density: float) -> adapters.NnxBalance:
    tiles, balancer = adapters.Tiles(BLOCK_Q, BLOCK_K), adapters.TileBalancer(rule)
    return adapters.NnxBalance(model, density, tiles, balancer)


ARMS: dict[str, Callable[[LanguageModel, float], adapters.NnxBalance | None]] = {
    "dense": _dense,
    "window": _swap("window"),  # and the first keys, the same part of every query block
    "sliding window": _swap("sliding-window"),  # of the same width for every query block
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
        text = text_of(name)
        cut = int(len(text) * (1 - HELD_OUT))
        parts.append((text[:cut], text[cut:]))
    tokenizer = byte_level_bpe((own for own, _ in parts), VOCABULARY, prefix_space=False)
    own, held = (
        np.concatenate([encode(tokenizer, text) for text in side])
        for side in zip(*parts, strict=True)
    )
    return own, held, tokenizer


class Settings(NamedTuple):
    """What all runs share."""

    steps: int  # of one piece each
    tokens: int  # of a piece
    density: float  # part of the causal tiles
    dense_start: float  # part of the steps, before the others, over all tiles


def train(arm: str, seed: int, settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    """Train one arm from the seed's parameters on the seed's pieces, the same for every arm.

    The steps over all tiles come first, once for all arms of a seed that are trained one after the
    other; then the arm's attention takes over, in training and on what is held out.

    Args:
      arm: a name in `ARMS`.
      seed: of parameters and pieces.
      settings: of all runs.
      advance: called after each step.

    Returns:
      Losses per token on held-out pieces, and what was computed.
    """
    _, held, _ = texts()
    tokens, dense_steps = settings.tokens, int(settings.dense_start * settings.steps)
    begun, traces, curve = _begin(seed, settings)
    for _ in range(dense_steps):
        advance()
    model, optimiser = nnx.clone(begun)
    balance = ARMS[arm](model, settings.density)
    own_steps = range(dense_steps, settings.steps)
    own_traces, own_curve = _continue(model, optimiser, balance, seed, settings, own_steps, advance)
    with logs.writer("tiles_train", arm, seed) as writer:
        for i, loss in curve + own_curve:
            writer.add_scalar("loss", loss, i)
    losses = nnx.jit(_losses)
    starts = np.linspace(0, len(held) - tokens - 1, HELD_OUT_PIECES).astype(int)
    each = np.stack([losses(model, jnp.asarray(held[None, s : s + tokens + 1]))[0] for s in starts])
    shares = [round(float(x.fraction), 3) for x in adapters.budgets_of(model)]
    figures = {
        "held_out": float(each.mean()),
        "held_out_second_half": float(each[:, tokens // 2 :].mean()),
        "traces": traces + own_traces,
    }
    return {"figures": figures, "parameters": num_parameters(model), "layer_shares": shares}


@functools.lru_cache(maxsize=1)
def _begin(seed: int, settings: Settings) -> tuple[Any, int, list[tuple[int, float]]]:
    """Model and optimiser after the steps over all tiles; traces, and the curve."""
    model = LanguageModel(Config(VOCABULARY), rngs=nnx.Rngs(seed))
    _dense(model, 1.0)
    adamw = optimisers.adamw(settings.steps, PEAK_RATE, weight_decay=WEIGHT_DECAY, warm_up=WARM_UP)
    optimiser = nnx.Optimizer(model, adamw, wrt=nnx.Param)
    steps = range(int(settings.dense_start * settings.steps))
    return (model, optimiser), *_continue(model, optimiser, None, seed, settings, steps)


def _continue(
    model: LanguageModel,
    optimiser: Any,
    balance: adapters.NnxBalance | None,
    seed: int,
    settings: Settings,
    steps: range,
    advance: Callable[[], None] = lambda: None,
) -> tuple[int, list[tuple[int, float]]]:
    """Train in place through some of the steps; how often they were traced, and the curve."""
    own, _, _ = texts()
    traces: list[int] = []

    @nnx.jit
    def step(model: LanguageModel, optimiser: Any, balance: Any, ids: jax.Array) -> jax.Array:
        traces.append(1)
        loss, gradient = nnx.value_and_grad(lambda model: _losses(model, ids).mean())(model)
        optimiser.update(model, gradient)
        if balance is not None:
            balance.update(model)
        return loss

    rng = np.random.default_rng(seed)
    starts = [rng.integers(0, len(own) - settings.tokens) for _ in range(settings.steps)]
    curve = []
    for i in steps:
        piece = jnp.asarray(own[None, starts[i] : starts[i] + settings.tokens + 1])
        loss = step(model, optimiser, balance, piece)
        if i % LOGGED == 0:
            curve.append((i, float(loss)))
        advance()
    return len(traces), curve


def _losses(model: LanguageModel, ids: jax.Array) -> jax.Array:
    """[B, T]."""
    return optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:])
