"""Texts in lines, an LSTM that begins anew with each, attention over each text's own states."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.text_classification import lstm
from experiments.text_classification.lstm import BATCH, HIDDEN, LINES, WIDTH, Room, Text
from experiments.text_classification.tokens import Worth

WORDS = 50


def some(number=BATCH - 3):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, WORDS, rng.integers(2, 12)).astype(np.int32) for _ in range(number)]
    return ids, Worth(rng.random(WORDS).astype(np.float32), np.ones(WORDS))


def packed(ids, attended=None):
    attended = attended or [np.ones(len(x), bool) for x in ids]
    texts = [Text(x, mask) for x, mask in zip(ids, attended, strict=True)]
    lines = lstm.lines_of(texts)
    return lstm.pack(texts, lines, np.ones(len(ids), np.int32), Room.of([texts], [lines])), lines


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", ["full", "uniform", "proportional", "ladder", "states"])
def test_a_budget_is_of_tokens_or_of_states(arm, part):
    ids, worth = some()
    texts = lstm.budgeted(ids, worth, arm, part)
    every = sum(map(len, ids))
    read, attended = (sum(map(len, side)) for side in zip(*texts, strict=True))
    states = sum(int(x.attended.sum()) for x in texts)
    assert read == attended == (every if arm in ("full", "states") else int(part * every))
    assert states == (every if arm == "full" else int(part * every))
    assert min(x.attended.sum() for x in texts) >= 1


def test_every_token_stands_in_a_line_once_and_lines_are_even():
    ids, _ = some()
    batch, lines = packed(ids)
    assert sorted(i for line in lines for i in line) == list(range(len(ids)))
    for i, x in enumerate(ids):
        np.testing.assert_array_equal(batch.ids.reshape(-1)[batch.at[batch.example == i]], x)
    assert batch.ids.shape == (LINES, max(sum(len(ids[i]) for i in line) for line in lines))
    assert batch.ids.shape[1] <= sum(map(len, ids)) / LINES + max(map(len, ids))
    assert (batch.labels == -1).sum() == BATCH - len(ids)


def test_a_line_is_read_as_its_texts_alone():
    ids, _ = some()
    batch, _ = packed(ids)
    cell = nnx.OptimizedLSTMCell(WIDTH, HIDDEN, rngs=nnx.Rngs(0))
    embedded = np.random.default_rng(1).normal(size=(WORDS, WIDTH)).astype(np.float32)
    states = np.asarray(lstm.read(cell, embedded[batch.ids], batch.first)).reshape(-1, HIDDEN)
    kernels = [np.asarray(x.kernel[...], np.float64) for x in (cell.dense_i, cell.dense_h)]
    bias = np.asarray(cell.dense_h.bias[...], np.float64)
    for i in (0, 7, len(ids) - 1):
        c, h = np.zeros(HIDDEN), np.zeros(HIDDEN)
        wanted = []
        for token in ids[i]:
            y = embedded[token] @ kernels[0] + h @ kernels[1] + bias
            inward, forget, new, out = np.split(y, 4)
            c = c / (1 + np.exp(-forget)) + np.tanh(new) / (1 + np.exp(-inward))
            h = np.tanh(c) / (1 + np.exp(-out))
            wanted.append(h)
        found = states[batch.at[batch.example == i]]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_attention_is_the_mean_of_a_texts_own_states():
    rng = np.random.default_rng(2)
    said, states = rng.normal(size=8).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    example = np.array([0, 0, 2, 2, 2, 3, 3, 3])  # nobody's: 3; no states: 1
    found = np.asarray(lstm.attend(said, states, example, 3))
    for i in (0, 2):
        weight = np.exp(said[example == i])
        wanted = weight @ states[example == i] / weight.sum()
        np.testing.assert_allclose(found[i], wanted, rtol=1e-5)
    np.testing.assert_array_equal(found[1], 0)


def test_a_state_that_is_not_attended_to_was_still_read():
    ids, _ = some(8)
    model = lstm.Reader(WORDS, nnx.Rngs(0))
    said = jax.jit(lambda batch: model(batch))
    only_last = [np.arange(len(x)) == len(x) - 1 for x in ids]
    first = np.asarray(said(packed(ids, only_last)[0]))
    changed = [np.concatenate([(x[:1] + 1) % WORDS, x[1:]]) for x in ids]
    assert (np.asarray(said(packed(changed, only_last)[0]))[:8] != first[:8]).all()
