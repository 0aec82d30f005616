"""One run: customers' requests share an arena by weight, and are asked for what they said.

Customer 0 is the one that floods. Of the others some are in a hurry and some unhappy; their texts are of
three lengths. Each says two numbers of its own early in its text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.customer_service import data, engine
from experiments.customer_service.data import Customer
from experiments.harness import runs, texts
from experiments.kv_budget import evaluate
from jbalance import decode, importance
from jbalance.decode import State, extend

SIZES = (320, 160, 320, 480, 160, 480)  # tokens of the customers' texts
CUSTOMERS = len(SIZES)
KINDS = ("order", "account")  # of the numbers that a customer says
PLACES_OF_FACTS = (0.2, 0.6)  # in its text
CAPACITY = 512
VOLUME = 1.0  # how much the indicator of data volume weighs
MORE_TOKENS, NUM_MORE = 64, 2  # of what the flood says later on
STEPS = 4  # of the check that a flood changes nothing


class Case(NamedTuple):
    """A question to a customer's request.

    Attributes:
      fed: [T] tokens of the question, and of the answer but its last one.
      answer: [A] tokens.
      full: [T, V] log-probabilities over the whole cache.
    """

    fed: np.ndarray
    answer: np.ndarray
    full: jax.Array


class Desk(NamedTuple):
    """What the customers said.

    Attributes:
      prompts: token ids of each.
      more: what the flood says later on.
      cases: two of each customer but the flood.
      importance: [C] w, data volume among the indicators.
      urgent: [C] bool.
    """

    prompts: list[np.ndarray]
    more: list[np.ndarray]
    cases: list[list[Case]]
    importance: np.ndarray
    urgent: np.ndarray


Weights = Callable[[np.ndarray], np.ndarray]
"""importance [C] -> shares of the memory [C]."""


class Arm(NamedTuple):
    """How an arena is shared.

    Attributes:
      weights: of the requests; None for no arena: everything is kept.
      part: of the bytes of all keys and values, for all caches.
      stuffed: whether the flood's text is stuffed with what the scorers look for.
    """

    weights: Weights | None
    part: float = 1.0
    stuffed: bool = False


def even(w: np.ndarray) -> np.ndarray:
    """The same for all."""
    return np.full(len(w), 1 / len(w))


def by_length(w: np.ndarray) -> np.ndarray:
    """In proportion to the tokens of a text."""
    del w
    return np.array(SIZES) / sum(SIZES)


ARMS = {
    "full": Arm(None),
    "even, quarter": Arm(even, 0.25),
    "bounded, quarter": Arm(data.bounded, 0.25),
    "even, tenth": Arm(even, 0.1),
    "by length, tenth": Arm(by_length, 0.1),
    "proportional, tenth": Arm(data.proportional, 0.1),
    "bounded, tenth": Arm(data.bounded, 0.1),
    "proportional, tenth, stuffed": Arm(data.proportional, 0.1, stuffed=True),
    "bounded, tenth, stuffed": Arm(data.bounded, 0.1, stuffed=True),
}


@functools.cache
def desk_of(seed: int, stuffed: bool) -> Desk:
    """The texts of a seed; those of the others are the same with and without stuffing."""
    _, tokenizer, _, lines = engine.loaded()
    rng = np.random.default_rng([seed, 2])
    unhappy, urgent = (rng.permutation(CUSTOMERS - 1)[:2] + 1 for _ in range(2))
    history = rng.integers(0, 11, CUSTOMERS) / 10
    prompts, cases, said = [], [], []
    customers = [
        Customer(float(history[c]), c in unhappy, c in urgent, stuffed and c == 0)
        for c in range(CUSTOMERS)
    ]
    for c, size in enumerate(SIZES):
        own = np.random.default_rng([seed, 3, c])
        facts = [data.fact(own, tokenizer, kind) for kind in KINDS]
        rest = size - sum(len(ids) for ids, _ in facts)
        body = data.message(own, lines, tokenizer, customers[c], rest)
        cuts = [int(part * rest) for part in PLACES_OF_FACTS]
        first, middle, last = np.split(body.tokens, cuts)
        prompts.append(np.concatenate([first, facts[0][0], middle, facts[1][0], last]))
        said.append(body.text)
        numbers = [number for _, number in facts]
        cases.append([] if c == 0 else _cases(prompts[-1], numbers))
    more = [
        data.message(rng, lines, tokenizer, customers[0], MORE_TOKENS).tokens
        for _ in range(NUM_MORE)
    ]
    w = _importance(said, history)
    return Desk(prompts, more, cases, w, np.isin(np.arange(CUSTOMERS), urgent))


def _cases(prompt: np.ndarray, numbers: Sequence[str]) -> list[Case]:
    loaded = engine.loaded()
    found = []
    for kind, number in zip(KINDS, numbers, strict=True):
        asked = data.question(loaded.tokenizer, kind)
        answer = texts.encode(loaded.tokenizer, " " + number)
        fed = np.concatenate([asked, answer[:-1]])
        found.append(Case(fed, answer, evaluate.reference(loaded.model, prompt, fed)))
    return found


def _importance(said: Sequence[str], history: np.ndarray) -> np.ndarray:
    """w by urgency, sentiment, history and data volume."""
    scores = np.array([data.scores_of(text) for text in said])
    volume = np.array(SIZES) / max(SIZES)
    association = np.column_stack([scores, history, volume]).astype(np.float32)
    complexity = np.append(data.COMPLEXITY, np.float32(VOLUME))
    return np.asarray(importance.weighted(association, complexity))


def budget_bytes(part: float) -> int:
    """Of all caches: a part of the bytes that the keys and values of all texts take."""
    return int(part * engine.loaded().decoder.dense_bytes(sum(SIZES)))


def run(name: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
    """An arm's figures: how the others are answered beside the flood."""
    arm = ARMS[name]
    desk = desk_of(seed, arm.stuffed)
    if arm.weights is None:
        advance()
        return _judged(desk, [[case.full for case in own] for own in desk.cases])
    weights = arm.weights(desk.importance)
    state = _joined(desk, weights, budget_bytes(arm.part))
    state = _flooded(desk, state)
    given = np.asarray(state.allowances[0])
    found = _answers(desk, state)
    advance()
    result = _judged(desk, found)
    result["figures"]["flood's part"] = float(given[0] / given.sum())
    result["figures"]["bytes kept"] = sum(state.nbytes) / budget_bytes(1.0)
    if name == "bounded, tenth, stuffed":
        result["figures"]["changed by the flood"] = _changed(desk, weights, state, found)
    return result


def _joined(desk: Desk, weights: np.ndarray, size: int) -> State:
    decoder = engine.loaded().decoder
    state = decode.create(decoder, [size], num_requests=CUSTOMERS)
    for c, (prompt, weight) in enumerate(zip(desk.prompts, weights, strict=True)):
        state = decode.join(decoder, state, c, prompt, weight=float(weight), capacity=CAPACITY)
    return state


def _flooded(desk: Desk, state: State) -> State:
    for more in desk.more:
        state = decode.tell(engine.loaded().decoder, state, 0, more)
    return state


def _answers(desk: Desk, state: State) -> list[list[jax.Array]]:
    """Log-probabilities [T, V] of each customer's cases, over what is held for it."""
    decoder = engine.loaded().decoder

    def asked(c: int, case: Case) -> jax.Array:
        return extend.log_probs(
            decoder, state.devices, state.caches, None, case.fed, len(desk.prompts[c]), request=c
        )

    return [[asked(c, case) for case in own] for c, own in enumerate(desk.cases)]


def _judged(desk: Desk, found: Sequence[Sequence[jax.Array]]) -> dict[str, Any]:
    """Figures over the cases of all but the flood."""
    owner, kl, nll, right = [], [], [], []
    for c, own in enumerate(desk.cases):
        for case, said in zip(own, found[c], strict=True):
            owner.append(c)
            kl.append(float(jnp.sum(jnp.exp(case.full) * (case.full - said), axis=-1).mean()))
            tail = np.asarray(said)[-len(case.answer) :]
            nll.append(-float(tail[np.arange(len(case.answer)), case.answer].mean()))
            right.append(float((tail.argmax(axis=-1) == case.answer).all()))
    of_customer = [np.mean([x for c, x in zip(owner, kl, strict=True) if c == o]) for o in owner]
    urgent = desk.urgent[owner]
    return {
        "figures": {
            "KL": float(np.mean(kl)),
            "KL, urgent": float(np.mean(np.array(kl)[urgent])),
            "KL, worst customer": float(max(of_customer)),
            "nats a token": float(np.mean(nll)),
            "answered": float(np.mean(right)),
        },
        "cases": {
            "KL": runs.packed(kl),
            "nats a token": runs.packed(nll),
            "answered": runs.packed(right),
        },
    }


def _changed(
    desk: Desk, weights: np.ndarray, state: State, found: Sequence[Sequence[jax.Array]]
) -> float:
    """Customers whose answers or next tokens differ from those beside one that says one word.

    The quiet one has the flood's weight, so that the others' shares of the memory are the same.
    """
    quiet = desk._replace(prompts=[desk.prompts[0][:1], *desk.prompts[1:]])
    beside = _joined(quiet, weights, budget_bytes(0.1))
    same = [
        all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in zip(found, _answers(quiet, beside), strict=True)
    ]
    tokens = [_next_tokens(x) for x in (state, beside)]
    same = [x and np.array_equal(*pair) for x, *pair in zip(same, *tokens, strict=True)]
    return float(sum(not x for x in same[1:]))


def _next_tokens(state: State) -> np.ndarray:
    """[B, 1 + STEPS] of all requests."""
    found = [np.asarray(state.tokens)]
    for _ in range(STEPS):
        tokens, state = decode.step(engine.loaded().decoder, state)
        found.append(np.asarray(tokens))
    return np.stack(found, axis=1)
