"""Settings of a checkpoint: each is read by its type and range, and none that matters is left unread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments.harness import files

T = TypeVar("T")
MOST = 2**31 - 1
_LARGEST = float(np.finfo(np.float32).max)
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})


class Settings:
    """Values by key, of one file.

    Args:
      where: the file's name, for errors.
      values: as the file has them.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, values
        self._read: set[str] = set()

    def with_defaults(self, defaults: Mapping[str, Any]) -> Settings:
        """The same, with values for keys that the file lacks altogether."""
        filled = Settings(self.where, {**defaults, **self.values})
        filled._read = self._read
        return filled

    def has(self, key: str) -> bool:
        """Whether the key is there and says something."""
        self._read.add(key)
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """A value as it stands.

        Raises:
          ValueError: it is not there, and there is no default.
        """
        if self.has(key):
            return self.values[key]
        if default is None:
            raise ValueError(f"{self.where} lacks {key!r}, which the model needs")
        return default

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in low..high."""
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"a whole number in {low}..{high}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero, in float32's range."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= _LARGEST:
            raise self.wrong(key, f"a finite number above 0, at most {_LARGEST:.3g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """A name."""
        value = self.get(key)
        if type(value) is not str:
            raise self.wrong(key, "a name")
        return value

    def positives(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above zero, in float32's range."""
        value = self.get(key)
        if type(value) is not list or not all(
            type(x) in (int, float) and 0 < x <= _LARGEST for x in value
        ):
            raise self.wrong(key, f"a list of finite numbers above 0, at most {_LARGEST:.3g}")
        return tuple(map(float, value))

    def several(self, key: str, kind: type) -> list[Any]:
        """A list of `kind`."""
        value = self.get(key)
        if type(value) is not list or not all(type(x) is kind for x in value):
            raise self.wrong(key, f"a list of {kind.__name__}")
        return value

    def only(self, key: str, *supported: Any) -> None:
        """Refuses every value but those that are implemented, the first of which is the default."""
        value = self.get(key, supported[0]) if self.has(key) else supported[0]
        if not any(_same(value, x) for x in supported):
            known = " or ".join(map(repr, supported))
            raise ValueError(
                f"unsupported {key}={_shown(value)} in {self.where}: only {known} is implemented"
            )

    def none_left(self, harmless: Callable[[str], bool]) -> None:
        """Refuses what was not read, is not harmless, and is not off.

        Raises:
          ValueError: that names the first such key.
        """
        for key in sorted(set(self.values) - self._read):
            value = self.values[key]
            if not harmless(key) and not any(_same(value, x) for x in _NEUTRAL):
                raise ValueError(
                    f"unsupported {key}={_shown(value)} in {self.where}: it may change what the model "
                    f"computes, and is not implemented"
                )

    def made(self, of: Callable[..., T], **values: Any) -> T:
        """`of` the values; its errors name the file."""
        try:
            return of(**values)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None

    def wrong(self, key: str, wanted: str) -> ValueError:
        """The error for a value."""
        return ValueError(
            f"{key}={_shown(self.values.get(key))} in {self.where}: it must be {wanted}"
        )


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file that is an object.

    Raises:
      ValueError: that names the file, if it is not.
    """
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: it must be an object")
    return value


def _same(value: Any, other: Any) -> bool:
    """Equal and of one type, but that a whole number may be written as a float."""
    numbers = (int, float)
    alike = type(value) is type(other) or (type(value) in numbers and type(other) in numbers)
    return alike and bool(value == other)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
