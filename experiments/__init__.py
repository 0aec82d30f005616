"""Experiments on real models and data; a module's docstring holds its command and figures."""

import sys
from types import TracebackType


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A command that is interrupted while its modules are still imported says so in one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # as long as python -m looks for the command's module
    sys.excepthook = _one_line
