"""Tasks over contexts that policies keep at fractions of the full cache's bytes; the full one first."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from experiments.harness import runs
from experiments.kv_budget import evaluate, measure, score
from experiments.kv_budget.policies import Policy, policy_of, scorers_of
from experiments.models import Transformer
from experiments.models.worth import decoder_of
from experiments.suites import prose, tasks
from experiments.suites.answers import LogProbs, Reply, found, reply, width_of
from experiments.suites.cases import Case, Question, Writer
from jbalance.decode import Model

FULL = "full"
ARM = "{} at {:g}"
# Everything at 16 bits; which scorer measures it makes no difference: `ladder` asks for this one too.
KEPT_WHOLE = dataclasses.replace(policy_of(FULL), scorer=measure.WORTH)

Row = dict[str, dict[str, Any]]
"""Figures of a context, by arm."""
Arms = Callable[[np.ndarray], Iterator[tuple[str, int, LogProbs]]]
"""Of a context: `_arms` of one model."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      tasks: names of `tasks.TASKS`, or `prose.NAME`.
      lengths: L of each.
      samples: contexts of each task and length.
      policies: names.
      budgets: fractions of the full cache's bytes at 16 bits, of layers without a window.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    policies: tuple[str, ...]
    budgets: tuple[float, ...]

    @property
    def arms(self) -> list[str]:
        """Names of what is compared with the full cache."""
        return [ARM.format(policy, budget) for policy in self.policies for budget in self.budgets]


def check(settings: Settings) -> None:
    """ValueError for unknown names, and numbers that cannot be."""
    names = dict.fromkeys((*tasks.TASKS, prose.NAME))
    for name in settings.tasks:
        if name not in names:
            raise ValueError(f"--task is {name!r}: it must be one of {', '.join(names)}")
    for name in settings.policies:
        if policy_of(name).name == FULL:
            raise ValueError("--policy names full: it is what the others are compared with")
    score.check_budgets(settings.budgets)
    if settings.samples < 1:
        raise ValueError(f"--samples is {settings.samples}: at least 1")
    for length in settings.lengths:
        if length < 2 * prose.CONTINUATION_TOKENS:
            raise ValueError(
                f"--length is {length}: at least {2 * prose.CONTINUATION_TOKENS} tokens, of which a "
                f"context has half or more"
            )


def run(
    model: Transformer,
    tokenizer: Tokenizer,
    name: str,
    settings: Settings,
    results: list[dict[str, Any]],
    step: Callable[[], object],
) -> None:
    """Adds the contexts that the results lack.

    Args:
      model: the decoder.
      tokenizer: of its texts.
      name: of the model, in the results.
      settings: checked ones.
      results: of each model, task and length: "cases", a `Row` of each context.
      step: called after every context.

    Raises:
      ValueError: results with other arms.
    """
    decoder = decoder_of(model)
    policies = [KEPT_WHOLE, *map(policy_of, settings.policies)]
    arms = functools.partial(_arms, model, decoder, policies, settings.budgets)
    for length in settings.lengths:
        writer = Writer(tokenizer, length)
        for task in settings.tasks:
            entry = _entry(results, name, task, length, settings.arms)
            for index in range(len(entry["cases"]), settings.samples):
                if task == prose.NAME:
                    row = prose_row(model, writer, index, arms)
                else:
                    row = task_row(task, writer, index, arms)
                entry["cases"].append(row)
                step()


def number_left(results: list[dict[str, Any]], name: str, settings: Settings) -> int:
    """Contexts that `run` will add."""
    done = {
        (entry["task"], entry["length"]): len(entry["cases"])
        for entry in results
        if entry["model"] == name
    }
    return sum(
        max(settings.samples - done.get((task, length), 0), 0)
        for task in settings.tasks
        for length in settings.lengths
    )


def _entry(results, name: str, task: str, length: int, arms: list[str]) -> dict[str, Any]:
    """Of a model, task and length: the results' own, or a new one."""
    about = {"model": name, "task": task, "length": length}
    for entry in results:
        if about.items() <= entry.items():
            if entry["arms"] != arms:
                raise ValueError(
                    f"--json holds {task} at {length} with {', '.join(entry['arms'])}, not "
                    f"{', '.join(arms)}: give another file, or the same policies and budgets"
                )
            return entry
    results.append({**about, "arms": arms, "cases": []})
    return results[-1]


def task_row(task: str, writer: Writer, index: int, arms: Arms) -> Row:
    """Case `index` of a task: what the full cache's answers hold, and what of that the others' hold."""
    case = tasks.case_of(task, writer, index)
    row: Row = {}
    full: list[Reply] | None = None
    for arm, cache_bytes, log_probs in arms(case.context):
        replies = _replies(log_probs, case, writer.tokenizer, full)
        if full is None:
            full = replies
            row[arm] = {
                "strings": sum(len(question.references) for question in case.questions),
                "tokens": sum(len(question.answer) for question in case.questions),
            }
        hits = [
            len(set(_held(question, ours)) & set(_held(question, whole)))
            for question, ours, whole in zip(case.questions, replies, full, strict=True)
        ]
        agreed = [
            int((ours.forced.likeliest == whole.forced.likeliest).sum())
            for ours, whole in zip(replies, full, strict=True)
        ]
        row.setdefault(arm, {})["found" if arm == FULL else "kept"] = sum(hits)
        likelihood = sum(x.forced.log_likelihood for x in replies)
        row[arm] |= {"agreed": sum(agreed), "log_likelihood": likelihood, "bytes": cache_bytes}
    return row


def _replies(
    log_probs: LogProbs, case: Case, tokenizer: Tokenizer, full: list[Reply] | None
) -> list[Reply]:
    """To all questions; of a smaller cache's, what the full one's answers hold is all that counts."""
    width, replies = width_of(case.questions), []
    for i, question in enumerate(case.questions):
        wanted = question.references if full is None else _held(question, full[i])
        draft = None if full is None else full[i].tokens
        replies.append(reply(log_probs, question, tokenizer, width, wanted=wanted, draft=draft))
    return replies


def _held(question: Question, own: Reply) -> tuple[str, ...]:
    """The references that an answer holds."""
    hits = found(own.text, question.references)
    return tuple(itertools.compress(question.references, hits))


def prose_row(model: Transformer, writer: Writer, index: int, arms: Arms) -> Row:
    """Passage `index`: the distance of every prediction from that of dense attention."""
    passage = prose.passage_of(writer, index)
    fed = passage.continuation[:-1]
    dense = evaluate.reference(model, passage.context, fed)
    row: Row = {}
    for arm, cache_bytes, log_probs in arms(passage.context):
        apart = prose.distances(log_probs(fed), dense)
        agreed = int(apart.same.sum())
        row[arm] = {"kl": runs.packed(apart.kl), "agreed": agreed, "bytes": cache_bytes}
    return row


def _arms(
    model: Transformer,
    decoder: Model,
    policies: Sequence[Policy],
    budgets: Sequence[float],
    context: np.ndarray,
) -> Iterator[tuple[str, int, LogProbs]]:
    """The context as each arm keeps it, the full cache first: name, bytes and predictions."""
    devices = jax.devices()[:1]
    measured = measure.prefill(model, context, scorers_of(list(policies)))
    whole, *others = policies
    for chosen, parts in (([whole], [1.0]), (others, budgets)):
        for kept in score.kept_contexts(decoder, measured, chosen, parts, devices):
            arm = FULL if kept.policy == FULL else ARM.format(kept.policy, kept.budget)
            log_probs = functools.partial(evaluate.log_probs, decoder, kept.context, devices)
            yield arm, kept.cache_bytes, log_probs
