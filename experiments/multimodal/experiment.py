"""One run: two tasks are trained and tested on the tokens of three modalities that an arm keeps."""

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
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from experiments.harness import logs, runs, training
from experiments.models.packed_encoder import Packed, pack, places
from experiments.multimodal import arms, data, tokens
from experiments.multimodal.arms import Scored
from experiments.multimodal.data import CATEGORIES, Stamps
from experiments.multimodal.model import TASKS, Reader, Scorer, claims
from experiments.multimodal.tokens import MODALITIES, Change, Example
from jbalance import importance, rescale, shares

BATCH, PEAK_RATE, WEIGHT_DECAY = 32, 4e-3, 0.1
DIMENSIONS, TEMPERATURE, SMOOTHING = 128, 0.07, 0.1
SCORER_EPOCHS, PRICE = 20, 5.0  # what a scorer pays for looking at noise


class Sizes(NamedTuple):
    """Of a study."""

    epochs: int
    copies: int  # of the stamps for training, each changed otherwise


class Material(NamedTuple):
    """What all runs read.

    Attributes:
      train: tokens of the copies, one copy after the other.
      test: by condition.
      changes: of each held-out stamp, by condition.
      labels, test_labels: [B, 2] int32, which caption and which category.
      captions, test_captions: [captions, DIMENSIONS] where they lie, of length 1.
      shares: [tasks, modalities] of one read.
      scorer_flops: of an example.
    """

    train: Scored
    test: dict[str, Scored]
    changes: dict[str, list[Change]]
    labels: np.ndarray
    test_labels: np.ndarray
    captions: np.ndarray
    test_captions: np.ndarray
    shares: np.ndarray
    scorer_flops: float


def clean(i: int) -> Change:
    """As it is."""
    del i
    return Change()


def missing(i: int) -> Change:
    """A third lack a modality, each in its turn."""
    return Change(missing=i // 3 % 3 if i % 3 == 0 else None)


def noisy(i: int) -> Change:
    """A third have a noisy picture, a third a noisy sound."""
    return Change(noisy=i % 3 if i % 3 < 2 else None)


CONDITIONS = {"clean": clean, "missing": missing, "noisy": noisy}


@functools.cache
def prepare(sizes: Sizes) -> Material:
    """Tokens of both parts, what each is worth by a scorer, and shares of the tasks.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    return of_parts(*data.split(data.read()), sizes)


def of_parts(known: Stamps, held: Stamps, sizes: Sizes) -> Material:
    """The material of some stamps to train on and others to test on."""
    rng = np.random.default_rng(0)
    train: list[Example] = [
        tokens.of_stamp(known, i, tokens.augmented(rng), rng)
        for _ in range(sizes.copies)
        for i in range(len(known.labels))
    ]
    changes = {name: [of(i) for i in range(len(held.labels))] for name, of in CONDITIONS.items()}
    test = {
        name: [tokens.of_stamp(held, i, change, rng) for i, change in enumerate(every)]
        for name, every in changes.items()
    }
    labels, test_labels = (
        np.stack([np.arange(len(x.labels)), x.labels], axis=1).astype(np.int32)
        for x in (known, held)
    )
    captions, test_captions = spaces(known.captions, held.captions)
    scorer = _scorer(train, np.tile(labels, (sizes.copies, 1)), captions, sizes)
    mass, flops = _masses(scorer, train)
    association = _association(train, mass)
    # METHOD section 1: what modalities a task uses, times how much data each has.
    volume = arms.counts(train).sum(axis=0) / sum(map(len, mass))
    alpha = shares.proportional(importance.weighted(association, volume.astype(np.float32)))
    return Material(
        Scored(train, _worth(mass)),
        {name: Scored(x, _worth(_masses(scorer, x)[0])) for name, x in test.items()},
        changes,
        np.tile(labels, (sizes.copies, 1)),
        test_labels,
        captions,
        test_captions,
        np.asarray(rescale.weights(alpha, association, np.ones(len(MODALITIES), np.float32))),
        flops,
    )


def spaces(known: Sequence[str], held: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """[captions, DIMENSIONS] of both: TF-IDF of character n-grams, its singular vectors by the first."""
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    counted = vectors.fit_transform(known)
    reduce = TruncatedSVD(DIMENSIONS, random_state=0).fit(counted)
    both = (reduce.transform(x) for x in (counted, vectors.transform(held)))
    first, second = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in both)
    return first.astype(np.float32), second.astype(np.float32)


def _worth(masses: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[n] of each example's tokens, by the tasks' mass [n, tasks]."""
    ends = np.cumsum([len(x) for x in masses])
    w = importance.weighted(np.concatenate(masses), np.ones(len(TASKS), np.float32))
    return np.split(np.asarray(w), ends[:-1])


def _association(examples: Sequence[Example], mass: Sequence[np.ndarray]) -> np.ndarray:
    """a [tasks, modalities]: the part of each modality in what each task looks at."""
    own = np.asarray(claims(jnp.asarray(np.concatenate([x["place"] for x in examples]))))
    found = (own @ np.concatenate(mass)).T
    return (found / found.sum(axis=1, keepdims=True)).astype(np.float32)


def loss_of(captions: Array) -> Callable[[Any, Packed, Array], Array]:
    """Both tasks' cross-entropy: of the caption among all known ones by cosine, and of the category."""

    def loss(model: Any, batch: Packed, key: Array) -> Array:
        category, at = model(batch, key)
        there = batch.labels[:, 0] >= 0
        caption, label = jnp.maximum(batch.labels, 0).T
        at /= jnp.sqrt(jnp.sum(jnp.square(at), axis=1, keepdims=True) + 1e-9)
        each = optax.softmax_cross_entropy_with_integer_labels(
            at @ captions.T / TEMPERATURE, caption
        )
        smooth = optax.smooth_labels(jax.nn.one_hot(label, CATEGORIES), SMOOTHING)
        each += optax.softmax_cross_entropy(category, smooth)
        return jnp.sum(jnp.where(there, each, 0)) / jnp.sum(there)

    return loss


def _trained(
    model: Any,
    loss: Callable[[Any, Packed, Array], Array],
    examples: Sequence[Example],
    labels: np.ndarray,
    number: int,
    epochs: int,
    seed: int,
    name: str,
    advance: Callable[[], None],
) -> None:
    """In place, a copy of the `number` stamps in an epoch."""
    orders = [
        order + epoch % (len(labels) // number) * number
        for epoch in range(epochs)
        for order in training.orders(number, BATCH, 1, 1000 * seed + epoch)
    ]
    size = places(examples, orders)
    batches = (pack([examples[i] for i in x], labels[x], size, BATCH) for x in orders)
    with logs.writer("multimodal", name, seed) as log:
        training.train(
            model, loss, batches, len(orders), PEAK_RATE, seed, log, advance,
            weight_decay=WEIGHT_DECAY,
        )  # fmt: skip


def _scorer(
    examples: Sequence[Example], labels: np.ndarray, captions: np.ndarray, sizes: Sizes
) -> Scorer:
    scorer = Scorer(DIMENSIONS, nnx.Rngs(0))
    tasks = loss_of(jnp.asarray(captions))

    def loss(model: Scorer, batch: Packed, key: Array) -> Array:
        # Or noise is where attention goes that has nowhere to go: it says the same in all examples.
        return tasks(model, batch, key) + PRICE * model.misled(batch)

    epochs = min(SCORER_EPOCHS, sizes.epochs)
    _trained(scorer, loss, examples, labels, len(captions), epochs, 0, "scorer", lambda: None)
    return scorer


def _masses(scorer: Scorer, examples: Sequence[Example]) -> tuple[list[np.ndarray], float]:
    """[n, tasks] of each example's tokens, and operations for an example."""
    graph, parameters, *rest = nnx.split(scorer, nnx.Param, ...)

    @jax.jit
    def mass(parameters: Any, batch: Packed) -> Array:
        model = nnx.merge(graph, parameters, *rest)
        return model.mass(model.embed(batch), batch)

    rows = training.rows(len(examples), BATCH)
    size, none, found = places(examples, rows), np.zeros((BATCH, 2), np.int32), []
    for row in rows:
        batch = pack([examples[i] for i in row], none[: len(row)], size, BATCH)
        lengths = [len(examples[i]["place"]) for i in row]
        every = np.asarray(mass(parameters, batch))[: sum(lengths)]
        found += np.split(every, np.cumsum(lengths)[:-1])
    return found, training.flops_of(mass.lower(parameters, batch).compile()) / BATCH


def run(
    arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """Both tasks' figures on held-out stamps at the arm's budget, and who got how much of it."""
    material = prepare(sizes)
    model, held = train(material, arm, part, seed, sizes, advance)
    return tested(model, held, arm, part, material)


def train(
    material: Material,
    arm: str,
    part: float,
    seed: int,
    sizes: Sizes,
    advance: Callable[[], None],
) -> tuple[Reader, dict[str, list[Example]]]:
    """A model trained at the arm's budget, and what the budget keeps of the held-out stamps."""
    budget = "full" if arm == "separate" else arm
    kept = arms.budgeted(material.train, budget, part)
    held = {name: arms.budgeted(x, budget, part) for name, x in material.test.items()}
    one_read = None if arm == "separate" else jnp.asarray(material.shares)
    model = Reader(DIMENSIONS, one_read, nnx.Rngs(seed))
    _trained(
        model, loss_of(jnp.asarray(material.captions)), kept, material.labels,
        len(material.captions), sizes.epochs, seed, f"{arm}-{part}", advance,
    )  # fmt: skip
    return model, held


def tested(
    model: Reader, held: Mapping[str, list[Example]], arm: str, part: float, material: Material
) -> Mapping[str, Any]:
    """A run's figures."""
    graph, parameters, *rest = nnx.split(model, nnx.Param, ...)
    predict = jax.jit(lambda parameters, batch: nnx.merge(graph, parameters, *rest)(batch))
    rows = training.rows(len(material.test_labels), BATCH)
    figures, cases = {}, {}
    size = max(places(examples, rows) for examples in held.values())
    for name, examples in held.items():
        batches = [
            pack([examples[i] for i in row], material.test_labels[row], size, BATCH) for row in rows
        ]
        said = [predict(parameters, x) for x in batches]
        category, at = (
            np.concatenate([np.asarray(x[i])[: len(r)] for x, r in zip(said, rows, strict=True)])
            for i in range(2)
        )
        rank = ranks(at, material.test_captions)
        judged = {
            "accuracy": category.argmax(axis=1) == material.test_labels[:, 1],
            "R@1": rank < 1,
            "R@10": rank < 10,
        }
        for figure, values in judged.items():
            own = figure if name == "clean" else f"{figure}, {name}"
            if own != "R@1, noisy" and own != "R@1, missing":
                figures[own], cases[own] = float(values.mean()), runs.packed(values)
        if name == "clean":
            flops = training.flops_of(predict.lower(parameters, batches[0]).compile()) / BATCH
    if arm in ("proportional", "ladder"):
        flops += material.scorer_flops
    figures |= budget_figures(held, material.changes["noisy"]) | {"MFLOP": flops / 1e6}
    details = {
        "parts": {name: _parts(x) for name, x in held.items()},
        "prices": None if arm != "ladder" else prices(material, part),
    }
    return {"figures": figures, "cases": cases, "details": details}


def prices(material: Material, part: float) -> dict[str, float]:
    """What the next token of the held-out stamps is worth, at one budget and at one of each modality."""
    one, each = arms.prices(material.test["clean"], part)
    return {"one": one, **{name: float(x) for name, x in zip(MODALITIES, each, strict=True)}}


def _parts(examples: Sequence[Example]) -> list[float]:
    found = arms.counts(examples).sum(axis=0)
    return [float(x) for x in found / found.sum()]


def ranks(at: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """[B] how many captions lie nearer by cosine than an example's own, ties half of them."""
    near = at @ captions.T
    own = np.diag(near)[:, None]
    return (near > own).sum(axis=1) + ((near == own).sum(axis=1) - 1) / 2


def budget_figures(
    held: Mapping[str, list[Example]], changes: Sequence[Change]
) -> dict[str, float]:
    """Tokens of an example, each modality's part of them, and what noise took from who has it."""
    plain, noised = (arms.counts(held[x]) for x in ("clean", "noisy"))
    found = {"tokens": float(plain.sum(axis=1).mean())}
    for m, name in enumerate(MODALITIES):
        found[f"{name}s' part"] = float(plain[:, m].sum() / plain.sum())
    for m, name in enumerate(MODALITIES[:2]):
        own = np.array([change.noisy == m for change in changes])
        found[f"noisy {name}s keep"] = float(noised[own, m].sum() / plain[own, m].sum())
    return found
