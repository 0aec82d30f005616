"""One run: several questions of each context, answered from the cache that an arm keeps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rouge_score import rouge_scorer
from tokenizers import Tokenizer

from experiments.harness import runs, texts
from experiments.kv_budget import evaluate, measure, policies
from experiments.kv_budget.measure import Measured
from experiments.long_text import data
from experiments.models import Transformer, load_gguf, smollm2_path
from experiments.models.worth import decoder_of
from jbalance import decode
from jbalance.decode import Context, Model, Reserve

CONTEXT = 1024  # tokens
QUESTIONS = 8  # of each context
ANSWER = 24  # tokens
FED = 64  # tokens of a question and its answer at most
PLACES = 4  # questions that are answered at once
QUESTION = '\nQuestion: What does "{0}" mean?\nAnswer: {0}:'
ARMS = ("full", "uniform", "uniform-bits", "proportional", "ladder")  # of `policies.POLICIES`
NOTHING = "no context"


class Sizes(NamedTuple):
    """Of a study."""

    contexts: int  # of each seed


class Asked(NamedTuple):
    """A question, and what the context says."""

    tokens: np.ndarray  # [Q]
    answer: np.ndarray  # [A]


class Reading(NamedTuple):
    """A context and what is asked of it."""

    tokens: np.ndarray  # [CONTEXT]
    asked: list[Asked]


class Loaded(NamedTuple):
    """SmolLM2-135M, as it is and as the library decodes it."""

    model: Transformer
    tokenizer: Tokenizer
    decoder: Model


@functools.cache
def loaded() -> Loaded:
    """All of it, loaded once."""
    _, model, tokenizer = load_gguf(smollm2_path())
    return Loaded(model, tokenizer, decoder_of(model))


@functools.cache
def readings(seed: int, number: int) -> list[Reading]:
    """Contexts of a glossary's entries in a random order, none of them twice."""
    tokenizer = loaded().tokenizer
    rng = np.random.default_rng([seed, 7])
    entries = data.entries()
    order = iter(rng.permutation(len(entries)))
    found = []
    for _ in range(number):
        parts: list[np.ndarray] = []
        whole: list[data.Entry] = []
        size = 0
        while size < CONTEXT:
            entry = entries[next(order)]
            parts.append(texts.encode(tokenizer, f"{entry.term}: {entry.definition}\n"))
            size += len(parts[-1])
            whole += [entry] if size <= CONTEXT else []
        chosen = rng.choice(len(whole), QUESTIONS, replace=False)
        asked = [
            Asked(
                texts.encode(tokenizer, QUESTION.format(whole[i].term)),
                texts.encode(tokenizer, " " + whole[i].definition)[:ANSWER],
            )
            for i in chosen
        ]
        found.append(Reading(np.concatenate(parts)[:CONTEXT], asked))
    return found


@functools.cache
def measured(seed: int, number: int) -> list[Measured]:
    """What the arms need to know of each context, which is read once for all."""
    scorers = policies.scorers_of([policies.policy_of(arm) for arm in ARMS])
    return [measure.prefill(loaded().model, x.tokens, scorers) for x in readings(seed, number)]


def run(
    arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """How well the questions of a seed's contexts are answered, and the bytes that were held."""
    likely, overlap, held = [], [], []
    for reading, known in zip(
        readings(seed, sizes.contexts), measured(seed, sizes.contexts), strict=True
    ):
        context = None if arm == NOTHING else reduced(arm, part, known)
        held.append(0 if context is None else sum(context.nbytes))
        likely += [nats(context, asked) for asked in reading.asked]
        overlap += _overlaps(context, reading)
        advance()
    # Each arm's arenas have shapes of their own: their programs are not used again.
    jax.clear_caches()
    return {
        "figures": {
            "nats a token of the answer": float(np.mean(likely)),
            "ROUGE-L": float(np.mean(overlap)),
            "MB held": float(np.mean(held)) / 1e6,
        },
        "cases": {
            "nats a token of the answer": runs.packed(likely),
            "ROUGE-L": runs.packed(overlap),
        },
    }


def reduced(arm: str, part: float, known: Measured) -> Context:
    """A context of which a policy keeps a part of the bytes, and room for what is asked of it."""
    policy = policies.policy_of(arm)
    budget = int(part * loaded().decoder.dense_bytes(known.k.shape[1]))
    plan = policies.make_plan(policy, known, [budget])
    context = policies.pack(policy, known, plan, jax.devices()[:1])
    return dataclasses.replace(context, reserve=Reserve(PLACES, FED))


def answers(
    context: Context | None, asked: Sequence[np.ndarray], new_tokens: int
) -> list[np.ndarray]:
    """Greedy tokens after each question, over the context and the room that is reserved beside it."""
    decoder = loaded().decoder
    units = decoder.num_layers * decoder.num_kv_heads
    reserve = Reserve(PLACES, FED)
    room = reserve.unit_bytes(decoder.head_dim) * units + reserve.device_bytes(units)
    held = 0 if context is None else sum(context.nbytes)
    return decode.generate(
        decoder,
        asked,
        [held + room],
        max_new_tokens=new_tokens,
        num_requests=min(PLACES, len(asked)),
        context=context,
    )


def nats(context: Context | None, asked: Asked) -> float:
    """Mean negative log-likelihood of what the context says, after the question."""
    fed = np.concatenate([asked.tokens, asked.answer[:-1]])
    row = np.zeros(FED, np.int32)  # what follows the answer is seen by nothing before it
    row[: len(fed)] = fed
    if context is None:
        found = evaluate.reference(loaded().model, row[:1], row)
    else:
        found = evaluate.log_probs(loaded().decoder, context, jax.devices()[:1], row)
    at = np.arange(len(asked.tokens) - 1, len(fed))
    return -float(np.asarray(found)[at, asked.answer].mean())


def _overlaps(context: Context | None, reading: Reading) -> list[float]:
    """ROUGE-L (F) of the greedy answers of each question with what the context says."""
    tokenizer = loaded().tokenizer
    found = answers(context, [asked.tokens for asked in reading.asked], ANSWER)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return [
        scorer.score(tokenizer.decode(asked.answer.tolist()), tokenizer.decode(own.tolist()))[
            "rougeL"
        ].fmeasure
        for asked, own in zip(reading.asked, found, strict=True)
    ]
