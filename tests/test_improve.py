"""The loop around training: keeps the changes that validate better than no change, and ends."""

import math

import numpy as np
import pytest

from jbalance.tune import tune

RANGES = {"temperature": (0.1, 10.0), "budget": (0.25, 1.0)}
START = {"temperature": 1.0, "budget": 0.5, "rate": 3.0}


def far_from(best):
    """A loss that is least at some settings, and does not depend on the state."""
    return lambda state, s: sum(np.log(s[name] / at) ** 2 for name, at in best.items())


def test_it_finds_settings_that_validate_better_and_stays_within_their_ranges():
    seen = []

    def train(state, settings):
        seen.append(dict(settings))
        return state + 1

    loss = far_from({"temperature": 5.0, "budget": 3.0})
    out = tune(train, loss, 0, START, RANGES, max_rounds=30)
    assert abs(np.log(out.settings["temperature"] / 5.0)) < np.log(1.5)
    assert out.settings["budget"] == 1.0
    assert out.settings["rate"] == 3.0
    assert out.loss == min(r.loss for r in out.rounds)
    assert all(0.1 <= s["temperature"] <= 10 and 0.25 <= s["budget"] <= 1 for s in seen)
    # The state is that of the rounds that were kept.
    assert out.state == sum(r.kept for r in out.rounds)


def test_it_stops_when_nothing_helps():
    calls = []
    out = tune(lambda s, _: s, lambda s, _: calls.append(1) or 1.0, 0, START, RANGES, patience=3)
    assert len(out.rounds) == 4
    assert len(calls) == 1 + 2 * 3
    assert out.settings == START


@pytest.mark.parametrize("start", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_progress_of_training_is_no_merit_of_a_setting(start):
    """Every round lowers the loss, and most with a budget of 0.5."""

    def train(loss, settings):
        return loss * (0.8 + 0.02 * np.log(settings["budget"] / 0.5) ** 2)

    out = tune(
        train, lambda loss, _: loss, 1.0, {"budget": start}, {"budget": (0.1, 1.0)}, patience=6
    )
    assert out.settings["budget"] == pytest.approx(0.5, rel=0.15)
    assert any(
        not r.kept and r.loss < 1 for r in out.rounds
    )  # it got better, but no thanks to that
    assert out.loss == min(min(r.loss, r.against) for r in out.rounds) == out.state


def test_both_train_from_the_same_state_for_as_many_rounds():
    seen = []

    def train(state, settings):
        seen.append((state, settings["budget"]))
        return (*state, settings["budget"])

    out = tune(
        train,
        lambda state, _: sum(abs(x - 0.5) for x in state) - len(state),
        (),
        {"budget": 1.0},
        {"budget": (0.1, 1.0)},
        max_rounds=7,
    )
    assert len(seen) == 1 + 2 * 6
    for (before, as_it_is), (same, tried) in zip(seen[1::2], seen[2::2], strict=True):
        assert before == same
        assert as_it_is != tried
    assert len(out.state) == 7
    assert [r.settings["budget"] for r in out.rounds][1:] == [tried for _, tried in seen[2::2]]


def test_no_change_is_tried_twice_in_vain():
    best = {"budget": 0.25}
    out = tune(lambda s, _: s, far_from(best), 0, {"budget": 0.25}, {"budget": (0.25, 1.0)})
    tried = [r.settings["budget"] for r in out.rounds[1:]]
    np.testing.assert_allclose(tried, 0.25 * 1.5 ** (0.5 ** np.arange(4)))


def test_overfitting_rounds_are_undone_but_their_settings_compared():
    def train(state, settings):
        return state + 1

    def validate(state, settings):
        return state**2 + abs(np.log(settings["budget"] / 0.2))

    out = tune(train, validate, 0, {"budget": 1.0}, {"budget": (0.1, 1.0)})
    assert out.state == 1
    assert out.settings["budget"] == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_any_number_is_better_than_nan(first):
    def validate(state, settings):
        return first if settings["budget"] >= 0.5 else 3.0 - settings["budget"]

    out = tune(
        lambda s, _: s + 1, validate, 0, {"budget": 0.5}, {"budget": (0.25, 1.0)}, max_rounds=9
    )
    assert math.isfinite(out.loss)
    assert out.settings["budget"] < 0.5
    assert out.rounds[2].kept
    assert math.isnan(out.rounds[2].against) == math.isnan(first)
    losses = iter([math.nan, math.nan, 2.0, math.nan, 1.0])
    alone = tune(lambda s, _: s + 1, lambda *_: next(losses), 0, START, {}, max_rounds=5)
    assert (alone.loss, alone.state) == (1.0, 3)


def test_settings_that_may_not_change_only_train_on():
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 3.05])
    out = tune(lambda s, _: s + 1, lambda s, _: next(losses), 0, START, {}, patience=4)
    assert out.loss == 3.0
    assert out.state == 3
    assert len(out.rounds) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranges": {"floor": (0.1, 1.0)}}, "ranges has 'floor'"),
        ({"ranges": {"budget": (0.6, 1.0)}}, r"settings\['budget'\] is 0.5"),
        ({"ranges": {"budget": (0.1, np.inf)}}, r"ranges\['budget'\] is inf"),
        ({"max_rounds": 0}, "max_rounds"),
        ({"patience": 0}, "patience"),
    ],
)
def test_bad_input_names_itself(change, message):
    given = {"ranges": RANGES} | change
    with pytest.raises(ValueError, match=message):
        tune(lambda s, _: s, lambda s, _: 1.0, 0, START, **given)
