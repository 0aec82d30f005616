"""Files that are whole or not there: written beside their place, then renamed; read with checks."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import origin
from experiments.harness.lines import plain

_MOST_DEFLATED = 1032  # bytes that one byte of deflate can stand for, at most
_DAMAGED = (
    *(ValueError, OSError, EOFError, KeyError, RuntimeError, NotImplementedError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, OverflowError, MemoryError, TypeError, AttributeError),
)


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes files and the folders above them; until all are on the disk, none has its new content.

    Raises:
      OSError: that names the file: no room, no permission, a folder in its place.
    """
    parts: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            with _named(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _forget_killed(path)
                parts[path] = path.with_name(f".{path.name}.{os.getpid()}.part")
                with parts[path].open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        for path, part in parts.items():
            with _named(path):
                part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _forget_killed(path: Path) -> None:
    """Removes what processes that were killed had begun to write to the same place."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        number = part.name.removesuffix(".part").rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            part.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """`write_together` of one file."""
    write_together({path: content})


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of JSON that people can read."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_signed(path: Path, value: dict[str, Any], *names: str) -> None:
    """`write_json` of an object that a later run goes on from; it gets the digest of these fields."""
    value["digest"] = _digest_of_fields(value, names)
    write_json(path, value)


def read_signed(path: Path, **kinds: type) -> dict[str, Any]:
    """What `write_signed` wrote of the fields that are named, each with its type.

    Raises:
      ValueError: that names the file: no JSON, fields that are missing or altered.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: it must be an object")
    for name, kind in {**kinds, "digest": str}.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{path} lacks {name!r}: it was not written by this command")
    if not is_signed(value, *kinds):
        raise ValueError(
            f"{path} is not what was written: its digest is not that of {', '.join(kinds)}; remove it "
            f"to run all again"
        )
    return value


def is_signed(value: dict[str, Any], *names: str) -> bool:
    """Whether an object has the digest that `write_signed` gave it for these fields."""
    return value["digest"] == _digest_of_fields(value, names)


def _digest_of_fields(value: dict[str, Any], names: Sequence[str]) -> str:
    """Of what was run and found; what is said about it may change."""
    return digest_of([value.get(name) for name in names])


def json_writer(path: str | Path | None) -> Callable[[Any], None]:
    """`write_json` to a place that was tried; of a command's results after every step of its work.

    The file has them with the command, the versions of its packages and the machine.

    Args:
      path: None where nothing is asked for; then nothing is written.

    Returns:
      What takes the results: an object, or rows, which become "rows".

    Raises:
      ValueError, OSError: as `check_writable`.
    """
    if path is None:
        return lambda value: None
    check_writable(Path(path))

    def keep(results: Any) -> None:
        known = results if isinstance(results, dict) else {"rows": results}
        write_json(Path(path), known | origin.of_results())

    return keep


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """`write_bytes` of named arrays, at `path` as it stands."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    write_bytes(path, file.getvalue())


def check_writable(path: Path) -> None:
    """Tries a destination before the work whose result it will hold; what is there stays.

    Raises:
      ValueError: a folder is in its place.
      OSError: that names the file: no permission, no room, a file where a folder should be.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file")
    trial = path.with_name(f".{path.name}.{os.getpid()}.trial")
    with _named(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(b"trial")
        finally:
            with contextlib.suppress(OSError):
                trial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file of results against other processes; the system ends it with the process.

    Raises:
      ValueError: another process holds it.
    """
    check_writable(path)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        held = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise ValueError(
                f"{path} is being written by another run: wait for its end, or give another file"
            ) from None
        with contextlib.suppress(FileNotFoundError):  # its last holder has just removed it
            if os.path.samestat(os.fstat(held), os.stat(lock)):
                break
        os.close(held)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(held)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """The system's errors with the file's name: a full disk's has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from None


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file, in which an object has each key once.

    Raises:
      ValueError: that names the file, if it is not one.
    """
    try:
        return json.loads(read_bytes(path).decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {again!r} is there twice")
    return found


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, each held against its header and checksum; no pickles.

    Raises:
      ValueError: that names the file, and the array where it is one.
    """
    name = ""
    try:
        found = {}
        with zipfile.ZipFile(io.BytesIO(read_bytes(path))) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name in found:
                    raise ValueError("it is there twice")
                if info.file_size > _MOST_DEFLATED * (info.compress_size + 1):
                    raise ValueError(f"it cannot hold the {info.file_size} bytes that it claims")
                found[name] = _array(archive.read(info))
        return found
    except _DAMAGED as error:
        where = f"{path}: array {name!r}" if name else str(path)
        said = plain(str(error))[:200]  # some quote all that there is
        raise ValueError(f"{where} is not an .npz file of arrays: {said}") from None


def _array(content: bytes) -> np.ndarray:
    """One .npy, its shape held against its bytes before memory is taken."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in header:
        raise ValueError(f"its header has the version {version}: 1.0 and 2.0 are known")
    shape, _, dtype = header[version](file)
    need, left = dtype.itemsize, len(content) - file.tell()
    for size in shape:  # Python's integers: they do not wrap
        need *= size
    if dtype.hasobject or min(shape, default=0) < 0 or need != left:
        raise ValueError(f"its header says {list(shape)} of {dtype}, and there are {left} bytes")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def decoded(content: bytes, errors: str = "strict") -> str:
    """Text in UTF-8 with the line ends of any system, each as a line feed."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors=errors).read()


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def digest_of(value: Any) -> str:
    """`digest` of a value as JSON has it, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True).encode())
