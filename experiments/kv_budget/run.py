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

from experiments.harness import processes
from experiments.kv_budget import data, evaluate, measure, state
from experiments.kv_budget.data import Case
from experiments.kv_budget.decode import (
    Caches,
    Decoder,
    DeviceCache,
    is_local,
    live_bytes,
    place_caches,
)
from experiments.kv_budget.policies import AnyPolicy, Plan, everything, make_plan, policy_of
from experiments.models import Llama
from jbalance.resources import AttentionDims, device_budgets, kv_cache_bytes

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
    question: str | None
    context_tokens: int
    continuation_tokens: int
    new_tokens: int
    policies: tuple[str, ...]
    save: str | None = None  # folder for the last policy's state, half of the new tokens generated

    def __post_init__(self) -> None:
        """ValueError for what can be seen without the model."""
        for name in self.policies:
            policy_of(name)
        least = 3 if self.question is not None else data.PASSKEY_DIGITS
        if self.new_tokens < least:
            raise ValueError(
                f"--new-tokens is {self.new_tokens}: at least {least}, for the answer and to time it"
            )
        if self.continuation_tokens < 1:
            raise ValueError(f"--continuation-tokens is {self.continuation_tokens}: at least 1")
        if self.question == "":
            raise ValueError("--question is empty: leave it out to ask for the pass key")
        if self.save is not None:
            state.check_folder(Path(self.save))
        measure.check_length("--context-tokens: the context", self.context_tokens)


@dataclasses.dataclass(frozen=True)
class Job:
    """What all policies share."""

    decoder: Decoder
    tokenizer: Tokenizer
    case: Case
    query: np.ndarray
    passkey: bool
    full: jax.Array  # [T, V] log-probabilities of the full cache
    budgets: list[int]
    new_tokens: int

    @property
    def tail_tokens(self) -> int:
        """Room behind the context, in every device's budget: the question and the new tokens."""
        return len(self.query) + self.new_tokens


def run(
    settings: Settings, model: Llama, tokenizer: Tokenizer, step: Callable[[str], Any]
) -> dict[str, Any]:
    """The report of one run, as `report.write` takes it.

    Raises:
      ValueError: a text too short, a budget too small, an unknown policy, too few devices.
    """
    policies = [policy_of(name) for name in settings.policies]
    devices = devices_for(len(settings.memory_bytes))
    budgets = device_budgets(devices, 1.0, settings.memory_bytes)
    case = data.cut(
        tokenizer,
        settings.text,
        context_tokens=settings.context_tokens,
        continuation_tokens=settings.continuation_tokens,
    )
    query = case.query
    if settings.question is not None:
        query = data.encode(tokenizer, settings.question)
    decoder = Decoder(model, devices)

    prefilled: dict[str, measure.Measured] = {}
    for scorer in dict.fromkeys(policy.scorer for policy in policies):
        step(f"prefill and scores ({scorer})")
        prefilled[scorer] = jax.block_until_ready(measure.prefill(model, case.context, scorer))
    first = next(iter(prefilled.values()))
    step("reference: the full cache")
    reference = evaluate.reference(decoder, first, case.continuation[:-1])
    job = Job(
        decoder,
        tokenizer,
        case,
        query,
        settings.question is None,
        reference,
        budgets,
        settings.new_tokens,
    )
    rows, plans = [], {}
    for policy in policies:
        step(f"policy {policy.name}")
        save = settings.save if policy is policies[-1] else None
        row, plans[policy.name] = _policy_row(job, policy, prefilled[policy.scorer], save)
        rows.append(row)
    step("quality against bytes")
    curve = _curve(job, policies, prefilled, rows)
    report = _header(settings, model, job)
    report |= {"policies": rows, "curve": curve}
    report["importance"] = _importance(prefilled[policies[-1].scorer], plans[policies[-1].name])
    return report


def outcome(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What of a report must be the same on every process: all but times."""
    return [
        {name: row[name] for name in ("policy", "answer_tokens", "kl", "nll", "top1", "devices")}
        for row in report["policies"]
    ]


def steps_of(settings: Settings) -> int:
    """How many times `run` calls `step`."""
    scorers = {policy_of(name).scorer for name in settings.policies}
    return len(scorers) + len(settings.policies) + 2


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
    job: Job, policy: AnyPolicy, measured: measure.Measured, save: str | None
) -> tuple[dict, Plan]:
    """Everything that the report says of one policy; its state is saved on the way if asked for."""
    make_plan(policy, measured, job.budgets, job.tail_tokens)  # compiles; the next one is timed
    start = time.perf_counter()
    plan = make_plan(policy, measured, job.budgets, job.tail_tokens)
    seconds = time.perf_counter() - start
    caches = place_caches(measured, plan, job.decoder.devices, job.tail_tokens)
    live = processes.total(live_bytes(caches))
    entries = np.bincount(plan.device_of, plan.entries, minlength=live.size)
    reduced = evaluate.log_probs(
        job.decoder, plan, _without_room(caches), job.case.continuation[:-1]
    )
    quality = evaluate.quality(reduced, job.full, job.case.continuation[1:])

    def at_half(progress: evaluate.Progress) -> None:
        if save is not None:
            state.save(Path(save), job.decoder, progress, job.new_tokens)

    generated = evaluate.generate(job.decoder, plan, caches, job.query, job.new_tokens, at_half)
    most = np.maximum(live, processes.total(generated.most_bytes))
    within = bool((most <= job.budgets).all())
    if not within and policy.rule is not everything:
        raise RuntimeError(f"{policy.name} holds {most} bytes, the budgets are {job.budgets}")
    price = [None] * len(live) if plan.price is None else plan.price.tolist()
    found = generated.tokens[: len(job.case.answer)]
    row = {
        "policy": policy.name,
        **quality._asdict(),
        "perplexity": float(np.exp(quality.nll)),
        "passkey_exact": bool((found == job.case.answer).all()) if job.passkey else None,
        "answer_tokens": generated.tokens.tolist(),
        "answer_text": job.tokenizer.decode(generated.tokens.tolist()),
        "plan_s": seconds,
        "tokens_per_s": generated.tokens_per_s,
        "cache_bytes": int(most.sum()),
        "budget_bytes": int(sum(job.budgets)),
        "within_budget": within,
        "entries": plan.entries.reshape(plan.kept.shape[:2]).tolist(),
        "evenness": None if plan.evenness is None else plan.evenness._asdict(),
        "devices": [
            {"budget_bytes": b, "live_bytes": int(n), "entries": int(e), "price_per_byte": p}
            for b, n, e, p in zip(job.budgets, most, entries, price, strict=True)
        ],
    }
    return row, plan


def _without_room(caches: Caches) -> Caches:
    """The same kept entries without a tail: for text that is only judged, not appended."""
    return [
        None
        if held is None
        else DeviceCache(held.context, held.tail_keys[:, :0], held.tail_values[:, :0])
        for held in caches
    ]


def _curve(job, policies, prefilled, rows) -> list[dict[str, Any]]:
    """KL at other budgets, on one device: how quality falls with the bytes."""
    points = [
        {"policy": row["policy"], "cache_bytes": row["cache_bytes"], "kl": row["kl"]}
        for row in rows
    ]
    full_bytes, decoder = _full_bytes(job), job.decoder.alone()
    for policy in policies:
        for scale in CURVE_SCALES if policy.name in CURVE_POLICIES else ():
            budget = int(sum(job.budgets) * scale)
            if budget >= full_bytes:
                continue
            measured = prefilled[policy.scorer]
            try:
                plan = make_plan(policy, measured, [budget], job.tail_tokens)
            except ValueError:  # half of a small budget may not hold the tails: no point there
                continue
            caches = place_caches(measured, plan, decoder.devices)
            reduced = evaluate.log_probs(decoder, plan, caches, job.case.continuation[:-1])
            kl = evaluate.quality(reduced, job.full, job.case.continuation[1:]).kl
            tails = plan.entries.size * job.tail_tokens * 4 * measured.k.shape[-1]
            size = int(live_bytes(caches).sum()) + tails
            points.append({"policy": policy.name, "cache_bytes": size, "kl": kl})
    return sorted(points, key=lambda p: (p["policy"], p["cache_bytes"]))


def _full_bytes(job: Job) -> int:
    config = job.decoder.config
    dims = AttentionDims(config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim)
    return kv_cache_bytes(dims, len(job.case.context) + job.tail_tokens)


def _importance(measured: measure.Measured, plan: Plan) -> dict[str, list[float]]:
    """Importance of each token, averaged over the heads, and how many of them kept it."""
    w = np.asarray(measured.w)
    inner = slice(measure.NUM_SINKS, w.shape[-1] - measure.NUM_RECENT)
    shown = w / w[..., inner].sum(axis=-1, keepdims=True)
    top = shown[..., inner].mean(axis=(0, 1)).max()
    mean = np.minimum(shown.mean(axis=(0, 1)), top)  # protected tokens stand above every score
    return {"mean": mean.tolist(), "kept": plan.kept.mean(axis=(0, 1)).tolist()}


def _header(settings: Settings, model: Llama, job: Job) -> dict[str, Any]:
    config, case = model.config, job.case
    excerpt = job.tokenizer.decode(case.context[-200:].tolist())
    start, stop = case.span
    return {
        "command": settings.command,
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
        },
        "text": {"name": settings.text_name, "excerpt": excerpt},
        "context_tokens": len(case.context),
        "continuation_tokens": len(case.continuation) - 1,
        "full_cache_bytes": _full_bytes(job),
        "devices": [
            {"name": f"{device.platform}:{device.id}", "budget_bytes": size}
            for device, size in zip(job.decoder.devices, job.budgets, strict=True)
        ],
        "question": job.tokenizer.decode(job.query.tolist()).strip(),
        "passkey": {
            "answer": job.tokenizer.decode(case.answer.tolist()).strip(),
            "start": start,
            "stop": stop,
        }
        if job.passkey
        else None,
        "machine": {"platform": platform.machine(), "cores": os.cpu_count() or 1},
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")
        },
    }
