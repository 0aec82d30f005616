"""A saved decode goes on with the same tokens on other devices, or says why it cannot."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.kv_budget import evaluate, measure, state
from experiments.kv_budget.decode import Decoder, live_bytes, place_caches
from experiments.kv_budget.policies import make_plan, policy_of
from experiments.models import Llama

QUERY = np.array([5, 17, 42], np.int32)
STEPS = 12
BUDGETS = {"ladder-eviction-only": [13_000, 9_000], "ladder": [16_000, 12_000]}


@pytest.fixture(scope="module")
def saved(small_model, context, tmp_path_factory):
    """For each policy: the decoder, the folder, and all tokens of the run that was not interrupted."""
    done = {}

    def of(name):
        if name not in done:
            measured = measure.prefill(small_model, context, policy_of(name).scorer)
            decoder = Decoder(small_model, jax.devices()[: len(BUDGETS[name])])
            plan = make_plan(policy_of(name), measured, BUDGETS[name], len(QUERY) + STEPS)
            caches = place_caches(measured, plan, decoder.devices, len(QUERY) + STEPS)
            folder = tmp_path_factory.mktemp(name)

            def at_half(progress):
                state.save(folder, decoder, progress, STEPS)

            out = evaluate.generate(decoder, plan, caches, QUERY, STEPS, at_half)
            done[name] = folder, out.tokens, caches
        return done[name]

    return of


def go_on(model, folder, budgets):
    decoder = Decoder(model, jax.devices()[-len(budgets) :])
    progress, new_tokens = state.load(folder, decoder, budgets)
    assert len(progress.tokens) == new_tokens // 2
    while len(progress.tokens) < new_tokens:
        progress = progress.next(decoder)
        assert (live_bytes(progress.caches) <= budgets).all()
    return progress.tokens


@pytest.mark.parametrize(
    ("name", "budgets"),
    [
        ("ladder-eviction-only", [22_500]),
        pytest.param("ladder-eviction-only", [11_500, 11_500], marks=pytest.mark.slow),
        pytest.param("ladder", [28_500], marks=pytest.mark.slow),
        pytest.param("ladder", [12_000, 8_000, 9_000], marks=pytest.mark.slow),
    ],
)
def test_other_devices_go_on_with_the_same_tokens(small_model, saved, name, budgets):
    folder, tokens, _ = saved(name)
    assert go_on(small_model, folder, budgets) == tuple(tokens)


def test_what_was_saved_is_what_is_restored(small_model, saved):
    folder, _, caches = saved("ladder-eviction-only")
    decoder = Decoder(small_model, jax.devices()[:1])
    progress, _ = state.load(folder, decoder, [30_000])
    restored = progress.caches[0].context
    assert restored.num_entries == sum(held.context.num_entries for held in caches)
    keys = np.concatenate([np.asarray(held.context.keys, np.float32) for held in caches])
    for got, want in zip(np.sort(restored.keys, axis=0), np.sort(keys, axis=0), strict=True):
        np.testing.assert_array_equal(np.float32(got), want)


@pytest.mark.slow
def test_too_little_memory_is_named(small_model, saved):
    folder, *_ = saved("ladder-eviction-only")
    decoder = Decoder(small_model, jax.devices()[:2])
    with pytest.raises(
        ValueError, match=r"--device-memory\[\d\] is .* more; all units take \d+ bytes"
    ):
        state.load(folder, decoder, [11_000, 4_000])


@pytest.mark.parametrize(
    ("break_it", "names"),
    [
        (lambda folder: (folder / state.MANIFEST).unlink(), "has no manifest.json"),
        (lambda folder: (folder / state.MANIFEST).write_text("{"), "cannot be read"),
        (lambda folder: (folder / state.MANIFEST).write_text("{}"), "not a manifest of format 1"),
        (lambda folder: (folder / "device-1.npz").unlink(), "device-1.npz cannot be read"),
        (lambda folder: flip(folder / "device-1.npz"), "SHA-256 differs"),
        (lambda folder: forget(folder, "device-0.npz"), "lacks units"),
    ],
)
def test_a_state_that_is_not_whole_is_named(small_model, saved, tmp_path, break_it, names):
    for file in saved("ladder-eviction-only")[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    break_it(tmp_path)
    with pytest.raises(ValueError, match="--state") as error:
        state.load(tmp_path, Decoder(small_model, jax.devices()[:1]), [30_000])
    assert names in str(error.value)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forget(folder, name):
    path = folder / state.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["files"][name]
    path.write_text(json.dumps(manifest))


@pytest.mark.slow
def test_another_model_is_named(small_model, saved):
    config = dataclasses.replace(small_model.config, embed_dim=24)
    other = Decoder(Llama(config, rngs=nnx.Rngs(0)), jax.devices()[:1])
    with pytest.raises(ValueError, match="is of another model"):
        state.load(saved("ladder-eviction-only")[0], other, [30_000])


def test_a_state_is_not_written_over(saved):
    with pytest.raises(ValueError, match="holds a state already"):
        state.check_folder(saved("ladder-eviction-only")[0])
