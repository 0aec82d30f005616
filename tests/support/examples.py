"""How many examples the properties try of which each takes long."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

USUAL, MANY = 50, 1000  # of a property in `make test`; from here on a profile counts for all alike


def few(number: int, **more: Any) -> settings:
    """`number` of them in `make test`, as many more in `make test-all`, and all that `long` asks for."""
    asked = settings().max_examples
    return settings(max_examples=asked if asked >= MANY else number * asked // USUAL, **more)
