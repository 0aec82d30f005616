"""The files of a saved state: arrays and a manifest, each with a digest, whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import reprlib
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np

from jbalance import checks

MANIFEST = "manifest.json"
_FORMAT = 7
_DAMAGED = (
    *(ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, RuntimeError),
    *(MemoryError, OverflowError, BadZipFile, zlib.error),
)
_FIELDS = ("format", "kinds", "context_tokens", "requests", "files", "model", "notes")


def path_of(folder: str | Path) -> Path:
    """ValueError for what is no path."""
    if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
        raise ValueError(f"folder is {reprlib.repr(folder)}: it must be the path of a folder")
    return Path(folder)


def as_json(notes: Any) -> dict[str, Any]:
    """The notes; ValueError, before anything is written, for what would not come back as it is."""
    checks.mapping("notes", notes, "values by name, as JSON has them")
    notes = dict(notes)
    try:
        back = json.loads(json.dumps(notes, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"notes is {reprlib.repr(notes)}: {error}") from None
    if back != notes:
        raise ValueError(
            f"notes is {reprlib.repr(notes)}: JSON would give back {reprlib.repr(back)}; names must be "
            f"text, and what holds several a list"
        )
    return back


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A device's file."""
    _write(path, _packed(arrays))


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    """As an .npz, bfloat16 as the 16 bits that it is."""
    plain = {
        f"{name}:bfloat16" if x.dtype == jnp.bfloat16 else name: x.view(np.uint16)
        if x.dtype == jnp.bfloat16
        else x
        for name, x in arrays.items()
    }
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **plain)
    return file.getvalue()


def read_arrays(path: Path, digest: str) -> dict[str, np.ndarray]:
    """A file of `write_arrays`, if it is what was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if _digest(content) != digest:
        raise ValueError(f"{path} is not what was saved: its SHA-256 differs")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {
                name.partition(":")[0]: arrays[name].view(jnp.bfloat16)
                if ":" in name
                else arrays[name]
                for name in arrays
            }
    except _DAMAGED as error:
        raise ValueError(f"{path} is no file of arrays: {error}") from None


def write_manifest(folder: Path, fields: dict[str, Any], devices: int) -> None:
    """The last file: what the state is, with digests of the devices' files, each field and all."""
    names = [file_of(d) for d in range(devices)]
    digests = {name: _digest((folder / name).read_bytes()) for name in names}
    manifest = fields | {"format": _FORMAT, "files": digests}
    manifest["digests"] = {name: digest_of(x) for name, x in manifest.items()}
    manifest["digest"] = digest_of(manifest)
    _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it is one and as it was written."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"folder {str(folder)!r} has no {MANIFEST}: nothing was saved there, or not all of it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a manifest of format {_FORMAT}")
    missing = [name for name in (*_FIELDS, "digests", "digest") if name not in manifest]
    if missing:
        raise ValueError(f"{path} lacks the field {missing[0]!r}")
    digest, digests = manifest.pop("digest"), manifest["digests"]
    for name in _FIELDS:
        if not isinstance(digests, dict) or digests.get(name) != digest_of(manifest[name]):
            raise ValueError(f"{path} is not what was saved: the digest of {name!r} differs")
    if digest != digest_of(manifest):
        raise ValueError(f"{path} is not what was saved: its digest differs")
    return manifest


def digest_of(value: Any) -> str:
    """SHA-256 of a value of JSON."""
    return _digest(json.dumps(value, sort_keys=True).encode())


def file_of(device: int) -> str:
    """Name of a device's file."""
    return f"device-{device}.npz"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """The whole file or none: under another name first, and on the disk before it gets its own."""
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from None
    finally:
        draft.unlink(missing_ok=True)
