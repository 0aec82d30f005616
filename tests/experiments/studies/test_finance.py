"""Finance: days line up, months at four resolutions, baselines by scikit-learn, alerts by hand."""

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from experiments.finance import experiment, histories
from experiments.finance.data import YEAR, Market
from experiments.finance.histories import COSTS, MONTH, MONTHS, Worth


def a_market(days=900):
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(0, 0.1, days)) + rng.normal(0, 0.3, days)
    y = np.append(x[1:], np.nan)
    return Market(x, y, 700)


def test_nothing_of_what_is_held_out_is_trained_on():
    market = a_market()
    train, test = market.days(test=False), market.days(test=True)
    assert train[0] == YEAR - 1
    assert train[-1] + 1 < test[0]  # the last target is before the first held-out day
    assert test[-1] == len(market.y) - 2
    history = histories.of_days(market, test)
    np.testing.assert_array_equal(history[:, -1], market.x[test])
    np.testing.assert_array_equal(history[5, 0], market.x[test[5] - YEAR + 1])


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", list(histories.ARMS))
def test_a_budget_is_spent_and_never_exceeded(arm, part):
    market = a_market()
    history = histories.of_days(market, market.days(test=True)[:20])
    total = int(part * history.size)
    found = histories.ARMS[arm](history, Worth.of(market), total)
    used = sum(len(x["span"]) for x in found)
    if arm == "full":
        assert used == history.size
    else:
        assert total - MONTH < used <= total


def test_tokens_are_the_means_of_their_days():
    history = np.random.default_rng(1).random(YEAR)
    level = np.arange(MONTHS) % len(COSTS)
    found = histories.tokens_of(history, level)
    assert len(found["span"]) == sum(COSTS[x] for x in level)
    for value, span, ago in zip(found["value"], found["span"], found["ago"], strict=True):
        first = round(YEAR - ago - span / 2)
        assert value == pytest.approx(history[first : first + int(span)].mean(), rel=1e-5)


def test_values_never_fall_with_the_level():
    market = a_market()
    history = histories.of_days(market, market.days(test=True)[:20])
    value = histories.values(history, Worth.of(market))
    assert np.all(np.diff(value, axis=-1) >= 0)
    worth = Worth.of(market)
    whole = worth.w * (history - worth.mean) ** 2
    np.testing.assert_allclose(value[..., -1].sum(-1), whole.sum(-1))


def test_the_baseline_is_scikit_learns():
    market = a_market()

    def features(days):
        return np.array([[market.x[d - n + 1 : d + 1].mean() for n in (1, 5, 22)] for d in days])

    train, test = market.days(False), market.days(True)
    fitted = LinearRegression().fit(features(train), market.y[train])
    errors = (fitted.predict(features(test)) - market.y[test]) ** 2
    guessed = (market.y[test] - market.y[train].mean()) ** 2
    assert experiment.har(market)["R²"] == pytest.approx(1 - errors.sum() / guessed.sum())


def test_alerts_that_know_the_future_are_right_and_early_ones_lead():
    market = a_market()
    days = market.days(True)
    known = experiment.surges(market, days, market.y[days])
    assert known["precision of alerts"] == 1
    assert known["lead of alerts, days"] >= 1
    never = experiment.surges(market, days, -market.y[days])
    assert never["precision of alerts"] < 0.5
