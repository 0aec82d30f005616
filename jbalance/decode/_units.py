"""A cache taken apart unit by unit, so that units go to other devices as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbalance.cache import KVCache, _cache, _centroids
from jbalance.cache._cache import bits_of, of_bits
from jbalance.cache._layout import page_shape, table_bytes
from jbalance.cache._pages import Arena
from jbalance.cache._sight import clock_bytes, create_clock

_RECENT_ROWS = ("recent_keys", "recent_values")  # which a cache holds as bits
_CACHE_ROWS = ("key_mean", "key_channels", "value_scale", *_RECENT_ROWS, "recent_energy")
_UNIT_ROWS = (*_CACHE_ROWS, "count", "pages")
_REQUEST_ROWS = ("recent_start", "recent_count")
_CLOCK_ROWS = ("next", "recent")  # of a model with windows, whose layers say what they are


@dataclasses.dataclass(frozen=True)
class Units:
    """What some units of one kind of cache hold, in their order: rows, and pages one after the other."""

    units: np.ndarray  # [n] of all units, (request L + layer) K + head
    rows: dict[str, np.ndarray]  # [n, ...]
    data: np.ndarray  # [sum of pages, page_bytes]

    @property
    def sizes(self) -> np.ndarray:
        """[n] pages of each unit."""
        return self.rows["pages"].sum(axis=1).astype(np.int64)

    def chosen(self, index: np.ndarray) -> Units:
        """Some of the units."""
        sizes = self.sizes
        first = np.cumsum(sizes) - sizes
        own = sizes[index]
        page = np.repeat(first[index] - (np.cumsum(own) - own), own) + np.arange(own.sum())
        rows = {name: x[index] for name, x in self.rows.items()}
        return Units(self.units[index], rows, self.data[page])


def row_names(head_dim: int, *, timed: bool) -> list[str]:
    """Of `Units.rows`."""
    leaves = jax.tree.leaves(_centroids.create(1, head_dim))
    clock = [f"clock_{name}" for name in _CLOCK_ROWS] if timed else []
    return [*_UNIT_ROWS, *_REQUEST_ROWS, *clock, *(f"centroids{i}" for i in range(len(leaves)))]


def taken_apart(cache: KVCache) -> Units:
    """The units of a device's cache, on the host."""
    slots = np.asarray(cache.slots).reshape(-1)
    heads = np.argsort(np.where(slots >= 0, slots, slots.size))[: int(slots.max()) + 1]
    units = (np.arange(cache.num_requests)[:, None] * slots.size + heads).reshape(-1)
    arena = cache.arena
    tables = {"count": arena.count, "pages": arena.pages}
    rows = {name: tables.get(name, getattr(cache, name, None)) for name in _UNIT_ROWS}
    rows |= {f"centroids{i}": x for i, x in enumerate(jax.tree.leaves(cache.centroids))}
    per_unit = cache.units_per_request
    rows |= {name: jnp.repeat(getattr(cache, name), per_unit) for name in _REQUEST_ROWS}
    if cache.clock is not None:
        rows |= {
            f"clock_{name}": jnp.repeat(getattr(cache.clock, name), per_unit, axis=0)
            for name in _CLOCK_ROWS
        }
    rows |= {name: of_bits(getattr(cache, name)) for name in _RECENT_ROWS}
    used = np.asarray(arena.order)[: int(arena.offset[-1])]
    return Units(units, {k: np.asarray(x) for k, x in rows.items()}, np.asarray(arena.flat)[used])


def put_together(
    part: Units,
    facts,
    slots: np.ndarray,
    budget: int | None,
    windows: tuple[int | None, ...] | None,
) -> KVCache:
    """A device's cache: a context's with its own pages, the requests' with all that a budget holds."""
    recents = {name: bits_of(jnp.asarray(part.rows[name])) for name in _RECENT_ROWS}
    rows: dict[str, Any] = part.rows | recents
    used = len(part.data)
    requests = len(part.units) // (int(slots.max()) + 1)
    bits, page_bytes = tuple(facts["bits"]), facts["page_bytes"]
    recent = rows["recent_keys"].shape[1]
    units, head_dim = len(part.units), facts["head_dim"]
    pages = used
    if budget is not None:
        fixed = units * _cache.unit_bytes(head_dim, recent)
        fixed += _cache.table_bytes_of(requests, slots.size)
        if windows is not None:
            fixed += clock_bytes(requests, units // requests, recent)
        pages = (budget - fixed - table_bytes(units, len(bits), 0)) // (page_bytes + 4)
    data: Any = np.zeros((pages, page_bytes), np.uint8)
    data[:used] = part.data
    offset: Any = np.concatenate([[0], np.cumsum(rows["pages"])]).astype(np.int32)
    order: Any = np.arange(pages, dtype=np.int32)
    timed = windows is not None
    data = data.reshape(pages, *page_shape(page_bytes))
    arena = Arena(data, order, offset, rows["count"], head_dim, bits, timed)
    empty, tree = jax.tree.flatten(_centroids.create(1, head_dim))
    leaves = [rows[f"centroids{i}"] for i in range(len(empty))]
    first = np.arange(requests) * (units // requests)
    clock = None
    if windows is not None:
        own = {name: rows[f"clock_{name}"][first] for name in _CLOCK_ROWS}
        clock = dataclasses.replace(create_clock(windows, slots, requests, recent), **own)
    return KVCache(
        arena=arena,
        centroids=jax.tree.unflatten(tree, leaves),
        slots=jnp.asarray(slots),
        layers_done=jnp.zeros((), jnp.int32),
        clock=clock,
        **{name: rows[name] for name in _CACHE_ROWS},
        **{name: rows[name][first] for name in _REQUEST_ROWS},
    )


def joined(parts: list[dict[str, np.ndarray]], kind: str, folder: Path) -> Units:
    """All units of a kind, in their order."""
    own = [
        {k.partition(".")[2]: x for k, x in part.items() if k.startswith(f"{kind}.")}
        for part in parts
    ]
    for d, arrays in enumerate(own):
        for name, x in arrays.items():
            if x.shape[1:] != own[0][name].shape[1:]:
                raise ValueError(
                    f"{folder / f'device-{d}.npz'}: the array {f'{kind}.{name}'!r} is "
                    f"{list(x.shape)}, that of device 0 is {list(own[0][name].shape)}: units of both "
                    f"cannot be on one device"
                )
    units = np.concatenate([x["units"] for x in own])
    names = [name for name in own[0] if name.startswith("rows.")]
    rows = {name.partition(".")[2]: np.concatenate([x[name] for x in own]) for name in names}
    whole = Units(units, rows, np.concatenate([x["data"] for x in own]))
    order = np.argsort(units, kind="stable")
    if not np.array_equal(units[order], np.arange(len(units))):
        raise ValueError(f"folder {str(folder)!r} is not whole: it lacks units of the model")
    return whole.chosen(order)


def arrays_of(part: Units) -> dict[str, np.ndarray]:
    return {"units": part.units, "data": part.data} | {f"rows.{k}": x for k, x in part.rows.items()}
