"""Which study, command or benchmark uses each public name of the library."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jbalance

ROOT = Path("experiments")


def public_names() -> list[str]:
    """Functions, classes and tables, as `jbalance.shares.proportional`, in the order of the stages."""
    names = []
    for stage in jbalance.__all__:
        found = getattr(jbalance, stage)
        if not inspect.ismodule(found):
            names.append(f"jbalance.{stage}")
            continue
        names += [f"jbalance.{stage}.{name}" for name in _names_of(found)]
    return names


def _names_of(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    return [
        name
        for name, x in vars(module).items()
        if not name.startswith("_")
        and callable(x)
        and getattr(x, "__module__", "").startswith("jbalance")
        and (x.__module__ == module.__name__ or module.__name__ == "jbalance.types")
    ]


def of_experiments(root: Path = ROOT) -> dict[str, list[str]]:
    """By public name, the modules below `root` that refer to it."""
    homes = _homes()
    found: dict[str, set[str]] = {name: set() for name in public_names()}
    for path in sorted(root.rglob("*.py")):
        if ".venv" in path.parts:
            continue
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for reference in _references(ast.parse(path.read_text())):
            name = homes.get(reference, reference)
            if name in found:
                found[name].add(module)
    return {name: sorted(users) for name, users in found.items()}


def _homes() -> dict[str, str]:
    """Longer ways to a public name, such as `jbalance.decode.model.Model`, and the public one."""
    homes = {}
    of_object = {}
    for name in public_names():
        owner, _, last = name.rpartition(".")
        module = importlib.import_module(owner) if owner != "jbalance" else jbalance
        of_object[id(getattr(module, last))] = name
    for info in pkgutil.walk_packages(jbalance.__path__, "jbalance."):
        module = importlib.import_module(info.name)
        for last, x in vars(module).items():
            if id(x) in of_object and callable(x):
                homes[f"{info.name}.{last}"] = of_object[id(x)]
    return homes


def _references(tree: ast.Module) -> Iterator[str]:
    """Dotted names below jbalance that a module refers to."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for x in node.names:
                if x.name.split(".")[0] == "jbalance":
                    known[x.asname or "jbalance"] = x.name if x.asname else "jbalance"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jbalance":
            for x in node.names:
                known[x.asname or x.name] = f"{node.module}.{x.name}"
                yield f"{node.module}.{x.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = [node.attr]
            inner: ast.expr = node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in known:
                yield ".".join([known[inner.id], *reversed(parts)])
