"""A saved decode goes on with the same tokens on other devices, or says why it cannot."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jbalance import adapters, decode
from jbalance.decode import Reserve, saved
from tests.decode.conftest import PROMPT
from tests.support.small_models import small_llama

STEPS = 6
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


def altered(field, value):
    """A manifest with a field changed, everything else as it was."""

    def change(folder):
        path = folder / saved.MANIFEST
        manifest = json.loads(path.read_text())
        manifest[field] = value
        path.write_text(json.dumps(manifest))

    return change


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
        (altered("notes", {"said": [3]}), "its digest differs"),
        (altered("context_tokens", 7), "its digest differs"),
        (altered("files", {}), "its digest differs"),
    ],
)
def test_a_state_that_is_not_whole_is_named(decoder, folder, tmp_path, break_it, names):
    for file in folder[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    break_it(tmp_path)
    with pytest.raises(ValueError, match=names):
        decode.restore(tmp_path, decoder, [66_000])


def test_another_model_is_named(sharp, folder):
    config = {f.name: getattr(sharp.config, f.name) for f in dataclasses.fields(sharp.config)}
    other = small_llama(**config | {"embed_dim": 24})
    other = adapters.decoder(other, other.attention_spec)
    with pytest.raises(ValueError, match="is of another model"):
        decode.restore(folder[0], other, [66_000])


def test_a_state_is_not_written_over(decoder, folder):
    with pytest.raises(ValueError, match="holds a state already"):
        saved.check_folder(folder[0])
