"""Reads the file `model.bin` of CTranslate2: the names, shapes and numbers of a model's tensors.

Little-endian: the format's version, the model's kind and its revision; then the number of tensors, and
of each its name, axes, type, bytes and content; then pairs of names, the first of which is another's
tensor. A text is its length with the closing zero byte, and that.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

VERSION = 6
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_MOST_AXES = 8


class Checkpoint(NamedTuple):
    """What a file holds."""

    kind: str
    tensors: dict[str, np.ndarray]


def read(content: bytes, where: str) -> Checkpoint:
    """All tensors, without a copy.

    Args:
      content: of the file.
      where: its name, for errors.

    Raises:
      ValueError: another version, a type that is not known, sizes that do not fit, bytes that are
        missing or left over.
    """
    reader = _Reader(content, where)
    version = reader.number("I", "version")
    if version != VERSION:
        raise ValueError(f"{where}: version is {version}: it must be {VERSION}")
    kind = reader.text("kind")
    reader.number("I", "revision")
    tensors: dict[str, np.ndarray] = {}
    for i in range(reader.number("I", "number of tensors")):
        name = reader.text(f"name of tensor {i}")
        tensors[name] = reader.tensor(name)
    for i in range(reader.number("I", "number of aliases")):
        alias, name = reader.text(f"alias {i}"), reader.text(f"name of alias {i}")
        if name not in tensors:
            raise ValueError(f"{where}: alias {alias!r} is of {name!r}, which is no tensor")
        tensors[alias] = tensors[name]
    if reader.at != len(content):
        raise ValueError(f"{where}: {len(content) - reader.at} bytes follow the last alias")
    return Checkpoint(kind, tensors)


class _Reader:
    """A place in the file."""

    def __init__(self, content: bytes, where: str) -> None:
        self.content, self.where, self.at = content, where, 0

    def number(self, code: str, what: str) -> int:
        """One whole number of `struct`'s code."""
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str) -> str:
        """A text without its closing zero."""
        raw = self.bytes(self.number("H", what), what)
        try:
            return raw.removesuffix(b"\0").decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.where}: {what} is {raw[:40]!r}: it must be UTF-8") from None

    def bytes(self, size: int, what: str) -> bytes:
        """So many bytes, which belong to `what`."""
        found = self.content[self.at : self.at + size]
        if len(found) < size:
            raise ValueError(f"{self.where} ends within {what}")
        self.at += size
        return found

    def tensor(self, name: str) -> np.ndarray:
        """What follows a tensor's name."""
        axes = self.number("B", f"axes of {name}")
        if axes > _MOST_AXES:
            raise ValueError(f"{self.where}: {name} has {axes} axes: at most {_MOST_AXES}")
        shape = tuple(self.number("I", f"shape of {name}") for _ in range(axes))
        code = self.number("B", f"type of {name}")
        if code not in _TYPES:
            raise ValueError(
                f"{self.where}: {name} is of type {code}: it must be one of {list(_TYPES)}"
            )
        dtype, size = np.dtype(_TYPES[code]), self.number("I", f"bytes of {name}")
        if size != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise ValueError(
                f"{self.where}: {name} has {size} bytes for shape {shape} of {dtype.name}"
            )
        return np.frombuffer(self.bytes(size, name), dtype).reshape(shape)
