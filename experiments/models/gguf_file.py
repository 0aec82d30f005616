"""The GGUF container: every count, length and offset is held against the file's size as it is read.

Layout (little-endian, version 2 or 3): magic, version, numbers of tensors and of keys; keys with typed
values; names, shapes, types and offsets of tensors; the tensors' data.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
MOST_AXES = 4
# The struct module's letter of each type; 8 is text, 9 an array.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in the file.

    Attributes:
      name: its name.
      kind: how its numbers are stored.
      shape: as NumPy has it, the file's axes the other way round.
      data: its bytes [n] uint8, of the file's memory map.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Keys and tensors of a file.

    Returns:
      (values by key, tensors by name).

    Raises:
      ValueError: that names the file and what in it is not as the format has it.
    """
    try:
        content = np.memmap(path, mode="r").view(np.ndarray)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from None
    header = _Header(str(path), content)
    magic = header.take(4, "its magic")
    version = header.number("I", "its version")
    if magic != MAGIC or version not in VERSIONS:
        raise ValueError(
            f"{path} is no GGUF file of version 2 or 3, little-endian: it begins with {magic!r} and "
            f"version {version}"
        )
    tensors = header.count("the number of tensors", 8 + 4 + 4 + 8)
    keys = header.count("the number of keys", 8 + 4 + 1)
    fields: dict[str, Any] = {}
    for i in range(keys):
        key = header.text(f"key {i}")
        if key in fields:
            raise ValueError(f"{path}: the key {key!r} is there twice")
        fields[key] = header.value(header.number("I", key), key)
    infos = [header.tensor(i) for i in range(tensors)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment is {alignment!r}: a power of two from 8 on")
    return fields, _placed(header, infos, alignment)


class _Header:
    """What is read from the beginning on."""

    def __init__(self, where: str, content: np.ndarray) -> None:
        self.where, self.content, self.at = where, content, 0
        self._bytes = memoryview(content)  # type: ignore[arg-type]

    @property
    def left(self) -> int:
        return len(self.content) - self.at

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise ValueError(
                f"{self.where} is cut or damaged: {what} needs {size} bytes at {self.at}, and "
                f"{self.left} are left"
            )
        self.at += size
        return bytes(self._bytes[self.at - size : self.at])

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        number = self.number("Q", what)
        if number * least > self.left:
            raise ValueError(
                f"{self.where} is cut or damaged: {what} is {number}, which {self.left} bytes "
                f"cannot hold"
            )
        return number

    def text(self, what: str) -> str:
        content = self.take(self.count(f"the length of {what}", 1), what)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where}: {what} is no UTF-8 text: {error}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self.values(key)
        return self.number(self.letter(kind, key), key)

    def values(self, key: str) -> list[Any]:
        kind = self.number("I", key)
        if kind == _STRING:
            return [self.text(f"{key}[{i}]") for i in range(self.count(f"the length of {key}", 8))]
        letter = self.letter(kind, key)
        size = struct.calcsize(f"<{letter}")
        number = self.count(f"the length of {key}", size)
        return list(struct.unpack(f"<{number}{letter}", self.take(number * size, key)))

    def letter(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"{self.where}: {key} has the type {kind}, which is not known here")
        return _SCALARS[kind]

    def tensor(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text(f"the name of tensor {index}")
        axes = self.number("I", f"tensor {name!r}")
        if not 1 <= axes <= MOST_AXES:
            raise ValueError(f"{self.where}: tensor {name!r} has {axes} axes: 1 to {MOST_AXES}")
        shape = struct.unpack(f"<{axes}Q", self.take(8 * axes, f"tensor {name!r}"))
        kind, offset = (self.number(x, f"tensor {name!r}") for x in "IQ")
        return name, tuple(reversed(shape)), kind, offset


def _placed(
    header: _Header, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> dict[str, TensorInfo]:
    """The tensors where the file has them, none upon another."""
    start = header.at + -header.at % alignment
    found: dict[str, TensorInfo] = {}
    used: list[tuple[int, int, str]] = []
    for name, shape, kind, offset in infos:
        where = f"{header.where}: tensor {name!r}"
        if name in found:
            raise ValueError(f"{where} is there twice")
        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"{where} has the type {kind}, which is not known here") from None
        block, size = GGML_QUANT_SIZES[known]
        elements = 1
        for axis in shape:  # Python's integers: they do not wrap
            elements *= axis
        if not elements or shape[-1] % block:
            raise ValueError(
                f"{where} has shape {list(shape)}: a row of {known.name} has blocks of {block}"
            )
        need, first = elements // block * size, start + offset
        if offset % alignment or first + need > len(header.content):
            raise ValueError(
                f"{where}, {list(shape)} of {known.name}, takes {need} bytes from {first} on: they must "
                f"begin at a multiple of {alignment} and end by {len(header.content)}, the file's size"
            )
        used.append((first, first + need, name))
        found[name] = TensorInfo(name, known, shape, header.content[first : first + need])
    used.sort()
    for (_, end, name), (first, _, other) in itertools.pairwise(used):
        if first < end:
            raise ValueError(f"{header.where}: tensors {name!r} and {other!r} lie upon each other")
    return found
