"""Summaries of a book's chapters: sentences taken from them, or written from a reduced cache.

    python -m experiments.long_text.summaries [--json OUT] [--seeds 0,1,2] [--arms NAMES] [--smoke]

Some 20 minutes on one core; runs that the file holds are not run again.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import networkx
import numpy as np
from rouge_score import rouge_scorer

from experiments.harness import runs, study, texts
from experiments.kv_budget import measure, policies
from experiments.kv_budget.measure import Measured
from experiments.long_text import data, questions
from experiments.long_text.data import Chapter

WINDOW = 1408  # tokens of a chapter that are read
WINDOWS = 3  # places where they begin, one for each seed
WORDS = 50  # of a summary at most
NEW_TOKENS = 64  # of a written one
BEGINNING = "\n\nIn short, this chapter"
WRITERS = {
    "written, full": ("full", 1.0),
    "written, ladder, tenth": ("ladder", 0.1),
    "written, uniform, tenth": ("uniform", 0.1),
}
ROUGE = {"ROUGE-1": "rouge1", "ROUGE-L": "rougeL"}


class Part(NamedTuple):
    """Of a chapter."""

    summary: str
    tokens: np.ndarray  # [WINDOW]
    sentences: list[str]
    sentence_of: np.ndarray  # [WINDOW], of each token


# An arm: a part of a chapter, what the model makes of it, a seed -> the summary.
Arm = Callable[[Part, Measured, int], str]


@functools.cache
def parts(seed: int, number: int | None = None) -> list[Part]:
    """One of every chapter that is long enough, or of the first ones, at a place by the seed."""
    tokenizer = questions.loaded().tokenizer
    found = []
    for chapter in data.chapters():
        if len(texts.encode(tokenizer, chapter.text)) >= WINDOW:
            found.append(_part(chapter, seed % WINDOWS / WINDOWS))
    return found[:number]


def _part(chapter: Chapter, at: float) -> Part:
    tokenizer = questions.loaded().tokenizer
    sentences = data.sentences(chapter.text)
    pieces = [texts.encode(tokenizer, " " + sentence) for sentence in sentences]
    ends = np.cumsum([len(piece) for piece in pieces])
    # So late that what follows is long enough.
    first = int(np.searchsorted(ends, at * (ends[-1] - WINDOW), side="right"))
    tokens = np.concatenate(pieces[first:])[:WINDOW]
    number = np.repeat(np.arange(len(pieces) - first), [len(x) for x in pieces[first:]])[:WINDOW]
    return Part(chapter.summary, tokens, sentences[first : first + number[-1] + 1], number)


def lead(part: Part, known: Measured, seed: int) -> str:
    """The first sentences."""
    return _within(part, range(len(part.sentences)))


def chance(part: Part, known: Measured, seed: int) -> str:
    """Any sentences."""
    return _within(part, np.random.default_rng(seed).permutation(len(part.sentences)))


def textrank(part: Part, known: Measured, seed: int) -> str:
    """PageRank over sentences that share words (Mihalcea & Tarau, 2004, equation 3)."""
    words = [set(sentence.lower().split()) for sentence in part.sentences]
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(words)))
    for (i, a), (j, b) in itertools.combinations(enumerate(words), 2):
        common, size = len(a & b), math.log(max(len(a), 1)) + math.log(max(len(b), 1))
        if common and size > 0:
            graph.add_edge(i, j, weight=common / size)
    rank = networkx.pagerank(graph)
    return _within(part, sorted(rank, key=lambda i: -rank[i]))


def by_worth(scorer: str) -> Arm:
    """The sentences whose tokens are worth most to the cache, for each word."""

    def arm(part: Part, known: Measured, seed: int) -> str:
        worth = np.asarray(known.w[scorer], np.float64).sum((0, 1))
        value = np.bincount(part.sentence_of, worth, len(part.sentences))
        words = np.array([len(sentence.split()) for sentence in part.sentences])
        return _within(part, np.argsort(-value / words, kind="stable"))

    return arm


def oracle(part: Part, known: Measured, seed: int) -> str:
    """Sentence by sentence what raises ROUGE-1 most: what no method that does not know it can reach."""
    chosen: list[int] = []
    while True:
        fits = [
            i
            for i in range(len(part.sentences))
            if i not in chosen and len(_joined(part, [*chosen, i]).split()) <= WORDS
        ]
        scored = [(_rouge(part, _joined(part, [*chosen, i]))["ROUGE-1"], i) for i in fits]
        now = _rouge(part, _joined(part, chosen))["ROUGE-1"]
        if not scored or max(scored)[0] <= now:
            return _joined(part, chosen)
        chosen.append(max(scored)[1])


def writer(policy: str, share: float) -> Arm:
    """What the model says next to the beginning of a summary, from the cache that a policy keeps."""

    def arm(part: Part, known: Measured, seed: int) -> str:
        tokenizer = questions.loaded().tokenizer
        context = questions.reduced(policy, share, known)
        (new,) = questions.answers(context, [texts.encode(tokenizer, BEGINNING)], NEW_TOKENS)
        return " ".join(("This chapter" + tokenizer.decode(new.tolist())).split()[:WORDS])

    return arm


ARMS: Mapping[str, Arm] = {
    "lead": lead,
    "chance": chance,
    "TextRank": textrank,
    "worth a word": by_worth("worth"),
    "attention a word": by_worth("attention_mass"),
    "best sentences": oracle,
    **{name: writer(*given) for name, given in WRITERS.items()},
}


def _within(part: Part, order: Iterable[int]) -> str:
    """The sentences of an order that fit, one after the other, in the order of the text."""
    chosen: list[int] = []
    for i in order:
        if len(_joined(part, [*chosen, i]).split()) <= WORDS:
            chosen.append(int(i))
    return _joined(part, chosen)


def _joined(part: Part, chosen: Sequence[int] | np.ndarray) -> str:
    return " ".join(part.sentences[i] for i in sorted(chosen))


def _rouge(part: Part, text: str) -> dict[str, float]:
    found = rouge_scorer.RougeScorer(list(ROUGE.values()), use_stemmer=True).score(
        part.summary, text
    )
    return {name: found[key].fmeasure for name, key in ROUGE.items()}


@functools.cache
def measured(seed: int, number: int | None) -> list[Measured]:
    """What the model makes of each part, which is read once for all arms."""
    scorers = ("attention_mass", *policies.scorers_of([
        policies.policy_of(policy) for policy, _ in WRITERS.values()
    ]))  # fmt: skip
    model = questions.loaded().model
    return [measure.prefill(model, part.tokens, scorers) for part in parts(seed, number)]


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    return study.main("long_text.summaries", __doc__, _study, arguments)


def _study(smoke: bool) -> study.Study:
    number = 2 if smoke else None
    about = {
        "title": "Summaries of a long text",
        "notes": (
            "The Debian Administrator's Handbook, of whose chapters the authors wrote summaries: "
            f"the model reads {WINDOW:,} tokens of each, from three places for three seeds, and {WORDS} "
            "words are compared with the authors'. `worth a word`: the sentences whose "
            "tokens are worth most to the cache; `attention a word` the same by the attention of later "
            "tokens; `lead` the first ones; `TextRank` PageRank over shared words; `best sentences` "
            "knows the answer. `written`: what the model says after "
            f"`{BEGINNING.strip()}`, from the whole cache or from a tenth of its bytes. Where it does "
            "not help: what the cache needs of a text is not what sums it up. The sentences of most "
            "worth are no nearer to the authors' summaries than any sentences, nor are those that later "
            "tokens attend to, and TextRank is nearest; the summaries say what a chapter is for, of "
            "which its sentences hold a third at best."
        ),
        "settings": {"tokens": WINDOW, "words": WORDS},
        "compare": [
            ["worth a word", "lead"],
            ["worth a word", "TextRank"],
            ["worth a word", "chance"],
            ["attention a word", "TextRank"],
            ["written, ladder, tenth", "written, full"],
            ["written, ladder, tenth", "written, uniform, tenth"],
        ],
    }

    def one(name: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
        cases: dict[str, list[float]] = {key: [] for key in ROUGE}
        for part, known in zip(parts(seed, number), measured(seed, number), strict=True):
            for key, value in _rouge(part, ARMS[name](part, known, seed)).items():
                cases[key].append(value)
        advance()
        return {
            "figures": {key: float(np.mean(x)) for key, x in cases.items()},
            "cases": {key: runs.packed(x) for key, x in cases.items()},
        }

    arms = ["lead", "TextRank", "worth a word"] if smoke else list(ARMS)
    return study.Study(about, arms, 1, one)


if __name__ == "__main__":
    sys.exit(main())
