"""The site's pages of the API: every public name, in the order of the pipeline.

A hook of MkDocs (`mkdocs.yml`): in a page of `docs/api` a line `::: jbalance.STAGE` becomes one for each
name of that stage. `python -m experiments.harness site` says what the site that was built lacks.
"""

from __future__ import annotations

import importlib
import inspect
import re
import zlib
from pathlib import Path
from typing import Any

SITE = Path("out/site")
_LINE = re.compile(r"^::: (jbalance\.\w+)$", re.M)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What MkDocs calls for each page."""
    if not page.file.src_uri.startswith("api/"):
        return markdown
    return _LINE.sub(lambda line: _of_module(line[1]), markdown)


def paths_of(module_name: str) -> list[str]:
    """Where each public name of a module is defined.

    A function may have the name of its file (`allocate.ladder`), which only its full path tells apart.
    """
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name, x in vars(module).items() if _is_own(name, x, module_name)]
    return [_path(module_name, name, getattr(module, name)) for name in names]


def documented() -> list[str]:
    """Of all pages, what they ask for."""
    text = "\n".join(x.read_text(encoding="utf-8") for x in sorted(Path("docs/api").glob("*.md")))
    return [path for name in _LINE.findall(text) for path in paths_of(name)]


def missing(inventory: bytes) -> list[str]:
    """What an inventory of objects (Sphinx's format, version 2) lacks of them."""
    packed = inventory.split(b"zlib.\n", 1)[1]
    there = {line.split(" ", 1)[0] for line in zlib.decompress(packed).decode().splitlines()}
    return sorted(set(documented()) - there)


def check() -> None:
    """ValueError with what the site lacks."""
    if found := missing((SITE / "objects.inv").read_bytes()):
        raise ValueError(f"{SITE} lacks {', '.join(found)}")
    print(f"{SITE}: {len(documented())} public names")


def _of_module(name):
    return "\n\n".join(f"::: {path}" for path in paths_of(name))


def _is_own(name, x, module_name):
    return not name.startswith("_") and getattr(x, "__module__", None) == module_name


def _path(module_name, name, x):
    if inspect.ismodule(x):
        return x.__name__
    if callable(x) and hasattr(x, "__qualname__") and x.__module__.startswith("jbalance"):
        return f"{x.__module__}.{x.__qualname__}"
    return f"{module_name}.{name}"
