"""Whatever a file holds, reading it ends with what the file says or with an error that names it.

A few dozen examples of each kind in `make test`; the profile `long` of `tests/conftest.py` runs 100,000.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json

import jax
import numpy as np
import pytest
from flax import nnx
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from experiments.harness import runs
from experiments.harness.__main__ import main
from experiments.kv_budget import score
from experiments.models import load_gguf, load_hf_directory
from jbalance import adapters, decode
from jbalance.decode import saved
from tests.support.checkpoint_files import (
    checkpoint_tensors,
    gguf_fields,
    gguf_tensors,
    hf_config,
    write_gguf,
    write_hf,
)
from tests.support.damage import altered, damaged, damaged_json
from tests.support.small_models import small_llama

LONGEST = 3000  # characters of an error: one line that can be read


@pytest.fixture(scope="module")
def model():
    return small_llama(num_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def outcome(read, *names):
    """What is read, or None after a ValueError that names one of the files."""
    try:
        return read()
    except ValueError as error:
        said = str(error)
    assert any(name in said for name in names), said
    assert len(said) < LONGEST
    return None


def finite(loaded):
    for path, x in nnx.to_flat_state(nnx.state(loaded)):
        assert np.isfinite(x[...]).all(), path


# GGUF


@pytest.fixture(scope="module")
def gguf(folder, model):
    path = folder / "it.gguf"
    fields = gguf_fields(model.config)
    write_gguf(path, fields, gguf_tensors(model), model.config.head_dim)
    return path, path.read_bytes(), fields


def check_gguf(path, model):
    read = outcome(lambda: load_gguf(path), str(path))
    if read is None:
        return
    config, loaded, tokenizer = read
    finite(loaded)
    reader = GGUFReader(path)
    says = {name: field.contents() for name, field in reader.fields.items()}
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert (config.num_layers, config.num_heads) == (2, 6)
    assert config.vocab_size == len(says["tokenizer.ggml.tokens"])
    assert config.rope_base == pytest.approx(says.get("llama.rope.freq_base", 10_000.0))
    embedding = stored["token_embd.weight"].view(np.float32)
    np.testing.assert_array_equal(loaded.embedding[...], embedding.reshape(-1, config.embed_dim))
    up = stored["blk.1.ffn_up.weight"].view(np.float32).reshape(config.hidden_dim, -1)
    np.testing.assert_array_equal(loaded.layers.up[...][1], up.T)
    assert max(tokenizer.encode("ab12").ids) < config.vocab_size


@given(data=st.data())
def test_damaged_gguf(gguf, model, data):
    path, whole, _ = gguf
    path.write_bytes(data.draw(damaged(whole)))
    check_gguf(path, model)


# config.json, tokenizer.json and safetensors


def tokenizer_json():
    pieces = ["<e>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:40], "!!"]
    tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(pieces)}, [("!", "!")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<e>"])
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def hf(folder, model):
    path = folder / "hf"
    path.mkdir()
    config = hf_config(model.config, rope_scaling={"rope_type": "linear", "factor": 2.0})
    write_hf(path, config, checkpoint_tensors(model), shards=2)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (path / "tokenizer_config.json").write_text('{"add_bos_token": false, "bos_token": "<e>"}')
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


def check_hf(path):
    read = outcome(lambda: load_hf_directory(path), str(path))
    if read is None:
        return
    config, loaded, tokenizer = read
    finite(loaded)
    says = json.loads((path / "config.json").read_text())
    assert (config.num_layers, config.embed_dim) == (says["num_hidden_layers"], says["hidden_size"])
    assert config.rope_base == float(says.get("rope_theta") or 10_000.0)
    stored = functools.reduce(dict.__or__, map(load_file, path.glob("*.safetensors")))
    embedding = stored["model.embed_tokens.weight"]
    np.testing.assert_array_equal(loaded.embedding[...], embedding)
    assert tokenizer.encode("!! $<e>").ids is not None


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")


@given(data=st.data())
def test_damaged_hf_directory(hf, data):
    path, whole = hf
    name = data.draw(st.sampled_from((*FILES, "model-00001-of-00002.safetensors")))
    if name.endswith(".json"):
        content = data.draw(damaged_json(json.loads(whole[name])))
    else:
        content = data.draw(damaged(whole[name]))
    (path / name).write_bytes(content)
    try:
        check_hf(path)
    finally:
        (path / name).write_bytes(whole[name])


@given(data=st.data())
def test_altered_safetensors_header(hf, data):
    """The header as JSON, of the right length."""
    path, whole = hf
    name = "model-00002-of-00002.safetensors"
    size = int.from_bytes(whole[name][:8], "little")
    header = json.dumps(data.draw(altered(json.loads(whole[name][8 : 8 + size])))).encode()
    (path / name).write_bytes(len(header).to_bytes(8, "little") + header + whole[name][8 + size :])
    try:
        check_hf(path)
    finally:
        (path / name).write_bytes(whole[name])


# Cases for `score`


@given(data=st.data())
def test_damaged_cases(folder, data):
    rng = np.random.default_rng(0)
    arrays = {"lm_ctx": rng.integers(0, 61, (2, 130)), "lm_cont": rng.integers(0, 61, (2, 5))}
    file = io.BytesIO()
    data.draw(st.sampled_from((np.savez, np.savez_compressed)))(file, **arrays)
    path = folder / "cases.npz"
    path.write_bytes(data.draw(damaged(file.getvalue())))
    found = outcome(lambda: score.read_cases(str(path), 61), str(path))
    if found is not None:
        assert found.keys() == arrays.keys()
        for name, x in arrays.items():
            np.testing.assert_array_equal(found[name], x)  # a checksum holds


# A saved state


@pytest.fixture(scope="module")
def state(folder, model):
    decoder = adapters.decoder(model, model.attention_specs)
    path = folder / "state"
    empty = decode.create(decoder, [40_000, 26_000], num_requests=2, recent_tokens=16)
    decode.save(path, decoder, empty, notes={"tokens": [3, 4], "new_tokens": 9})
    return decoder, path, {file.name: file.read_bytes() for file in path.iterdir()}


def check_state(decoder, path):
    with jax.default_device(jax.devices("cpu")[0]):
        return outcome(lambda: decode.restore(path, decoder, [80_000]), str(path))


@given(data=st.data())
def test_damaged_state(state, data):
    decoder, path, whole = state
    name = data.draw(st.sampled_from(sorted(whole)))
    content = data.draw(
        damaged_json(json.loads(whole[name])) if name == saved.MANIFEST else damaged(whole[name])
    )
    (path / name).write_bytes(content)
    try:
        found = check_state(decoder, path)
        if found is not None:  # the same value, otherwise written
            assert found.tokens.tolist() == [0, 0]
            if name == saved.MANIFEST:
                assert json.loads(content) == json.loads(whole[name])
            else:
                assert content == whole[name]
    finally:
        (path / name).write_bytes(whole[name])


def sha(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@given(data=st.data())
def test_a_state_altered_under_its_own_digests(state, data):
    """By somebody who can sign it."""
    decoder, path, whole = state
    manifest = json.loads(whole[saved.MANIFEST])
    fields = {name: x for name, x in manifest.items() if name not in ("digest", "digests")}
    fields = data.draw(altered(fields))
    fields["digests"] = {name: sha(x) for name, x in fields.items()}
    (path / saved.MANIFEST).write_text(json.dumps(fields | {"digest": sha(fields)}))
    try:
        found = check_state(decoder, path)
        assert found is None or found.num_requests == 2
    finally:
        (path / saved.MANIFEST).write_bytes(whole[saved.MANIFEST])


# Results


ABOUT = {"title": "It", "command": "python -m it", "settings": {"steps": 3}}
ABOUT |= {"baselines": {"known": {"loss": 1.0}}, "compare": [["a", "b"]], "notes": ["So."]}


def run_all(path, calls):
    def one(arm, seed, advance):
        calls.append((arm, seed))
        return {"figures": {"loss": 2.0 + seed}}

    with contextlib.redirect_stderr(io.StringIO()):
        return runs.run_all(path, ABOUT, ["a", "b"], [0], 1, one)


@pytest.fixture(scope="module")
def results(folder):
    path = folder / "results" / "it.json"
    return path, run_all(path, [])


@given(data=st.data())
def test_damaged_results(results, data):
    (path, right), calls = results, []
    page = path.parent.parent / "page.md"
    content = data.draw(damaged_json(right))
    path.write_bytes(content)
    found = outcome(lambda: run_all(path, calls), str(path))
    assert not calls  # nothing is run again, or instead
    if found is None:
        assert path.read_bytes() == content
    else:
        assert found["runs"] == right["runs"]
    said = io.StringIO()
    path.write_bytes(content)
    with (
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("experiments.harness.docs.write.__defaults__", (path.parent, page))
        code = main(["docs"])
    if code:
        assert code == 2
        assert said.getvalue().startswith("error: ")
        assert said.getvalue().count("\n") == 1
