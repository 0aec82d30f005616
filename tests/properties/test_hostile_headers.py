"""Files cut at every byte of their headers, and with every number of them made huge.

Reading ends with an error that names the file, within a memory of a few times the file: a header is
held against the file's size before anything is made of what it says.
"""

from __future__ import annotations

import io
import json
import struct
import tracemalloc

import numpy as np
import pytest

from experiments.harness import files
from experiments.kv_budget import score
from experiments.models import load_gguf
from experiments.models.gguf_file import read_gguf
from experiments.models.safetensors import opened
from jbalance import adapters, decode
from tests.support.checkpoint_files import gguf_fields, gguf_tensors, write_gguf
from tests.support.small_models import small_llama

MOST_BYTES = 8 << 20  # of memory that a reader may take for a file of some hundred KiB
HUGE = (2**31 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def refused(read, path):
    """The error of a file that cannot be read, which names it; None where it can. Little memory."""
    said = None
    tracemalloc.start()
    try:
        read(path)
    except ValueError as error:
        said = str(error)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < MOST_BYTES
    assert said is None or (str(path) in said and len(said) < 3000)
    return said


@pytest.fixture(scope="module")
def model():
    return small_llama(num_layers=1)


@pytest.fixture(scope="module")
def gguf(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "it.gguf"
    write_gguf(path, gguf_fields(model.config), gguf_tensors(model), model.config.head_dim)
    content = path.read_bytes()
    _, tensors = read_gguf(path)
    begin = content.index(b"token_embd.weight")
    return path, content, begin + 64 * len(tensors)


def every(size, step):
    """Each of the first bytes, where magic, version and counts are, then each step-th."""
    return [*range(min(size, 64)), *range(64, size, step)]


def test_gguf_cut_within_its_header(gguf):
    path, content, header = gguf
    for at in every(header, 37):
        path.write_bytes(content[:at])
        assert refused(read_gguf, path)
    path.write_bytes(content)


def test_gguf_with_huge_numbers(gguf):
    """Eight bytes anywhere in the header, as a length, a count, an offset or a shape."""
    path, content, header = gguf
    for at in every(header, 41):
        for number in HUGE[at % 2 :: 2]:
            data = bytearray(content)
            data[at : at + 8] = struct.pack("<Q", number)
            path.write_bytes(data)
            refused(read_gguf, path)
    path.write_bytes(content)


@pytest.mark.slow
def test_gguf_at_every_byte(gguf):
    path, content, header = gguf
    for at in range(header):
        path.write_bytes(content[:at])
        assert refused(read_gguf, path)
        data = bytearray(content)
        data[at : at + 8] = struct.pack("<Q", HUGE[at % len(HUGE)])
        path.write_bytes(data)
        refused(read_gguf, path)
    path.write_bytes(content)


@pytest.mark.parametrize("field", ["llama.block_count", "llama.context_length", "llama.vocab_size"])
def test_gguf_of_a_model_beyond_the_file(model, tmp_path, field):
    path = tmp_path / "it.gguf"
    fields = gguf_fields(model.config, **{field: 2**31 - 1})
    write_gguf(path, fields, gguf_tensors(model), model.config.head_dim)
    if field == "llama.context_length":  # takes no memory: positions are rotated
        assert load_gguf(path)[0].num_layers == 1
    else:
        assert refused(load_gguf, path)


def safetensors(header, data=bytes(64)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin=0, end=64, shape=(16,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HOSTILE = {
    "overlap": {"a": entry(0, 40, (10,)), "b": entry(24, 64, (10,))},
    "a hole": {"a": entry(0, 32, (8,)), "b": entry(40, 64, (6,))},
    "beyond the file": {"a": entry(0, 128, (32,))},
    "a negative offset": {"a": entry(-64, 0)},
    "ends before it begins": {"a": entry(64, 0)},
    "shape times size is no length": {"a": entry(0, 64, (17,))},
    "a product that wraps": {"a": entry(0, 64, (2**33, 2**33))},
    "a fractional shape": {"a": entry(0, 64, (16.5,))},
    "a negative shape": {"a": entry(0, 64, (-4, -4))},
    "a type that there is not": {"a": entry(dtype="F31")},
    "no object": [1, 2],
    "an entry that is none": {"a": 7},
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
}


def read_safetensors_header(path):
    with opened(path):
        pass


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors(tmp_path, case):
    path = tmp_path / "it.safetensors"
    path.write_bytes(safetensors(HOSTILE[case]))
    assert refused(read_safetensors_header, path)


def test_safetensors_cut_and_with_huge_lengths(tmp_path):
    path = tmp_path / "it.safetensors"
    content = safetensors({"a": entry()})
    for at in range(len(content)):
        path.write_bytes(content[:at])
        assert refused(read_safetensors_header, path)
    for number in HUGE:
        path.write_bytes(struct.pack("<Q", number % 2**64) + content[8:])
        assert refused(read_safetensors_header, path)


def test_npz_cut_and_with_huge_numbers(tmp_path):
    path, file = tmp_path / "cases.npz", io.BytesIO()
    np.savez_compressed(file, lm_ctx=np.zeros((2, 130), int), lm_cont=np.zeros((2, 5), int))
    content = file.getvalue()
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at])
        assert refused(files.read_npz, path)
        data = bytearray(content)
        data[at : at + 4] = struct.pack("<I", 2**32 - 1)
        path.write_bytes(data)
        refused(files.read_npz, path)
    path.write_bytes(content)
    assert refused(lambda p: score.read_cases(str(p), 1), path) is None


def test_a_saved_state_cut_and_with_huge_numbers(model, tmp_path):
    """Signed anew by whoever wrote it: what its fields say is held against what its files hold."""
    decoder = adapters.decoder(model, model.attention_specs)
    folder = tmp_path / "state"
    decode.save(folder, decoder, decode.create(decoder, [60_000], recent_tokens=16))
    for part in sorted(folder.iterdir()):
        whole = part.read_bytes()
        for at in every(len(whole), max(1, len(whole) // 40)):
            part.write_bytes(whole[:at])
            said = refused(lambda _: decode.restore(folder, decoder, [80_000]), folder)
            assert said, (part.name, at)
        part.write_bytes(whole)
    assert decode.restore(folder, decoder, [80_000]).num_requests == 1


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff\xfe", b"{" * 99_999, b"9" * 99_999])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_texts_that_are_no_json(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert refused(files.read_json, path)
