"""A saved decode goes on with the same tokens on other devices, or says why it cannot."""

import dataclasses
import errno
import hashlib
import json

import jax
import numpy as np
import pytest

from jbalance import adapters, decode
from jbalance.decode import Reserve, _files, saved
from tests.decode.conftest import PROMPT
from tests.support.small_models import small_llama

STEPS = 6
FIELDS = ("kinds", "context_tokens", "requests", "files", "model", "notes")
BUDGETS = [40_000, 26_000]


def go_on(decoder, state, budgets):
    tokens = []
    for _ in range(STEPS):
        new, state = decode.step(decoder, state)
        tokens.append(np.asarray(new).tolist())
        assert all(n <= b for n, b in zip(state.nbytes, budgets, strict=True))
    return tokens


@pytest.fixture(scope="module")
def folder(decoder, tmp_path_factory):
    """A saved state, of two requests that read a context on two devices, and what they say next."""
    path = tmp_path_factory.mktemp("state") / "here"
    held = decode.read(decoder, PROMPT[:200], BUDGETS, reserve=Reserve(2, 16))
    state = decode.create(decoder, BUDGETS, num_requests=2, context=held)
    state = decode.join(decoder, state, 0, PROMPT[:7])
    state = decode.join(decoder, state, 1, PROMPT[20:30], sampling=decode.Sampling(0.8, seed=3))
    _, state = decode.step(decoder, state)
    decode.save(path, decoder, state, notes={"said": [1, 2]})
    return path, go_on(decoder, state, BUDGETS)


@pytest.mark.parametrize(
    "budgets",
    [[66_000], pytest.param([30_000, 22_000, 22_000], marks=pytest.mark.slow)],
)
def test_other_devices_go_on_with_the_same_tokens(decoder, folder, budgets):
    path, want = folder
    devices = jax.devices()[-len(budgets) :]
    state = decode.restore(path, decoder, budgets, devices=devices)
    assert decode.notes_of(path) == {"said": [1, 2]}
    assert go_on(decoder, state, budgets) == want


def test_too_little_memory_is_named(decoder, folder):
    with pytest.raises(ValueError, match=r"budgets_bytes\[\d\] is .* more; all units take \d+"):
        decode.restore(folder[0], decoder, [30_000, 4_000])


def altered(field, value, *, signed=False):
    """A manifest with a field changed or, with None, left out; with `signed` under its right digests."""

    def change(folder):
        path = folder / saved.MANIFEST
        manifest = json.loads(path.read_text())
        *above, name = field.split(".")
        place = manifest
        for key in above:
            place = place[key]
        place[name] = value
        if value is None:
            del place[name]
        if signed:
            del manifest["digest"]
            fields = {name: x for name, x in manifest.items() if name != "digests"}
            manifest["digests"] = {name: sha(x) for name, x in fields.items()}
            manifest["digest"] = sha(manifest)
        path.write_text(json.dumps(manifest))

    return change


def sha(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flip(folder):
    path = folder / "device-1.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "names"),
    [
        (lambda folder: (folder / saved.MANIFEST).unlink(), "has no manifest.json"),
        (lambda folder: (folder / saved.MANIFEST).write_text("{"), "cannot be read"),
        (lambda folder: (folder / saved.MANIFEST).write_text("{}"), "not a manifest of format"),
        (lambda folder: (folder / "device-1.npz").unlink(), "device-1.npz cannot be read"),
        (flip, "SHA-256 differs"),
        (altered("notes", {"said": [3]}), "the digest of 'notes' differs"),
        (altered("context_tokens", 7), "the digest of 'context_tokens' differs"),
        (altered("files", {}), "the digest of 'files' differs"),
        (altered("requests.tokens", [1, 2]), "the digest of 'requests' differs"),
        (altered("digests", {}), "the digest of 'format' differs"),
        (altered("digest", "0"), "its digest differs"),
        *((altered(x, None), f"lacks the field '{x}'") for x in (*FIELDS, "digests", "digest")),
    ],
)
def test_a_state_that_is_not_whole_is_named(decoder, folder, tmp_path, break_it, names):
    for file in folder[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    break_it(tmp_path)
    with pytest.raises(ValueError, match=names):
        decode.restore(tmp_path, decoder, [66_000])


SIGNED = {
    "no files": ("files", {}, "files is {}"),
    "a file elsewhere": ("files", {"../device-0.npz": "0"}, "files is {'../device-0.npz'"),
    "files of no digest": ("files", {"device-0.npz": 3}, "files is"),
    "no kinds": ("kinds", {}, "kinds is {}"),
    "no own": ("kinds.own", None, "kinds is {'context'"),
    "no head dim": ("kinds.own.head_dim", None, "kinds.own.head_dim is None"),
    "another head dim": ("kinds.own.head_dim", 2**40, "kinds.own.head_dim is 1099511627776"),
    "no page bytes": ("kinds.own.page_bytes", 0, "kinds.own.page_bytes is 0"),
    "other page bytes": ("kinds.own.page_bytes", 8, "the array 'own.data' is"),
    "no bits": ("kinds.context.bits", [], r"kinds.context.bits is \[\]"),
    "too many bits": ("kinds.context.bits", [99], r"kinds.context.bits\[0\] is 99"),
    "other levels": ("kinds.own.bits", [2], "the array 'own.rows.count' is"),
    "tokens before the first": ("context_tokens", -1, "context_tokens is -1"),
    "tokens in words": ("context_tokens", "many", "context_tokens is 'many'"),
    "no requests": ("requests", [], r"requests is \[\]"),
    "no tokens": ("requests.tokens", None, "requests.tokens is None"),
    "no positions": ("requests.positions", [3], r"requests.positions is \[3\]"),
    "a negative position": ("requests.positions", [1, -1], r"requests.positions\[1\] is -1"),
    "half a token": ("requests.tokens", [1.5, 2], r"requests.tokens\[0\] is 1.5"),
    "a large token": ("requests.tokens", [2**31, 2], r"requests.tokens\[0\] is 2147483648"),
    "active in numbers": ("requests.active", [1, 0], r"requests.active\[0\] is 1"),
    "weights of nothing": ("requests.weights", [float("nan"), 1], r"requests.weights\[0\] is nan"),
    "no sampler": ("requests.sampler_seed", None, "requests.sampler_seed is None"),
    "one request more": ("requests.tokens", [1, 2, 3], "requests.positions is"),
    "notes in words": ("notes", "said", "notes is 'said'"),
}


@pytest.mark.parametrize("case", SIGNED)
def test_a_manifest_under_its_own_digest_names_the_field(decoder, folder, tmp_path, case):
    field, value, names = SIGNED[case]
    for file in folder[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    altered(field, value, signed=True)(tmp_path)
    with pytest.raises(ValueError, match=f"(manifest.json|device-0.npz): {names}"):
        decode.restore(tmp_path, decoder, [66_000])


def without(name):
    return lambda arrays: arrays.pop(name)


def with_array(name, change):
    def put(arrays):
        arrays[name] = change(arrays[name])

    return put


ARRAYS = {
    "no units": (without("own.units"), "lacks the array 'own.units'"),
    "no rows": (
        without("context.rows.key_mean:bfloat16"),
        "lacks the array 'context.rows.key_mean'",
    ),
    "a unit elsewhere": (with_array("own.units", lambda x: x + 99), "'own.units' is"),
    "a unit twice": (with_array("own.units", lambda x: x * 0), "lacks units of the model"),
    "units in floats": (with_array("own.units", lambda x: x * 1.0), "'own.units' is"),
    "fewer rows": (
        with_array("own.rows.recent_energy", lambda x: x[1:]),
        "'own.rows.recent_energy' is",
    ),
    "other axes": (
        with_array("own.rows.recent_energy", lambda x: x[:, 1:]),
        "'own.rows.recent_energy'",
    ),
    "negative pages": (with_array("own.rows.pages", lambda x: -x - 1), "'own.rows.pages' is"),
    "less data": (with_array("context.data", lambda x: x[1:]), "'context.data' is"),
    "data of another type": (with_array("own.data", lambda x: x.astype(np.int8)), "'own.data' is"),
    "NaN": (with_array("own.rows.recent_energy", lambda x: x * np.nan), "not finite"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_a_devices_file_under_its_own_digest_names_the_array(decoder, folder, tmp_path, case):
    change, names = ARRAYS[case]
    for file in folder[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "device-0.npz"
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    with path.open("wb") as file:
        np.savez(file, **arrays)
    digests = json.loads((tmp_path / saved.MANIFEST).read_text())["files"]
    digests["device-0.npz"] = hashlib.sha256(path.read_bytes()).hexdigest()
    altered("files", digests, signed=True)(tmp_path)
    with pytest.raises(ValueError, match=f"(device-0.npz|{tmp_path.name}).*{names}"):
        decode.restore(tmp_path, decoder, [66_000])


def test_devices_with_different_recent_tokens_are_named_when_saved(decoder, tmp_path):
    state = decode.create(decoder, [40_000, 32_000])
    with pytest.raises(ValueError, match=r"state keeps \d+ recent tokens on one device and \d+"):
        decode.save(tmp_path / "state", decoder, state)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_part_and_names_the_file(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot be written: No space left on device: '.*it\.npz'"):
        _files._write(tmp_path / "it.npz", b"x")
    assert not list(tmp_path.iterdir())


def test_another_model_is_named(sharp, folder):
    config = {f.name: getattr(sharp.config, f.name) for f in dataclasses.fields(sharp.config)}
    other = small_llama(**config | {"embed_dim": 24})
    other = adapters.decoder(other, other.attention_specs)
    with pytest.raises(ValueError, match="is of another model"):
        decode.restore(folder[0], other, [66_000])


def test_a_state_is_not_written_over(decoder, folder):
    with pytest.raises(ValueError, match="holds a state already"):
        saved.check_folder(folder[0])
