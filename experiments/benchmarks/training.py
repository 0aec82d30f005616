"""Benchmark of a training step that balances: steps per second, and how often it compiles.

    python -m experiments.benchmarks.training [--json OUT] [--quick]

Case `t4096_d0.5`: a decoder of two layers over 4,096 bytes of a real text, whose attention is most
of the work, trained with half of its causal tiles, chosen in every step and moved between the layers
by what they are worth. `steps_ratio_vs_own_dense` is in steps per second over this library's
attention to all causal tiles, `steps_ratio_vs_jax_dpa` over Flax's own, which is
`jax.nn.dot_product_attention`; medians of interleaved steps on one core. `traces` counts how often 500
steps were traced whose budget changed in every one, `largest_density` is the most tiles that any of
them took, and `attention_part` what of the dense step is attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.benchmarks import _report
from experiments.benchmarks._report import Bar, Row
from experiments.harness import texts
from experiments.models.decoder import Decoder, DecoderConfig
from jbalance import adapters, attention
from jbalance.attention import TilePlan

TOKENS, QUICK_TOKENS, STEPS, QUICK_STEPS = 4096, 1024, 500, 10
DENSITY, BLOCK, REPETITIONS = 0.5, 128, 5
BARS = {
    "steps_ratio_vs_own_dense": Bar(1.4, at_least=True),
    "steps_ratio_vs_jax_dpa": Bar(3, at_least=True),
    "traces": Bar(1),
}


class Job(NamedTuple):
    """A model in training: what a step changes, and the step."""

    state: list[Any]  # [model, optimiser, balance or None]
    step: Callable[..., jax.Array]  # (*state, ids [1, T + 1], density) -> loss
    traces: list[int]


def main() -> None:
    _report.main("benchmarks.training", __doc__, measure)


def measure(quick: bool) -> list[Row]:
    tokens, steps = (QUICK_TOKENS, QUICK_STEPS) if quick else (TOKENS, STEPS)
    text = np.frombuffer(texts.text_of("lcet10").encode(), np.uint8).astype(np.int32)
    ids = [jnp.asarray(text[None, i * tokens : (i + 1) * tokens + 1]) for i in range(8)]
    jobs = {
        "dpa": job(tokens, lambda model: None),
        "dense": job(tokens, _with(adapters.attention_fn())),
        "none": job(tokens, _with(adapters.attention_fn(_no_tiles))),
        "balanced": job(tokens, _balanced),
    }
    seconds = _report.interleaved(
        {name: functools.partial(j.step, *j.state, ids[0], DENSITY) for name, j in jobs.items()},
        REPETITIONS,
    )
    balanced = jobs["balanced"]
    density = np.linspace(0.3, 0.7, steps)
    np.random.default_rng(0).shuffle(density)
    largest = 0.0
    for i, budget in enumerate(density):
        balanced.step(*balanced.state, ids[i % len(ids)], float(budget))
        given = _density(balanced.state[0])
        if given > np.float32(budget):
            raise RuntimeError(f"step {i} was given {budget} of the tiles and plans {given}")
        largest = max(largest, given)
    values = {
        "steps_ratio_vs_own_dense": seconds["dense"] / seconds["balanced"],
        "steps_ratio_vs_jax_dpa": seconds["dpa"] / seconds["balanced"],
        "traces": len(balanced.traces),
        "largest_density": largest,
        "attention_part": 1 - seconds["none"] / seconds["dense"],
    }
    case = f"t{tokens}_d{DENSITY:g}"
    # Short texts are not what is held against the bars.
    bars = {} if quick else BARS
    return [Row(case, name, value, bars.get(name)) for name, value in values.items()]


def job(tokens: int, balance_of: Callable[[Decoder], Any]) -> Job:
    """The same model, from the same parameters, whose attention `balance_of` changes."""
    config = DecoderConfig(
        256, tokens, num_layers=2, width=128, num_heads=4, head_dim=64, hidden=256
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    balance = balance_of(model)
    optimiser = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    traces: list[int] = []

    @nnx.jit
    def step(
        model: Decoder, optimiser: Any, balance: Any, ids: jax.Array, density: jax.Array
    ) -> jax.Array:
        traces.append(1)

        def loss_of(model: Decoder) -> jax.Array:
            predicted = model(ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(predicted, ids[:, 1:]).mean()

        loss, gradient = nnx.value_and_grad(loss_of)(model)
        optimiser.update(model, gradient)
        if balance is not None:
            balance.update(model, density)
        return loss

    return Job([model, optimiser, balance], step, traces)


def _with(attention_fn: Callable[..., jax.Array]) -> Callable[[Decoder], None]:
    def swap(model: Decoder) -> None:
        adapters.set_attention_fn(model, attention_fn)

    return swap


def _balanced(model: Decoder) -> adapters.NnxBalance:
    return adapters.NnxBalance(model, DENSITY, adapters.Tiles(BLOCK, BLOCK))


def _no_tiles(q: jax.Array, k: jax.Array, v: jax.Array, /, *, causal: bool | None) -> TilePlan:
    tiling = attention.Tiling(q.shape[1], k.shape[1], BLOCK, BLOCK, bool(causal))
    return attention.from_mask(jnp.zeros((1, 1, *tiling.shape), bool), tiling)


def _density(model: Decoder) -> float:
    """Of the tiles that the layers' next plans hold, all together."""
    budgets = adapters.budgets_of(model)
    tiles = sum(round(float(x.fraction) * int(x.limits[1])) for x in budgets)
    return tiles / sum(int(x.limits[1]) for x in budgets)


if __name__ == "__main__":
    main()
