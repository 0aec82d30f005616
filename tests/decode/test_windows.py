"""Layers with windows, caps and scales of their own in one budget: as dense attention where all fits."""

import numpy as np
import pytest

from jbalance import decode
from jbalance.decode import Reserve, devices
from tests.support import window_models as models
from tests.support.window_models import KV_HEADS, VOCAB, WINDOWS, regret

PROMPT = np.random.default_rng(7).integers(0, VOCAB, 300).astype(np.int32)
AMPLE, TIGHT = 200_000, 13_500  # bytes a request
LENGTHS = (1, 11, 90, 256)
ROUNDING = 0.03  # in logits, of 8 bits; a window that is wrong by one token costs 0.4 to 9


@pytest.fixture(scope="module")
def model():
    return models.model()


@pytest.mark.parametrize("shares", [(1.0,), pytest.param((0.7, 0.3), marks=pytest.mark.slow)])
def test_an_ample_budget_decodes_as_dense_attention_does(model, shares):
    """Prompts shorter and longer than the windows; decoding goes on far beyond the shorter ones."""
    prompts = [PROMPT[i : i + n] for i, n in enumerate(LENGTHS)]
    budgets = [int(share * AMPLE * len(prompts)) for share in shares]
    before = devices._attend_token._cache_size()
    found = decode.generate(model, prompts, budgets, max_new_tokens=40)
    # Two of three layers have the same window: one program on each device.
    assert devices._attend_token._cache_size() == before + 2 * len(shares)
    for tokens, prompt in zip(found, prompts, strict=True):
        assert regret(prompt, tokens) <= ROUNDING


def held_tokens(state) -> np.ndarray:
    """[L, K] tokens of the first request in its arena and recent buffer."""
    cache = state.caches[0]
    count = np.asarray(cache.arena.count)[: cache.units_per_request].sum(axis=1)
    return count.reshape(-1, KV_HEADS) + int(cache.recent_count[0])


def test_a_window_holds_its_own_tokens_only(model):
    """What left a window is gone, whatever memory there is; other layers keep all."""
    state = decode.create(model, [AMPLE], recent_tokens=8)
    state = decode.join(model, state, 0, PROMPT[:200])
    np.testing.assert_array_equal(held_tokens(state)[:, 0], [11, 200, 11])
    centroids = np.asarray(state.caches[0].centroids.count).sum()
    for _ in range(60):
        _, state = decode.step(model, state)
        held = held_tokens(state)
        for layer, window in enumerate(WINDOWS):
            if window is not None:
                assert (held[layer] < window + state.caches[0].recent_tokens).all()
    assert (held[1] == 260).all()
    assert np.asarray(state.caches[0].centroids.count).sum() == centroids == 0


def test_a_tight_budget_is_one_price_for_all_layers(model):
    """Evicted tokens of a window join nothing; the bytes stay; other requests change no bit."""
    rows = []
    for other in (0, 200):
        state = decode.create(model, [2 * TIGHT], num_requests=2, recent_tokens=8)
        state = decode.join(model, state, 0, PROMPT[:200], capacity=256)
        state = decode.join(model, state, 1, PROMPT[-50:], capacity=256)
        if other:
            state = decode.tell(model, state, 1, PROMPT[:other])
        tokens = []
        for _ in range(30):
            new, state = decode.step(model, state)
            tokens.append(int(new[0]))
            assert state.nbytes[0] <= 2 * TIGHT
        cache = state.caches[0]
        own = np.asarray(cache.centroids.count)[: cache.units_per_request]
        own = own.reshape(len(WINDOWS), -1).sum(axis=1)
        assert own[1] > 0
        assert (own[[0, 2]] == 0).all()
        rows.append((tokens, np.asarray(cache.arena.count[: cache.units_per_request])))
    assert rows[0][0] == rows[1][0]
    np.testing.assert_array_equal(rows[0][1], rows[1][1])


def test_a_second_turn_sees_what_its_windows_reach(model):
    """Its first tokens still see what its last ones do not."""
    state = decode.create(model, [AMPLE], recent_tokens=8)
    state = decode.join(model, state, 0, PROMPT[:60])
    first = [int(state.tokens[0])]
    for _ in range(5):
        new, state = decode.step(model, state)
        first.append(int(new[0]))
    turn = PROMPT[100:170]  # more than a piece
    state = decode.tell(model, state, 0, turn)
    second = [int(state.tokens[0])]
    for _ in range(12):
        new, state = decode.step(model, state)
        second.append(int(new[0]))
    whole = np.concatenate([PROMPT[:60], first, turn])
    assert regret(PROMPT[:60], first) <= ROUNDING
    assert regret(whole, second) <= ROUNDING


@pytest.mark.parametrize("num_devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_questions_of_one_context(model, num_devices):
    """They see of the context what is in their windows, which moves on as they are answered."""
    reserve = Reserve(2, 80)
    budgets = [2 * AMPLE // num_devices] * num_devices
    context = decode.read(model, PROMPT[:150], budgets, reserve=reserve)
    assert all(n <= b for n, b in zip(context.nbytes, budgets, strict=True))
    kept = context.plan.kept.sum(axis=2)
    np.testing.assert_array_equal(kept[:, 0], [11, 150, 11])
    questions = [PROMPT[200:203], PROMPT[210:230]]
    found = decode.generate(model, questions, budgets, max_new_tokens=45, context=context)
    for tokens, question in zip(found, questions, strict=True):
        whole = np.concatenate([PROMPT[:150], question])
        assert regret(whole, tokens) <= ROUNDING


def test_a_saved_state_keeps_its_positions(model, tmp_path):
    state = decode.create(model, [AMPLE], recent_tokens=8)
    state = decode.join(model, state, 0, PROMPT[:100])
    found = [int(state.tokens[0])]
    for _ in range(5):
        new, state = decode.step(model, state)
        found.append(int(new[0]))
    decode.save(tmp_path / "state", model, state)
    state = decode.restore(tmp_path / "state", model, [AMPLE])
    assert state.nbytes[0] <= AMPLE
    for _ in range(20):
        new, state = decode.step(model, state)
        found.append(int(new[0]))
    assert regret(PROMPT[:100], found) <= ROUNDING


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"windows": (1 << 14, None, None)}, r"layer 0 has window = 16384: .* up to 16383"),
        ({"windows": (0, None, None)}, "window is 0"),
        ({"soft_cap": 0.0}, "soft_cap is 0"),
    ],
)
def test_what_cannot_be_kept_is_named(changes, names):
    with pytest.raises(ValueError, match=names):
        decode.create(models.model(models.specs(**changes)), [AMPLE])
