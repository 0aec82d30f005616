"""Many requests within fixed bytes: questions of one context, and requests that join and leave.

    python -m experiments.benchmarks.serving [--json OUT] [--quick]

Some fifteen minutes on two cores; --quick takes four. SmolLM2-135M over a public-domain text. Sixteen
questions of one context, which is read once: their answers against those of sixteen runs of their own.
And 200 requests of random lengths in four places: bytes, which are fixed when the cache is made,
compilations, and the answers of some against those that they give alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import _report
from experiments.benchmarks._report import Bar, Row
from experiments.harness import texts
from experiments.models import load_gguf, smollm2_path
from experiments.models.worth import decoder_of
from jbalance import decode
from jbalance.decode import Model, Reserve, devices, prefill

TEXT = "lcet10"
QUESTIONS, ANSWER_TOKENS, QUESTION_TOKENS = 16, 8, 12
CONTEXT, QUICK_CONTEXT = 4096, 1024
REQUESTS, QUICK_REQUESTS, PLACES = 200, 40, 4
LONGEST_PROMPT, MOST_NEW = 256, 24
PLACE_BYTES = 4_000_000  # so that a request has as much as it can use, whoever is beside it


def main() -> None:
    _report.main("benchmarks.serving", __doc__, measure_all)


def measure_all(quick: bool) -> Iterator[Row]:
    _, model, tokenizer = load_gguf(smollm2_path())
    ids = texts.encode(tokenizer, texts.text_of(TEXT))
    decoder = decoder_of(model)
    yield from _questions(decoder, ids, QUICK_CONTEXT if quick else CONTEXT)
    yield from _requests(decoder, ids, QUICK_REQUESTS if quick else REQUESTS)


def _questions(model: Model, ids: np.ndarray, size: int) -> list[Row]:
    """Questions of one context together, and each in a run of its own."""
    full = model.dense_bytes(size)
    reserve = Reserve(PLACES, QUESTION_TOKENS + ANSWER_TOKENS)
    room = reserve.unit_bytes(model.head_dim) * model.num_layers * model.num_kv_heads
    budget = [full // 4 + room]
    start = time.perf_counter()
    context = decode.read(model, ids[:size], budget, reserve=reserve)
    jax.block_until_ready(context.caches)
    read_s = time.perf_counter() - start
    begins = np.linspace(100, size - 100, QUESTIONS).astype(int)
    questions = [
        ids[i : i + QUESTION_TOKENS] for i in begins
    ]  # what the text says there goes on so
    options: dict[str, Any] = {
        "max_new_tokens": ANSWER_TOKENS,
        "num_requests": PLACES,
        "context": context,
    }
    start = time.perf_counter()
    together = decode.generate(model, questions, budget, **options)
    answer_s = time.perf_counter() - start
    alone = [decode.generate(model, [q], budget, **options)[0] for q in questions]
    same = sum(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    right = [
        np.mean(found == ids[i + QUESTION_TOKENS :][:ANSWER_TOKENS])
        for found, i in zip(together, begins, strict=True)
    ]
    label = f"ctx{size}_questions{QUESTIONS}"
    return [
        Row(label, "answers_as_alone", same, Bar(QUESTIONS, at_least=True)),
        Row(label, "tokens_as_in_the_text", float(np.mean(right))),
        Row(label, "resident_bytes", sum(context.nbytes), Bar(full // 4)),
        Row(label, "reading_over_answering", read_s / answer_s),
    ]


def _requests(model: Model, ids: np.ndarray, number: int) -> list[Row]:
    """Requests of random lengths in a few places: some of them again, alone."""
    rng = np.random.default_rng(0)
    begins = rng.integers(0, len(ids) - LONGEST_PROMPT, number)
    prompts = [ids[i : i + n] for i, n in zip(begins, rng.integers(1, 257, number), strict=True)]
    most = rng.integers(1, MOST_NEW + 1, number).tolist()
    budget, largest, compiled = PLACES * PLACE_BYTES, 0, set()
    jitted: dict[str, Any] = {
        "step": devices._attend_token,
        "prefill": prefill._layer,
        "admit": devices._admit,
        "settle": devices.settle,
    }

    def watched(_: int, token: int) -> None:
        del token
        compiled.add(tuple(f._cache_size() for f in jitted.values()))

    before = {name: f._cache_size() for name, f in jitted.items()}
    found = decode.generate(
        model, prompts, [budget], max_new_tokens=most, num_requests=PLACES, on_token=watched
    )
    for name, f in jitted.items():
        largest = max(largest, f._cache_size() - before[name])
    chosen = range(0, number, max(number // 8, 1))
    same = 0
    for i in chosen:
        (alone,) = decode.generate(
            model, [prompts[i]], [budget], max_new_tokens=most[i], num_requests=PLACES
        )
        same += np.array_equal(alone, found[i])
    label = f"requests{number}_places{PLACES}"
    return [
        Row(label, "tokens", sum(map(len, found))),
        Row(label, "most_compilations_of_a_program", largest, Bar(1)),
        Row(label, "resident_bytes", _resident(model, budget), Bar(budget)),
        Row(label, "of_8_as_alone", same, Bar(len(chosen), at_least=True)),
    ]


def _resident(model: Model, budget: int) -> int:
    """Bytes of the caches, which no step changes: they are fixed when they are made."""
    return max(decode.create(model, [budget], num_requests=PLACES).nbytes)


if __name__ == "__main__":
    main()
