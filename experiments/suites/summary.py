"""What the rows say: retained fractions with intervals, likelihoods, and distances over prose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.harness import runs
from experiments.harness.statistics import Range, paired_bootstrap
from experiments.suites import prose, tasks
from experiments.suites.cases import QUESTION_TOKENS
from experiments.suites.run import FULL, Row

SOLVED = 0.5  # of the strings, from which on a task counts among those that the full cache solves
OUTSIDE = 0.05  # of an interval
BARS = {0.25: 0.99, 0.1: 0.97, 0.05: 0.93}  # retained at a fraction of the bytes
LEARNING, LEARNING_BAR = "arithmetic and in-context learning", 0.98  # at a quarter of the bytes


class Retained(NamedTuple):
    """Of the strings that the full cache's answers hold, those that a smaller one's hold too."""

    contexts: int  # in which the full cache finds any
    strings: int
    part: Range | None  # None of fewer than two contexts


def screened(cases: Sequence[Row]) -> float:
    """The full cache's score: the part of all reference strings that its answers hold."""
    found, strings = (sum(case[FULL][x] for case in cases) for x in ("found", "strings"))
    return found / strings


def retained(cases: Sequence[Row], arm: str) -> Retained:
    """With an interval over whole contexts, of 95 %.

    It is the percentile bootstrap's, which sees no spread where no context, or every one, loses all that
    there is; then it is Clopper's and Pearson's (1934) for so many contexts.
    """
    pairs = [(case[arm]["kept"], case[FULL]["found"]) for case in cases if case[FULL]["found"]]
    if len(pairs) < 2:
        return Retained(len(pairs), sum(found for _, found in pairs), None)
    kept, found = np.array(pairs, float).T
    part = paired_bootstrap(kept, np.zeros(len(kept)), found, confidence=1 - OUTSIDE)
    beyond = (OUTSIDE / 2) ** (1 / len(kept))
    if part.mean == 1:
        part = part._replace(low=beyond)
    elif part.mean == 0:
        part = part._replace(high=1 - beyond)
    return Retained(len(kept), int(found.sum()), part)


class Likelihood(NamedTuple):
    """Of the right answers' tokens, whether the model would have given them or not."""

    less: float  # nats a token that a smaller cache loses
    agreement: float  # how often both have the same most likely token in the answer's place


def likelihood(cases: Sequence[Row], arm: str) -> Likelihood:
    """Over all tokens of all answers."""
    tokens = sum(case[FULL]["tokens"] for case in cases)
    lost = sum(case[FULL]["log_likelihood"] - case[arm]["log_likelihood"] for case in cases)
    return Likelihood(lost / tokens, sum(case[arm]["agreed"] for case in cases) / tokens)


def over_prose(cases: Sequence[Row], arm: str) -> dict[str, float]:
    """KL by mean and percentiles, and top-1 agreement, over all predicted tokens."""
    kl = np.concatenate([runs.unpacked(arm, case[arm]["kl"]) for case in cases]).astype(float)
    found = {"mean": float(kl.mean())}
    found |= {name: float(np.percentile(kl, q)) for name, q in PERCENTILES.items()}
    agreed = sum(case[arm]["agreed"] for case in cases)
    return found | {"top-1": agreed / kl.size, "tokens": kl.size}


PERCENTILES = prose.PERCENTILES


def page(results: Sequence[dict[str, Any]], commands: Sequence[str]) -> str:
    """Tables of all results, by model and length."""
    lines = [HEAD, *(f"    {command}" for command in commands), ""]
    keys = dict.fromkeys((entry["model"], entry["length"]) for entry in results)
    for model, length in sorted(keys, key=lambda key: (key[0], key[1])):
        own = [x for x in results if (x["model"], x["length"]) == (model, length) and x["cases"]]
        if own:
            lines += [f"## {model}, {length:,} tokens", "", *_section(own)]
    return "\n".join(lines).rstrip() + "\n"


def _section(entries: list[dict[str, Any]]) -> list[str]:
    """Of one model and length."""
    of_task = {entry["task"]: entry for entry in entries}
    arms = list(dict.fromkeys(arm for entry in entries for arm in entry["arms"]))
    asked = [of_task[name] for name in tasks.TASKS if name in of_task]
    lines: list[str] = []
    if asked:
        lines += _table(["retained", "n", "full", *arms], _retained_rows(asked, arms))
        lines += _table(["answers' tokens", "n", *arms], _likelihood_rows(asked, arms))
    if prose.NAME in of_task:
        lines += _table(PROSE_COLUMNS, _prose_rows(of_task[prose.NAME]))
    return lines


def _retained_rows(entries, arms: list[str]) -> list[list[str]]:
    rows = []
    solved: dict[str, list[Row]] = {}
    for entry in entries:
        cases, name = entry["cases"], entry["task"]
        full = screened(cases)
        rows.append([name, str(len(cases)), f"{full:.2f}", *_cells(cases, entry["arms"], arms)])
        if full >= SOLVED:
            group = next(group for group, own in tasks.GROUPS.items() if name in own)
            solved.setdefault(group, []).extend(cases)
    for group, cases in solved.items():
        number = str(len(cases))
        own = [arm for arm in arms if all(arm in case for case in cases)]
        rows.append(
            [
                f"**{group}**, solved ones",
                number,
                f"{screened(cases):.2f}",
                *_cells(cases, own, arms),
            ]
        )
    return rows


def _cells(cases, own: list[str], arms: list[str]) -> list[str]:
    """Of each arm: the part, its interval, and of how many strings."""
    cells = []
    for arm in arms:
        if arm not in own:
            cells.append("")
            continue
        found = retained(cases, arm)
        if found.part is None:
            cells.append(f"– ({found.strings})")
            continue
        part = found.part
        cells.append(f"{part.mean:.3f} [{part.low:.2f}, {part.high:.2f}] ({found.strings})")
    return cells


def _likelihood_rows(entries, arms: list[str]) -> list[list[str]]:
    rows = []
    for entry in entries:
        tokens = sum(case[FULL]["tokens"] for case in entry["cases"])
        cells = []
        for arm in arms:
            if arm in entry["arms"]:
                one = likelihood(entry["cases"], arm)
                cells.append(f"{one.less:+.3f}, {one.agreement:.3f}")
            else:
                cells.append("")
        rows.append([entry["task"], str(tokens), *cells])
    return rows


PROSE_COLUMNS = ["prose", "KL: mean", *PERCENTILES, "top-1 agreement", "tokens"]


def _prose_rows(entry) -> list[list[str]]:
    rows = []
    for arm in (FULL, *entry["arms"]):
        found = over_prose(entry["cases"], arm)
        values = [f"{found[name]:.2g}" for name in ("mean", *PERCENTILES)]
        rows.append([arm, *values, f"{found['top-1']:.4f}", f"{found['tokens']:,.0f}"])
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


HEAD = f"""# Suites that the field knows

Written by `python -m experiments.suites` beside its file of results; do not edit. Tasks after RULER
(arXiv:2404.06654), several questions of one context after SCBench (arXiv:2412.10319), arithmetic and
learning in the context, and distances of predictions on real prose. They are implementations of their
own, with wording of their own: **RULER-like**, and no figure here is one of RULER's.

Every context is kept alone, before any question is known; the question and the fixed beginning of its
answer come behind it. The full cache (16 bits) answers first. *full* is its score, the part of the
reference strings that its greedy answers hold; *retained* is the part of these strings that a smaller
cache's answers hold too, with a 95 % interval over whole contexts (bootstrap; Clopper and Pearson where
nothing was lost) and the number of strings. A small model fails many tasks by itself: of a task below
{SOLVED} nothing counts in the rows of groups. The bars are {BARS[0.25]} retained at 25 % of the bytes,
{BARS[0.1]} at 10 %, {BARS[0.05]} at 5 %, and {LEARNING_BAR} at 25 % for arithmetic and learning in the
context. *Answers' tokens*: nats a token of the right answer's likelihood lost to the smaller cache, and
how often both have the same most likely token there, whether the model can solve the task or not.

Departures from RULER:

- Haystacks are public-domain prose from packages in place of essays; names, words, sentences and
  questions are others, in the form of plain text that goes on, without a chat template.
- A context has exactly length - {QUESTION_TOKENS} tokens, so that one program serves all; the others are
  left for the longest question and its answer. What a task leaves of the context is noise at its very
  front, and the last sentence of prose is cut.
- A sample's size is found by search for each sample, not for the first one and then by decrements.
- An answer ends at its line's end, or 8 tokens beyond the right one's number.
- A reference must stand in the answer as a whole word or number.
- The two tasks on documents of other data sets are left out; few contexts a task, not 500.
"""
