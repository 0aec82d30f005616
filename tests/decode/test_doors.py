"""Doors of decoding that take folders, models, plans and token ids: each names what it cannot use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import decode, explain
from jbalance.decode import engine
from tests.decode.conftest import PROMPT
from tests.support.small_models import VOCAB

BYTES = [90_000]
SHAPE, DIM = (4, 3, 24), 8
CODES = np.full((12, 24), 9, np.uint8)
NAN = float("nan")


@pytest.fixture(scope="module")
def state(decoder):
    return decode.create(decoder, BYTES, recent_tokens=16)


@pytest.mark.parametrize("folder", [None, 3, b"x", "", "a\0b"])
def test_folders_are_paths(decoder, state, folder):
    for call in (
        lambda: decode.save(folder, decoder, state),
        lambda: decode.restore(folder, decoder, BYTES),
        lambda: decode.notes_of(folder),
    ):
        with pytest.raises(ValueError, match=r"folder is .*the path of a folder"):
            call()


def test_a_folder_may_be_text(decoder, state, tmp_path):
    folder = str(tmp_path / "it")
    decode.save(folder, decoder, state, notes={"of": ["a"]})
    assert decode.notes_of(folder) == {"of": ["a"]}
    assert decode.restore(folder, decoder, BYTES).num_requests == 1


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"a": {1}}, "not JSON serializable"),
        ({"a": NAN}, "not JSON compliant"),
        ({1: 2}, "JSON would give back"),
        ({"a": (1, 2)}, "JSON would give back"),
        ("x", "notes is 'x': it must be values by name"),
    ],
)
def test_notes_come_back_as_they_are_or_nothing_is_written(
    decoder, state, tmp_path, notes, message
):
    with pytest.raises(ValueError, match=message):
        decode.save(tmp_path / "it", decoder, state, notes=notes)
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("budgets", [None, 90_000, [90_000.5], [True], ["90000"], [NAN], [2**70]])
def test_bytes_of_a_restored_state_are_whole(decoder, tmp_path, budgets):
    with pytest.raises(ValueError, match="budgets_bytes"):
        decode.restore(tmp_path, decoder, budgets)
    with pytest.raises(ValueError, match="budgets_bytes"):
        decode.fit(decode.ladder(CODES), SHAPE, DIM, budgets)


def test_models_and_states_are_those_of_decode(decoder, state, tmp_path):
    for call, message in (
        (lambda: decode.save(tmp_path, None, state), "model is None: it must be a Model"),
        (lambda: decode.save(tmp_path, decoder, None), "state is None: it must be a State"),
        (lambda: decode.restore(tmp_path, None, BYTES), "model is None"),
        (lambda: decode.step(decoder, None), "state is None"),
        (lambda: decode.step(None, state), "model is None"),
        (lambda: decode.join(None, state, 0, PROMPT), "model is None"),
        (lambda: decode.tell(None, state, 0, PROMPT), "model is None"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def fitted(codes=CODES, shape=SHAPE, head_dim=DIM, **options):
    return decode.fit(decode.ladder(codes), shape, head_dim, BYTES, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fitted(codes=CODES[0]), r"codes must have shape \[U, S\]"),
        (lambda: fitted(codes=CODES + 0.5), "codes has dtype float64"),
        (lambda: fitted(codes=CODES.astype(int) + 247), r"codes\[\(0, 0\)\] is 256"),
        (lambda: fitted(codes=CODES[:11]), "codes has 11 rows: the context has 12 units"),
        (lambda: fitted(codes=CODES[:, :23]), r"levels of shape \(12, 23\).*\(12, 24\)"),
        (lambda: fitted(shape=None), "shape is None"),
        (lambda: fitted(shape=(4, 3)), r"shape is \(4, 3\): it must be \(L, K, S\)"),
        (lambda: fitted(shape=(4, 3.0, 24)), r"shape\[1\] is 3.0"),
        (lambda: fitted(head_dim=True), "head_dim is True"),
        (lambda: fitted(head_dim=2**20), "head_dim is 1048576: it must be at most 4096"),
        (lambda: fitted(bits=()), "bits is empty"),
        (lambda: fitted(reserve=3), "reserve is 3: it must be a Reserve"),
        (lambda: fitted(page_bytes="x"), "page_bytes is 'x'"),
        (lambda: fitted(windows=(4,)), "windows has 1 entries for 4 layers"),
        (lambda: fitted(windows=(-4, None, None, None)), r"windows\[0\] is -4"),
        (lambda: decode.fit(None, SHAPE, DIM, BYTES), "rule is None: it must be a function"),
        (lambda: decode.ladder(CODES, np.ones((12, 23), bool)), "seen has dtype bool and shape"),
    ],
)
def test_arguments_of_a_plan_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert fitted().level.shape == SHAPE


BEYOND = np.array([1, VOCAB])  # one more than the last id: JAX would read the last one's embedding


def test_ids_beyond_the_vocabulary_are_refused(decoder, state):
    for call, name in (
        (lambda: decode.generate(decoder, [BEYOND], BYTES, max_new_tokens=1), "prompts[0]"),
        (lambda: decode.join(decoder, state, 0, BEYOND), "prompt"),
        (lambda: decode.tell(decoder, state, 0, BEYOND), "tokens"),
        (lambda: decode.read(decoder, BEYOND, BYTES), "tokens"),
        (lambda: decode.fit_worth(decoder, [np.tile(BEYOND, 300)]), "texts[0]"),
        (lambda: decode.memory_losses(decoder, np.tile(BEYOND, 64)), "tokens"),
        (lambda: explain.ablate(decoder, PROMPT[:3], BEYOND, layers=np.ones((1, 4), bool)), "cont"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        assert str(error.value).startswith(name)
        assert f"[1] is {VOCAB}" in str(error.value)
        assert f"0..{VOCAB - 1}" in str(error.value)
    assert decode.model.in_vocabulary("x", BEYOND - 1, decoder) is not None


def test_a_model_that_gives_nan_says_so(decoder, state, monkeypatch):
    broken = dataclasses.replace(decoder, layers=jax.tree.map(lambda x: x * NAN, decoder.layers))
    with pytest.raises(ValueError, match="model gives NaN in layer 0"):
        decode.read(broken, PROMPT[:9], BYTES)
    with pytest.raises(ValueError, match="model gives NaN after the prompt"):
        engine._chosen(state, state.caches, 0, jnp.full(VOCAB, NAN), 9)
    monkeypatch.setattr(engine, "join", lambda model, state, place, prompt, **_: state)
    monkeypatch.setattr(engine, "step", lambda model, state: (jnp.array([-1]), state))
    with pytest.raises(ValueError, match=r"model gives NaN after 1 new tokens of prompts\[0\]"):
        decode.generate(decoder, [PROMPT[:9]], BYTES, max_new_tokens=2)
    greedy = decode.sampling.Samplers.greedy(2)
    logits = jnp.array([[1.0, 3.0, 2.0], [1.0, NAN, 2.0]])
    chosen = decode.sampling.sample(logits, greedy, jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(chosen, [1, -1])
