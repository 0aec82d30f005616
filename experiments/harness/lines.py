"""Text from outside on a terminal: what it says, and nothing that it does."""

from __future__ import annotations

import unicodedata

_UNSHOWN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode's controls, formats and separators
# Characters of one line: a message quotes what it found, and that may be a whole file.
_LONGEST = 2000


def plain(text: str) -> str:
    """`text` on one line: white space is a space, every other control character is left out."""
    spaced = " ".join(text[: 8 * _LONGEST].split())
    shown = "".join(c for c in spaced if unicodedata.category(c) not in _UNSHOWN)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
