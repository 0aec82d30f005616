"""Decoding in progress on disk: saved by the devices that hold it, restored on any others.

A folder with one file a device, written by its process, and then a manifest that names them with their
digests, and has one of each of its fields and of all: without it the state is not whole. What a file
holds lies unit by unit, so that units go to other devices as they are: packed pages are copied, nothing
is quantized again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.cache import KVCache, _cache
from jbalance.cache._sight import clock_bytes
from jbalance.decode import _files
from jbalance.decode._checks import CONTEXT, OWN, check_facts, check_part, shown
from jbalance.decode._files import MANIFEST
from jbalance.decode._placement import place_units
from jbalance.decode._units import arrays_of, joined, put_together, taken_apart
from jbalance.decode.context import devices_for, is_local, slots_of
from jbalance.decode.model import Model, budgets_of
from jbalance.decode.sampling import Samplers
from jbalance.decode.state import Requests, State, around, shared


@in_32_bits
def save(
    folder: str | Path,
    model: Model,
    state: State,
    *,
    notes: dict[str, Any] | None = None,
    barrier: Callable[[], object] = lambda: None,
) -> None:
    """Write a state; all processes call it alike, and see the same folder.

    Args:
      folder: made if it is not there; it must not hold a state.
      model: of which it is.
      state: what goes on later.
      notes: what the caller wants to know again, as JSON has it; `notes_of` gives it back.
      barrier: called when this process has written its part, to return when all have; needed with many
        processes.

    Raises:
      ValueError: a folder that holds a state already, or is a file; devices that keep different
        numbers of recent tokens, whose units could not be on one device; notes that are no JSON.
    """
    folder = check_folder(folder)
    checks.instance("model", model, Model)
    checks.instance("state", state, State)
    checks.function("barrier", barrier)
    notes = _files.as_json({} if notes is None else notes)
    recent = sorted({x.recent_tokens for x in state.caches if x is not None})
    if len(recent) > 1:
        raise ValueError(
            f"state keeps {recent[0]} recent tokens on one device and {recent[-1]} on another: give "
            f"`create` recent_tokens, for units to go from one to the other"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for d in range(len(state.devices)):
        context = None if state.contexts is None else state.contexts[d]
        kinds = {OWN: state.caches[d], CONTEXT: context}
        if kinds[OWN] is not None:
            arrays: dict[str, Any] = {}
            for kind, cache in kinds.items():
                if cache is not None:
                    arrays |= {f"{kind}.{k}": x for k, x in arrays_of(taken_apart(cache)).items()}
            _files.write_arrays(folder / _files.file_of(d), arrays)
    barrier()
    if jax.process_index() == 0:
        fields = _facts(state) | {"model": _model_facts(model), "notes": notes}
        _files.write_manifest(folder, fields, len(state.devices))


def check_folder(folder: str | Path) -> Path:
    """The folder; ValueError if a state is there already: it is not written over."""
    folder = _files.path_of(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r} is a file: give a folder")
    if (folder / MANIFEST).exists():
        raise ValueError(f"folder {str(folder)!r} holds a state already: give another one")
    return folder


def notes_of(folder: str | Path) -> dict[str, Any]:
    """The notes of a saved state; ValueError if it is not there, not whole or altered."""
    return _files.read_manifest(_files.path_of(folder))["notes"]


@in_32_bits
def restore(
    folder: str | Path,
    model: Model,
    budgets_bytes: Sequence[int],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> State:
    """A saved state on other devices.

    Args:
      folder: of `save`.
      model: of which it is.
      budgets_bytes: of each device [G].
      devices: [G]; None for the first ones.

    Raises:
      ValueError: a state that is not there, not whole, altered or of another model, or budgets that do
        not hold it, with what is missing.
    """
    folder = _files.path_of(folder)
    checks.instance("model", model, Model)
    budgets = budgets_of(budgets_bytes)
    facts = _files.read_manifest(folder)
    if facts["model"] != _model_facts(model):
        raise ValueError(
            f"folder {str(folder)!r} is of another model: {shown(facts['model'])}, not "
            f"{_model_facts(model)}"
        )
    shape = model.num_layers, model.num_kv_heads
    heads = shape[0] * shape[1]
    timed = model.windows is not None
    check_facts(folder / MANIFEST, facts, model.head_dim, timed=timed)
    devices = devices_for(devices, len(budgets))
    parts = []
    for name, digest in facts["files"].items():
        parts.append(_files.read_arrays(folder / name, digest))
        check_part(folder / name, parts[-1], facts, heads)
    whole = {kind: joined(parts, kind, folder) for kind in facts["kinds"]}
    device_of = _place(whole, facts, shape, budgets, folder)
    caches: dict[str, list[KVCache | None]] = {kind: [] for kind in facts["kinds"]}
    for d, device in enumerate(devices):
        left = budgets[d]
        for kind in reversed(facts["kinds"]):  # the context first: the requests get what is left
            cache = None
            if is_local(device):
                mine = np.tile(device_of == d, len(whole[kind].units) // device_of.size)
                part = whole[kind].chosen(np.flatnonzero(mine))
                slots = slots_of(device_of.reshape(shape), d)
                budget = left if kind == OWN else None
                cache = put_together(part, facts["kinds"][kind], slots, budget, model.windows)
                left -= cache.nbytes
                cache = jax.device_put(jax.tree.map(_owned, cache), device)
            caches[kind].append(cache)
    return _state(model, facts, caches, devices)


def _state(model, facts, caches, devices) -> State:
    """The state around its caches."""
    given = facts["requests"]
    empty = Samplers.greedy(len(given["tokens"]))
    samplers = Samplers(
        *(
            np.asarray(given[f"sampler_{name}"], old.dtype)
            for name, old in zip(Samplers._fields, empty, strict=True)
        )
    )
    requests = Requests(
        np.asarray(given["tokens"], np.int32),
        np.asarray(given["positions"], np.int32),
        np.asarray(given["active"], bool),
        samplers,
    )
    weights = np.asarray(given["weights"], np.float32)
    protected = np.asarray(given["protected"], np.int32)
    contexts = caches.get(CONTEXT)
    state = around(
        caches[OWN],
        contexts,
        requests,
        weights,
        protected,
        devices,
        facts["context_tokens"],
        learned=model.learned,
    )
    return shared(state)


def _facts(state: State) -> dict[str, Any]:
    """What is small in a state."""
    kinds = {OWN: state.caches} | ({} if state.contexts is None else {CONTEXT: state.contexts})
    requests = {
        name: np.asarray(x).tolist()
        for name, x in (
            ("tokens", state.tokens),
            ("positions", state.positions),
            ("active", state.active),
            ("weights", state.weights),
            ("protected", state.protected),
            *((f"sampler_{name}", x) for name, x in state.samplers._asdict().items()),
        )
    }
    static = {}
    for kind, caches in kinds.items():
        arena = next(x for x in caches if x is not None).arena
        static[kind] = {
            "head_dim": arena.head_dim,
            "bits": list(arena.bits),
            "page_bytes": arena.page_bytes,
            "timed": arena.timed,
        }
    return {
        "kinds": static,
        "context_tokens": state.context_tokens,
        "requests": requests,
    }


def _model_facts(model: Model) -> dict[str, Any]:
    """What must be the same of a model: its attention, and the shapes of its parameters."""
    shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves((model.params, model.layers))]
    facts = {
        "num_layers": model.num_layers,
        "attention": [dataclasses.asdict(spec) for spec in model.attention],
        "shapes": _files.digest_of(shapes),
    }
    return json.loads(json.dumps(facts))


def _owned(x) -> np.ndarray:
    """A copy: device_put may keep the host's memory, and caches are donated."""
    return np.array(x)


def _place(whole, facts, shape, budgets, folder) -> np.ndarray:
    """device_of [L K]; ValueError if the devices do not hold the units."""
    heads = shape[0] * shape[1]
    tokens, size, fixed = np.zeros(heads), np.zeros(heads, np.int64), 0
    for kind, part in whole.items():
        own = facts["kinds"][kind]
        requests, levels = len(part.units) // heads, len(own["bits"])
        recent = part.rows["recent_keys"].shape[1]
        unit = _cache.unit_bytes(own["head_dim"], recent) + 8 * levels
        each = unit + part.sizes * (own["page_bytes"] + 4)
        size += each.reshape(requests, heads).sum(axis=0)
        if own["timed"]:
            size += 4  # a unit's window
            fixed += clock_bytes(requests, 0, recent)
        tokens += part.rows["count"].sum(axis=1).reshape(requests, heads).sum(axis=0)
        fixed += _cache.table_bytes_of(requests, heads) + 4
    room = np.array(budgets) - fixed
    device_of = place_units(tokens.reshape(shape), size.reshape(shape), room)
    held = np.bincount(device_of, size, len(budgets)).astype(np.int64) + fixed
    for d, (need, budget) in enumerate(zip(held, budgets, strict=True)):
        if need > budget:
            raise ValueError(
                f"budgets_bytes[{d}] is {budget}: the units of the state {str(folder)!r} that fit best "
                f"take {need}, {need - budget} more; all units take {int(held.sum())} bytes and the "
                f"devices have {sum(budgets)}"
            )
    return device_of
