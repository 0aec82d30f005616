"""One loader for files, directories and packaged models; longer contexts are asked for."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from experiments.harness import files, packages
from experiments.harness.packages import Archive, Member
from experiments.models import RopeScaling, greedy, load, packaged, smollm2_path
from experiments.models.rotary import frequencies
from tests.support.family_checkpoints import CASES
from tests.support.family_files import write_family, write_family_gguf
from tests.support.together import ROOT


def test_a_file_a_directory_and_a_name(tmp_path):
    directory = load(write_family(tmp_path, "qwen3"))
    assert directory.where == tmp_path
    assert (directory.tokenizer, directory.chat) == (None, None)
    file = load(str(write_family_gguf(tmp_path / "it.gguf", "qwen3")))
    assert file.config.num_layers == directory.config.num_layers == 4
    assert file.chat.tokenizer is file.tokenizer
    assert file.chat.where == str(tmp_path / "it.gguf")
    assert load("smollm2").where == smollm2_path()


@pytest.mark.parametrize("name", ["smollm3", "a/b.gguf", ""])
def test_what_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no model|no directory of a model"):
        load(name)
    with pytest.raises(ValueError, match=r"one of smollm2, gemma3-270m"):
        load("nothing")
    (tmp_path / "config.txt").write_text("It is a text, and long enough for a header.")
    with pytest.raises(ValueError, match=r"config\.txt is no GGUF file"):
        load("config.txt")


def test_positions_beyond_training_are_asked_for(tmp_path):
    write_family(tmp_path, "gemma3")
    prompt = np.full((1, 60), 5)
    with pytest.raises(ValueError, match=r"max_positions=64, got T=60, steps=8"):
        greedy(load(tmp_path).model, prompt, 8)
    assert greedy(load(tmp_path, max_positions=68).model, prompt, 8).shape == (1, 8)
    with pytest.raises(ValueError, match=r"65 tokens are more than max_positions=64: load"):
        load(tmp_path).model(np.full((1, 65), 5))
    with pytest.raises(ValueError, match="max_positions is 0"):
        load(tmp_path, max_positions=0)


def test_dynamic_frequencies_are_those_of_the_longest_context(tmp_path):
    """The base grows by (f T / T0 - f + 1)^(D / (D - 2)): f = 2, T0 = 16, D = 8."""
    write_family(tmp_path, "llama dynamic")
    for positions, base in ((None, 1000.0), (8, 1000.0), (48, 1000 * 5 ** (8 / 6))):
        config = load(tmp_path, max_positions=positions).config
        want = base ** -(np.arange(4) / 4)
        np.testing.assert_allclose(config.frequencies, [want] * 4, rtol=1e-6)


def test_dynamic_frequencies_stay_finite_whatever_the_factor():
    huge = RopeScaling("dynamic", 1e38, original_positions=16)
    np.testing.assert_array_equal(frequencies(8, 1000.0, huge, 16), frequencies(8, 1000.0))
    assert np.isfinite(frequencies(8, 1000.0, huge, 2**31 - 1)).all()


def test_long_factors_are_those_of_contexts_beyond_the_original(tmp_path):
    write_family(tmp_path, "phi3 short")
    original = CASES["phi3 short"].config["original_max_position_embeddings"]
    for positions, factors in (
        (None, [1.25, 4.0]),
        (original, [1, 1.5]),
        (original + 1, [1.25, 4]),
    ):
        table = load(tmp_path, max_positions=positions).config.frequencies
        want = [*(1000.0 ** -np.array([0, 0.5]) / factors), 0, 0]
        np.testing.assert_allclose(table, [want] * 4, rtol=1e-6)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A folder in which pip finds one wheel, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    path, about = folder / "apkg-1.0-py3-none-any.whl", "apkg-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("apkg/part", b"Words.\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: apkg\nVersion: 1.0\n")
        tag = "Wheel-Version: 1.0\nGenerator: it\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{about}/WHEEL", tag)
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.chdir(ROOT)
    return Archive("apkg==1.0", files.digest(path.read_bytes()))


def test_files_of_wheels_are_those_that_were_meant(wheel):
    member = Member("apkg/part", files.digest(b"Words.\n"))
    assert packages.wheel_files({wheel: [member]}) == {member: b"Words.\n"}
    other = Archive(wheel.requirement, "0" * 64)
    with pytest.raises(ValueError, match=r"pip could not fetch apkg==1\.0: .+"):
        packages.wheel_files({other: [member]})
    with pytest.raises(ValueError, match=r"none is no file in the wheel apkg==1\.0"):
        packages.wheel_files({wheel: [Member("none", "")]})
    with pytest.raises(ValueError, match=r"apkg/part of apkg==1\.0 is not what was meant"):
        packages.wheel_files({wheel: [Member("apkg/part", "")]})


def test_a_model_of_parts_is_joined_once(tmp_path, monkeypatch, wheel):
    monkeypatch.setattr(packages, "CACHE", tmp_path / "data")
    part = Member("apkg/part", files.digest(b"Words.\n"))
    monkeypatch.setattr(packaged, "GEMMA3_PARTS", {wheel: [part]})
    monkeypatch.setattr(packaged, "GEMMA3", Member("it.gguf", part.sha256))
    assert packaged.gemma3_path().read_bytes() == b"Words.\n"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert packaged.gemma3_path() == tmp_path / "data" / "it.gguf"
