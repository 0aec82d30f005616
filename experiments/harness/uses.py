"""Which study, command or benchmark uses each public name of the library."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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
    names = _names()
    found: dict[str, set[str]] = {name: set() for name in names.values()}
    for module, reference in _of_modules(root):
        name = names.get(_identity(reference))
        if name is not None:
            found[name].add(module)
    return {name: sorted(users) for name, users in found.items()}


def through(root: Path = ROOT) -> dict[str, str]:
    """By public name that nothing below `root` refers to, one that is used there and leads to it.

    A function leads to what its body names, a table to what it holds, and these further.
    """
    names, bodies = _names(), _bodies()
    origin: dict[int | str, str] = {}
    for name, users in of_experiments(root).items():
        if users:
            origin[_identity(name)] = name
    for _, reference in _of_modules(root):
        origin.setdefault(_identity(reference), reference)  # of the library, but not public
    queue = list(origin)
    while queue:
        here = queue.pop(0)
        for reference in bodies.get(here, ()):
            there = _identity(reference)
            if there not in origin:
                origin[there] = names.get(here, origin[here])
                queue.append(there)
    return {
        name: origin[key] for key, name in names.items() if key in origin and origin[key] != name
    }


def _of_modules(root: Path) -> Iterator[tuple[str, str]]:
    """Each module below the root, and what it refers to."""
    for path in sorted(root.rglob("*.py")):
        if ".venv" not in path.parts:
            module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            for reference in _references(ast.parse(path.read_text())):
                yield module, reference


def _names() -> dict[int | str, str]:
    """Identities of what is public, and their names."""
    return {_identity(name): name for name in public_names()}


@functools.cache
def _identity(reference: str) -> int | str:
    """Of the object behind a dotted name, as far as it leads; of a number or module the name."""
    parts = reference.split(".")
    modules = _modules()
    # A function may hide the module that it is in: `jbalance.importance.combine`.
    first = max(i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in modules)
    first = min(first, len(parts) - 1) or 1
    found: Any = modules[".".join(parts[:first])]
    for part in parts[first:]:
        try:
            found = getattr(found, part)
        except AttributeError:
            break
    plain = type(found) in (int, float, str, tuple) or inspect.ismodule(found)
    return reference if plain else id(found)


@functools.cache
def _modules() -> dict[str, ModuleType]:
    """All of the library's, by name."""
    found = pkgutil.walk_packages(jbalance.__path__, "jbalance.")
    names = ["jbalance", *(info.name for info in found)]
    return {name: importlib.import_module(name) for name in names}


def _bodies() -> dict[int | str, list[str]]:
    """What each function, class and table of the library's modules refers to.

    A module that is a value, as in a table of back ends, leads to all that it defines.
    """
    found: dict[int | str, list[str]] = {}
    for module in _modules().values():
        tree = ast.parse(inspect.getsource(module))
        own = {name for node in tree.body for name in _defined(node)}
        found[f"{module.__name__}.*"] = [f"{module.__name__}.{name}" for name in own]
        imports = [x for x in ast.walk(tree) if isinstance(x, (ast.Import, ast.ImportFrom))]
        for node in tree.body:
            for name in _defined(node):
                inside = ast.Module([*imports, node], [])
                references = [*_references(inside, listed=False)]
                references += [
                    f"{module.__name__}.{x.id}"
                    for x in ast.walk(node)
                    if isinstance(x, ast.Name) and x.id in own
                ]
                found.setdefault(_identity(f"{module.__name__}.{name}"), []).extend(references)
    return found


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement of a module gives a meaning."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [x.id for x in node.targets if isinstance(x, ast.Name)]
    return []


def _references(tree: ast.Module, *, listed: bool = True) -> Iterator[str]:
    """Dotted names below jbalance that a module refers to; its imports count with `listed`."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for x in node.names:
                if x.name.split(".")[0] == "jbalance":
                    known[x.asname or "jbalance"] = x.name if x.asname else "jbalance"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jbalance":
            for x in node.names:
                known[x.asname or x.name] = f"{node.module}.{x.name}"
                if listed:
                    yield f"{node.module}.{x.name}"
    within = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Name)
            and node.id in known
            and not listed
            and id(node) not in within
        ):
            yield f"{known[node.id]}.*"  # all of it, where it is a module; else as without
        if isinstance(node, ast.Attribute):
            parts = [node.attr]
            inner: ast.expr = node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in known:
                yield ".".join([known[inner.id], *reversed(parts)])
