"""What a schedule is judged by: service gap, waits, evenness, idle places, tokens a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.customer_service.schedule import OUTPUT_COST, PROMPT_COST, Request, Served
from jbalance import shares


def service_gap(served: Served, weights: np.ndarray) -> float:
    """The largest difference of what two customers were given, in any stretch where both wait.

    Args:
      served: by any policy.
      weights: [C]; what is given to a customer is divided by its own.
    """
    given = served.given / weights
    largest = 0.0
    for one in range(len(weights)):
        for other in range(one):
            apart = given[:, one] - given[:, other]
            both = (served.waiting[:, one] > 0) & (served.waiting[:, other] > 0)
            edges = np.flatnonzero(np.diff(np.concatenate([[0], both, [0]])))
            for first, end in edges.reshape(-1, 2):
                largest = max(largest, float(np.ptp(apart[first:end])))
    return largest


def gap_bound(requests: Sequence[Request], places: int, weights: np.ndarray) -> float:
    """2 max(prompt cost, 2 M) over the least weight, M tokens in all places: that of token counters.

    Sheng et al., "Fairness in Serving Large Language Models", arXiv:2401.00588, theorem 4.4.
    """
    prompt = max(len(r.prompt) for r in requests)
    most = places * (prompt + max(r.new_tokens for r in requests))
    return 2 * max(PROMPT_COST * prompt, OUTPUT_COST * most) / float(np.min(weights))


def waits(requests: Sequence[Request], served: Served, horizon: int, light: int) -> np.ndarray:
    """Steps from arrival to the first token, of the requests of customers 0..light-1.

    Those that have none at the horizon waited until then.
    """
    own = [i for i, r in enumerate(requests) if r.customer < light and r.arrival < horizon]
    first = np.where(served.first_token[own] < 0, horizon, served.first_token[own])
    return first - np.array([requests[i].arrival for i in own])


def jain(requests: Sequence[Request], served: Served, horizon: int) -> float:
    """Jain's index of what each customer was given, over its max-min share of all that was given.

    A max-min share is never more than what the customer asked for: 1 where all have theirs.
    """
    given = served.given[-1]
    asked = np.zeros(len(given))
    for request in requests:
        asked[request.customer] += request.cost if request.arrival < horizon else 0
    asked = np.maximum(asked, given)
    some = asked > 0
    even = np.asarray(shares.uniform(int(some.sum())))
    own = shares.constrained(even, cap=np.minimum(asked[some] / given.sum(), 1))
    x = given[some] / (np.asarray(own) * given.sum())
    return float(x.sum() ** 2 / (len(x) * (x**2).sum()))


def idle_steps(served: Served) -> int:
    """Steps with a free place while somebody waited.

    Who comes during a step is counted as waiting from the next event on.
    """
    return int(((served.free > 0) & (served.waiting.sum(axis=1) > 0)).sum())


def tokens_a_step(served: Served) -> float:
    """Tokens of prompts and answers, over all steps until the last event."""
    return served.tokens / int(served.clock[-1])
