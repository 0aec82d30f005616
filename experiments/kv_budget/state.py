"""A decoding in progress on disk: saved by the devices that hold it, restored on any others.

A folder with one file a device, written by its process, and then a manifest that names them with their
digests: without it the state is not whole. What a file holds lies unit by unit, so that units go to
other devices as they are: packed pages are copied, nothing is decoded or quantised again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import processes
from experiments.kv_budget.decode import (
    Caches,
    Decoder,
    DeviceCache,
    Layout,
    PagedContext,
    is_local,
)
from experiments.kv_budget.evaluate import Progress
from experiments.kv_budget.placing import place_units
from jbalance.cache import RaggedCache, remainder
from jbalance.cache.pages import Arena

MANIFEST = "manifest.json"
_FORMAT = 1
_TREE = "remainder"
_TABLE = 4  # bytes of a device's table beside those of its units


class _Part(NamedTuple):
    """What some units hold, in their order: whole rows, and rows by the piece."""

    units: np.ndarray  # [n] of all units
    sizes: np.ndarray  # [n] pieces of each: pages, or entries
    rows: dict[str, np.ndarray]  # [n, ...]
    pieces: dict[str, np.ndarray]  # [sum of sizes, ...]


def check_folder(folder: Path) -> None:
    """ValueError if a state is there already: it is not written over."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--save {str(folder)!r} is a file: give a folder")
    if (folder / MANIFEST).exists():
        raise ValueError(f"--save {str(folder)!r} holds a state already: give another folder")


def save(folder: Path, decoder: Decoder, progress: Progress, new_tokens: int) -> None:
    """Writes the state; all processes call it alike, and see the same folder.

    Args:
      folder: made if it is not there.
      decoder: whose devices hold it.
      progress: what goes on later.
      new_tokens: that were asked for, those of `progress` among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layout = progress.layout
    for d, held in enumerate(progress.caches):
        if held is not None:
            part = _taken_apart(held, np.flatnonzero(layout.device_of.reshape(-1) == d))
            _write(folder / _file(d), _packed(part))
    processes.total(np.zeros(1, np.int64))  # all have written
    if jax.process_index() == 0:
        files = [_file(d) for d in range(len(decoder.devices))]
        manifest = {
            "format": _FORMAT,
            "model": _model(decoder),
            "context": _context_facts(progress.caches),
            "context_tokens": progress.context_tokens,
            "tail_tokens": progress.tail_tokens,
            "tokens": list(progress.tokens),
            "new_tokens": new_tokens,
            "files": {name: _digest((folder / name).read_bytes()) for name in files},
        }
        _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def load(folder: Path, decoder: Decoder, budgets: list[int]) -> tuple[Progress, int]:
    """The state on other devices, and how many new tokens were asked for.

    Args:
      folder: of `save`.
      decoder: over the devices that shall hold it, of the same model.
      budgets: bytes of each.

    Raises:
      ValueError: a state that is not there, not whole or of another model, or budgets that do not
        hold it, with what is missing.
    """
    manifest = _manifest(folder)
    if manifest["model"] != _model(decoder):
        raise ValueError(f"--state {str(folder)!r} is of another model: {manifest['model']}")
    facts = manifest["context"]
    parts = [_read(folder / name, digest) for name, digest in manifest["files"].items()]
    whole = _joined(parts)
    config = decoder.config
    shape = config.num_layers, config.num_kv_heads
    if not np.array_equal(whole.units, np.arange(shape[0] * shape[1])):
        raise ValueError(f"--state {str(folder)!r} is not whole: it lacks units of the model")
    tokens = whole.rows["tokens"] + manifest["tail_tokens"]
    device_of = _place(tokens.reshape(shape), _unit_bytes(whole, facts), budgets, folder)
    caches: Caches = []
    for d, device in enumerate(decoder.devices):
        local = is_local(device)
        caches.append(
            _put_together(_chosen(whole, device_of == d), facts, device) if local else None
        )
    return (
        Progress(
            caches,
            Layout.of(device_of, shape),
            manifest["context_tokens"],
            manifest["tail_tokens"],
            tuple(manifest["tokens"]),
        ),
        manifest["new_tokens"],
    )


def _place(tokens, unit_bytes, budgets, folder) -> np.ndarray:
    """device_of [U]; ValueError if the devices do not hold the units."""
    device_of = place_units(tokens, unit_bytes.reshape(tokens.shape), np.array(budgets) - _TABLE)
    held = np.bincount(device_of, unit_bytes, len(budgets)).astype(np.int64) + _TABLE
    for d, (need, budget) in enumerate(zip(held, budgets, strict=True)):
        if need > budget:
            total = int(held.sum())
            raise ValueError(
                f"--device-memory[{d}] is {budget} bytes: the units of the state {str(folder)!r} that "
                f"fit it best take {need}, {need - budget} more; all units take {total} bytes and the "
                f"devices have {sum(budgets)}"
            )
    return device_of


def _unit_bytes(part: _Part, facts: dict[str, Any]) -> np.ndarray:
    """Bytes [U] that units take on a device."""
    rows = sum(
        x.nbytes // len(x) for name, x in part.rows.items() if name not in ("tokens", "pages")
    )
    pieces = sum(x[:1].nbytes for x in part.pieces.values())
    if facts["kind"] == "pages":
        # A page's place in the order; of the groups, where they begin (as `count`, which is in rows).
        return rows + 4 * len(facts["bits"]) + part.sizes * (pieces + 4)
    return rows + 4 + part.sizes * pieces


def _context_facts(caches: Caches) -> dict[str, Any]:
    """What is static in the caches."""
    context = next(held for held in caches if held is not None).context
    if isinstance(context, RaggedCache):
        return {"kind": "entries"}
    arena = context.arena
    return {"kind": "pages", "head_dim": arena.head_dim, "bits": list(arena.bits)}


def _taken_apart(held: DeviceCache, units: np.ndarray) -> _Part:
    rows: dict[str, Any] = {"tail_keys": held.tail_keys, "tail_values": held.tail_values}
    context = held.context
    if isinstance(context, RaggedCache):
        sizes = np.diff(context.offsets)
        rows["tokens"] = sizes
        pieces = {"keys": context.keys, "values": context.values}
    else:
        arena = context.arena
        used = int(arena.offset[-1])
        pieces = {"data": np.asarray(arena.data)[np.asarray(arena.order[:used])]}
        rows |= {"count": arena.count, "pages": arena.pages, "key_mean": context.key_mean}
        rows["tokens"] = np.sum(arena.count, axis=1)
        sizes = np.sum(arena.pages, axis=1)
        for i, leaf in enumerate(jax.tree.leaves(context.remainder)):
            rows[f"{_TREE}{i}"] = leaf
    host = [{name: np.asarray(x) for name, x in table.items()} for table in (rows, pieces)]
    return _Part(units, np.asarray(sizes, np.int64), *host)


def _put_together(part: _Part, facts: dict[str, Any], device: jax.Device) -> DeviceCache:
    rows: dict[str, Any] = part.rows
    pieces: dict[str, Any] = part.pieces
    context: RaggedCache | PagedContext
    if facts["kind"] == "entries":
        context = RaggedCache(pieces["keys"], pieces["values"], _offsets(part.sizes))
    else:
        order = jnp.arange(len(pieces["data"]), dtype=jnp.int32)
        static = facts["head_dim"], tuple(facts["bits"])
        arena = Arena(pieces["data"], order, _offsets(rows["pages"]), rows["count"], *static)
        leaves = [rows[name] for name in sorted(rows) if name.startswith(_TREE)]
        context = PagedContext(arena, rows["key_mean"], _remainder(leaves))
    held = DeviceCache(context, rows["tail_keys"], rows["tail_values"])
    return jax.device_put(jax.tree.map(_owned, held), device)


def _offsets(sizes: np.ndarray) -> jax.Array:
    return jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32)


def _owned(x) -> np.ndarray:
    """A copy: device_put may keep the host's memory, and the tails are donated."""
    return np.array(x)


def _remainder(leaves: list[np.ndarray]) -> remainder.Remainder | None:
    if not leaves:
        return None
    tree = jax.tree.structure(remainder.create(1, 64))
    return jax.tree.unflatten(tree, leaves)


def _joined(parts: list[_Part]) -> _Part:
    """All units, in their order."""
    units, sizes = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    tables = [
        {name: np.concatenate([part[i][name] for part in parts]) for name in parts[0][i]}
        for i in (2, 3)
    ]
    return _chosen(_Part(units, sizes, *tables), np.argsort(units, kind="stable"))


def _chosen(part: _Part, which: np.ndarray) -> _Part:
    """Some of the units, by index or by a mask."""
    at = np.flatnonzero(which) if which.dtype == bool else which
    first = np.cumsum(part.sizes) - part.sizes
    sizes = part.sizes[at]
    piece = np.repeat(first[at] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    rows = {name: x[at] for name, x in part.rows.items()}
    return _Part(part.units[at], sizes, rows, {name: x[piece] for name, x in part.pieces.items()})


def _packed(part: _Part) -> bytes:
    """As an .npz, bfloat16 as the 16 bits that it is."""
    arrays = {"units": part.units, "sizes": part.sizes}
    for kind, table in (("rows", part.rows), ("pieces", part.pieces)):
        for name, x in table.items():
            wide = x.dtype == jnp.bfloat16
            arrays[f"{kind}.{name}{'.bfloat16' if wide else ''}"] = x.view(np.uint16) if wide else x
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _read(path: Path, digest: str) -> _Part:
    """A file of `_packed`, if it is what was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--state: {path} cannot be read: {error}") from None
    if _digest(content) != digest:
        raise ValueError(f"--state: {path} is not what was saved: its SHA-256 differs")
    tables: dict[str, dict[str, np.ndarray]] = {"rows": {}, "pieces": {}}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for key in arrays:
            kind, _, name = key.partition(".")
            if kind in tables:
                name, _, wide = name.partition(".")
                tables[kind][name] = arrays[key].view(jnp.bfloat16) if wide else arrays[key]
        return _Part(arrays["units"], arrays["sizes"], tables["rows"], tables["pieces"])


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"--state {str(folder)!r} has no {MANIFEST}: nothing was saved there, or not all of it"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--state: {path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"--state: {path} is not a manifest of format {_FORMAT}")
    return manifest


def _model(decoder: Decoder) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(decoder.config)))


def _file(device: int) -> str:
    return f"device-{device}.npz"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """The whole file or none: under another name first, and on the disk before it gets its own."""
    draft = path.with_name(path.name + ".part")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
