"""One run: tokens' importance follows a stream of texts, from reviews of products to tweets."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jbalance
from experiments.harness import budgets, runs
from experiments.robustness.experiment import verdicts
from experiments.text_classification import data, features, tokens
from experiments.text_classification.data import Part
from experiments.text_classification.tokens import Worth
from jbalance import importance

BEFORE, AFTER = "product", "tweets"
BATCH, WINDOW = 64, 512  # texts of a step; texts that a step's importance is measured on
PART = 0.5  # of the tokens of a text that a budget keeps
GOOD = 0.9  # of the worth that importance fitted to the new domain keeps
BETA = 0.5  # of the old domain's importance as prior
REVIEWED = 64  # tokens of a step's texts that a person judges
FORGET, ETA = 0.9, 1.0  # of what was said a step ago; how much it counts


class Sizes(NamedTuple):
    """Of a study."""

    before: int  # steps in the old domain
    after: int  # steps in the new one
    held: int  # texts of the new one that quality is measured on


class Arm(NamedTuple):
    """What a balance does.

    Attributes:
      follows: whether it learns after the change.
      carried: whether it keeps what it had learned before.
      decay: of the moving average: 0 forgets at once.
      prior: whether the old domain's importance is a prior.
      reviewed: whether a person judges some tokens of each step after the change.
    """

    follows: bool = True
    carried: bool = True
    decay: float = 0.8
    prior: bool = False
    reviewed: bool = False


ARMS = {
    "static": Arm(follows=False),
    "carried": Arm(),
    "carried, no average": Arm(decay=0.0),
    "carried, reviewed": Arm(reviewed=True),
    "fresh": Arm(carried=False),
    "fresh, prior": Arm(carried=False, prior=True),
}


class Domain(NamedTuple):
    """Texts as token ids, and what they say."""

    ids: list[np.ndarray]
    positive: np.ndarray


class Material(NamedTuple):
    """What all runs read."""

    before: Domain
    after: Domain
    held: list[np.ndarray]
    fitted: list[np.ndarray]  # worth of the held texts' tokens, by all texts of the new domain
    idf: np.ndarray
    verdict: np.ndarray  # [N] in -1..1, what a person says of each token


@functools.cache
def prepare(held: int) -> Material:
    """Both domains in one tokenizer's tokens.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    splits = [data.split(data.read(source)) for source in (BEFORE, AFTER)]
    tokenizer = tokens.train_tokenizer([text for split in splits for text in split.train.texts])

    def domain(part: Part) -> Domain:
        return Domain(tokens.encode(tokenizer, part.texts), part.positive)

    before, after = (domain(split.train) for split in splits)
    test = tokens.encode(tokenizer, splits[1].test.texts)[:held]
    worth = Worth.of(after.ids, after.positive, tokens.VOCABULARY)
    both = tokens.counts(before.ids + after.ids, tokens.VOCABULARY)
    idf = tokens.inverse_document_frequency(both)
    verdict = verdicts(np.arange(tokens.VOCABULARY), tokenizer)
    return Material(before, after, test, worth.of_tokens(test), idf, verdict)


def kept_by(w: np.ndarray, material: Material) -> np.ndarray:
    """[tokens of all held texts] which of them a budget of `PART` keeps by this importance."""
    scored = Worth(w, material.idf).of_tokens(material.held)
    total = int(PART * sum(map(len, scored)))
    return np.concatenate(budgets.ladder(scored, total))


def run(name: str, seed: int, sizes: Sizes, advance: Callable[[], None]) -> Mapping[str, Any]:
    """How much of the fitted worth is kept, step by step after the change."""
    arm, material = ARMS[name], prepare(sizes.held)
    rng = np.random.default_rng(seed)
    old, new = (
        rng.choice(len(domain.ids), (steps, BATCH), replace=steps * BATCH > len(domain.ids))
        for domain, steps in ((material.before, sizes.before), (material.after, sizes.after))
    )
    window: deque[tuple[np.ndarray, int]] = deque(maxlen=WINDOW)
    balancer = jbalance.balancer(decay=arm.decay)
    state = balancer.init(tokens.VOCABULARY)
    found = None
    for row in old:
        window.extend((material.before.ids[i], material.before.positive[i]) for i in row)
        found, state = balancer.update(_measured(window, material.idf), state, 1)
        advance()
    assert found is not None
    w = np.asarray(found.w)
    if not arm.carried:
        prior = jnp.asarray(w) if arm.prior else None
        balancer = jbalance.balancer(decay=arm.decay, prior=prior, beta=BETA if arm.prior else 0.0)
        state = balancer.init(tokens.VOCABULARY)
        window.clear()
        w = w if arm.prior else np.ones_like(w)
    worth = np.concatenate(material.fitted)
    best = worth[np.concatenate(budgets.ladder(material.fitted, int(PART * worth.size)))].sum()
    quality, masks = [], [kept_by(w, material)]
    reviewer, feedback = np.random.default_rng([seed, 9]), jnp.zeros(tokens.VOCABULARY)
    for row in new:
        window.extend((material.after.ids[i], material.after.positive[i]) for i in row)
        if arm.follows:
            found, state = balancer.update(_measured(window, material.idf), state, 1)
            latest = found.w
            if arm.reviewed:
                said = _said([material.after.ids[i] for i in row], material.verdict, reviewer)
                feedback = importance.decay_feedback(feedback, FORGET, said)
                latest = importance.blend(latest, feedback=feedback, eta=ETA)
            masks.append(kept_by(np.asarray(latest), material))
        else:
            masks.append(masks[-1])
        quality.append(worth[masks[-1]].sum() / best)
        advance()
    good = np.flatnonzero(np.array(quality) >= GOOD)
    changed = [
        np.mean(a != b)
        for a, b in zip(masks[-len(new) // 2 :], masks[-len(new) // 2 - 1 :], strict=False)
    ]
    return {
        "figures": {
            "kept at the change": float(worth[masks[0]].sum() / best),
            "kept after 5 steps": float(quality[min(4, len(quality) - 1)]),
            "kept at the end": float(quality[-1]),
            "steps until good": float(good[0] + 1 if good.size else len(new) + 1),
            "tokens that change a step": float(np.mean(changed)),
        },
        "cases": {
            "kept at the end": runs.packed(_of_texts(worth * masks[-1], material.held) / best)
        },
    }


def _said(ids: list[np.ndarray], verdict: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[N] what a person says of some of the tokens of texts; 0 of the others."""
    there = np.unique(np.concatenate(ids))
    listed = rng.choice(there, min(REVIEWED, there.size), replace=False)
    said = np.zeros(tokens.VOCABULARY, np.float32)
    said[listed] = verdict[listed]
    return said


def _of_texts(value: np.ndarray, texts: list[np.ndarray]) -> np.ndarray:
    """[texts] sums of their tokens, times the number of texts: their mean is the sum of all."""
    ends = np.cumsum([len(x) for x in texts])
    return np.array([x.sum() for x in np.split(value, ends[:-1])]) * len(texts)


def _measured(window: deque[tuple[np.ndarray, int]], idf: np.ndarray) -> np.ndarray:
    """w [tokens] of the latest texts alone; what none of them holds has the mean of the others."""
    ids, positive = zip(*window, strict=True)
    counts = tokens.counts(list(ids), tokens.VOCABULARY)
    x = counts.multiply(idf[None]).tocsr()
    length = np.sqrt(np.asarray(x.multiply(x).sum(axis=1))).reshape(-1, 1)
    w = features.scores(x.multiply(1 / length).tocsr(), np.array(positive, np.int32))
    seen = counts.getnnz(axis=0) > 0
    return np.where(seen, w, w[seen].mean())
