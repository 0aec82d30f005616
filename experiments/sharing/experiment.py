"""One run: rounds of training, in each of which memory and batch are divided among the tasks anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import runs
from experiments.sharing import data, model
from experiments.sharing.data import ROW_BYTES, TASKS, Task, Texts
from jbalance import importance, rescale, resources, tasks, tune
from jbalance.tasks import TaskAmounts
from jbalance.types import Resources

BATCH, STEPS = 64, 40  # of a round
LEAVES, JOINS = TASKS.index("product"), TASKS.index("tweets")  # in the middle of a run
AGED = 4  # a row in so many gives way in each round, the oldest first
SAMPLE = 256  # kept texts of a task that its tokens' association is measured on
WEIGHTS = {  # of volume, loss and shift
    "even": (0.0, 0.0, 0.0),
    "volume": (1.0, 0.0, 0.0),
    "loss": (0.0, 1.0, 0.0),
    "both": (0.5, 0.5, 0.0),
    "shift": (0.0, 0.0, 1.0),
}
RANGES = {"floor": (0.02, 0.3), "rate": (1e-3, 2e-2)}


class Sizes(NamedTuple):
    """Of a study."""

    rounds: int
    most: int | None  # texts of each part of a task; None for all
    part: float  # of all training texts that memory holds


class Arm(NamedTuple):
    """How what there is gets divided.

    Attributes:
      by: what importance is: "even", "volume" (training texts), "loss" (of the validation texts),
        "both" of these indicators, each by its largest, or "shift" (how far a task's tokens are from
        those of all that are there).
      floor: least share of a task.
      rescaled: whether attention's logits have the bias of the tasks' shares.
      tuned: whether `tune` changes the floor and the rate between rounds.
      all_rows: whether memory holds all training texts.
    """

    by: str
    floor: float = 0.0
    rescaled: bool = False
    tuned: bool = False
    all_rows: bool = False


ARMS = {
    "all texts": Arm("even", all_rows=True),
    "even": Arm("even"),
    "volume": Arm("volume"),
    "volume, floor": Arm("volume", 0.25),
    "volume, tuned": Arm("volume", 0.1, tuned=True),
    "loss": Arm("loss"),
    "loss, rescaled": Arm("loss", rescaled=True),
    "both": Arm("both"),
    "shift": Arm("shift"),
}


@dataclasses.dataclass(frozen=True)
class State:
    """Of a run after some rounds; rounds make new ones."""

    round: int
    trained: tuple[Any, Any]
    held: tuple[np.ndarray, ...]  # of each task, its rows that memory holds, the oldest first
    loss: np.ndarray  # [N] of validation texts
    token_bias: jax.Array  # [V]
    left: tuple[Resources, ...] = ()  # of each round, before its division
    given: tuple[TaskAmounts, ...] = ()


def begun(seed: int) -> State:
    """Before the first round."""
    none = (np.zeros(0, np.int64),) * len(TASKS)
    return State(0, model.init(seed), none, np.ones(len(TASKS)), jnp.zeros(data.VOCABULARY))


def active_in(number: int, rounds: int) -> np.ndarray:
    """[N] bool: who takes part in a round."""
    active = np.ones(len(TASKS), bool)
    active[LEAVES if number >= rounds // 2 else JOINS] = False
    return active


def divided(state: State, arm: Arm, every: tuple[Task, ...], sizes: Sizes, floor: float) -> State:
    """The state with this round's amounts, and with the rows that memory holds by them."""
    number = np.array([len(task.train.ids) for task in every])
    part = 1.0 if arm.all_rows else sizes.part
    capacity = resources.blocks([int(part * number.sum()) * ROW_BYTES], ROW_BYTES)
    active = active_in(state.round, sizes.rounds)
    kept = [x[len(x) // AGED :] for x in state.held]
    demand = np.where(active, number, 0)[None]
    used = np.array([[len(x) for x in kept]])
    indicators = np.stack([number, state.loss, shift_of(every, active)]) * active
    w = importance.combine(indicators, np.array(WEIGHTS[arm.by]), normalize="max")
    left = tasks.remaining(capacity, demand, np.minimum(used, demand))
    given = tasks.divide(
        w,
        active,
        batch=BATCH,
        tokens=BATCH * data.MOST_TOKENS,
        capacity=capacity,
        demand=demand,
        used=used,
        floor=floor,
    )
    rng = np.random.default_rng([state.round, 7])
    held = tuple(
        _grown(x, int(n), len(task.train.ids), rng)
        for x, n, task in zip(kept, given.cache[0], every, strict=True)
    )
    lefts, givens = (*state.left, left), (*state.given, given)
    return dataclasses.replace(state, held=held, left=lefts, given=givens)


def shift_of(every: tuple[Task, ...], active: np.ndarray) -> np.ndarray:
    """[N]: how far the tokens of each task's texts are from those of all tasks that are there."""
    counts = np.stack([task.counts for task in every])
    together = np.broadcast_to(active @ counts, counts.shape)
    return np.asarray(importance.distribution_shift(counts, together))


def _grown(held: np.ndarray, number: int, every: int, rng: np.random.Generator) -> np.ndarray:
    """So many rows: the latest of those that are held, and then new ones."""
    held = held[max(len(held) - number, 0) :]
    others = np.setdiff1d(np.arange(every), held)
    return np.concatenate([held, rng.permutation(others)[: number - len(held)]])


def biased(state: State, every: tuple[Task, ...]) -> State:
    """The state with the bias of the rule "renormalize": log of what the tasks' shares claim of a token.

    What no task that is there claims has the mean of the others.
    """
    rng = np.random.default_rng([state.round, 8])
    association = np.zeros((len(TASKS), data.VOCABULARY), np.float32)
    for i, (rows, task) in enumerate(zip(state.held, every, strict=True)):
        if len(rows):
            at = rng.choice(rows, SAMPLE, replace=len(rows) < SAMPLE)
            association[i] = data.association(Texts(*(x[at] for x in task.train)))
    alpha = state.given[-1].alpha
    bias = rescale.logit_bias(alpha, association)
    nobodys = rescale.unclaimed(alpha, association)
    mean = jnp.mean(bias, where=~nobodys)
    return dataclasses.replace(state, token_bias=jnp.where(nobodys, mean, bias) - mean)


def batches_of(state: State, every: tuple[Task, ...], seed: int) -> tuple[jax.Array, ...]:
    """ids, task and label [STEPS, BATCH, ...]: of each task as many as it was given."""
    rng = np.random.default_rng([seed, state.round])
    task = np.asarray(tasks.task_of(state.given[-1].examples, BATCH))
    at = [rng.choice(state.held[i], STEPS) if len(state.held[i]) else None for i in task]
    ids = np.stack([every[i].train.ids[x] for i, x in zip(task, at, strict=True)], axis=1)
    positive = np.stack([every[i].train.positive[x] for i, x in zip(task, at, strict=True)], 1)
    return jnp.asarray(ids), jnp.asarray(np.tile(task, (STEPS, 1))), jnp.asarray(positive)


_losses, _logits = jax.jit(model.losses), jax.jit(model.logits)


def hits(state: State, texts: Texts, task: int) -> np.ndarray:
    """[B] bool, which texts of a task are told right."""
    of_task = jnp.full(len(texts.ids), task)
    found = _logits(state.trained[0], state.token_bias, jnp.asarray(texts.ids), of_task)
    return np.asarray(found > 0) == texts.positive


def advanced(
    state: State,
    arm: Arm,
    every: tuple[Task, ...],
    sizes: Sizes,
    seed: int,
    settings: Mapping[str, float],
) -> State:
    """The state after a round: divided, trained, measured."""
    state = divided(state, arm, every, sizes, settings["floor"])
    if arm.rescaled:
        state = biased(state, every)
    batches = batches_of(state, every, seed)
    trained = model.fit(state.trained, state.token_bias, batches, jnp.float32(settings["rate"]))
    loss = [
        float(
            jnp.mean(
                _losses(
                    trained[0],
                    state.token_bias,
                    jnp.asarray(task.validation.ids),
                    jnp.full(len(task.validation.ids), i),
                    jnp.asarray(task.validation.positive),
                )
            )
        )
        for i, task in enumerate(every)
    ]
    return dataclasses.replace(state, round=state.round + 1, trained=trained, loss=np.array(loss))


def run(name: str, seed: int, sizes: Sizes, advance: Callable[[], None]) -> Mapping[str, Any]:
    """Accuracy of each task when it ends, and how memory was used."""
    arm, every = ARMS[name], data.tasks(sizes.most)
    state, settings = begun(seed), {"floor": arm.floor, "rate": 5e-3}
    right: list[np.ndarray] = [np.zeros(0)] * len(TASKS)
    half = sizes.rounds // 2
    for end in (half, sizes.rounds):

        def train(state: State, settings: Mapping[str, float]) -> State:
            return advanced(state, arm, every, sizes, seed, settings)

        def validate(state: State, settings: Mapping[str, float]) -> float:
            return float(state.loss[active_in(state.round - 1, sizes.rounds)].mean())

        if arm.tuned:
            # A round that does not validate better is undone: there may be fewer of them.
            found = tune(train, validate, state, settings, RANGES, max_rounds=half, patience=half)
            state = dataclasses.replace(found.state, round=end)
            settings = found.settings
        else:
            while state.round < end:
                state = train(state, settings)
        for i in np.flatnonzero(active_in(end - 1, sizes.rounds)):
            right[i] = hits(state, every[i].test, int(i))
        advance()
    return {
        "figures": figures(right, state, settings),
        "cases": {"accuracy": runs.packed(_of_tasks(right))},
    }


def figures(
    right: list[np.ndarray], state: State, settings: Mapping[str, float]
) -> dict[str, float]:
    """What a run says."""
    each = [float(x.mean()) for x in right]
    return {
        "accuracy": float(np.mean(each)),
        "worst task": min(each),
        "texts right": float(np.concatenate(right).mean()),
        **dict(zip(TASKS, each, strict=True)),
        "least share": float(np.mean([x.alpha[x.alpha > 0].min() for x in state.given])),
        "rows shared out": float(np.mean([x.total_remaining for x in state.left[1:]])),
        "kB of texts": max(int(x.cache.sum()) for x in state.given) * ROW_BYTES / 1000,
        "floor": settings["floor"],
        "rate": settings["rate"],
    }


def _of_tasks(right: list[np.ndarray]) -> np.ndarray:
    """Hits of all test texts, weighed so that their mean is the mean over the tasks."""
    total = sum(x.size for x in right)
    return np.concatenate([x * (total / (len(right) * x.size)) for x in right])
