"""The loop around training: keeps what validates better, undoes the rest, and ends."""

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
    assert len(calls) == len(out.rounds) == 4
    assert out.settings == START


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
        ({"max_rounds": 0}, "max_rounds"),
        ({"patience": 0}, "patience"),
    ],
)
def test_bad_input_names_itself(change, message):
    given = {"ranges": RANGES} | change
    with pytest.raises(ValueError, match=message):
        tune(lambda s, _: s, lambda s, _: 1.0, 0, START, **given)
