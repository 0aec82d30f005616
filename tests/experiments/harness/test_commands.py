"""All commands have one style: help, defaults, results and exit codes."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import re
import sys
from pathlib import Path

import pytest

from experiments.harness import cli

ROOT = Path(__file__).resolve().parents[3]
# Started by other commands, not by people; or with an environment of their own.
INNER = {"harness._archive", "compiled.one", "compiled.pod"}
OTHER_ENVIRONMENTS = ("peers.", "others.")
GUARD = re.compile(r"^if __name__ ==", re.M)


def _commands() -> list[str]:
    """Modules below `experiments` that `python -m` runs, without `.__main__`."""
    found = []
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        if ".venv" in path.parts or not GUARD.search(path.read_text()):
            continue
        name = ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)
        if name not in INNER and not name.startswith(OTHER_ENVIRONMENTS):
            found.append(name.removesuffix(".__main__"))
    return found


def _module(name: str):
    try:
        return importlib.import_module(f"experiments.{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name not in {f"experiments.{name}.__main__", f"experiments.{name}"}:
            pytest.skip(f"{error.name} is installed by a command of its own")
    return importlib.import_module(f"experiments.{name}")


@pytest.fixture
def parser_of(monkeypatch):
    """name -> the parser that the command's main hands to `cli.run`."""
    monkeypatch.setenv("COLUMNS", "100")  # of help, whatever the terminal has

    def parser(name: str) -> argparse.ArgumentParser:
        given = []
        monkeypatch.setattr(cli, "run", lambda parser, *rest: given.append(parser) or 0)
        monkeypatch.setattr(sys, "argv", [name])
        with contextlib.suppress(SystemExit):  # some end by themselves
            _module(name).main()
        return given[0]

    return parser


def _all(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser and those of its jobs."""
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    return parsers


def test_the_commands_are_found():
    names = _commands()
    assert len(names) > 40
    assert {"kv_budget", "generate", "benchmarks.cache", "recall", "tiles.prefill"} <= set(names)


@pytest.mark.parametrize("name", _commands())
def test_help_says_what_the_command_is_and_what_every_option_is(name, parser_of):
    parser = parser_of(name)
    doc = ast.get_docstring(ast.parse(Path(_module(name).__file__).read_text()))
    assert parser.prog == f"python -m experiments.{name}"
    assert parser.description.strip() == doc
    assert f"python -m experiments.{name}" in doc
    for each in _all(parser):
        text = each.format_help()
        assert each.description
        assert str(ROOT) not in "".join(text.split()), "a default that holds only in this folder"
        for action in each._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action
            left_out = action.default
            if action.option_strings[:1] != ["-h"] and left_out not in (None, False):
                assert f"(default: {left_out})" in " ".join(text.split()), action


@pytest.mark.parametrize("name", _commands())
def test_results_go_where_json_says(name, parser_of):
    """A command that measures has --json; --out is a folder of a report, or a file of another kind."""
    parsers = _all(parser_of(name))
    options = [x.option_strings[0] for each in parsers for x in each._actions if x.option_strings]
    assert {"--json", "--out", "--picture"} & set(options) or name in ("chat", "harness")
    for each in parsers:
        for action in each._actions:
            if "--json" in action.option_strings:
                assert (action.metavar, action.type) == ("OUT", Path)


def test_a_default_place_has_the_jobs_name():
    default = Path("out/it.json")
    assert cli.of_job(default, default, "smoke") == Path("out/it_smoke.json")
    assert cli.of_job(Path("my.json"), default, "smoke") == Path("my.json")


def test_numbers_of_an_option():
    assert cli.numbers("--budget", "0.25,1") == [0.25, 1.0]
    assert cli.numbers("--seeds", "0,1", int) == [0, 1]
    with pytest.raises(ValueError, match=r"--seeds is '0\.5': whole numbers with commas"):
        cli.numbers("--seeds", "0.5", int)
