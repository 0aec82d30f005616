"""One run: the variance to come by attention over what an arm remembers of the past year."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments.finance import data, histories
from experiments.finance.data import Market
from experiments.finance.histories import Worth
from experiments.harness import logs, runs, training
from experiments.models.packed_encoder import Packed, pack, places

BATCH, PEAK_RATE, HEADS, HIDDEN = 128, 5e-3, 8, 32
_ROUNDED = 256
SURGE, ONSET = (
    0.9,
    5,
)  # quantile of the year before that a surge is above; days without one before it


class Material(NamedTuple):
    """One market, ready for all runs."""

    market: Market
    worth: Worth


@functools.cache
def prepare(name: str) -> Material:
    """Days and what they are worth, by the training part alone.

    Raises:
      ValueError: a package that cannot be fetched.
    """
    market = data.read(name)
    return Material(market, Worth.of(market))


class Forecaster(nnx.Module):
    """Learned queries that attend to remembered days; a mean over several days counts as so many."""

    def __init__(self, mean: float, scale: float, rngs: nnx.Rngs):
        self.mean, self.scale = mean, scale
        self.keys = nnx.Linear(4, HIDDEN, rngs=rngs)
        self.queries = nnx.Linear(HIDDEN, HEADS, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(HEADS, 1, rngs=rngs)

    def __call__(self, batch: Packed) -> Array:
        """[B] the log variance to come."""
        value, span, ago = (batch.fields[x] for x in ("value", "span", "ago"))
        value = (value - self.mean) / self.scale
        near = jnp.log(jnp.maximum(ago, 0.5)) / 2
        features = jnp.stack([near, near**2, jnp.log(jnp.maximum(span, 1.0)), value], axis=-1)
        logits = self.queries(jnp.tanh(self.keys(features)))
        logits += jnp.log(jnp.maximum(span, 1.0))[:, None]
        number = len(batch.labels)
        top = jax.ops.segment_max(logits, batch.example, number)
        weight = jnp.exp(logits - top.at[batch.example].get(mode="fill", fill_value=jnp.inf))
        total = jax.ops.segment_sum(weight, batch.example, number)
        seen = jax.ops.segment_sum(weight * value[:, None], batch.example, number)
        return self.out(seen / jnp.maximum(total, 1e-9))[:, 0] * self.scale + self.mean


def loss_of(model: Forecaster, batch: Packed, key: Array) -> Array:
    """Mean squared error of the days that are there."""
    del key
    there = batch.labels > -1e8
    return jnp.sum(jnp.where(there, (model(batch) - batch.labels) ** 2, 0)) / jnp.sum(there)


def run(
    arm: str, part: float, seed: int, market: str, epochs: int, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """R² of the held-out days, and how well surges are foretold."""
    own, worth = prepare(market)
    train_days, test_days = own.days(test=False), own.days(test=True)
    train, test = (budgeted(own, worth, days, arm, part) for days in (train_days, test_days))
    steps = training.orders(len(train), BATCH, epochs, seed)
    rows = training.rows(len(test), BATCH)
    size = max(places(train, steps, _ROUNDED), places(test, rows, _ROUNDED))

    def packed(x: list[dict[str, np.ndarray]], days: np.ndarray, row: np.ndarray) -> Packed:
        y = own.y[days[row]].astype(np.float32)
        found = pack([x[i] for i in row], y, size, BATCH)
        labels = np.array(found.labels)
        labels[len(row) :] = -1e9
        return found._replace(labels=labels)

    model = Forecaster(worth.mean, float(own.x[train_days].std()), nnx.Rngs(seed))
    batches = (packed(train, train_days, row) for row in steps)
    with logs.writer("finance", f"{market}-{arm}-{part}", seed) as log:
        training.train(model, loss_of, batches, len(steps), PEAK_RATE, seed, log, advance)
    predict = nnx.jit(lambda model, batch: model(batch))
    said = np.concatenate([
        np.asarray(predict(model, packed(test, test_days, row)))[: len(row)] for row in rows
    ])  # fmt: skip
    lost = (said - own.y[test_days]) ** 2
    explained = 1 - lost / np.mean(_guessed(own))
    figures = {
        "R²": float(explained.mean()),
        "tokens a day": float(np.mean([len(x["span"]) for x in test])),
    }
    return {
        "figures": figures | surges(own, test_days, said),
        "cases": {"R²": runs.packed(explained)},
    }


def budgeted(
    market: Market, worth: Worth, days: np.ndarray, arm: str, part: float
) -> list[dict[str, np.ndarray]]:
    """What is remembered on each of the days, the budget shared over `BATCH` of them."""
    found = []
    for start in range(0, len(days), BATCH):
        history = histories.of_days(market, days[start : start + BATCH])
        total = int(part * history.size)
        found += histories.ARMS[arm](history, worth, total)
    return found


def surges(market: Market, days: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """How well alerts foretell that what comes is above nine tenths of the year before.

    There are as many alerts as surges: the days whose forecast is the highest over that level.

    Returns:
      precision (which is also the recall), and the mean lead in days of surges that begin: how many of
      the days before the first of them had an alert without a break.
    """
    level = np.quantile(histories.of_days(market, days), SURGE, axis=1)
    surge = market.y[days] > level
    margin = said - level
    alert = margin >= np.sort(margin)[-max(int(surge.sum()), 1)]
    leads = []
    for day in range(ONSET, len(days)):
        if surge[day] and not surge[day - ONSET : day].any():
            before = alert[day - ONSET : day + 1][::-1]
            leads.append(int(np.argmin(before)) if not before.all() else ONSET + 1)
    return {
        "precision of alerts": float(surge[alert].mean()),
        "lead of alerts, days": float(np.mean(leads)) if leads else 0.0,
    }


def har(market: Market) -> dict[str, float]:
    """The baseline: least squares on the mean of the last day, week and month (Corsi 2009)."""
    features = []
    for test in (False, True):
        history = histories.of_days(market, market.days(test))
        features.append(
            np.stack([history[:, -n:].mean(1) for n in (1, 5, 22)] + [np.ones(len(history))], 1)
        )
    fitted, *_ = np.linalg.lstsq(features[0], market.y[market.days(False)], rcond=None)
    return _of_forecast(market, features[1] @ fitted)


def last_value(market: Market) -> dict[str, float]:
    """The other baseline: tomorrow as today."""
    return _of_forecast(market, market.x[market.days(True)])


def _of_forecast(market: Market, said: np.ndarray) -> dict[str, float]:
    days = market.days(True)
    y = market.y[days]
    r2 = 1 - np.mean((said - y) ** 2) / np.mean(_guessed(market))
    return {"R²": float(r2)} | surges(market, days, said)


def _guessed(market: Market) -> np.ndarray:
    """Squared errors of the training days' mean on the held-out days, against which R² is."""
    return (market.y[market.days(True)] - market.y[market.days(False)].mean()) ** 2
