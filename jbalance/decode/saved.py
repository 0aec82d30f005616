"""Decoding in progress on disk: saved by the devices that hold it, restored on any others.

A folder with one file a device, written by its process, and then a manifest that names them with their
digests, and has one of each of its fields and of all: without it the state is not whole. What a file
holds lies unit by unit, so that units go to other devices as they are: packed pages are copied, nothing
is quantized again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import reprlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.cache import KVCache, _cache
from jbalance.cache._sight import clock_bytes
from jbalance.decode._checks import CONTEXT, OWN, check_facts, check_part, shown
from jbalance.decode._units import arrays_of, joined, put_together, taken_apart
from jbalance.decode.context import devices_for, is_local, slots_of
from jbalance.decode.model import Model, budgets_of
from jbalance.decode.plan import place_units
from jbalance.decode.sampling import Samplers
from jbalance.decode.state import Requests, State, around, shared

MANIFEST = "manifest.json"
_FORMAT = 7
_DAMAGED = (
    *(ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, RuntimeError),
    *(MemoryError, OverflowError, BadZipFile, zlib.error),
)
_FIELDS = ("format", "kinds", "context_tokens", "requests", "files", "model", "notes")


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
    notes = _as_json({} if notes is None else notes)
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
            _write(folder / _file(d), _packed(arrays))
    barrier()
    if jax.process_index() == 0:
        names = [_file(d) for d in range(len(state.devices))]
        digests = {name: _digest((folder / name).read_bytes()) for name in names}
        manifest = _facts(state) | {"format": _FORMAT, "files": digests}
        manifest |= {"model": _model_facts(model), "notes": notes}
        manifest["digests"] = {name: _digest(_canonical(x)) for name, x in manifest.items()}
        manifest["digest"] = _digest(_canonical(manifest))
        _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def check_folder(folder: str | Path) -> Path:
    """The folder; ValueError if a state is there already: it is not written over."""
    folder = _path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r} is a file: give a folder")
    if (folder / MANIFEST).exists():
        raise ValueError(f"folder {str(folder)!r} holds a state already: give another one")
    return folder


def _path(folder: str | Path) -> Path:
    """ValueError for what is no path."""
    if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
        raise ValueError(f"folder is {reprlib.repr(folder)}: it must be the path of a folder")
    return Path(folder)


def _as_json(notes: Any) -> dict[str, Any]:
    """The notes; ValueError, before anything is written, for what would not come back as it is."""
    checks.mapping("notes", notes, "values by name, as JSON has them")
    notes = dict(notes)
    try:
        back = json.loads(json.dumps(notes, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"notes is {reprlib.repr(notes)}: {error}") from None
    if back != notes:
        raise ValueError(
            f"notes is {reprlib.repr(notes)}: JSON would give back {reprlib.repr(back)}; names must be "
            f"text, and what holds several a list"
        )
    return back


def notes_of(folder: str | Path) -> dict[str, Any]:
    """The notes of a saved state; ValueError if it is not there, not whole or altered."""
    return _manifest(_path(folder))["notes"]


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
    folder = _path(folder)
    checks.instance("model", model, Model)
    budgets = budgets_of(budgets_bytes)
    facts = _manifest(folder)
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
        parts.append(_read(folder / name, digest))
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
    return _state(facts, caches, devices)


def _state(facts, caches, devices) -> State:
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
        caches[OWN], contexts, requests, weights, protected, devices, facts["context_tokens"]
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
        "shapes": _digest(_canonical(shapes)),
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


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    """As an .npz, bfloat16 as the 16 bits that it is."""
    plain = {
        f"{name}:bfloat16" if x.dtype == jnp.bfloat16 else name: x.view(np.uint16)
        if x.dtype == jnp.bfloat16
        else x
        for name, x in arrays.items()
    }
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **plain)
    return file.getvalue()


def _read(path: Path, digest: str) -> dict[str, np.ndarray]:
    """A file of `_packed`, if it is what was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if _digest(content) != digest:
        raise ValueError(f"{path} is not what was saved: its SHA-256 differs")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {
                name.partition(":")[0]: arrays[name].view(jnp.bfloat16)
                if ":" in name
                else arrays[name]
                for name in arrays
            }
    except _DAMAGED as error:
        raise ValueError(f"{path} is no file of arrays: {error}") from None


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it is one and as it was written."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"folder {str(folder)!r} has no {MANIFEST}: nothing was saved there, or not all of it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a manifest of format {_FORMAT}")
    missing = [name for name in (*_FIELDS, "digests", "digest") if name not in manifest]
    if missing:
        raise ValueError(f"{path} lacks the field {missing[0]!r}")
    digest, digests = manifest.pop("digest"), manifest["digests"]
    for name in _FIELDS:
        if not isinstance(digests, dict) or digests.get(name) != _digest(
            _canonical(manifest[name])
        ):
            raise ValueError(f"{path} is not what was saved: the digest of {name!r} differs")
    if digest != _digest(_canonical(manifest)):
        raise ValueError(f"{path} is not what was saved: its digest differs")
    return manifest


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _file(device: int) -> str:
    return f"device-{device}.npz"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """The whole file or none: under another name first, and on the disk before it gets its own."""
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from None
    finally:
        draft.unlink(missing_ok=True)
