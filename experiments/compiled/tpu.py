"""Programs for TPUs, by libtpu's compiler, and what the schedules of their kernels do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from experiments.compiled.cases import Program

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
LINE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{(.*)$")
SKIP = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
ENDS = re.compile(r"empty region (\d+)")
MATRIX = re.compile(r"vmatmul|vmatpush|vmatres")


def environment(folder: Path) -> dict[str, str]:
    """What must be set before JAX is imported: libtpu without a TPU, schedules into a folder."""
    return {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
    }


def compiled(program: Program, chip: str) -> Any:
    """The executable for one of `CHIPS`."""
    topology = topologies.get_topology_desc(topology_name=CHIPS[chip], platform="tpu")
    one = NamedSharding(Mesh(np.array(topology.devices[:1]), ("d",)), jax.P())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for x in program.shapes]
    return jax.jit(program.run).lower(*shapes).compile()


class Bundle(NamedTuple):
    """One cycle of a schedule, if nothing stalls."""

    depth: int  # of loops around it
    code: str


class Schedule(NamedTuple):
    """Of a kernel: cycles, parts under a predicate told apart.

    Attributes:
      step: of the innermost loop that holds matrix products: cycles that always run.
      branches: cycles of each predicated part of it with matrix products, the longest last.
      beside: cycles of the kernel outside of that loop, or under a predicate without products.
    """

    step: int
    branches: tuple[int, ...]
    beside: int

    @property
    def cycles(self) -> int:
        """Of a step with its shortest branch."""
        return self.step + min(self.branches, default=0)


def schedules(folder: Path) -> dict[str, Schedule]:
    """By kernel, those whose schedules lie in the folder; XLA's own fusions are left out."""
    found = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        name = re.sub(r"^\d+-|(\.\d+)?-\d+-final_bundles\.txt$", "", path.name)
        if re.search(r"schedule-analysis|fusion|^copy|^TLP|^while|^slice", name):
            continue
        bundles = read(path.read_text())
        if any(MATRIX.search(bundle.code) for bundle in bundles):
            found[name] = schedule_of(bundles)
    return found


def read(text: str) -> list[Bundle]:
    """The bundles of a dump."""
    found: list[Bundle] = []
    for match in map(LINE.match, text.splitlines()):
        if match is None:
            continue
        empty = match[2].strip().startswith("}") and found  # has no mark of the loops around it
        depth = found[-1].depth if empty else len(match[1])
        found.append(Bundle(depth, match[2]))
    return found


def schedule_of(bundles: Sequence[Bundle]) -> Schedule:
    """Cycles by parts."""
    depth = max(x.depth for x in bundles if MATRIX.search(x.code))
    first, last = _loop(bundles, depth)
    parts = [(a, b) for a, b in _predicated(bundles) if first <= a and b <= last]
    products = {part for part in parts if any(MATRIX.search(x.code) for x in bundles[slice(*part)])}
    # What holds a part with products, the whole of a step's work, is no branch of its own.
    leaves = [x for x in products if not any(_holds(x, other) for other in products)]
    rest = [x for x in parts if x not in products and not any(_holds(y, x) for y in leaves)]
    rest = [x for x in rest if not any(_holds(other, x) for other in rest)]
    branches = tuple(sorted(b - a for a, b in leaves))
    step = last - first - sum(branches) - sum(b - a for a, b in rest)
    return Schedule(step, branches, len(bundles) - step - sum(branches))


def _holds(part, other):
    """Whether another part lies in this one."""
    return part != other and part[0] <= other[0] and other[1] <= part[1]


def _loop(bundles, depth):
    """Begin and end of the stretch at that depth that holds most products."""
    stretches, begin = [], None
    for i, bundle in enumerate([*bundles, Bundle(-1, "")]):
        if bundle.depth >= depth and begin is None:
            begin = i
        elif bundle.depth < depth and begin is not None:
            products = sum(bool(MATRIX.search(x.code)) for x in bundles[begin:i])
            stretches.append((products, begin, i))
            begin = None
    return max(stretches)[1:]


def _predicated(bundles):
    """Stretches that a branch forward skips: index behind the branch, and behind the end."""
    at: dict[str, int] = {}
    for i, bundle in enumerate(bundles):
        for region in ENDS.findall(bundle.code):
            at.setdefault(region, i)
    for i, bundle in enumerate(bundles):
        for region in SKIP.findall(bundle.code):
            if at.get(region, -1) > i + 1:
                yield i + 1, at[region]
