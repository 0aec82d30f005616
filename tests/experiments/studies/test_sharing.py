"""Several tasks on one set of resources: whole amounts, within memory, that follow importance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from experiments.sharing import data, experiment, model
from experiments.sharing.data import NONE, ROW_BYTES, Task, Texts
from experiments.sharing.experiment import ARMS, BATCH, JOINS, LEAVES, Sizes

SIZES = Sizes(4, None, 0.5)
NUMBERS = (120, 40, 60, 80)


@pytest.fixture(scope="module")
def every():
    """Tasks whose label is told by a token of their own; its presence among noise."""
    rng = np.random.default_rng(0)

    def texts(task, number):
        positive = rng.integers(0, 2, number).astype(np.int32)
        ids = np.full((number, data.MOST_TOKENS), NONE, data.DTYPE)
        ids[:, :6] = rng.integers(100, 160, (number, 6))
        ids[np.arange(number), rng.integers(0, 6, number)] = 10 + 2 * task + positive
        return Texts(ids, positive)

    return tuple(
        Task.of(texts(i, number), texts(i, 40), texts(i, 40)) for i, number in enumerate(NUMBERS)
    )


def after(every, arm, rounds, seed=0):
    state = experiment.begun(seed)
    for _ in range(rounds):
        settings = {"floor": arm.floor, "rate": 5e-3}
        state = experiment.advanced(state, arm, every, SIZES, seed, settings)
    return state


def test_memory_and_batch_are_divided_among_those_that_are_there(every):
    state = after(every, ARMS["volume"], 3)
    capacity = int(SIZES.part * sum(NUMBERS))
    for i, (left, given) in enumerate(zip(state.left, state.given, strict=True)):
        active = experiment.active_in(i, SIZES.rounds)
        assert given.status == 0
        assert given.examples.sum() == BATCH
        assert not np.asarray(given.examples)[~active].any()
        assert not np.asarray(given.cache)[0][~active].any()
        assert given.cache.sum() <= capacity
        assert 0 <= left.total_remaining <= capacity
    assert [len(x) for x in state.held] == np.asarray(state.given[-1].cache)[0].tolist()
    # In proportion to the volumes of those that are there: 120, 40 and 80 in the first round.
    first = state.given[0]
    np.testing.assert_allclose(
        first.alpha[np.array([0, 1, 3])], np.array([120, 40, 80]) / 240, rtol=1e-6
    )


def test_shift_is_that_of_the_tokens_of_those_that_are_there(every):
    """Padding left out; a task is the nearer to all the larger a part of them it is."""
    counts = np.zeros((len(every), data.VOCABULARY))
    for row, task in zip(counts, every, strict=True):
        for token in task.train.ids[task.train.ids != NONE]:
            row[token] += 1
    active = experiment.active_in(0, SIZES.rounds)
    all_of_them = counts[active].sum(axis=0)
    want = [jensenshannon(row, all_of_them, base=2) ** 2 for row in counts]
    np.testing.assert_allclose(experiment.shift_of(every, active), want, rtol=1e-4)
    first = after(every, ARMS["shift"], 1).given[0]
    np.testing.assert_allclose(first.alpha, want * active / np.sum(want * active), rtol=1e-4)


def test_who_ends_gives_memory_back_to_who_begins(every):
    state = after(every, ARMS["even"], 3)
    before, now = (np.asarray(state.given[i].cache)[0] for i in (1, 2))
    assert before[LEAVES] > 0 == before[JOINS]
    assert now[JOINS] > 0 == now[LEAVES]


def test_rows_grow_by_new_ones_and_lose_the_oldest():
    rng = np.random.default_rng(0)
    held = np.array([3, 7, 5])
    np.testing.assert_array_equal(experiment._grown(held, 2, 10, rng), [7, 5])
    grown = experiment._grown(held, 6, 10, rng)
    np.testing.assert_array_equal(grown[:3], held)
    assert len(set(grown.tolist())) == 6


def test_the_bias_raises_tokens_that_tell_a_class(every):
    state = after(every, ARMS["loss, rescaled"], 1)
    bias = np.asarray(state.token_bias)
    assert bias[[10, 11]].min() > bias[100:160].mean() + 0.5
    assert np.isfinite(bias).all()
    assert bias[5] == 0  # in no text: the mean


def test_tasks_are_learned_and_figures_are_those_of_the_cases(every, monkeypatch):
    monkeypatch.setattr(data, "tasks", lambda most: every)
    found = experiment.run("loss", 0, SIZES._replace(rounds=6), lambda: None)
    assert found["figures"]["accuracy"] > 0.8
    cases = experiment.runs.unpacked("", found["cases"]["accuracy"])
    np.testing.assert_allclose(cases.mean(), found["figures"]["accuracy"], rtol=1e-5)
    most = int(SIZES.part * sum(NUMBERS)) * ROW_BYTES / 1000
    assert found["figures"]["kB of texts"] <= most


def test_tuning_keeps_settings_in_their_ranges(every, monkeypatch):
    monkeypatch.setattr(data, "tasks", lambda most: every)
    found = experiment.run("volume, tuned", 0, SIZES, lambda: None)["figures"]
    for name, (low, high) in experiment.RANGES.items():
        assert low <= found[name] <= high


def test_padding_says_nothing(every):
    parameters, _ = model.init(0)
    bias = np.zeros(data.VOCABULARY, np.float32)
    ids, task = every[0].train.ids[:5], np.zeros(5, np.int32)
    whole = model.logits(parameters, bias, model.jnp.asarray(ids), task)
    short = model.logits(parameters, bias, model.jnp.asarray(ids[:, :6]), task)
    np.testing.assert_allclose(whole, short, rtol=1e-5)
