"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import functools
import math
import operator
import re
from typing import NamedTuple

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"[a-z]+(\d+)\w*\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_CALL = re.compile(r" (?:call|fusion|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)")


class Traffic(NamedTuple):
    """What one device receives, at most."""

    numbers: int
    bytes: int
    collectives: int

    def __add__(self, other: Traffic) -> Traffic:  # type: ignore[override]
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: int) -> Traffic:
        return Traffic(*(n * x for x in self))


_NOTHING = Traffic(0, 0, 0)


def traffic(hlo: str, *, passes: int, branches: bool = True) -> Traffic:
    """The results of all collectives of a program, those in a loop once for each of its passes.

    Args:
      hlo: `compiled.as_text()`.
      passes: the most that any loop with a collective in it makes, where the text does not say it.
      branches: of a conditional count the branch that exchanges the most; False: the least.
    """
    return _total(by_kind(hlo, passes=passes, branches=branches))


def by_kind(hlo: str, *, passes: int, branches: bool = True) -> dict[str, Traffic]:
    """`traffic` of each kind of collective that there is."""
    computations, entry = _computations(hlo)

    def one_of(names):
        return (max if branches else min)(map(of, names), key=_total)

    @functools.cache
    def of(name: str) -> dict[str, Traffic]:
        total: dict[str, Traffic] = {}

        def add(found: dict[str, Traffic], times: int = 1) -> None:
            for kind, x in found.items():
                total[kind] = total.get(kind, _NOTHING) + x.times(times)

        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                kind, started = found.group(2), bool(found.group(3))
                add({kind: _of_shapes(found.group(1), kind if started else None)})
            elif found := _WHILE.search(line):
                add(of(found.group(1)), _trips(line, computations) or passes)
            elif found := _BRANCHES.search(line):
                add(one_of(re.findall(r"[\w.\-]+", found.group(1))))
            elif found := _TWO_BRANCHES.search(line):
                add(one_of(found.groups()))
            elif found := _CALL.search(line):
                add(of(found.group(1)))
        return total

    return of(entry)


def kinds(hlo: str) -> set[str]:
    """Which collectives a program has."""
    return {found.group(2) for found in _COLLECTIVE.finditer(hlo)}


def _total(found: dict[str, Traffic]) -> Traffic:
    return functools.reduce(operator.add, found.values(), _NOTHING)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            name = head.group(2)
            found[name] = []
            entry = name if head.group(1) else entry
        elif name:
            found[name].append(line)
    return found, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """Passes of a loop, where the text says them or counts up to a constant."""
    if known := _TRIPS.search(line):
        return int(known.group(1))
    condition = _CONDITION.search(line)
    lines = computations.get(condition.group(1), []) if condition else []
    bounds = [found.group(1) for x in lines if (found := _CONSTANT.search(x))]
    counts_up = sum("compare(" in x for x in lines) == 1 and any("direction=LT" in x for x in lines)
    return int(bounds[0]) if counts_up and len(bounds) == 1 else None


def _of_shapes(text: str, started: str | None) -> Traffic:
    """Of the results of a collective; a gather that is only `started` lists what it is given first, a
    permutation also two counters."""
    sizes = [
        (int(bits), math.prod(int(n) for n in dims.split(",") if n))
        for bits, dims in _SHAPE.findall(text)
    ]
    if started == "all-gather":
        sizes = sizes[len(sizes) // 2 :]
    if started == "collective-permute":
        sizes = sizes[1:2]
    return Traffic(sum(n for _, n in sizes), sum(bits * n // 8 for bits, n in sizes), 1)
