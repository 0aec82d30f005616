"""Other libraries in a process of their own, so that calls of both take turns in one run."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

_FOLDER = Path(__file__).parents[1] / "peers"
_PYTHON = _FOLDER / ".venv" / "bin" / "python"


def add_options(parser: argparse.ArgumentParser) -> None:
    """--peers."""
    parser.add_argument(
        "--peers", action="store_true", help="beside other libraries, which `make peers` installs"
    )


class Peer:
    """A script of `experiments/peers` that reads one call a line and answers each when it is done.

    The way there and back takes less than 0.1 ms.
    """

    def __init__(self, script: str, inputs: dict[str, ArrayLike]) -> None:
        if not _PYTHON.exists():
            raise SystemExit("error: --peers needs the other libraries: run `make peers` first")
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "inputs.npz"
        np.savez(path, allow_pickle=False, **{name: np.asarray(x) for name, x in inputs.items()})
        self._process = subprocess.Popen(
            [_PYTHON, _FOLDER / script, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def call(self, line: str) -> Callable[[], str]:
        """What runs that call and returns its answer."""

        def run() -> str:
            assert self._process.stdin
            print(line, file=self._process.stdin, flush=True)
            return self._answer()

        return run

    def _answer(self) -> str:
        """Its next line; RuntimeError if it has ended (what it said is on stderr)."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer has ended with exit code {self._process.wait()}")
        return line.strip()
