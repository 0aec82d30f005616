"""`score`: quality of policies at fractions of the full cache's bytes, on given cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.harness import files, statistics
from experiments.kv_budget import evaluate, measure
from experiments.kv_budget.measure import Measured
from experiments.kv_budget.policies import (
    Policy,
    everything,
    make_plan,
    pack,
    policy_of,
    scorers_of,
    window_bytes,
)
from experiments.models import Transformer
from experiments.models.worth import decoder_of
from jbalance.decode import Context, Model


def read_cases(path: str, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays of a case file, checked.

    Raises:
      ValueError: an unreadable file, missing arrays, wrong ranks or lengths, ids outside the
        vocabulary.
    """
    try:
        cases = files.read_npz(Path(path))
    except ValueError as error:
        raise ValueError(f"--cases {path!r} is no readable .npz file: {error}") from None
    together = (("lm_ctx", "lm_cont"), ("pk_ctx", "pk_query", "pk_answer"))
    for names in together:
        present = [name for name in names if name in cases]
        if present and len(present) < len(names):
            missing = ", ".join(sorted(set(names) - set(present)))
            raise ValueError(f"--cases {path!r} has {present[0]} but lacks {missing}")
        for name in present:
            _check_ids(path, name, cases[name], vocab_size, len(cases[names[0]]))
    if "lm_ctx" not in cases and "pk_ctx" not in cases:
        raise ValueError(f"--cases {path!r} holds {sorted(cases)}: it needs lm_ctx and lm_cont")
    if "lm_cont" in cases and cases["lm_cont"].shape[1] < 2:
        raise ValueError(f"--cases {path!r}: lm_cont needs at least 2 tokens, one to predict")
    return cases


def _check_ids(path: str, name: str, ids: np.ndarray, vocab_size: int, number: int) -> None:
    where = f"--cases {path!r}: {name}"
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{where} has shape {ids.shape} and dtype {ids.dtype}: token ids [N, L]")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"{where} has ids {ids.min()}..{ids.max()}: they must be in 0..{vocab_size - 1}"
        )
    if len(ids) != number:
        raise ValueError(f"{where} has {len(ids)} cases, the others {number}")
    if name.endswith("ctx"):
        measure.check_length(name, ids.shape[1])


def check_budgets(budgets: Sequence[float]) -> None:
    """ValueError for what is no fraction of a cache."""
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"--budget is {budget}: a fraction of the full cache, in (0, 1]")


def score(
    model: Transformer,
    cases: dict[str, np.ndarray],
    policies: list[str],
    budgets: list[float],
    step: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """Results of every policy at every budget, as the command writes them.

    Args:
      model: the decoder.
      cases: of `read_cases`.
      policies: names.
      budgets: fractions of the full cache's bytes at 16 bits, of layers without a window.
      step: called after every context with the results of those that are done.

    Raises:
      ValueError: unknown policy, a budget outside (0, 1].
    """
    check_budgets(budgets)
    chosen = [policy_of(name) for name in policies]
    decoder = decoder_of(model)
    table: dict[tuple[str, float], list[dict[str, Any]]] = {
        (p.name, b): [{} for _ in range(max(map(len, cases.values())))]
        for p in chosen
        for b in budgets
    }
    for kind in ("lm", "pk"):
        for i, context in enumerate(cases.get(f"{kind}_ctx", ())):
            given = {
                name.removeprefix(f"{kind}_"): x[i]
                for name, x in cases.items()
                if name.startswith(kind)
            }
            context = context.astype(np.int32)
            measured = measure.prefill(model, context, scorers_of(chosen))
            full = None
            if kind == "lm":
                full = evaluate.reference(model, context, given["cont"][:-1].astype(np.int32))
            rows = _score_context(decoder, measured, chosen, budgets, full, given)
            for key, row in rows:
                table[key][i].update(row)
            step(_results(table))
    return _results(table)


def _results(table: dict[tuple[str, float], list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "results": [
            {
                "policy": name,
                "budget": budget,
                "mean": _mean(rows),
                "interval": _interval(rows),
                "passkeys_found": sum(int(row.get("passkey_exact", 0)) for row in rows),
                "cases": rows,
            }
            for (name, budget), rows in table.items()
        ]
    }


class Kept(NamedTuple):
    """A context as a policy keeps it within a budget."""

    policy: str
    budget: float  # fraction of the full cache's bytes
    context: Context
    cache_bytes: int  # that it takes, windows left out
    budget_bytes: int


def kept_contexts(
    decoder: Model,
    measured: Measured,
    policies: Sequence[Policy],
    budgets: Sequence[float],
    devices: list[jax.Device],
) -> Iterator[Kept]:
    """A measured context by every policy at every budget, one at a time.

    Args:
      decoder: whose context it is.
      measured: by the scorers of all policies.
      policies: of which `full` keeps everything at any budget.
      budgets: fractions of the full cache's bytes at 16 bits, of layers without a window.
      devices: [1].

    Raises:
      RuntimeError: bytes above the budget.
    """
    size, windows = measured.k.shape[1], decoder.windows
    whole = [spec for spec in decoder.attention if spec.window is None]
    full_bytes = dataclasses.replace(decoder, attention=tuple(whole)).dense_bytes(size)
    for policy in policies:
        for budget in budgets:
            budget_bytes = int(budget * full_bytes)
            plan = make_plan(policy, measured, [budget_bytes], windows=windows)
            context = pack(policy, measured, plan, devices)
            resident = sum(context.nbytes) - window_bytes(plan)
            if resident > budget_bytes and policy.rule is not everything:
                raise RuntimeError(f"{policy.name} holds {resident} of {budget_bytes} bytes")
            yield Kept(policy.name, budget, context, resident, budget_bytes)


def _score_context(decoder, measured, policies: list[Policy], budgets, full, given):
    """Rows of one context: quality against `full`, or whether the pass key is found if that is None."""
    devices = jax.devices()[:1]
    for kept in kept_contexts(decoder, measured, policies, budgets, devices):
        if full is not None:
            fed, labels = given["cont"][:-1].astype(np.int32), given["cont"][1:]
            reduced = evaluate.log_probs(decoder, kept.context, devices, fed)
            row = evaluate.quality(reduced, full, labels)._asdict()
            row |= {"cache_bytes": kept.cache_bytes, "budget_bytes": kept.budget_bytes}
        else:
            query, answer = given["query"].astype(np.int32), given["answer"]
            found = evaluate.answers(decoder, kept.context, devices, query, answer)
            row = {"passkey_exact": float(found), "passkey_cache_bytes": kept.cache_bytes}
        yield (kept.policy, kept.budget), row


def _mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every figure over the cases that have it."""
    return {name: float(np.mean(values)) for name, values in _by_name(rows).items()}


def _interval(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Half of the 95 % interval of each mean over the cases, where there are two or more."""
    return {
        name: statistics.interval(values).half
        for name, values in _by_name(rows).items()
        if len(values) > 1
    }


def _by_name(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name] for row in rows if name in row] for name in names}
