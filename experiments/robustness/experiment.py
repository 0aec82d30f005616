"""One run: a classifier of texts of four sources at an arm's budget, tested where things go wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from tokenizers import Tokenizer

from experiments.harness import logs, runs, training
from experiments.models.packed_encoder import Packed, pack, places
from experiments.robustness import arms, attacks, data
from experiments.robustness.data import Material
from experiments.text_classification import data as texts
from experiments.text_classification.data import SOURCES
from experiments.text_classification.tokens import WORD_START
from experiments.text_classification.transformer import Classifier, Config
from jbalance import audit, importance

BATCH, PEAK_RATE = 64, 2e-3
DROPOUT, WEIGHT_DECAY = 0.2, 0.01
RADIUS = 0.05  # of an attack, in root mean squares of a batch's embedded tokens
FAIRNESS = 1.0  # how much the hardest source of a batch counts beside the mean
MARGIN, ETA = 0.1, 1.0  # of what a person is shown, and how much the answers count
STRONG = 1.0  # of a word's valence, from which on people say that it tells something

Examples = list[dict[str, np.ndarray]]


class Sizes(NamedTuple):
    """Of a study."""

    epochs: int
    train: int  # texts of a source
    test: int


def budgeted(
    material: Material, ids: Sequence[np.ndarray], arm: str, total: int, groups: np.ndarray
) -> Examples:
    """The tokens that are kept of each text."""
    masks = arms.ARMS[arm](material.worth.of_tokens(list(ids)), groups, total)
    return kept_of(ids, masks)


def kept_of(ids: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Examples:
    """Tokens and their positions."""
    return [
        {"ids": x[m], "position": np.flatnonzero(m).astype(np.int32)}
        for x, m in zip(ids, masks, strict=True)
    ]


def each_loss(model: Classifier, x: Array, batch: Packed, key: Array | None = None) -> Array:
    """[B] cross-entropy of embedded tokens; 0 where there is no text."""
    dropout = nnx.Dropout(DROPOUT)

    def drop(y: Array) -> Array:
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return dropout(y, deterministic=key is None, rngs=rngs)

    said = model(x, batch, drop)
    each = optax.sigmoid_binary_cross_entropy(said, batch.labels[:, 0])
    return jnp.where(batch.labels[:, 0] >= 0, each, 0)


def objective(each: Array, labels: Array, fairness: float) -> Array:
    """The mean of the texts' losses, and `fairness` times that of the source for which it is largest.

    Args:
      each: [B] losses, 0 where there is no text.
      labels: [B, 2] whether positive, -1 where there is no text, and which source.
      fairness: at 1 a source counts twice while it is the hardest.
    """
    there = labels[:, 0] >= 0
    columns = jnp.stack([each, there], axis=1)
    total, number = jax.ops.segment_sum(columns, labels[:, 1], len(SOURCES)).T
    return jnp.sum(total) / jnp.sum(number) + fairness * jnp.max(total / jnp.maximum(number, 1))


class Trained(NamedTuple):
    """A classifier, by what it tells right of a batch.

    Attributes:
      hits: [B] bool, as the texts are.
      attacked: [B] bool by attack.
    """

    hits: Callable[[Packed], Array]
    attacked: Callable[[Packed], dict[str, Array]]


def train(
    material: Material, arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Trained:
    """A classifier of what the arm keeps of the texts for training."""
    total = int(part * sum(map(len, material.train)))
    kept = budgeted(material, material.train, arm, total, material.train_labels[:, 1])
    orders = training.orders(len(kept), BATCH, sizes.epochs, seed)
    size = places(kept, orders)
    model = Classifier(Config(material.tokenizer.get_vocab_size()), nnx.Rngs(seed))
    batches = (
        pack([kept[i] for i in row], material.train_labels[row], size, BATCH) for row in orders
    )
    fairness = FAIRNESS if arm == "ladder with a fair loss" else 0.0

    def loss_of(model: Classifier, batch: Packed, key: Array) -> Array:
        each = each_loss(model, model.embedded(batch), batch, key)
        return objective(each, batch.labels, fairness)

    with logs.writer("robustness", f"{arm}-{part}", seed) as log:
        training.train(
            model, loss_of, batches, len(orders), PEAK_RATE, seed, log, advance,
            weight_decay=WEIGHT_DECAY,
        )  # fmt: skip
    graph, parameters = nnx.split(model)

    def told(model: Classifier, x: Array, batch: Packed) -> Array:
        return (model(x, batch, lambda y: y) > 0) == batch.labels[:, 0]

    @jax.jit
    def hits(parameters: Any, batch: Packed) -> Array:
        model = nnx.merge(graph, parameters)
        return told(model, model.embedded(batch), batch)

    @jax.jit
    def attacked(parameters: Any, batch: Packed) -> dict[str, Array]:
        model = nnx.merge(graph, parameters)
        x = model.embedded(batch)
        there = (batch.example < len(batch.labels))[:, None]
        power = jnp.sum(jnp.where(there, x**2, 0)) / (jnp.sum(there) * x.shape[1])
        radius = RADIUS * jnp.sqrt(power)

        def loss(x: Array) -> Array:
            return jnp.sum(each_loss(model, x, batch))

        shifts = {
            "FGSM": attacks.sign_gradient(loss, x, radius),
            "PGD": attacks.projected_gradient(loss, x, radius),
        }
        return {name: told(model, x + shift, batch) for name, shift in shifts.items()}

    return Trained(functools.partial(hits, parameters), functools.partial(attacked, parameters))


def over_texts(of: Callable[[Packed], Any], kept: Examples, labels: np.ndarray, size: int) -> Any:
    """What `Trained.hits` or `Trained.attacked` say of all texts: [B] bool, or so by attack."""
    rows = training.rows(len(kept), BATCH)
    found = [
        jax.tree.map(
            lambda x, row=row: np.asarray(x)[: len(row)],
            of(pack([kept[i] for i in row], labels[row], size, BATCH)),
        )
        for row in rows
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *found)


def run(
    arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """Accuracy in all conditions, of the worst source, of those beside texts that stuff."""
    material = data.prepare(sizes.train, sizes.test)
    trained = train(material, arm, part, seed, sizes, advance)
    labels, groups = material.test_labels, material.test_labels[:, 1]
    # The memory is what it is, whatever the texts do.
    totals = {
        name: int(part * sum(map(len, material.test["clean" if name == "stuffed" else name])))
        for name in material.test
    }
    if arm == "full":
        totals["stuffed"] = sum(map(len, material.test["stuffed"]))
    kept = {
        name: budgeted(material, ids, arm, totals[name], groups)
        for name, ids in material.test.items()
    }
    rows = training.rows(len(labels), BATCH)
    size = max(places(x, rows) for x in kept.values())
    told = {name: over_texts(trained.hits, x, labels, size) for name, x in kept.items()}
    right = told["clean"]
    others = ~material.stuffs
    judged = {
        "accuracy": right,
        "noise": told["noise"],
        "missing": told["missing"],
        **over_texts(trained.attacked, kept["clean"], labels, size),
        "others, stuffed": told["stuffed"][others],
    }
    got = np.array([len(x["ids"]) for x in kept["clean"]], np.float32)
    fared = audit.by_group(got, groups, len(SOURCES), 1.0 - right)
    stuffed = np.array([len(x["ids"]) for x in kept["stuffed"]])
    figures = {name: float(x.mean()) for name, x in judged.items()} | {
        "others' tokens": float(stuffed[others].sum() / got[others].sum()),
        "worst source": float(1 - np.max(fared.error)),
        "gap": float(fared.error_gap),
        "least tokens": _least(got, material.test["clean"], groups),
    }
    if arm == "ladder":
        figures |= reviewed(material, trained, totals["clean"], size)
    cases = {name: runs.packed(x) for name, x in judged.items()}
    return {"figures": figures, "cases": cases}


def _least(got: np.ndarray, ids: Sequence[np.ndarray], groups: np.ndarray) -> float:
    """The smallest part that is kept of a source's tokens, over the part of all."""
    lengths = np.array([len(x) for x in ids])
    kept, whole = (np.bincount(groups, x, len(SOURCES)) for x in (got, lengths))
    return float((kept / whole).min() / (got.sum() / lengths.sum()))


def reviewed(material: Material, trained: Trained, total: int, size: int) -> dict[str, float]:
    """What a round with a person changes: tokens near the price, and what is told right after it.

    The person is the lexicon, in which people rated words: of the tokens that are listed, words of
    strong valence should stay and other words go. The verdict is on the token in its text alone.
    """
    ids, groups = material.test["clean"], material.test_labels[:, 1]
    scored = material.worth.of_tokens(ids)
    before = arms.ARMS["ladder"](scored, groups, total)
    near = arms.near_the_price(scored, before, MARGIN)
    ends = np.cumsum([len(x) for x in ids])
    every, listed = np.concatenate(ids), (ends - [len(x) for x in ids])[near.text] + near.at
    feedback = np.zeros(len(every), np.float32)
    feedback[listed] = verdicts(every[listed], material.tokenizer)
    w = importance.blend(np.concatenate(scored).astype(np.float32), feedback=feedback, eta=ETA)
    after = arms.ARMS["ladder"](np.split(np.asarray(w), ends[:-1]), groups, total)
    kept = kept_of(ids, after)
    size = max(size, places(kept, training.rows(len(kept), BATCH)))
    right = over_texts(trained.hits, kept, material.test_labels, size)
    return {
        "listed": len(listed) / len(every),
        "moved": float(np.mean(np.concatenate(before) != np.concatenate(after))),
        "reviewed": float(right.mean()),
    }


def verdicts(listed: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """[n] 1 for words of strong valence, -1 for other words, 0 for what is no whole word."""
    valence = texts.lexicon()

    def verdict(token: int) -> int:
        text = str(tokenizer.id_to_token(token))
        word = text.removeprefix(WORD_START)
        if word == text or not word.isalpha():
            return 0
        return 1 if abs(valence.get(word, 0)) >= STRONG else -1

    return np.array([verdict(int(token)) for token in listed], np.float32)
