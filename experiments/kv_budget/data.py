"""Contexts that are cut from real texts, and pass keys planted in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from experiments.harness.texts import encode, text_of

PASSKEY_DIGITS = 5
PLANTINGS = 20  # pass keys tried for one case
# With its space: whether the model goes on with one is no matter of memory, and often decided by a hair.
QUESTION = "\nThe pass key is "
NOTE = " The pass key is {}. Remember it. {} is the pass key."


@dataclasses.dataclass(frozen=True)
class Case:
    """A context to keep, what follows it, and a planted pass key."""

    context: np.ndarray  # [S] token ids
    continuation: np.ndarray  # [T + 1]
    query: np.ndarray  # [Q]
    answer: np.ndarray  # [A]
    span: tuple[int, int]  # tokens of the context that hold the note


def cut(
    tokenizer: Tokenizer,
    text: str,
    *,
    context_tokens: int,
    continuation_tokens: int,
    at: float = 0.3,
    depth: float = 0.4,
    seed: int = 0,
) -> Case:
    """A context from the text at a fraction `at` of it, with a pass key planted at `depth`.

    Raises:
      ValueError: if the text is too short, with the tokens missing.
    """
    digits = "".join(map(str, np.random.default_rng(seed).integers(0, 10, PASSKEY_DIGITS)))
    note = encode(tokenizer, NOTE.format(digits, digits))
    ids = encode(tokenizer, text)
    need = context_tokens - len(note) + continuation_tokens + 1
    if context_tokens <= 2 * len(note):
        raise ValueError(
            f"--context-tokens is {context_tokens}: with the pass key it must be more than "
            f"{2 * len(note)}"
        )
    if len(ids) < need:
        raise ValueError(
            f"--text has {len(ids)} tokens: a context of {context_tokens} and {continuation_tokens} "
            f"tokens to predict need {need}; give a longer text or a smaller --context-tokens"
        )
    start = int((len(ids) - need) * at)
    own = ids[start : start + context_tokens - len(note)]
    plant = int(len(own) * depth)
    after = start + len(own)
    return Case(
        context=np.concatenate([own[:plant], note, own[plant:]]),
        continuation=ids[after : after + continuation_tokens + 1],
        query=encode(tokenizer, QUESTION),
        answer=encode(tokenizer, digits),
        span=(plant, plant + len(note)),
    )


def case_arrays(
    tokenizer: Tokenizer,
    names: list[str],
    *,
    per_text: int,
    context_tokens: int,
    continuation_tokens: int,
    accept: Callable[[Case], bool] = lambda case: True,
) -> dict[str, np.ndarray]:
    """Cases for `score`: contexts spread over each of some `TEXTS`, plain and with a pass key.

    Args:
      tokenizer: the model's.
      names: of the texts.
      per_text: contexts of each kind.
      context_tokens: S.
      continuation_tokens: T.
      accept: whether a pass key will do; those that the model cannot answer with all of its cache say
        nothing of a smaller one. Another pass key is planted elsewhere until one does.

    Returns:
      lm_ctx [N, S], lm_cont [N, T + 1], pk_ctx [N, S], pk_query [N, Q], pk_answer [N, A].

    Raises:
      ValueError: as `text_of` and `cut`, or per_text below 1, or pass keys that are never accepted.
    """
    if per_text < 1:
        raise ValueError(f"--per-text is {per_text}: at least 1")
    rows: dict[str, list[np.ndarray]] = {}
    for name in names:
        text = text_of(name)
        ids = encode(tokenizer, text)
        last = len(ids) - context_tokens - continuation_tokens - 1
        for i, start in enumerate(np.linspace(0.1 * len(ids), last, per_text).astype(int)):
            for attempt in range(PLANTINGS):
                part = ((i + 0.5) / per_text + 0.382 * attempt) % 1
                planted = cut(
                    tokenizer,
                    text,
                    context_tokens=context_tokens,
                    continuation_tokens=continuation_tokens,
                    at=part,
                    depth=0.15 + 0.7 * part,
                    seed=1000 * attempt + 100 * i + len(name),
                )
                if accept(planted):
                    break
            else:
                raise ValueError(f"{name}: none of {PLANTINGS} pass keys was accepted")
            middle = int(start) + context_tokens
            row = {
                "lm_ctx": ids[start:middle],
                "lm_cont": ids[middle : middle + continuation_tokens + 1],
                "pk_ctx": planted.context,
                "pk_query": planted.query,
                "pk_answer": planted.answer,
            }
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
    return {key: np.stack(values) for key, values in rows.items()}
