"""The layout is the pipeline: a module imports only from stages above its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import jbalance

ROOT = Path(jbalance.__file__).parent
# Above are those that import nothing from below. A stage that is not listed fails here: list it.
ORDER = [
    "_objects",
    "_debug_check",
    "checks",
    "_axes",
    "_fallback",
    "tiling",
    "types",
    "_exp2",
    "_bits",
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
    "tune",
    "attention",
    "cache",
    "decode",
    "sharded",
    "explain",
    "multitask",
    "adapters",
]
ORDER += ["__init__"]
RANK = {stage: rank for rank, stage in enumerate(ORDER)}
OUTSIDE = {"jax", "numpy", *sys.stdlib_module_names}
# What a stage may import besides: importance optax when a worth is learned, adapters wandb when they
# are given a run of it, and not before.
BESIDE = {
    "multitask": {"optax", "chex"},
    "adapters": {"flax", "wandb"},
    "importance": {"optax"},
}


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


def test_stages_are_attributes_and_those_that_need_more_than_jax_come_when_asked_for():
    code = """
import sys
import jbalance as jb
jb.attention.Tiling, jb.cache, jb.sharded.attend, jb.place.Term, jb.types.Status
assert not {"flax", "optax", "chex"} & set(sys.modules), "the core needs jax and numpy"
jb.multitask.by_importance
assert "optax" in sys.modules and "flax" not in sys.modules
jb.adapters.Tiles
assert {"multitask", "adapters"} <= set(dir(jb))
try:
    jb.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("an attribute that there is not")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
