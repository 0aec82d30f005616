"""Greedy answers over a kept context, many tokens at a time, and the likelihood of the right one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from experiments.suites.cases import Question

MORE_TOKENS = 8  # that an answer may take beyond the right one
WIDTHS = 32  # tokens are padded to a multiple of it, so that programs serve many questions

LogProbs = Callable[[np.ndarray], jax.Array]
"""Tokens [T] behind a context -> log-probabilities [T, V] after each of them."""


class Forced(NamedTuple):
    """The right answer, token by token, whatever the model would have said before."""

    log_likelihood: float  # nats, of all its tokens
    likeliest: np.ndarray  # [A] the most likely tokens in their places


class Reply(NamedTuple):
    """What a model says to a question."""

    forced: Forced
    text: str  # its own answer, up to the line's end; as far as it was needed
    tokens: np.ndarray  # [N] of the text, and of what it was cut from


def width_of(questions: Sequence[Question]) -> int:
    """Tokens of a program that serves all of them."""
    most = max(len(x.ids) + len(x.answer) for x in questions) + MORE_TOKENS
    return -(-most // WIDTHS) * WIDTHS


def reply(
    log_probs: LogProbs,
    question: Question,
    tokenizer: Tokenizer,
    width: int,
    *,
    wanted: Sequence[str],
    draft: np.ndarray | None = None,
) -> Reply:
    """The likelihood of the right answer, and the model's own greedy one.

    Greedy decoding is a fixed point: tokens, each of which is the likeliest after those before it. The
    right answer is the first guess; every pass settles the tokens up to the first that differs from its
    guess, and that one (Song et al. 2021, arXiv:2002.03629). The result is that of one token at a time,
    in one pass where the model is right, in two where it says what the draft says.

    Args:
      log_probs: of the kept context.
      question: with its right answer.
      tokenizer: of the model.
      width: of `width_of`, to which tokens are padded behind.
      wanted: strings after all of which the own answer is known well enough; none for no own answer.
      draft: [N] tokens of an answer that the model may give.
    """
    first, number = len(question.ids) - 1, len(question.answer) + MORE_TOKENS
    guess = _padded(question.answer, number)
    forced, text, own = None, "", np.zeros(0, np.int32)
    for _ in range(number):
        fed = _padded(np.concatenate([question.ids, guess[:-1]]), width)
        likeliest, chosen = map(np.asarray, _read(log_probs(fed), fed))
        predicted = likeliest[first : first + number]
        if forced is None:
            behind = slice(first, first + len(question.answer))
            forced = Forced(float(chosen[behind].sum()), likeliest[behind])
        if not wanted:
            break
        same = np.append(predicted == guess, False)
        own = predicted[: int(np.argmin(same)) + 1]
        text = tokenizer.decode(own.tolist())
        if "\n" in text or len(own) == number:
            text = text.split("\n")[0] + "\n"
            break
        if all(found(text, wanted)):
            break
        guess = predicted
        if draft is not None and np.array_equal(draft[: len(own)], own):
            guess = np.concatenate([draft, predicted[len(draft) :]])[:number]
    assert forced is not None
    return Reply(forced, text, own)


def _padded(tokens: np.ndarray, number: int) -> np.ndarray:
    """Zeros behind."""
    return np.pad(tokens, (0, number - len(tokens))).astype(np.int32)


def found(text: str, references: Sequence[str]) -> list[bool]:
    """Which of the references stand in an answer, whole and in any case.

    A number that goes on with other digits is another one.
    """
    return [
        re.search(rf"(?<![^\W_]){re.escape(x)}(?=[\W_])", text, re.IGNORECASE) is not None
        for x in references
    ]


@jax.jit
def _read(log_probs, fed):
    """[T] the likeliest next tokens, and [T] log-probabilities of those that follow in `fed`."""
    following = jnp.roll(fed, -1)[:, None]
    chosen = jnp.take_along_axis(log_probs, following, axis=1)[:, 0]
    return jnp.argmax(log_probs, axis=-1), chosen
