"""A page of tables from the rows of suites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.suites import prose, tasks
from experiments.suites.cases import QUESTION_TOKENS
from experiments.suites.run import FULL, Row
from experiments.suites.summary import likelihood, over_prose, retained, screened

SOLVED = 0.5  # of the strings, from which on a task counts among those that the full cache solves
BARS = {0.25: 0.99, 0.1: 0.97, 0.05: 0.93}  # retained at a fraction of the bytes
LEARNING_BAR = 0.98  # of arithmetic and in-context learning, at a quarter of the bytes
PROSE_COLUMNS = ["prose", "KL: mean", *prose.PERCENTILES, "top-1 agreement", "tokens"]
HEAD = f"""# Suites that the field knows

Written by `python -m experiments.suites` beside its file of results; do not edit. Tasks after RULER
(arXiv:2404.06654), several questions of one context after SCBench (arXiv:2412.10319), arithmetic and
learning in the context, and distances of predictions on real prose. They are implementations of their
own, with wording of their own: **RULER-like**, and no figure here is one of RULER's.

Every context is kept alone, before any question is known; the question and the fixed beginning of its
answer come behind it. The full cache (16 bits) answers first. *full* is its score, the part of the
reference strings that its greedy answers hold; *retained* is the part of these strings that a smaller
cache's answers hold too, *strings* their number, with a 95 % interval over whole contexts (the wider
one of the bootstrap's and of Clopper's and Pearson's for so many trials). A small model fails many tasks
by itself: the rows of groups are over all strings of the tasks whose full score is {SOLVED} or more. The
bars are {BARS[0.25]} retained at 25 % of the bytes, {BARS[0.1]} at 10 %, {BARS[0.05]} at 5 %, and for
arithmetic and learning in the context {LEARNING_BAR} at 25 %. *Answers*: nats a token of the right
answer's likelihood lost to the smaller cache, and how often both have the same most likely token there,
whether the model can solve the task or not.

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


def text_of(results: Sequence[dict[str, Any]], commands: Sequence[str]) -> str:
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
        lines += _table(
            ["retained", "contexts", "full", "strings", *arms], _retained_rows(asked, arms)
        )
        lines += _table(["answers", "tokens", *arms], _likelihood_rows(asked, arms))
    if prose.NAME in of_task:
        lines += _table(PROSE_COLUMNS, _prose_rows(of_task[prose.NAME]))
    return lines


def _retained_rows(entries, arms: list[str]) -> list[list[str]]:
    """Of each task, and of each group's solved ones together."""
    rows = [_retained_row(entry["task"], entry["cases"], arms) for entry in entries]
    groups = _by_group([x for x in entries if screened(x["cases"]) >= SOLVED])
    return rows + [_retained_row(f"**{name}**, solved", own, arms) for name, own in groups.items()]


def _by_group(entries) -> dict[str, list[Row]]:
    """The contexts of each group of tasks."""
    found: dict[str, list[Row]] = {}
    for entry in entries:
        group = next(name for name, own in tasks.GROUPS.items() if entry["task"] in own)
        found.setdefault(group, []).extend(entry["cases"])
    return found


def _retained_row(name: str, cases: list[Row], arms: list[str]) -> list[str]:
    found = sum(case[FULL]["found"] for case in cases)
    cells = []
    for arm in arms:
        there = all(arm in case for case in cases)
        part = retained(cases, arm).part if there else None
        cells.append("–" if part is None else f"{part.mean:.3f} [{part.low:.2f}, {part.high:.2f}]")
    return [name, str(len(cases)), f"{screened(cases):.2f}", str(found), *cells]


def _likelihood_rows(entries, arms: list[str]) -> list[list[str]]:
    """Of each task, and of all in each group."""
    rows = [_likelihood_row(entry["task"], entry["cases"], arms) for entry in entries]
    groups = _by_group(entries)
    return rows + [_likelihood_row(f"**{name}**, all", own, arms) for name, own in groups.items()]


def _likelihood_row(name: str, cases: list[Row], arms: list[str]) -> list[str]:
    cells = []
    for arm in arms:
        one = likelihood(cases, arm) if all(arm in case for case in cases) else None
        cells.append("–" if one is None else f"{one.less:+.3f}, {one.agreement:.3f}")
    return [name, str(sum(case[FULL]["tokens"] for case in cases)), *cells]


def _prose_rows(entry) -> list[list[str]]:
    rows = []
    for arm in (FULL, *entry["arms"]):
        found = over_prose(entry["cases"], arm)
        values = [f"{found[name]:.2g}" for name in ("mean", *prose.PERCENTILES)]
        rows.append([arm, *values, f"{found['top-1']:.4f}", f"{found['tokens']:,.0f}"])
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]
