"""`run`: one context, given device memories, every policy at the same bytes, and a report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from experiments.harness import processes, rules
from experiments.harness.tokens import pieces
from experiments.kv_budget import data, evaluate, measure, telling
from experiments.kv_budget.data import Case
from experiments.kv_budget.policies import (
    Policy,
    everything,
    ladder,
    make_plan,
    pack,
    policy_of,
    scorers_of,
)
from experiments.models import Loaded, Transformer
from experiments.models.worth import decoder_of
from jbalance import decode
from jbalance.decode import Model, Plan, Reserve
from jbalance.decode.context import is_local
from jbalance.decode.devices import main_device
from jbalance.decode.saved import check_folder
from jbalance.resources import device_budgets

DEFAULT_POLICIES = (
    *("full", "sinks-recent", "uniform", "ladder-eviction-only"),
    *("uniform-bits", "ladder"),
)
CURVE_POLICIES = ("sinks-recent", "ladder-eviction-only", "ladder")
CURVE_SCALES = (0.5, 1.5, 2.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for."""

    command: str
    memory_bytes: tuple[int, ...]
    text_name: str
    text: str
    context_tokens: int
    continuation_tokens: int
    new_tokens: int
    policies: tuple[str, ...]
    save: str | None = None  # folder for the last policy's state, half of the new tokens generated
    keep: str | None = None  # a regular expression: tokens that ladders always keep

    def __post_init__(self) -> None:
        """ValueError for what can be seen without the model."""
        for name in self.policies:
            policy_of(name)
        if self.new_tokens < data.PASSKEY_DIGITS:
            raise ValueError(
                f"--new-tokens is {self.new_tokens}: at least {data.PASSKEY_DIGITS}, for the pass key"
            )
        if self.continuation_tokens < 1:
            raise ValueError(f"--continuation-tokens is {self.continuation_tokens}: at least 1")
        if self.save is not None:
            check_folder(Path(self.save))
        if self.keep is not None:
            rules.pattern_of(self.keep)
        measure.check_length("--context-tokens: the context", self.context_tokens)


@dataclasses.dataclass(frozen=True)
class Job:
    """What all policies share."""

    name: str
    model: Transformer
    decoder: Model
    devices: list[jax.Device]
    tokenizer: Tokenizer
    case: Case
    query: np.ndarray
    full: jax.Array  # [T, V] log-probabilities of the full cache
    budgets: list[int]
    new_tokens: int

    @property
    def reserve(self) -> Reserve:
        """Room beside the context, in every device's budget: the question and the new tokens."""
        return Reserve(1, len(self.query) + self.new_tokens)


def run(settings: Settings, found: Loaded, step: Callable[[str], Any]) -> dict[str, Any]:
    """The report of one run with a model, as `report.write` takes it.

    Raises:
      ValueError: a text too short, a budget too small, an unknown policy, too few devices.
    """
    policies = [policy_of(name) for name in settings.policies]
    model, tokenizer = found.model, found.spoken.tokenizer
    if model.config.windows is not None:
        raise ValueError(
            "the model's layers have windows: `score` compares policies on them, and `python -m "
            "experiments.generate` decodes"
        )
    devices = devices_for(len(settings.memory_bytes))
    budgets = device_budgets(devices, 1.0, settings.memory_bytes)
    case = data.cut(
        tokenizer,
        settings.text,
        context_tokens=settings.context_tokens,
        continuation_tokens=settings.continuation_tokens,
    )
    step("prefill and scores")
    measured = jax.block_until_ready(measure.prefill(model, case.context, scorers_of(policies)))
    read = pieces(tokenizer, case.context)
    if settings.keep is not None:
        measured = measured._replace(known=rules.kept_by_rule(settings.keep, read))
    step("reference: the full cache")
    job = Job(
        found.where.stem,
        model,
        decoder_of(model),
        devices,
        tokenizer,
        case,
        case.query,
        evaluate.reference(model, case.context, case.continuation[:-1]),
        budgets,
        settings.new_tokens,
    )
    rows, plans = [], {}
    for policy in policies:
        step(f"policy {policy.name}")
        save = settings.save if policy is policies[-1] else None
        row, plans[policy.name] = _policy_row(job, policy, measured, save)
        rows.append(row)
    step("quality against bytes")
    curve = _curve(job, policies, measured, rows)
    report = _header(settings, job, read)
    report |= {"policies": rows, "curve": curve}
    last = policies[-1]
    w, plan = np.asarray(measured.w[last.scorer]), plans[last.name]
    report["importance"] = telling.of_tokens(w, plan)
    report["reasons"] = telling.reasons(w, plan, measured.known) if last.rule is ladder else []
    return report


def outcome(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What of a report must be the same on every process: all but times."""
    return [
        {name: row[name] for name in ("policy", "answer_tokens", "kl", "nll", "top1", "devices")}
        for row in report["policies"]
    ]


def steps_of(settings: Settings) -> int:
    """How many times `run` calls `step`."""
    return len(settings.policies) + 3


def devices_for(number: int) -> list[jax.Device]:
    """The first devices of all processes.

    Raises:
      ValueError: if there are fewer, or a process would have none.
    """
    devices = jax.devices()
    if len(devices) < number:
        raise ValueError(
            f"--device-memory has {number} entries, but there are {len(devices)} devices: "
            f"give at most one entry each"
        )
    if not any(map(is_local, devices[:number])):
        raise ValueError(
            f"--device-memory has {number} entries, which leaves process {jax.process_index()} without "
            f"a device: give one entry for each of the {len(devices)} devices"
        )
    return devices[:number]


def _policy_row(
    job: Job, policy: Policy, measured: measure.Measured, save: str | None
) -> tuple[dict, Plan]:
    """Everything that the report says of one policy; its state is saved on the way if asked for."""
    start = time.perf_counter()
    plan = make_plan(policy, measured, job.budgets, job.reserve)
    seconds = time.perf_counter() - start
    context = dataclasses.replace(pack(policy, measured, plan, job.devices), reserve=job.reserve)
    reduced = evaluate.log_probs(job.decoder, context, job.devices, job.case.continuation[:-1])
    quality = evaluate.quality(reduced, job.full, job.case.continuation[1:])

    def at_half(state: decode.State, tokens: list[int]) -> None:
        if save is not None:
            notes = {"tokens": tokens, "new_tokens": job.new_tokens}
            decode.save(
                Path(save),
                job.decoder,
                state,
                notes=notes,
                barrier=lambda: processes.total(np.zeros(1, np.int64)),
            )

    room = job.budgets if policy.rule is not everything else _over(job, context)
    generated = evaluate.generate(
        job.decoder, context, job.devices, room, job.query, job.new_tokens, at_half
    )
    most = processes.total(generated.most_bytes)
    within = bool((most <= job.budgets).all())
    if not within and policy.rule is not everything:
        raise RuntimeError(f"{policy.name} holds {most} bytes, the budgets are {job.budgets}")
    price = [None] * len(most) if plan.price is None else plan.price.tolist()
    entries = plan.kept.sum(axis=-1)
    held = np.bincount(plan.room.device_of, entries.reshape(-1), minlength=most.size)
    found = generated.tokens[: len(job.case.answer)]
    row = {
        "policy": policy.name,
        **quality._asdict(),
        "perplexity": float(np.exp(quality.nll)),
        "passkey_exact": bool((found == job.case.answer).all()),
        "answer_tokens": generated.tokens.tolist(),
        "answer_text": job.tokenizer.decode(generated.tokens.tolist()),
        "plan_s": seconds,
        "tokens_per_s": generated.tokens_per_s,
        "cache_bytes": int(most.sum()),
        "budget_bytes": int(sum(job.budgets)),
        "within_budget": within,
        "entries": entries.tolist(),
        "evenness": None if plan.evenness is None else plan.evenness._asdict(),
        "devices": [
            {"budget_bytes": b, "live_bytes": int(n), "entries": int(e), "price_per_byte": p}
            for b, n, e, p in zip(job.budgets, most, held, price, strict=True)
        ],
    }
    return row, plan


def _over(job: Job, context: decode.Context) -> list[int]:
    """Budgets that hold all of a context and the room for its request."""
    units = job.decoder.num_layers * job.decoder.num_kv_heads
    room = job.reserve.unit_bytes(job.decoder.head_dim) * units
    beside = job.reserve.device_bytes(units) + 4
    return [held + room + beside for held in context.nbytes]


def _curve(job, policies, measured, rows) -> list[dict[str, Any]]:
    """KL at other budgets, on one device: how quality falls with the bytes."""
    points = [
        {"policy": row["policy"], "cache_bytes": row["cache_bytes"], "kl": row["kl"]}
        for row in rows
    ]
    full_bytes = _full_bytes(job)
    device = [main_device(job.devices)]
    units = job.decoder.num_layers * job.decoder.num_kv_heads
    beside = job.reserve.unit_bytes(job.decoder.head_dim) * units
    for policy in policies:
        for scale in CURVE_SCALES if policy.name in CURVE_POLICIES else ():
            budget = int(sum(job.budgets) * scale)
            if budget >= full_bytes:
                continue
            try:
                plan = make_plan(policy, measured, [budget], job.reserve)
            except ValueError:  # half of a small budget may not hold the reserve: no point there
                continue
            context = pack(policy, measured, plan, device)
            reduced = evaluate.log_probs(job.decoder, context, device, job.case.continuation[:-1])
            kl = evaluate.quality(reduced, job.full, job.case.continuation[1:]).kl
            size = sum(context.nbytes) + beside
            points.append({"policy": policy.name, "cache_bytes": size, "kl": kl})
    return sorted(points, key=lambda p: (p["policy"], p["cache_bytes"]))


def _full_bytes(job: Job) -> int:
    return job.decoder.dense_bytes(len(job.case.context) + job.reserve.new_tokens)


def _header(settings: Settings, job: Job, read: list[str]) -> dict[str, Any]:
    config, case = job.model.config, job.case
    excerpt = job.tokenizer.decode(case.context[-200:].tolist())
    start, stop = case.span
    return {
        "command": settings.command,
        "model": {
            "name": job.name,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
        },
        "text": {
            "name": settings.text_name,
            "excerpt": excerpt,
            "pieces": read,
        },
        "context_tokens": len(case.context),
        "continuation_tokens": len(case.continuation) - 1,
        "full_cache_bytes": _full_bytes(job),
        "devices": [
            {"name": f"{device.platform}:{device.id}", "budget_bytes": size}
            for device, size in zip(job.devices, job.budgets, strict=True)
        ],
        "question": job.tokenizer.decode(job.query.tolist()).strip(),
        "passkey": {
            "answer": job.tokenizer.decode(case.answer.tolist()).strip(),
            "start": start,
            "stop": stop,
        },
        "machine": {"platform": platform.machine(), "cores": os.cpu_count() or 1},
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")
        },
    }
