"""Whether what a saved state says fits together: errors name the file and the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbalance.cache import _centroids
from jbalance.checks import INT32_MAX
from jbalance.decode._units import row_names
from jbalance.decode.sampling import Samplers

OWN, CONTEXT = "own", "context"
_MOST_BITS = 16
_BY_CHANNEL = ("key_mean", "key_channels", "value_scale")


def check_facts(path: Path, facts: dict[str, Any], head_dim: int, *, timed: bool) -> None:
    """The manifest's fields, of a model with this head dim, `timed` if it has windows.

    Raises:
      ValueError: that names the field.
    """
    files = _object(path, "files", facts["files"])
    names = [f"device-{d}.npz" for d in range(len(files))]
    if not files or list(files) != names or not all(isinstance(x, str) for x in files.values()):
        raise _wrong(
            path, "files", files, f"the digests of {names[0] if names else 'device-0.npz'}, …"
        )
    kinds = _object(path, "kinds", facts["kinds"])
    if list(kinds) not in ([OWN], [OWN, CONTEXT]):
        raise _wrong(path, "kinds", kinds, f"{OWN!r}, and {CONTEXT!r} if there is a context")
    for kind, own in kinds.items():
        own, where = _object(path, f"kinds.{kind}", own), f"kinds.{kind}"
        _whole(path, f"{where}.head_dim", own.get("head_dim"), head_dim, head_dim)
        _whole(path, f"{where}.page_bytes", own.get("page_bytes"), 1)
        if own.get("timed") is not timed:
            raise _wrong(path, f"{where}.timed", own.get("timed"), f"{timed}, as the model has it")
        bits = own.get("bits")
        if not isinstance(bits, list) or not bits:
            raise _wrong(path, f"{where}.bits", bits, "a list of bits")
        for i, level in enumerate(bits):
            _whole(path, f"{where}.bits[{i}]", level, 0, _MOST_BITS)
    _whole(path, "context_tokens", facts["context_tokens"], 0)
    _object(path, "notes", facts["notes"])
    _check_requests(path, _object(path, "requests", facts["requests"]))


def _check_requests(path: Path, given: dict[str, Any]) -> None:
    """As many numbers of each kind as there are requests."""
    samplers = {f"sampler_{name}": x for name, x in Samplers.greedy(1)._asdict().items()}
    kinds = {"tokens": "i", "positions": "i", "active": "b", "weights": "f", "protected": "i"}
    kinds |= {name: np.asarray(x).dtype.kind for name, x in samplers.items()}
    number = len(given["tokens"]) if isinstance(given.get("tokens"), list) else 0
    for name, kind in kinds.items():
        value, field = given.get(name), f"requests.{name}"
        wanted = {"b": (bool,), "i": (int,), "f": (int, float)}[kind]
        if not isinstance(value, list) or len(value) != number or not number:
            raise _wrong(path, field, value, f"a list with an entry for each of {number} requests")
        for i, x in enumerate(value):
            if type(x) not in wanted or (kind != "b" and not 0 <= x <= INT32_MAX):
                words = "true or false" if kind == "b" else f"a number in 0..{INT32_MAX}"
                raise _wrong(path, f"{field}[{i}]", x, words)


def check_part(path: Path, part: dict[str, np.ndarray], facts: dict[str, Any], heads: int) -> None:
    """The arrays of a device's file; ValueError that names the array.

    Args:
      path: of the file.
      part: its arrays.
      facts: the manifest's, checked.
      heads: units of a request.
    """
    requests = len(facts["requests"]["tokens"])
    for kind, own in facts["kinds"].items():
        levels, dim = len(own["bits"]), own["head_dim"]
        if f"{kind}.units" not in part:
            raise ValueError(f"{path} lacks the array {f'{kind}.units'!r}")
        units = part[f"{kind}.units"]
        if units.ndim != 1 or not np.issubdtype(units.dtype, np.integer):
            raise _misshapen(path, f"{kind}.units", units, "[units] whole numbers")
        last = heads * (requests if kind == OWN else 1) - 1
        if units.size and not 0 <= units.min() <= units.max() <= last:
            raise _misshapen(path, f"{kind}.units", units, f"units in 0..{last}")
        for name in row_names(dim, timed=own["timed"]):
            _check_rows(path, f"{kind}.rows.{name}", part, len(units))
        for name in ("count", "pages"):
            rows = part[f"{kind}.rows.{name}"]
            whole = rows.shape == (len(units), levels) and np.issubdtype(rows.dtype, np.integer)
            if not whole or (rows.size and not 0 <= rows.min() <= rows.max() <= INT32_MAX):
                raise _misshapen(
                    path, f"{kind}.rows.{name}", rows, f"[{len(units)}, {levels}] counts"
                )
        data = part.get(f"{kind}.data")
        pages = int(part[f"{kind}.rows.pages"].sum(dtype=np.int64))
        if data is None or data.dtype != np.uint8 or data.shape != (pages, own["page_bytes"]):
            raise _misshapen(path, f"{kind}.data", data, f"[{pages}, {own['page_bytes']}] bytes")
        recent = part[f"{kind}.rows.recent_keys"]
        if recent.ndim != 3 or recent.shape[2] != dim:
            raise _misshapen(path, f"{kind}.rows.recent_keys", recent, f"[units, tokens, {dim}]")
        if part[f"{kind}.rows.recent_values"].shape != recent.shape:
            values = part[f"{kind}.rows.recent_values"]
            raise _misshapen(path, f"{kind}.rows.recent_values", values, f"{list(recent.shape)}")
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(_BY_CHANNEL, (len(units), dim))
        wanted["recent_energy"] = recent.shape[:2]
        wanted |= dict.fromkeys(("recent_start", "recent_count"), (len(units),))
        if own["timed"]:
            wanted |= {"clock_next": (len(units),), "clock_recent": recent.shape[:2]}
        empty = _centroid_shapes(dim)
        wanted |= {f"centroids{i}": (len(units), *x) for i, x in enumerate(empty)}
        for name, shape in wanted.items():
            rows = part[f"{kind}.rows.{name}"]
            if rows.shape != shape:
                raise _misshapen(path, f"{kind}.rows.{name}", rows, f"{list(shape)}")


def _centroid_shapes(head_dim: int) -> list[tuple[int, ...]]:
    return [x.shape[1:] for x in jax.tree.leaves(_centroids.create(1, head_dim))]


def _check_rows(path: Path, name: str, part: dict[str, np.ndarray], units: int) -> None:
    if name not in part:
        raise ValueError(f"{path} lacks the array {name!r}")
    rows = part[name]
    numbers = jnp.issubdtype(rows.dtype, jnp.number)
    if not numbers or not rows.ndim or len(rows) != units:
        raise _misshapen(path, name, rows, f"numbers of {units} units")
    if jnp.issubdtype(rows.dtype, jnp.floating) and not np.isfinite(rows).all():
        raise ValueError(f"{path}: the array {name!r} holds numbers that are not finite")


def _misshapen(path: Path, name: str, got: np.ndarray | None, wanted: str) -> ValueError:
    have = "is missing" if got is None else f"is {list(got.shape)} of {got.dtype}"
    return ValueError(f"{path}: the array {name!r} {have}: it must be {wanted}")


def _object(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, name, value, "an object")
    return value


def _whole(path: Path, name: str, value: Any, low: int, high: int = INT32_MAX) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _wrong(path, name, value, f"a whole number in {low}..{high}")


def _wrong(path: Path, name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{path}: {name} is {shown(value)}: it must be {wanted}")


def shown(value: Any) -> str:
    """A value of a file in an error, cut."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
