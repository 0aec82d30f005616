"""Placement against a bound that nothing beats: balance and time, beside simpler ways.

    python -m experiments.benchmarks.placement [--json OUT] [--quick]
    python -m experiments.benchmarks.placement --loads FILE.npz [--devices G] [--slots R] [--json
    OUT]

FILE.npz has `loads` [layers, units], `devices` (G) and `replicas` (R slots on all devices together,
0 for one slot a unit); --devices and --slots override them. Without it: seeded loads of experts
with copies, attention heads, sequences on data-parallel ranks and packed documents on
context-parallel ranks.

A case is `<loads>_g<devices>_<method>`. `max_over_mean` is the load of the fullest device over the
mean device's, averaged over the layers, `max_over_bound` the same over the lower bound of
`jbalance.place.bound` (for equal counts and for copies their own), `worst_max_over_bound` the worst
layer's, `ms_per_layer` the time of all layers at once, jitted, on one core, over their number.
`excess_over_eplb` is max_over_bound - 1 over that of `eplb`, `max_over_eplb` the mean ratio of the
fullest devices. Methods: `exchange` (ours), `longest_first` (ours without swaps), both with
`_equal` where counts are equal; `contiguous`; `eplb`, the balancer of arXiv:2412.19437 in its
global mode, from its description, in numpy. `drift_*`: loads of the first case that change from round
to round; `time_over_bound` is the time of the layers' steps over the bound's, `moved_a_round` the part
of the experts that moved.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import _drift, _report
from experiments.benchmarks._report import Bar, Row
from experiments.harness import files
from jbalance import place

LAYERS, QUICK_LAYERS = 58, 4
EXPERTS, SLOTS = 256, 288
TOKENS, TILE = 131_072, 128
SWAPS = 128


class Case(NamedTuple):
    """Loads of some layers on devices, and what the methods are held against."""

    name: str
    loads: np.ndarray  # [L, U]
    devices: int
    slots: int = 0  # 0: one a unit
    bars: dict[tuple[str, str], float] = {}  # noqa: RUF012  (method, metric) -> at most


class Placed(NamedTuple):
    """What a method made of the layers."""

    largest: np.ndarray  # [L] load of the fullest device
    bound: np.ndarray  # [L]
    seconds: float


def main() -> None:
    _report.main("benchmarks.placement", __doc__, measure, _add_options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loads", type=Path, metavar="FILE", help="an .npz file; if left out, ours"
    )
    parser.add_argument("--devices", type=int, help="other than the file's")
    parser.add_argument("--slots", type=int, help="other than the file's")


def measure(
    quick: bool, loads: Path | None = None, devices: int | None = None, slots: int | None = None
) -> Iterator[Row]:
    if loads is None and (devices is not None or slots is not None):
        raise ValueError("--devices and --slots override those of a file: give --loads")
    if loads is not None:
        yield from rows_of(from_file(loads, devices, slots))
        return
    found = cases(QUICK_LAYERS if quick else LAYERS)
    for case in found:
        yield from rows_of(case)
    yield from _drift.rows(found[0].loads)


def from_file(path: Path, devices: int | None = None, slots: int | None = None) -> Case:
    """The case of a file; ValueError that says what is wrong with it."""
    arrays = files.read_npz(path)
    if "loads" not in arrays:
        raise ValueError(f"{path}: it has no array `loads` [layers, units], only {sorted(arrays)}")
    loads = arrays["loads"]
    if loads.dtype.kind not in "iuf" or loads.ndim != 2 or 0 in loads.shape:
        raise ValueError(
            f"{path}: loads has dtype {loads.dtype} and shape {loads.shape}: it must be numbers "
            f"[layers, units], at least one of each"
        )
    with np.errstate(over="ignore"):  # what overflows is reported below
        loads = loads.astype(np.float32)
    if not (np.isfinite(loads) & (loads >= 0)).all():
        at = tuple(int(i) for i in np.argwhere(~(np.isfinite(loads) & (loads >= 0)))[0])
        raise ValueError(
            f"{path}: loads{list(at)} is {loads[at]}: every load must be finite in float32 and >= 0"
        )
    devices = _whole(path, arrays, "devices", "--devices", 1) if devices is None else devices
    if slots is None:
        slots = _whole(path, arrays, "replicas", "--slots", 0)
    if devices < 1:
        raise ValueError(f"devices is {devices}: at least one is needed")
    units = loads.shape[1]
    if slots and not units <= slots <= units * devices:
        raise ValueError(
            f"slots is {slots}: {units} units on {devices} devices, at most one copy of each on a "
            f"device, take {units} to {units * devices} slots, or 0 for one a unit"
        )
    return Case("file", loads, devices, 0 if slots == units else slots)


def _whole(path: Path, arrays: dict[str, np.ndarray], name: str, flag: str, least: int) -> int:
    """A whole number of the file."""
    if name not in arrays:
        raise ValueError(f"{path}: it has no `{name}`: add it, or give {flag}")
    value = arrays[name]
    if value.size != 1 or value.dtype.kind not in "iuf" or value.item() != int(value.item()):
        raise ValueError(f"{path}: {name} is {value}: it must be one whole number")
    if value.item() < least:
        raise ValueError(f"{path}: {name} is {value}: it must be at least {least}")
    return int(value.item())


# Loads.


def cases(layers: int, seed: int = 0) -> list[Case]:
    """All seeded cases."""
    rng = np.random.default_rng(seed)
    found = []
    for name, loads, at_96 in (
        ("zipf0.6", zipf(rng, layers, 0.6), 0.95),
        ("zipf1.0", zipf(rng, layers, 1.0), 1.0),
        ("lognormal0.7", rng.lognormal(0, 0.7, (layers, EXPERTS)), 0.98),
    ):
        found += [Case(name, loads, devices, SLOTS, EXCESS_BARS) for devices in (16, 32)]
        found.append(Case(name, loads, 48, SLOTS, EXCESS_BARS | TIME_BARS))
        found.append(Case(name, loads, 96, SLOTS, {("exchange", "max_over_eplb"): at_96}))
        found.append(Case(name, loads, 144, SLOTS))
    heads = budgets(rng, layers, 64)
    found.append(Case("heads64", heads, 16, 0, HEAD_BARS))
    few = budgets(rng, layers, 8)
    found.append(Case("kv_heads8", few, 8, 16, {("exchange", "max_over_mean"): 1.10}))
    lengths = np.minimum(rng.lognormal(7.5, 1.0, (min(layers, 8), 512)), 32_768)
    for devices in (16, 32):
        for name, loads in (("tokens", lengths), ("causal_work", lengths**2)):
            found.append(Case(f"sequences512_{name}", loads, devices, 0, SEQUENCE_BARS))
    for name, make in (
        ("one_document", lambda: [TOKENS]),
        ("packed_lognormal", lambda: documents(rng, rng.lognormal(7.5, 1.2, 4096))),
        ("packed_one_long", lambda: documents(rng, [TOKENS // 2, *rng.lognormal(7, 1, 4096)])),
    ):
        tiles = np.stack([tile_loads(make()) for _ in range(1 if layers < LAYERS else 3)])
        for devices in (8, 64):
            bar = 1.0005 if name == "one_document" else 1.005
            bars = {("exchange_equal", "max_over_mean"): bar}
            found.append(Case(name, tiles, devices, 0, bars))
    return found


EXCESS_BARS = {("exchange", "max_over_bound"): 1.001, ("exchange", "excess_over_eplb"): 0.3}
TIME_BARS = {("longest_first", "ms_per_layer"): 1.0, ("exchange", "ms_per_layer"): 3.0}
HEAD_BARS = {("exchange", "max_over_bound"): 1.008, ("exchange_equal", "max_over_bound"): 1.02}
SEQUENCE_BARS = {("exchange_equal", "max_over_bound"): 1.0005}


def zipf(rng: np.random.Generator, layers: int, exponent: float) -> np.ndarray:
    """Loads [layers, EXPERTS] of experts, rank^-exponent in any order, each within some 2 %."""
    ranks = np.arange(1, EXPERTS + 1) ** -exponent
    order = rng.permuted(np.broadcast_to(ranks, (layers, EXPERTS)), axis=1)
    return order * rng.lognormal(0, 0.02, order.shape)


def budgets(rng: np.random.Generator, layers: int, heads: int) -> np.ndarray:
    """Entries [layers, heads] of a cache with adaptive budgets: 512 on average, a fifth of it for every
    head and the rest by importance."""
    importance = rng.exponential(size=(layers, heads))
    return 512 * (0.2 + 0.8 * importance / importance.mean(axis=1, keepdims=True))


def documents(rng: np.random.Generator, lengths: Any) -> list[int]:
    """Lengths in tokens, in any order, that fill TOKENS."""
    lengths = np.maximum(np.asarray(lengths), 16).astype(int)
    ends = np.minimum(np.cumsum(lengths), TOKENS)
    kept = np.diff(ends, prepend=0)
    return rng.permutation(kept[kept > 0]).tolist()


def tile_loads(lengths: list[int]) -> np.ndarray:
    """Keys that the queries of each tile see, in a row of packed documents."""
    ids = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths), jnp.int32)
    return np.asarray(place.visible_keys(ids, TILE), np.float64)


# Methods: loads [L, U] -> the largest load of each layer, and the bound.


def ours(case: Case, swaps: int, equal: bool) -> Placed:
    """Jitted and vmapped over the layers."""
    units = case.loads.shape[1]
    run: Callable[..., Any]
    if case.slots:
        run = functools.partial(place.replicate, num_slots=case.slots)
    else:
        run = functools.partial(place.pack, max_count=-(-units // case.devices) if equal else None)
    place_all = jax.jit(jax.vmap(functools.partial(run, num_devices=case.devices, swaps=swaps)))
    loads = jnp.asarray(case.loads, jnp.float32)
    seconds = _report.interleaved({"it": lambda: place_all(loads)}, repetitions=3)["it"]
    out = jax.tree.map(np.asarray, place_all(loads))
    # Summed in float64 from where the units are: no rounding of the solver's own is taken on trust.
    return Placed(_largest(case, out), np.asarray(out.bound, np.float64), seconds)


def _largest(case: Case, out: Any) -> np.ndarray:
    largest = np.zeros(len(case.loads))
    for i, loads in enumerate(case.loads):
        if case.slots:
            shares = np.append(loads / out.copies[i], 0)
            largest[i] = shares[out.unit_of[i]].sum(axis=1).max()
        else:
            largest[i] = np.bincount(out.device_of[i], loads, case.devices).max()
    return largest


def contiguous(case: Case) -> np.ndarray:
    """As many neighbours on each device as on any other; spare slots copy nothing."""
    units = case.loads.shape[1]
    device_of = np.arange(units) * case.devices // units
    return np.stack([np.bincount(device_of, x, case.devices) for x in case.loads]).max(axis=1)


def eplb(case: Case) -> np.ndarray:
    """The heaviest per copy is copied until slots are full; then longest first, equal counts."""
    slots = case.slots or case.loads.shape[1]
    largest = []
    for loads in case.loads:
        copies = np.ones(loads.size)
        for _ in range(slots - loads.size):
            copies[np.argmax(loads / copies)] += 1
        items = np.sort(np.repeat(loads / copies, copies.astype(int)))[::-1]
        load, count = np.zeros(case.devices), np.zeros(case.devices, int)
        most = -(-slots // case.devices)
        for item in items:
            d = np.argmin(np.where(count < most, load, np.inf))
            load[d] += item
            count[d] += 1
        largest.append(load.max())
    return np.array(largest)


def rows_of(case: Case) -> list[Row]:
    """All methods on one case."""
    placed = {}
    for suffix, equal in (("", False), ("_equal", True)):
        if case.slots and equal:
            continue  # slots are as many on every device anyway
        placed[f"exchange{suffix}"] = ours(case, SWAPS, equal)
        placed[f"longest_first{suffix}"] = ours(case, 0, equal)
    # The baselines have equal counts and are held against the bound of those.
    bound = placed["exchange" if case.slots else "exchange_equal"].bound
    placed["eplb"] = _timed(eplb, case, bound)
    placed["contiguous"] = _timed(contiguous, case, bound)
    rows = []
    for method, (largest, bound, seconds) in placed.items():
        mean = case.loads.sum(axis=1) / case.devices
        theirs = placed["eplb"]
        excess = np.mean(_ratio(theirs.largest, theirs.bound)) - 1
        values = {
            "max_over_mean": np.mean(_ratio(largest, mean)),
            "max_over_bound": np.mean(_ratio(largest, bound)),
            "worst_max_over_bound": np.max(_ratio(largest, bound)),
            "ms_per_layer": 1e3 * seconds / len(case.loads),
            "max_over_eplb": np.mean(_ratio(largest, theirs.largest)),
        }
        if excess > 0:
            values["excess_over_eplb"] = (values["max_over_bound"] - 1) / excess
        for metric, value in values.items():
            limit = case.bars.get((method, metric))
            bar = None if limit is None else Bar(limit)
            rows.append(Row(f"{case.name}_g{case.devices}_{method}", metric, float(value), bar))
    return rows


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; 1 for a layer without any load."""
    return np.divide(a, b, out=np.ones_like(a, float), where=b > 0)


def _timed(method: Callable[[Case], np.ndarray], case: Case, bound: np.ndarray) -> Placed:
    start = time.perf_counter()
    largest = method(case)
    return Placed(largest, bound, time.perf_counter() - start)


if __name__ == "__main__":
    main()
