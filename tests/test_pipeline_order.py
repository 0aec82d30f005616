"""The layout is the pipeline: a module imports only from stages above its own."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import jbalance

ROOT = Path(jbalance.__file__).parent
# Above are those that import nothing from below. A stage that is not listed fails here: list it.
ORDER = [
    "checks",
    "tiling",
    "types",
    "_exp2",
    "_search",
    "_water_fill",
    "importance",
    "resources",
    "shares",
    "allocate",
]
ORDER += [
    "place",
    "rescale",
    "balance",
    "tasks",
    "audit",
    "improve",
    "attention",
    "cache",
    "sharded",
    "multitask",
    "adapters",
]
ORDER += ["__init__"]
RANK = {stage: rank for rank, stage in enumerate(ORDER)}
OUTSIDE = {"jax", "numpy", *sys.stdlib_module_names}
# What a stage outside of the core may import besides.
BESIDE = {"multitask": {"optax"}, "adapters": {"flax"}}


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports; of `from jbalance import x`, jbalance.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert node.level == 0, f"{path}: imports are absolute"
            whole = module == "jbalance"
            found |= {f"{module}.{name.name}" for name in node.names} if whole else {module}
    return found


def test_imports_point_up_the_pipeline():
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        for name in imports(path):
            package, _, rest = name.partition(".")
            if package != "jbalance":
                assert package in OUTSIDE | BESIDE.get(own, set()), (
                    f"{path.name} imports {name}: the core needs jax and numpy"
                )
                continue
            stage = rest.partition(".")[0]
            if own != "__init__":
                assert RANK[stage] <= RANK[own], f"{own} imports {stage}, which comes after it"
