"""Chat templates: Jinja programs in checkpoints that write messages as a model knows them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


def render(
    template: str, messages: list[dict[str, str]], tokens: Mapping[str, str], where: str
) -> str:
    """A template's text of messages, up to where the answer begins.

    Args:
      template: Jinja source; it may use what such templates commonly find: loop controls, `tojson`,
        `raise_exception`, `strftime_now` and {% generation %}.
      messages: each a role and a content.
      tokens: other names that it knows, such as "bos_token".
      where: the file that it comes from, for errors.

    Raises:
      ValueError: the template fails. It is run in a sandbox.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    try:
        made = environment.from_string(template)
        return made.render(messages=messages, add_generation_prompt=True, **tokens)
    except Exception as error:  # templates are programs: they fail in every way
        raise ValueError(f"the chat template in {where} fails: {error}") from None


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what a model wrote, for training; here it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
