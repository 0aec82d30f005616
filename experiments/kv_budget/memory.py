"""A model's weights and its cache in one memory at one price, beside the memory given to one of them.

    python -m experiments.kv_budget.memory [--json OUT] [--contexts N]

Some half an hour on two cores. What fewer bits cost SmolLM2-135M is measured on a novel that the
contexts do not come from. Then contexts of 1,280 tokens of two other texts, and the 128 tokens after
them: KL to the model as it is with a dense cache. The total bytes are those of weights in 3, 4 or 5 bits
with a dense cache of 16 bits, and of weights in 16 bits with a quarter of the cache.

`one price` is `decode.fit_memory`. `weights alone` has all weights in the finest bits that leave room
for a dense cache of 16 bits, which is not even rounded here. `cache alone` has what weights of 16 bits
leave; they are held and computed in 32 here.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.harness import cli, files, progress, texts
from experiments.kv_budget import data, evaluate
from experiments.models import options as models
from experiments.models.worth import decoder_of
from jbalance import decode
from jbalance.decode import Model, extend
from jbalance.decode.memory import dense_log_probs
from jbalance.decode.weights import BITS

CALIBRATION, CALIBRATION_TOKENS = "alice29", 1024
CONTEXT, CONTINUATION = 1280, 128
TEXTS = ["lcet10", "plrabn12"]
WEIGHT_BITS, CACHE_PART = (3, 4, 5), 0.25


class Arm(NamedTuple):
    """Some weights, and the bytes of the cache; None for a dense one."""

    model: Model
    cache_bytes: int | None
    about: dict[str, Any]


def totals(model: Model, losses: decode.MemoryLosses) -> dict[str, int]:
    """Bytes of weights and cache together, by what takes them."""
    dense = model.dense_bytes(CONTEXT + CONTINUATION)
    found = {
        f"weights in {bits} bits, dense cache": bytes_in(losses, bits) + dense
        for bits in WEIGHT_BITS
    }
    part = int(CACHE_PART * dense)
    return found | {"weights in 16 bits, a quarter of the cache": sixteen_bits(model) + part}


def bytes_in(losses: decode.MemoryLosses, bits: int) -> int:
    """Of all weights in so many bits."""
    level = losses.bits.index(bits)
    return int(losses.layer_bytes[:, level].sum() + losses.table_bytes[level])


def sixteen_bits(model: Model) -> int:
    """Bytes of the model in 16 bits."""
    return 2 * sum(x.size for x in jax.tree.leaves((model.params, model.layers)))


def arms(model: Model, losses: decode.MemoryLosses, total: int) -> dict[str, Callable[[], Arm]]:
    """By name, what fits into the bytes."""

    def one_price() -> Arm:
        fit = decode.fit_memory(model, losses, total, CONTEXT + CONTINUATION)
        about: dict[str, Any] = {"layer_bits": fit.layer_bits, "table_bits": fit.table_bits}
        about |= {"predicted_kl": fit.loss, "nats_per_mib": fit.price * 2**20}
        return Arm(fit.model, fit.cache_bytes, about)

    found: dict[str, Callable[[], Arm]] = {"one price": one_price}
    left = total - model.dense_bytes(CONTEXT + CONTINUATION)
    fitting = [bits for bits in BITS if bytes_in(losses, bits) <= left]
    if fitting:
        found["weights alone"] = functools.partial(weights_alone, model, fitting[-1])
    if total > sixteen_bits(model):
        found["cache alone"] = lambda: Arm(model, total - sixteen_bits(model), {})
    return found


def weights_alone(model: Model, bits: int) -> Arm:
    """All weights in so many bits, with a dense cache."""
    return Arm(decode.quantize_weights(model, bits, bits), None, {"bits": bits})


def kl_of(arm: Arm, context: np.ndarray, follow: np.ndarray, full: jax.Array) -> float:
    """Of the tokens that follow a context."""
    if arm.cache_bytes is None:
        got = dense_log_probs(arm.model, np.concatenate([context, follow]), len(context))
    else:
        state = decode.join(arm.model, decode.create(arm.model, [arm.cache_bytes]), 0, context)
        given = follow[:-1]
        device = jax.devices()[:1]
        got = extend.log_probs(arm.model, device, state.caches, None, given, len(context))
    return evaluate.quality(got, full, follow[1:]).kl


def job(options: argparse.Namespace) -> None:
    keep = files.json_writer(options.json)
    found = models.loaded(options)
    model, tokenizer = decoder_of(found.model), found.spoken.tokenizer
    cases = data.case_arrays(
        tokenizer,
        TEXTS,
        per_text=max(options.contexts // 2, 1),
        context_tokens=CONTEXT,
        continuation_tokens=CONTINUATION,
    )
    pairs = list(zip(cases["lm_ctx"], cases["lm_cont"], strict=True))
    ids = texts.encode(tokenizer, texts.text_of(CALIBRATION))
    start = len(ids) // 5
    with progress.display() as bars:
        task = bars.add_task("Measuring what bits cost", total=None)

        def step(done: int, steps: int) -> None:
            bars.update(task, total=steps)
            bars.advance(task)

        losses = decode.memory_losses(model, ids[start : start + CALIBRATION_TOKENS], on_step=step)
    full = [evaluate.reference(found.model, context, follow[:-1]) for context, follow in pairs]
    results: list[dict[str, Any]] = []
    report = {"contexts": len(pairs), "losses": _plain(losses), "results": results}
    every = {
        name: (total, arms(model, losses, total)) for name, total in totals(model, losses).items()
    }
    with progress.bar("arms", sum(len(named) for _, named in every.values())) as advance:
        for name, (total, named) in every.items():
            for arm, made in named.items():
                own = made()
                kl = [kl_of(own, *pair, wanted) for pair, wanted in zip(pairs, full, strict=True)]
                row = {"total": name, "total_bytes": total, "arm": arm, "kl": float(np.mean(kl))}
                row |= {"cache_bytes": own.cache_bytes, "each": kl, **own.about}
                results.append(row)
                keep(report)
                print(f"{name} ({total / 1e6:.1f} MB), {arm}: KL {row['kl']:.4g}", flush=True)
                advance()


def _plain(losses: decode.MemoryLosses) -> dict[str, Any]:
    return {name: np.asarray(x).tolist() for name, x in losses._asdict().items()}


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.kv_budget.memory", __doc__)
    cli.add_json(parser)
    parser.add_argument("--contexts", type=int, default=8, help="from both texts together")
    models.add_options(parser)
    return cli.run(parser, job, arguments)


if __name__ == "__main__":
    sys.exit(main())
