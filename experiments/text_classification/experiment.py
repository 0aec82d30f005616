"""The runs: a transformer under a token budget, or attention over features, of one source and seed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from experiments.harness import logs, training
from experiments.models.packed_encoder import BLOCK, Packed, pack
from experiments.text_classification import data, features, tokens, transformer
from experiments.text_classification.data import Split
from experiments.text_classification.features import Scored, Settings
from experiments.text_classification.tokens import Kept, Worth
from experiments.text_classification.transformer import Classifier, Config, Regularisation

EXPERIMENT = "text_classification"
BATCH, EPOCHS, PEAK_RATE = 64, 3, 2e-3
BASE = Regularisation(dropout=0.2, weight_decay=0.01)
# As the search found them.
_FOUND = Settings(rate=0.0047, weight_decay=0.019, dropout=0.013, temperature=0.225, epochs=7)
SETTINGS = dict.fromkeys(("uniform", "proportional", "softmax"), _FOUND)
REGULARISED = {
    "none": Regularisation(),
    "dropout": Regularisation(dropout=0.2),
    "weight decay": Regularisation(weight_decay=0.1),
    "augmentation": Regularisation(token_dropout=0.1),
    "adversarial": Regularisation(adversarial=0.005),
    "all": Regularisation(0.2, 0.1, 0.1, 0.005),
}


class Material(NamedTuple):
    """One source, ready for all runs."""

    split: Split
    tokenizer: Tokenizer
    worth: Worth
    scored: Scored


@functools.cache
def prepare(source: str, beta: float = 0.0) -> Material:
    """Split, subwords and scores; of the training part alone.

    Args:
      source: of texts.
      beta: how much of the tokens' worth is the lexicon's, as prior knowledge.

    Raises:
      ValueError: an unknown source, or a package that cannot be fetched.
    """
    split = data.split(data.read(source))
    tokenizer = tokens.train_tokenizer(split.train.texts)
    ids = tokens.encode(tokenizer, split.train.texts)
    worth = Worth.of(ids, split.train.positive, tokenizer.get_vocab_size())
    if beta:
        worth = worth.with_prior(tokenizer, data.lexicon(), beta)
    return Material(split, tokenizer, worth, features.scored(split))


class Part(NamedTuple):
    """Texts as a budget leaves them."""

    kept: list[Kept]
    positive: np.ndarray

    def batch(self, index: np.ndarray, size: int) -> Packed:
        return pack([self.kept[i]._asdict() for i in index], self.positive[index], size, BATCH)

    def batches(self, size: int) -> Iterator[Packed]:
        for start in range(0, len(self.kept), BATCH):
            yield self.batch(np.arange(start, min(start + BATCH, len(self.kept))), size)


def part_of(budget: str) -> float:
    """What a budget computes, of all tokens."""
    return 1.0 if budget == "full" else 0.5


def budgeted(material: Material, texts: data.Part, budget: str, tokenizer: Tokenizer) -> Part:
    ids = tokens.encode(tokenizer, texts.texts)
    kept = tokens.budgeted(ids, material.worth, budget, part_of(budget))
    return Part(kept, texts.positive)


def run_transformer(
    source: str,
    budget: str,
    regularisation: Regularisation,
    seed: int,
    held: str = "test",
    beta: float = 0.0,
) -> dict[str, Any]:
    """One run, and its hits on a held-out part with the same budget."""
    material = prepare(source, beta)
    orders = training.orders(len(material.split.train.texts), BATCH, EPOCHS, seed)
    augmented = tokens.with_dropout(material.tokenizer, regularisation.token_dropout)
    an_epoch = len(orders) // EPOCHS
    train = budgeted(material, material.split.train, budget, material.tokenizer)
    test = budgeted(material, getattr(material.split, held), budget, material.tokenizer)
    size = _size(train, test, orders, 1.25 if regularisation.token_dropout else 1.0)
    config = Config(material.tokenizer.get_vocab_size())
    _, parameters = nnx.split(Classifier(config, nnx.Rngs(seed)))
    step = _step(config, regularisation, len(orders), size)
    state, losses, used = step.init(parameters), [], 0
    with logs.writer(EXPERIMENT, f"{source}-{budget}", seed) as log:
        for i, order in enumerate(orders):
            if regularisation.token_dropout and i % an_epoch == 0:
                train = budgeted(material, material.split.train, budget, augmented)
            batch = train.batch(order, size)
            used += int((batch.example < BATCH).sum())
            key = jax.random.key(100_000 * seed + i)
            parameters, state, loss = step.train(parameters, state, batch, key)
            losses.append(float(loss))
            if i % 20 == 0:
                log.add_scalar("loss", losses[-1], i)
    right = hits(step, parameters, test, size)
    return {
        "accuracy": float(right.mean()),
        "hits": right,
        "train_loss": float(np.mean(losses[-an_epoch:])),
        "tokens_a_step": used / len(orders),
        "places_a_step": size,
        "traces": len(step.traces),
    }


@functools.cache  # seeds share a program
def _step(
    config: Config, regularisation: Regularisation, steps: int, size: int
) -> transformer.Step:
    del size  # another one compiles anew anyway
    return transformer.make_step(config, regularisation, steps, PEAK_RATE)


def _size(train: Part, test: Part, orders: list[np.ndarray], room: float) -> int:
    """Places for the tokens of any batch."""
    lengths = np.array([len(x.ids) for x in train.kept])
    most = max(int(lengths[order].sum()) for order in orders)
    most = max(
        most, *(int((b.example < BATCH).sum()) for b in test.batches(BATCH * tokens.MOST_TOKENS))
    )
    return -(-int(most * room) // BLOCK) * BLOCK


def hits(step: transformer.Step, parameters: Any, part: Part, size: int) -> np.ndarray:
    """[texts] bool, whether each is told right."""
    right = []
    for batch in part.batches(size):
        there = batch.labels >= 0
        said = np.asarray(step.logits(parameters, batch)) > 0
        right.append((said == batch.labels)[there])
    return np.concatenate(right)


def run_features(
    source: str, rule: str, settings: Settings, seed: int, held: str = "test"
) -> dict[str, Any]:
    """Attention over features by a rule: accuracy on a held-out part."""
    material = prepare(source)
    scored, split = material.scored, material.split
    weight = features.attention(scored.w, rule, settings.temperature)
    fitted = features.fit(scored.train, split.train.positive, weight, settings, seed)
    part = getattr(split, held)
    right = features.hits(fitted, getattr(scored, held), part.positive)
    return {
        "accuracy": float(right.mean()),
        "hits": right,
        "train_loss": fitted.losses[-1],
    }
