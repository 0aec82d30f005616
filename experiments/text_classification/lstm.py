"""Attention over the states of an LSTM: a budget of tokens before it, or of states after it.

    python -m experiments.text_classification.lstm [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Every arm trains a bidirectional LSTM with attention pooling from nothing on the tokens that its budget
keeps, and is tested with the same budget. Some 8 minutes on one core; runs that the file holds are not
run again.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.harness import logs, runs, study, training
from experiments.text_classification import data, features, tokens
from experiments.text_classification.data import Split
from experiments.text_classification.tokens import BUDGETS, Worth
from jbalance import place

BATCH, PEAK_RATE, WEIGHT_DECAY, DROPOUT = 64, 3e-3, 0.05, 0.3
WIDTH, HIDDEN, LOOKED = 48, 48, 32  # of a token, of a direction's state, of what attention looks at
LINES = 16  # in which a batch's texts stand, one after the other
SOURCE = "film"


class Sizes(NamedTuple):
    """Of a study."""

    epochs: int
    texts: int  # of a source's training part, at most


WHOLE, SMOKE = Sizes(3, 1 << 20), Sizes(1, 128)
# The last is a budget of states: every token is read.
ARMS = study.at_parts("full", ("uniform", "proportional", "ladder", "states"))


class Text(NamedTuple):
    """Tokens that are read, and which of their states are attended to."""

    ids: np.ndarray  # [n] int32
    attended: np.ndarray  # [n] bool


class Lines(NamedTuple):
    """Texts of a batch in `LINES` lines of T places, and the N states that are attended to.

    Attributes:
      ids: [LINES, T] int32.
      first, last: [LINES, T] bool, where a text begins and ends, or there is none.
      at: [N] int32, of a state in all places line by line.
      example: [N] int32, whose it is; BATCH where there is none.
      labels: [BATCH] int32; -1 where there is no text.
    """

    ids: Any
    first: Any
    last: Any
    at: Any
    example: Any
    labels: Any


class Reader(nnx.Module):
    """Texts to the logits of being positive [BATCH]."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs):
        start = nnx.initializers.normal(0.1)
        self.embed = nnx.Embed(vocabulary, WIDTH, embedding_init=start, rngs=rngs)
        self.forth, self.back = (nnx.OptimizedLSTMCell(WIDTH, HIDDEN, rngs=rngs) for _ in range(2))
        self.look = nnx.Linear(2 * HIDDEN, LOOKED, rngs=rngs)
        self.weigh = nnx.Linear(LOOKED, 1, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(2 * HIDDEN, 1, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT)

    def __call__(self, batch: Lines, key: Array | None = None) -> Array:
        rngs = None if key is None else nnx.Rngs(dropout=key)

        def drop(x: Array) -> Array:
            return self.dropout(x, deterministic=key is None, rngs=rngs)

        x = drop(self.embed(batch.ids))
        forth = read(self.forth, x, batch.first)
        back = read(self.back, x[:, ::-1], batch.last[:, ::-1])[:, ::-1]
        states = jnp.concatenate([forth, back], axis=-1).reshape(-1, 2 * HIDDEN)
        states = states[batch.at]
        # Softmax over the states of what a small network says of each.
        said = self.weigh(jnp.tanh(self.look(states)))[:, 0]
        pooled = attend(said, states, batch.example, len(batch.labels))
        return self.out(drop(pooled))[:, 0]


def read(cell: nnx.OptimizedLSTMCell, x: Array, first: Array) -> Array:
    """[LINES, T, HIDDEN] states of an LSTM along the lines, which begins anew with each text."""
    graph, parameters = nnx.split(cell)
    nothing = jnp.zeros((x.shape[0], HIDDEN))

    def step(carry: Any, now: tuple[Array, Array]) -> Any:
        return one_step(nnx.merge(graph, parameters), carry, *now)

    _, states = jax.lax.scan(step, (nothing, nothing), (x.swapaxes(0, 1), first.T))
    return states.swapaxes(0, 1)


def one_step(cell: nnx.OptimizedLSTMCell, carry: Any, x: Array, first: Array) -> Any:
    """The body of `read`'s loop: [LINES, WIDTH] and where a text begins."""
    return cell(jax.tree.map(lambda c: jnp.where(first[:, None], 0, c), carry), x)


def attend(said: Array, states: Array, example: Array, number: int) -> Array:
    """[number, D] means of each text's states [N, D], by the softmax of `said` [N] over them."""
    top = jax.lax.stop_gradient(jax.ops.segment_max(said, example, number))
    top = jnp.where(jnp.isfinite(top), top, 0)  # of no text
    there, own = example < number, jnp.minimum(example, number - 1)
    weight = jnp.exp(jnp.where(there, said - top[own], -jnp.inf))
    total = jax.ops.segment_sum(weight, example, number)
    summed = jax.ops.segment_sum(weight[:, None] * states, example, number)
    return summed / jnp.maximum(total, 1e-9)[:, None]


def loss_of(model: Reader, batch: Lines, key: Array) -> Array:
    """Mean cross-entropy of the texts that are there."""
    there = batch.labels >= 0
    each = optax.sigmoid_binary_cross_entropy(model(batch, key), batch.labels)
    return jnp.sum(jnp.where(there, each, 0)) / jnp.sum(there)


def budgeted(ids: list[np.ndarray], worth: Worth, arm: str, part: float) -> list[Text]:
    """What an arm reads and attends to of each text: a budget for each batch of texts in their order.

    So no batch is larger than others, whose size is every batch's.
    """
    name, masks = "ladder" if arm == "states" else arm, []
    for row in training.rows(len(ids), BATCH):
        own = [ids[i] for i in row]
        masks += BUDGETS[name](worth.of_tokens(own), int(part * sum(map(len, own))))
    if arm == "states":
        return [Text(x, mask) for x, mask in zip(ids, masks, strict=True)]
    return [Text(x[m], np.ones(m.sum(), bool)) for x, m in zip(ids, masks, strict=True)]


def lines_of(texts: Sequence[Text]) -> list[list[int]]:
    """Which texts stand in each line, so that the longest line is short."""
    lengths = np.zeros(BATCH, np.float32)
    lengths[: len(texts)] = [len(x.ids) for x in texts]
    line = np.asarray(place.pack(lengths, LINES, swaps=0).device_of)[: len(texts)]
    return [np.flatnonzero(line == i).tolist() for i in range(LINES)]


class Room(NamedTuple):
    """Places of a batch: of a line, and for states that are attended to."""

    line: int
    states: int

    @classmethod
    def of(cls, batches: Sequence[Sequence[Text]], lines: Sequence[list[list[int]]]) -> Room:
        """For the fullest of these."""
        lengths = [
            max(sum(len(texts[i].ids) for i in line) for line in own)
            for texts, own in zip(batches, lines, strict=True)
        ]
        states = [sum(int(x.attended.sum()) for x in texts) for texts in batches]
        return cls(max(lengths), max(states))


def pack(texts: Sequence[Text], lines: list[list[int]], labels: np.ndarray, room: Room) -> Lines:
    """A batch in places of a size that all batches share."""
    ids = np.zeros((LINES, room.line), np.int32)
    first, last = np.ones(ids.shape, bool), np.ones(ids.shape, bool)
    at, example = np.zeros(room.states, np.int32), np.full(room.states, BATCH, np.int32)
    used = 0
    for row, line in enumerate(lines):
        start = 0
        for i in line:
            end = start + len(texts[i].ids)
            ids[row, start:end] = texts[i].ids
            first[row, start + 1 : end] = last[row, start : end - 1] = False
            own = row * room.line + start + np.flatnonzero(texts[i].attended)
            at[used : used + len(own)], example[used : used + len(own)] = own, i
            start, used = end, used + len(own)
    padded = np.full(BATCH, -1, np.int32)
    padded[: len(labels)] = labels
    return Lines(ids, first, last, at, example, padded)


class Material(NamedTuple):
    """A source, as all runs read it."""

    split: Split
    train: list[np.ndarray]  # ids
    test: list[np.ndarray]
    worth: Worth
    vocabulary: int


@functools.cache
def prepare(texts: int) -> Material:
    """The source's subwords and their worth, of the training part alone.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    split = data.split(data.read(SOURCE))
    known = split.train.at(np.arange(min(texts, len(split.train.texts))))
    tokenizer = tokens.train_tokenizer(known.texts)
    ids, test = (tokens.encode(tokenizer, x.texts) for x in (known, split.test))
    vocabulary = tokenizer.get_vocab_size()
    worth = Worth.of(ids, known.positive, vocabulary)
    return Material(split._replace(train=known), ids, test, worth, vocabulary)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Texts in batches, which of them are in each, and where they stand."""

    texts: list[list[Text]]
    rows: Sequence[np.ndarray]
    lines: list[list[list[int]]]
    room: Room
    positive: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Text], rows: Sequence[np.ndarray], positive: np.ndarray) -> Batches:
        own = [[texts[i] for i in row] for row in rows]
        lines = [lines_of(x) for x in own]
        return cls(own, rows, lines, Room.of(own, lines), positive)

    def __iter__(self) -> Iterator[Lines]:
        for texts, row, lines in zip(self.texts, self.rows, self.lines, strict=True):
            yield pack(texts, lines, self.positive[row], self.room)


def run(
    arm: str, part: float, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """How many held-out texts are told right, and what a text takes."""
    material = prepare(sizes.texts)
    train, test = (budgeted(x, material.worth, arm, part) for x in (material.train, material.test))
    orders = training.orders(len(train), BATCH, sizes.epochs, seed)
    known = Batches.of(train, orders, material.split.train.positive)
    model = Reader(material.vocabulary, nnx.Rngs(seed))
    with logs.writer("text_classification.lstm", f"{arm}-{part}", seed) as log:
        training.train(
            model, loss_of, known, len(orders), PEAK_RATE, seed, log, advance,
            weight_decay=WEIGHT_DECAY,
        )  # fmt: skip
    rows = training.rows(len(test), BATCH)
    hits, flops = told(model, Batches.of(test, rows, material.split.test.positive))
    return {
        "figures": {
            "accuracy": float(hits.mean()),
            "tokens a text": float(np.mean([len(x.ids) for x in test])),
            "states a text": float(np.mean([x.attended.sum() for x in test])),
            "MFLOP a text": flops / BATCH / 1e6,
        },
        "cases": {"accuracy": runs.packed(hits)},
    }


def told(model: Reader, held_out: Batches) -> tuple[np.ndarray, float]:
    """[texts] whether each is told right; what the program of a batch computes."""
    graph, parameters = nnx.split(model)
    predict = jax.jit(lambda parameters, batch: nnx.merge(graph, parameters)(batch) > 0)
    hits = np.concatenate([
        np.asarray(predict(parameters, batch))[: len(row)] == held_out.positive[row]
        for batch, row in zip(held_out, held_out.rows, strict=True)
    ])  # fmt: skip
    one = next(iter(held_out))
    flops = training.flops_of(predict.lower(parameters, one).compile())
    return hits, flops + 2 * (held_out.room.line - 1) * flops_of_step(model)


def flops_of_step(model: Reader) -> float:
    """Of one step of one direction: a compiler counts a loop's body once, however often it runs."""
    graph, parameters = nnx.split(model.forth)
    state = jnp.zeros((LINES, HIDDEN))
    step = jax.jit(lambda parameters, *now: one_step(nnx.merge(graph, parameters), *now))
    now = (state, state), jnp.zeros((LINES, WIDTH)), jnp.zeros(LINES, bool)
    return training.flops_of(step.lower(parameters, *now).compile())


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("text_classification.lstm", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    sizes = SMOKE if smoke else WHOLE
    split = prepare(sizes.texts).split
    about = {
        "title": "Attention over the states of an LSTM",
        "notes": NOTES,
        "settings": {
            "sizes": sizes._asdict(),
            "batch": BATCH,
            "rate": PEAK_RATE,
            "weight decay": WEIGHT_DECAY,
            "dropout": DROPOUT,
            "model": [WIDTH, HIDDEN, LOOKED],
            "lines": LINES,
        },
        "baselines": {
            "TF-IDF and logistic regression": {"accuracy": features.logistic_regression(split)}
        },
        "drawn": ["TF-IDF and logistic regression"],
        "compare": [
            [f"ladder, {part}", other]
            for part in study.PARTS
            for other in ("full", f"uniform, {part}", f"proportional, {part}", f"states, {part}")
        ],
    }

    def one(arm: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        return run(*ARMS[arm], seed, sizes, advance)

    steps = sizes.epochs * (len(split.train.texts) // BATCH)
    return study.Study(about, study.arms_of(ARMS, smoke), steps, one)


NOTES = (
    "Sign of human sentiment of film snippets, by a bidirectional LSTM and attention over its states. "
    "`uniform`, `proportional` and `ladder` read half or a quarter of a batch's tokens: what is not "
    "read, the LSTM does not step over. `states` reads every token, and attends to the states of "
    "those that the ladder would read. Half of the tokens by one price tell the class as often as all "
    "of them, at half of the computation, and a quarter about a hundredth less often; even parts of "
    "the texts lose much. Where it does not help: a budget of states costs no accuracy but saves next "
    "to nothing, for the LSTM that makes them is nearly all of the computation: tokens before it, not "
    "states after it, are what to leave out. Shares by importance do as well as one price here, and "
    "the linear baseline is better than any of these networks."
)

if __name__ == "__main__":
    sys.exit(main())
