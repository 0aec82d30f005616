"""The site's pages of the API name all that is public, and the examples of docstrings run."""

import doctest
import importlib
import pkgutil
import types
import zlib

import pytest

import jbalance
from experiments.harness import site

MODULES = [x.name for x in pkgutil.walk_packages(jbalance.__path__, "jbalance.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_stage_has_a_page():
    found = set(site.documented())
    for stage in ("importance", "allocate", "place", "attention", "cache", "decode", "sharded"):
        assert set(site.paths_of(f"jbalance.{stage}")) <= found
    assert {"jbalance.allocate.ladder.ladder", "jbalance.types.Status"} <= found
    assert set(jbalance.__all__) - {"balancer", "Binding", "Status"} <= {
        path.split(".")[1] for path in found
    }


def test_a_page_of_the_api_names_what_its_stage_has():
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="api/allocate.md"))
    text = site.on_page_markdown("# allocate\n\n::: jbalance.allocate\n", page)
    assert "::: jbalance.allocate.whole.whole\n" in text
    page.file.src_uri = "design.md"
    assert site.on_page_markdown("::: jbalance.allocate", page) == "::: jbalance.allocate"


def test_what_the_site_lacks_is_named():
    names = site.documented()
    lines = "".join(f"{name} py:function 1 api/x.html#$ -\n" for name in names[1:])
    inventory = b"# zlib.\n" + zlib.compress(lines.encode())
    assert site.missing(inventory) == [names[0]]
