"""What a token's worth is made of: learned, sketched, and attention alone, over the same live cache.

    python -m experiments.kv_budget.worths [--json OUT] [--contexts N]

Some ten minutes on two cores. Prompts of 1,280 tokens of two texts enter a live cache of SmolLM2-135M at
a fraction of their bytes: weighed by what the model has learned (`decode.fit_worth`), by
`importance.token_worth`, or by the attention of the last 64 queries alone, in a currency in which a
token that is decoded later weighs a seventh. KL to dense attention over the 128 tokens that follow, and
pass keys found; and the same KL after 600 given tokens were decoded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import cli, files, progress
from experiments.kv_budget import data, evaluate
from experiments.models import options as models
from experiments.models.worth import decoder_of
from jbalance import decode, importance
from jbalance.decode import extend, prefill

FRACTIONS, CONTEXT, CONTINUATION, LONG = (0.25, 0.1), 1280, 128, 600
TEXTS = ["lcet10", "plrabn12"]


@contextlib.contextmanager
def attention_alone() -> Iterator[None]:
    """Prompts weighed by the attention of the last queries, whatever their distance, undiscounted."""

    def later(q, k, v, *, num_tokens=None):
        return importance.attention_energy(
            q, k, v, queries=q.shape[0], min_distance=0, num_tokens=num_tokens
        )

    jax.clear_caches()
    with (
        mock.patch.object(prefill, "later_energy", later),
        mock.patch.object(prefill, "worth_of", lambda repeated, later: jnp.sqrt(later)),
    ):
        yield
    jax.clear_caches()


def rows_of(model, decoder, cases: dict[str, np.ndarray], fraction: float) -> dict[str, float]:
    """Means over the cases at a fraction of the bytes."""
    budget, device = [int(fraction * decoder.dense_bytes(CONTEXT))], jax.devices()[:1]
    found: dict[str, list[float]] = {"kl": [], "passkey": [], "kl_after_600": []}
    for i, context in enumerate(cases["lm_ctx"]):
        follow = cases["lm_cont"][i]
        state = decode.join(decoder, decode.create(decoder, budget), 0, context)
        near, far = follow[:CONTINUATION], follow[LONG : LONG + CONTINUATION]
        found["kl"].append(_kl(model, decoder, state, device, context, near))
        for token in follow[:LONG]:
            given = jax.device_put(jnp.array([token], jnp.int32), device[0])
            state = dataclasses.replace(state, tokens=given)
            _, state = decode.step(decoder, state)
        seen = np.concatenate([context, follow[:LONG]])
        found["kl_after_600"].append(_kl(model, decoder, state, device, seen, far))
    for i, context in enumerate(cases["pk_ctx"]):
        state = decode.join(decoder, decode.create(decoder, budget), 0, context)
        fed = np.concatenate([cases["pk_query"][i], cases["pk_answer"][i][:-1]])
        logs = _log_probs(decoder, state, device, fed, len(context))
        answer = cases["pk_answer"][i]
        found["passkey"].append(float((np.argmax(logs, axis=-1)[-len(answer) :] == answer).all()))
    return {name: float(np.mean(x)) for name, x in found.items()}


def _log_probs(decoder, state, device, tokens, position):
    """After each of the tokens, which only look at a request's cache: its recent tokens too."""
    return extend.log_probs(decoder, device, state.caches, None, tokens, position)


def _kl(model, decoder, state, device, seen, follow) -> float:
    full = evaluate.reference(model, seen, follow[:-1])
    reduced = _log_probs(decoder, state, device, follow[:-1], len(seen))
    return evaluate.quality(reduced, full, follow[1:]).kl


def job(options: argparse.Namespace) -> None:
    keep = files.json_writer(options.json)
    found = models.loaded(options)
    model, tokenizer = found.model, found.spoken.tokenizer
    cases = data.case_arrays(
        tokenizer,
        TEXTS,
        per_text=max(options.contexts // 2, 1),
        context_tokens=CONTEXT,
        continuation_tokens=LONG + CONTINUATION,
        accept=evaluate.answers_with_everything(model),
    )
    sketched, results = decoder_of(model, learned=False), []
    ways: dict[str, Any] = {
        "learned": (decoder_of(model), contextlib.nullcontext),
        "token_worth": (sketched, contextlib.nullcontext),
        "attention_alone": (sketched, attention_alone),
    }
    with progress.bar("worths x budgets", len(ways) * len(FRACTIONS)) as advance:
        for name, (decoder, way) in ways.items():
            with way():
                for fraction in FRACTIONS:
                    row = rows_of(model, decoder, cases, fraction)
                    results.append({"worth": name, "budget": fraction} | row)
                    keep({"contexts": len(cases["lm_ctx"]), "results": results})
                    print(results[-1], flush=True)
                    advance()


def main(arguments: list[str] | None = None) -> int:
    parser = cli.parser("experiments.kv_budget.worths", __doc__)
    cli.add_json(parser)
    parser.add_argument("--contexts", type=int, default=4, help="of each kind, from both texts")
    models.add_options(parser)
    return cli.run(parser, job, arguments)


if __name__ == "__main__":
    sys.exit(main())
