"""One job in many processes: how they are started here, how one joins, what they tell each other."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from experiments.harness import cli, guard
from experiments.harness.lines import plain

_LAST_LINES = 8  # of a process that failed
_END_S = 10.0  # in which the others end by themselves when one has failed


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of jobs that run in many processes."""
    parser.add_argument("--processes", type=int, default=1, help="started here, on loopback")
    parser.add_argument("--devices-per-process", type=int, help="simulated on the CPU")
    parser.add_argument(
        "--coordinator", help="HOST:PORT of process 0, where a launcher starts the processes"
    )
    parser.add_argument("--process-id", type=int, help="with --coordinator: 0 to processes - 1")


def check_options(options: argparse.Namespace) -> None:
    """ValueError for options that do not fit together."""
    if options.processes < 1:
        raise ValueError(f"--processes is {options.processes}: at least 1")
    devices = options.devices_per_process
    if devices is not None and devices < 1:
        raise ValueError(f"--devices-per-process is {devices}: at least 1")
    if (options.coordinator is None) != (options.process_id is None):
        raise ValueError("--coordinator and --process-id: give both or neither")
    if options.coordinator is None:
        return
    if not options.coordinator.rpartition(":")[2].isdecimal() or ":" not in options.coordinator:
        raise ValueError(f"--coordinator is {options.coordinator!r}: HOST:PORT, as node0:12345")
    if not 0 <= options.process_id < options.processes:
        raise ValueError(
            f"--process-id is {options.process_id}: 0 to {options.processes - 1}, one for each of "
            f"--processes {options.processes}"
        )


def launch(module: str, arguments: list[str], processes: int) -> int:
    """Starts `python -m MODULE` on loopback, shows what process 0 says, and the others' if they fail.

    Returns:
      0 if all have ended well; else the first code that is not 0.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    coordinator = f"127.0.0.1:{_free_ports()}"
    command = [sys.executable, "-m", module, *arguments]
    command += ["--coordinator", coordinator, "--process-id"]
    # Whose other end no child has: however this process ends, they read its end.
    read, write = os.pipe()
    own = {guard.LAUNCHER: str(read), guard.TOKEN: secrets.token_hex(32)}
    given: dict[str, Any] = {"env": os.environ | own, "pass_fds": [read]}
    given["start_new_session"] = True  # Ctrl-C is for this process, with which the others end
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, write)
        stack.callback(os.close, read)
        logs = [
            stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            for _ in range(1, processes)
        ]
        children: list[subprocess.Popen] = []
        try:
            children.append(subprocess.Popen([*command, "0"], **given))
            for i, log in enumerate(logs, 1):
                own_command = [*command, str(i)]
                children.append(
                    subprocess.Popen(own_command, stdout=log, stderr=subprocess.STDOUT, **given)
                )
            codes = _wait(children)
        finally:
            for child in children:
                child.kill()
        for i, code in enumerate(codes):
            if code is not None and code < 0:
                reason = signal.Signals(-code).name
                print(f"error: process {i} of {processes}: ended by {reason}", file=sys.stderr)
            elif code and i:
                logs[i - 1].seek(0)
                said = [plain(line) for line in logs[i - 1].readlines()[-_LAST_LINES:]]
                print("\n".join([f"process {i} of {processes} said:", *said]), file=sys.stderr)
    return next((code if code > 0 else 1 for code in codes if code), 0)


def _free_ports() -> int:
    """A free port whose next one is free as well: for JAX and for the guards."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def _wait(children: list[subprocess.Popen]) -> list[int | None]:
    """Exit codes; when one has failed the others have `_END_S` left, and are None if they take more."""
    until = float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        if any(child.returncode for child in children):
            until = min(until, time.monotonic() + _END_S)
        time.sleep(0.1)
    return [child.poll() for child in children]


def join(options: argparse.Namespace, num_devices: int) -> None:
    """Gives this process its devices, and meets the others.

    Args:
      options: those of `add_options`.
      num_devices: over all processes.

    Raises:
      ValueError: if the processes do not have so many.
    """
    import jax
    from jax.sharding import AxisType

    each, rest = divmod(num_devices, options.processes)
    own = options.devices_per_process
    if rest or own not in (None, each):
        have = f"{options.processes} processes"
        have += f" of {own} devices: give {options.processes * own}" if own else " share them alike"
        raise ValueError(f"--device-memory has {num_devices} entries, but there are {have}")
    if own:
        jax.config.update("jax_platforms", "cpu")
    cli.simulated_devices(each)
    if options.processes == 1:
        return
    guard.beat()
    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.process_id,
        initialization_timeout=int(guard.JOIN_S),
    )
    # Gloo makes connections within 30 s or fails: now, before one process is ahead of another.
    _gathered(np.zeros(1, np.int32))
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    add = jax.shard_map(
        lambda: jax.lax.psum(jax.lax.axis_index("devices"), "devices"),
        mesh=mesh,
        in_specs=(),
        out_specs=jax.P(),
    )
    jax.block_until_ready(jax.jit(add)())


def total(values: np.ndarray) -> np.ndarray:
    """The sum over the processes of integers that each has, up to 2^60."""
    high, low = np.divmod(values, 2**30)  # JAX knows 32 bits
    both = _gathered(np.stack([high, low]).astype(np.int32)).astype(np.int64).sum(axis=0)
    return both[0] * 2**30 + both[1]


def agree(result: Any) -> str:
    """The digest of a result that all processes must have alike.

    Raises:
      RuntimeError: that names a process that has another one.
    """
    digest = hashlib.sha256(json.dumps(result, sort_keys=True).encode())
    rows = _gathered(np.frombuffer(digest.digest(), np.uint8))
    other = np.flatnonzero((rows != rows[0]).any(axis=1))
    if other.size:
        raise RuntimeError(f"process {other[0]} has another result than process 0")
    return digest.hexdigest()


def _gathered(x: np.ndarray) -> np.ndarray:
    """[P, ...]: the x of every process."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return x[None]
    return np.asarray(multihost_utils.process_allgather(x))
