"""What results come from: the command, the versions of its packages, and the machine."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("jbalance", "jax", "jaxlib", "flax", "optax", "numpy")


def of_results() -> dict[str, Any]:
    """As files of results keep it."""
    return {
        "command": command(),
        "versions": _versions(),
        "machine": machine(),
    }


def command() -> str:
    """What this process was started with."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        start = [Path(sys.argv[0]).name]
    else:
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*start, *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """The processor, and how many of its cores this process may use; the load of the last minute."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }


@functools.cache  # results are kept after every step of the work
def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {x: version(x) for x in PACKAGES}


@functools.cache
def _processor() -> str:
    """Its name where the system tells one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
