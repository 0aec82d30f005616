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
fullest devices. Methods: those of `jbalance.place.PLACERS`, which are `exchange` (ours),
`longest_first` (ours without swaps) and `contiguous` (the best cut that keeps neighbors together);
`exchange_equal` and `longest_first_equal`, with equal counts, and `contiguous_equal`, as many neighbors
on each device; of documents `causal_tiles`, from the ids of their tokens, and `zigzag`, the first block
and the last to one rank and so on; `eplb`, the balancer of arXiv:2412.19437 in its global mode, from
its description, in numpy. `<loads>_g<devices>_bound` has `bound_over_mean`, what no placement avoids.
`drift_*`: loads of the first case that change from round
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
    document_of: np.ndarray | None = None  # [L, TOKENS], where units are blocks of their queries
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
    for name, loads, most in (
        ("zipf0.6", zipf(rng, layers, 0.6), 0.95),
        ("zipf1.0", zipf(rng, layers, 1.0), 1.0),
        ("lognormal0.7", rng.lognormal(0, 0.7, (layers, EXPERTS)), 0.98),
    ):
        found += [Case(name, loads, devices, SLOTS, bars=EXCESS_BARS) for devices in (16, 32)]
        found.append(Case(name, loads, 48, SLOTS, bars=EXCESS_BARS | TIME_BARS))
        at_96 = {("exchange", "max_over_eplb"): most}
        found.append(Case(name, loads, 96, SLOTS, bars=at_96))
        found.append(Case(name, loads, 144, SLOTS))
    heads = budgets(rng, layers, 64)
    found.append(Case("heads64", heads, 16, bars=HEAD_BARS))
    few = budgets(rng, layers, 8)
    found.append(Case("kv_heads8", few, 8, 16, bars={("exchange", "max_over_mean"): 1.10}))
    lengths = np.minimum(rng.lognormal(7.5, 1.0, (min(layers, 8), 512)), 32_768)
    for devices in (16, 32):
        for name, loads in (("tokens", lengths), ("causal_work", lengths**2)):
            found.append(Case(f"sequences512_{name}", loads, devices, bars=SEQUENCE_BARS))
    for name, make in (
        ("one_document", lambda: [TOKENS]),
        ("packed_lognormal", lambda: documents(rng, rng.lognormal(7.5, 1.2, 4096))),
        ("packed_one_long", lambda: documents(rng, [TOKENS // 2, *rng.lognormal(7, 1, 4096)])),
    ):
        rows = [document_of(make()) for _ in range(1 if layers < LAYERS else 3)]
        tiles = np.stack([np.asarray(place.visible_keys(x, TILE), np.float64) for x in rows])
        for devices in (8, 64):
            bar = 1.0005 if name == "one_document" else 1.005
            bars = {("causal_tiles", "max_over_mean"): bar}
            found.append(Case(name, tiles, devices, document_of=np.stack(rows), bars=bars))
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


def document_of(lengths: list[int]) -> np.ndarray:
    """[TOKENS] whose each token of a row of packed documents is."""
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


# Methods: loads [L, U] -> the largest load of each layer, and the bound.


def ours(case: Case, run: Callable[..., Any], given: np.ndarray | None = None) -> Placed:
    """Jitted and vmapped over the layers' loads, or over what is given in their place."""
    place_all = jax.jit(jax.vmap(lambda x: run(x, case.devices)))
    x = jnp.asarray(case.loads, jnp.float32) if given is None else jnp.asarray(given)
    seconds = _report.interleaved({"it": lambda: place_all(x)}, repetitions=3)["it"]
    out = jax.tree.map(np.asarray, place_all(x))
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


def contiguous_equal(case: Case) -> np.ndarray:
    """As many neighbors on each device as on any other; spare slots copy nothing."""
    units = case.loads.shape[1]
    return _fullest(case, np.arange(units) * case.devices // units)


def zigzag(case: Case) -> np.ndarray:
    """The first block and the last to one device, the second and the last but one to the next."""
    units = case.loads.shape[1]
    part = np.arange(units) * 2 * case.devices // units
    return _fullest(case, np.minimum(part, 2 * case.devices - 1 - part))


def _fullest(case: Case, device_of: np.ndarray) -> np.ndarray:
    """[L] load of the fullest device, where the units of all layers lie alike."""
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


def placed_by(case: Case) -> dict[str, Placed]:
    """What our methods make of a case."""
    units = case.loads.shape[1]
    most = -(-units // case.devices)
    swaps = {"exchange": SWAPS, "longest_first": 0}
    if case.slots:  # as many on every device anyway
        copied = functools.partial(place.replicate, num_slots=case.slots)
        return {name: ours(case, functools.partial(copied, swaps=n)) for name, n in swaps.items()}
    placed = {name: ours(case, placer) for name, placer in place.PLACERS.items()}
    for name, n in swaps.items():
        equal = functools.partial(place.pack, max_count=most, swaps=n)
        placed[f"{name}_equal"] = ours(case, equal)
    if case.document_of is not None:
        dealt = functools.partial(place.causal_tiles, block_q=TILE)
        placed["causal_tiles"] = ours(case, dealt, case.document_of)
    return placed


def bound_of(case: Case, equal: bool) -> np.ndarray:
    """[L] of every placement, or of those with equal counts."""
    most = -(-case.loads.shape[1] // case.devices) if equal and not case.slots else None
    run = functools.partial(
        place.bound, num_devices=case.devices, max_count=most, num_slots=case.slots or None
    )
    value = jax.jit(jax.vmap(run))(jnp.asarray(case.loads, jnp.float32)).value
    return np.asarray(value, np.float64)


def rows_of(case: Case) -> list[Row]:
    """All methods on one case."""
    placed = placed_by(case)
    bound = bound_of(case, equal=True)  # that of the baselines
    placed["eplb"] = _timed(eplb, case, bound)
    placed["contiguous_equal"] = _timed(contiguous_equal, case, bound)
    if case.document_of is not None:
        placed["zigzag"] = _timed(zigzag, case, bound)
    mean = case.loads.sum(axis=1) / case.devices
    over = float(np.mean(_ratio(bound_of(case, equal=False), mean)))
    rows = [Row(f"{case.name}_g{case.devices}_bound", "bound_over_mean", over)]
    for method, (largest, bound, seconds) in placed.items():
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
