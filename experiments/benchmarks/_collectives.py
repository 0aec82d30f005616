"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"[a-z]+(\d+)\w*\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.\-]+)")


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
      passes: the most that any loop with a collective in it makes.
      branches: of a conditional count the branch that exchanges the most; False: the least.
    """
    computations, entry = _computations(hlo)

    def of(name: str) -> Traffic:
        total = _NOTHING
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.search(line):
                total += _of_shapes(found.group(1))
            elif found := _WHILE.search(line):
                total += of(found.group(1)).times(passes)
            elif found := _BRANCHES.search(line):
                names = re.findall(r"[\w.\-]+", found.group(1))
                total += (max if branches else min)(map(of, names))
            elif found := _TWO_BRANCHES.search(line):
                total += (max if branches else min)(map(of, found.groups()))
            elif found := _CALL.search(line):
                total += of(found.group(1))
        return total

    return of(entry)


def kinds(hlo: str) -> set[str]:
    """Which collectives a program has."""
    return {found.group(2) for found in _COLLECTIVE.finditer(hlo)}


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


def _of_shapes(text: str) -> Traffic:
    sizes = [
        (int(bits), math.prod(int(n) for n in dims.split(",") if n))
        for bits, dims in _SHAPE.findall(text)
    ]
    return Traffic(sum(n for _, n in sizes), sum(bits * n // 8 for bits, n in sizes), 1)
