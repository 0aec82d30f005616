"""Files as a failing disk, an interrupted copy or somebody who means harm leaves them."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, 2, 7, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\x1b[2J\n", "../x", [], {}, [[]], {"x": {}}, -1, 0.5, -0.0),
    *(float("nan"), float("inf"), -float("inf"), 1e300, *NUMBERS, -(2**63), 10**30, 10**400),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's content cut, with bits flipped, or with a piece overwritten, left out or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 2))):
        size = len(data)
        if not size:
            break
        # Headers are small parts of files, and most is decided there.
        at = draw(st.one_of(st.integers(0, size - 1), st.integers(0, min(size - 1, 400))))
        length = draw(st.sampled_from((1, 2, 4, 8, 16, 100)))
        match draw(st.sampled_from(("cut", "flip", "number", "bytes", "drop", "repeat", "zero"))):
            case "cut":
                del data[at:]
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "number":
                letter = draw(st.sampled_from("IQ"))
                number = draw(st.sampled_from(NUMBERS)) % 2 ** (32 if letter == "I" else 64)
                data[at : at + struct.calcsize(f"<{letter}")] = struct.pack(f"<{letter}", number)
            case "bytes":
                data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
            case "drop":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[at : at + length]
            case "zero":
                data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


def places(value: Any, above: tuple = ()) -> list[tuple]:
    """The keys that lead to every part of a JSON value but itself."""
    if isinstance(value, dict):
        pairs: Any = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        return []
    return [path for key, x in pairs for path in ((*above, key), *places(x, (*above, key)))]


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one or two fields of another value, left out, or new."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        options = places(value)
        if not options:
            break
        *above, key = draw(st.sampled_from(options))
        place = value
        for step in above:
            place = place[step]
        match draw(st.sampled_from(("value", "value", "value", "drop", "new"))):
            case "value":
                place[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "drop":
                del place[key]
            case "new":
                if isinstance(place, dict):
                    place[draw(st.sampled_from(("new", "scale", "", "bias")))] = 2
                else:
                    place.insert(0, copy.deepcopy(draw(st.sampled_from(VALUES))))
    return value


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON file: damaged as bytes, or whole with altered fields."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(json.dumps(value).encode()))
    return json.dumps(draw(altered(value))).encode()
