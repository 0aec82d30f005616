"""Requests of any length within given bytes: as dense decoding where all fits, and each by itself."""

import jax
import numpy as np
import pytest

from jbalance import decode
from jbalance.decode import Sampling, devices
from tests.decode.conftest import PROMPT
from tests.support.small_models import VOCAB

AMPLE, TIGHT = 90_000, 26_000  # bytes a request: everything at 8 bits; a third of it
LENGTHS = (1, 14, 200, 256)  # the likeliest two of 13 differ by less than 8 bits tell apart
PROMPTS = [PROMPT[i : i + n] for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("shares", [(1.0,), (0.7, 0.3)])
def test_an_ample_budget_decodes_as_dense_attention_does(decoder, dense, shares):
    """Four prompts of different lengths, on one device and on two of unequal memory."""
    budgets = [int(share * AMPLE * len(PROMPTS)) for share in shares]
    found = decode.generate(decoder, PROMPTS, budgets, max_new_tokens=12)
    for tokens, prompt in zip(found, PROMPTS, strict=True):
        np.testing.assert_array_equal(tokens, dense(prompt, 12))
    assert len({tuple(x) for x in map(tuple, found)}) == len(PROMPTS)  # the model tells them apart


def test_requests_come_and_go_in_constant_bytes_and_one_program(decoder):
    """Bytes at every step, compilations, and each request's tokens as if it had been alone."""
    rng = np.random.default_rng(3)
    prompts = [PROMPT[: rng.integers(1, 200)] for _ in range(12)]
    steps = [int(n) for n in rng.integers(1, 30, len(prompts))]
    budget, seen, places = 3 * TIGHT, [], 3
    alone = [
        decode.generate(decoder, [p], [TIGHT], max_new_tokens=n)[0]
        for p, n in zip(prompts[:2], steps[:2], strict=True)
    ]
    before = devices._attend_token._cache_size()

    def on_token(prompt, token):
        del token
        seen.append(prompt)

    found = decode.generate(
        decoder,
        prompts,
        [budget],
        max_new_tokens=steps,
        num_requests=places,
        on_token=on_token,
    )
    assert [len(x) for x in found] == steps
    assert sorted(seen) == sorted(i for i, n in enumerate(steps) for _ in range(n))
    assert devices._attend_token._cache_size() == before + 1
    del alone


def test_what_others_do_changes_no_bit_of_a_request(decoder):
    """The same request beside one that floods its own share, and beside none that is active."""
    rows = []
    for other in (None, PROMPT[:250]):
        state = decode.create(decoder, [2 * TIGHT], num_requests=2)
        state = decode.join(decoder, state, 0, PROMPT[:150], capacity=256)
        state = decode.join(decoder, state, 1, PROMPT[-40:], capacity=256)
        if other is not None:
            state = decode.tell(decoder, state, 1, other[:100])
        tokens = []
        for _ in range(20):
            new, state = decode.step(decoder, state)
            tokens.append(int(new[0]))
            assert max(state.nbytes) <= 2 * TIGHT
        cache = state.caches[0]
        n = cache.units_per_request
        energy = np.asarray(cache.recent_energy[:n])
        rows.append((tokens, energy, np.asarray(cache.arena.count[:n])))
    assert rows[0][0] == rows[1][0]
    for a, b in zip(rows[0][1:], rows[1][1:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_second_turn_goes_on_from_the_first(decoder, dense):
    state = decode.create(decoder, [AMPLE])
    state = decode.join(decoder, state, 0, PROMPT[:60])
    first = [int(state.tokens[0])]
    for _ in range(3):
        new, state = decode.step(decoder, state)
        first.append(int(new[0]))
    np.testing.assert_array_equal(first, dense(PROMPT[:60], 4))
    turn = PROMPT[100:130]
    state = decode.tell(decoder, state, 0, turn)
    second = [int(state.tokens[0])]
    for _ in range(3):
        new, state = decode.step(decoder, state)
        second.append(int(new[0]))
    whole = np.concatenate([PROMPT[:60], first, turn])
    np.testing.assert_array_equal(second, dense(whole, 4))


def test_a_place_that_was_left_is_as_new(decoder):
    state = decode.create(decoder, [2 * TIGHT], num_requests=2)
    empty = [np.asarray(x) for x in jax.tree.leaves(state.caches[0].centroids)]
    state = decode.join(decoder, state, 1, PROMPT[:200], capacity=256)
    assert int(state.caches[0].held_pages[1]) > 0
    state = decode.leave(state, 1)
    assert int(state.caches[0].held_pages.sum()) == 0
    for old, new in zip(empty, jax.tree.leaves(state.caches[0].centroids), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not bool(state.active.any())


def test_memory_is_shared_by_weight(decoder):
    state = decode.create(decoder, [4 * TIGHT], num_requests=2)
    state = decode.join(decoder, state, 0, PROMPT[:256], weight=1.0)
    assert state.allowances[0][0] == state.caches[0].arena.num_pages
    state = decode.join(decoder, state, 1, PROMPT[:256], weight=3.0)
    pages = np.asarray(state.caches[0].held_pages)
    assert state.allowances[0].sum() == state.caches[0].arena.num_pages
    assert (pages <= state.allowances[0]).all()
    assert state.allowances[0][1] == pytest.approx(3 * state.allowances[0][0], abs=2)


def test_stop_tokens_and_seeds(decoder, dense):
    prompt, want = PROMPT[:13], dense(PROMPT[:13], 12)
    stop = int(want[3])
    (found,) = decode.generate(decoder, [prompt], [AMPLE], max_new_tokens=12, stop_tokens=[stop])
    np.testing.assert_array_equal(found, want[: list(want).index(stop) + 1])
    warm = [Sampling(temperature=1.5, seed=s) for s in (1, 1, 2)]
    a, b, c = decode.generate(decoder, [prompt] * 3, [3 * AMPLE], max_new_tokens=12, sampling=warm)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda d: decode.generate(d, [], [AMPLE], max_new_tokens=1), "prompts is empty"),
        (lambda d: decode.generate(d, [[1]], [AMPLE], max_new_tokens=0), "max_new_tokens is 0"),
        (lambda d: decode.generate(d, [[]], [AMPLE], max_new_tokens=1), r"prompts\[0\] is empty"),
        (lambda d: decode.create(d, [100]), "budget_bytes is 100"),
        (lambda d: decode.create(d, [AMPLE, AMPLE], devices=jax.devices()[:1]), "2 entries for 1"),
        (lambda d: decode.leave(decode.create(d, [AMPLE]), 1), "request is 1"),
        (lambda d: decode.tell(d, decode.create(d, [AMPLE]), 0, [1]), "its place is free"),
    ],
)
def test_bad_input_is_named(decoder, call, names):
    with pytest.raises(ValueError, match=names):
        call(decoder)


def test_tokens_of_the_vocabulary(decoder):
    (found,) = decode.generate(
        decoder, [PROMPT[:5]], [AMPLE], max_new_tokens=5, sampling=Sampling(1.0, top_k=3)
    )
    assert ((found >= 0) & (found < VOCAB)).all()
