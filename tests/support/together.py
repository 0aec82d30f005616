"""Processes that need each other."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_together(commands: Sequence[Sequence[Any]], timeout: float, **options: Any) -> None:
    """All of them at once, from the repository's root; each must end well, and none is left behind."""
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        for command in commands
    ]
    try:
        for process in started:
            said, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in started:
            process.kill()
