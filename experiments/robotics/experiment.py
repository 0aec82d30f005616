"""One run: a driver that imitates the expert within an arm's budget, held out and on the road."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.harness import logs, runs, training
from experiments.models.packed_encoder import Packed, pack, places
from experiments.robotics import crossing, data, expert, policy, vehicles
from experiments.robotics.crossing import Moment
from experiments.robotics.data import Scenes
from experiments.robotics.foresight import Worth, foreseen
from experiments.robotics.policy import Driver

BATCH, PEAK_RATE, WEIGHT_DECAY = 64, 2e-3, 0.05
HELD_OUT, ROAD = 500, 1000  # first seeds of the scenes that are held out, and of the drives
NOISE = (2.0, 1.0)  # m and m/s, deviations of the others' places and speeds
MISSING = 0.3  # chance of another to be unseen, in each decision
TRIED = ("full", "ladder, half")  # arms that also drive with bad sensors


Sensor = Callable[[np.ndarray, np.random.Generator], np.ndarray]
SENSORS: dict[str, Sensor] = {
    "": lambda seen, rng: seen,
    ", noise": lambda seen, rng: crossing.noisy(seen, rng, *NOISE),
    ", unseen": lambda seen, rng: crossing.missing(seen, rng, MISSING),
}


class Sizes(NamedTuple):
    """Of a study."""

    train: int  # episodes
    test: int  # episodes
    epochs: int
    drives: int  # episodes of each test on the road


class Material(NamedTuple):
    """What all runs read."""

    train: Scenes
    test: Scenes
    worth: Worth


@functools.cache
def prepare(sizes: Sizes) -> Material:
    """Both parts, and what vehicles are worth by the first.

    Raises:
      ValueError: recorded scenes that cannot be read.
    """
    train = data.read(0, sizes.train)
    return Material(train, data.read(HELD_OUT, sizes.test), Worth.of(train))


# Drivers differ in few decisions: what one has driven is not driven again for another.
start = functools.cache(crossing.begin)


def baselines(drives: int) -> dict[str, dict[str, float]]:
    """Of the same episodes: those who do not look, and the expert, who knows everyone's route."""
    rng = np.random.default_rng(0)
    known: dict[str, Callable[[Moment], int]] = {
        "always faster": lambda now: crossing.ACTIONS - 1,
        "random": lambda now: int(rng.integers(crossing.ACTIONS)),
        "the expert": lambda now: expert.act(now.env),
    }
    found = {}
    for name, act in known.items():
        ends = [crossing.drive(start(seed), act) for seed in range(ROAD, ROAD + drives)]
        found[name] = {
            "return": float(np.mean([x.total for x in ends])),
            "collisions": float(np.mean([x.crashed for x in ends])),
        }
    return found


def run(
    arm: str, part: float, tried: bool, seed: int, sizes: Sizes, advance: Callable[[], None]
) -> Mapping[str, Any]:
    """How often an arm's driver does as the expert, and how it fares on the road.

    Args:
      arm, part: of `vehicles.ARMS`, and of the vehicles.
      tried: whether it drives with bad sensors too.
      seed: of the order of scenes and the first parameters.
      sizes: of the study.
      advance: called after each step of training, and each drive.
    """
    material = prepare(sizes)
    graph, parameters = nnx.split(trained(material, arm, part, seed, sizes.epochs, advance))
    decide = jax.jit(lambda parameters, batch: jnp.argmax(nnx.merge(graph, parameters)(batch), -1))
    figures, cases = judged(material, arm, part, decide, parameters)
    rule = vehicles.Rule.of(arm, part, material.train.seen, material.worth)
    road = Road(rule, material.worth, functools.partial(decide, parameters))
    one = road.batch(material.test.seen[:1])[0]
    figures["MFLOP a decision"] = training.flops_of(decide.lower(parameters, one).compile()) / 1e6
    for name in SENSORS if tried else ("",):
        ends, looked = road.drives(SENSORS[name], sizes.drives, advance)
        for figure, each in ends.items():
            figures[figure + name] = float(each.mean())
            cases[figure + name] = runs.packed(each)
        if not name:
            figures |= looked
    return {"figures": figures, "cases": cases}


def trained(
    material: Material, arm: str, part: float, seed: int, epochs: int, advance: Callable[[], None]
) -> Driver:
    """A driver that imitates the expert by what an arm keeps of each scene."""
    known = material.train
    examples = _examples(known.seen, vehicles.kept(arm, part, known.seen, material.worth, BATCH))
    labels = _labels(known.seen, known.value)
    orders = training.orders(len(examples), BATCH, epochs, seed)
    room = places(examples, orders, 1)
    model = Driver(nnx.Rngs(seed))
    batches = (pack([examples[i] for i in row], labels[row], room, BATCH) for row in orders)
    with logs.writer("robotics", f"{arm}-{part}", seed) as log:
        training.train(
            model, policy.loss_of, batches, len(orders), PEAK_RATE, seed, log, advance,
            weight_decay=WEIGHT_DECAY,
        )  # fmt: skip
    return model


def judged(
    material: Material, arm: str, part: float, decide: Any, parameters: Any
) -> tuple[dict[str, float], dict[str, str]]:
    """Figures and cases of the decisions in held-out scenes, a batch of them in one budget."""
    known = material.test
    examples = _examples(known.seen, vehicles.kept(arm, part, known.seen, material.worth, BATCH))
    labels, rows = _labels(known.seen, known.value), training.rows(len(examples), BATCH)
    room = places(examples, rows, 1)
    packed = [pack([examples[i] for i in row], labels[row], room, BATCH) for row in rows]
    chosen = np.concatenate([
        np.asarray(decide(parameters, batch))[: len(row)]
        for batch, row in zip(packed, rows, strict=True)
    ])  # fmt: skip
    lost = lost_by(known.value)[np.arange(len(chosen)), chosen]
    flops = training.flops_of(decide.lower(parameters, packed[0]).compile())
    figures = {
        "agreement": float((lost == 0).mean()),
        "lost a decision": float(lost.mean()),
        "vehicles a scene": float(np.mean([len(x["seen"]) for x in examples])),
        "MFLOP a scene": flops / BATCH / 1e6,
    }
    return figures, {"agreement": runs.packed(lost == 0), "lost a decision": runs.packed(lost)}


class Road:
    """Drives of one driver with an arm's rule, in a program of the rule's capacity."""

    def __init__(self, rule: vehicles.Rule, worth: Worth, decide: Callable[[Packed], Any]):
        self.rule, self.worth, self.decide = rule, worth, decide

    def batch(self, seen: np.ndarray) -> tuple[Packed, int, bool]:
        """One scene [1, ROWS, FEATURES] packed; how many vehicles, whether more was asked for."""
        mask, beyond = self.rule.keep(seen, self.worth)
        labels = _labels(seen, np.zeros((1, crossing.ACTIONS), np.float32))
        packed = pack(_examples(seen, mask), labels, self.rule.capacity, 1)
        return packed, int(mask.sum()), bool(beyond[0])

    def drives(
        self, sensor: Sensor, number: int, advance: Callable[[], None]
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Returns and collisions [number]; vehicles that a decision computed, and those cut off."""
        looked, ends = [], []
        for seed in range(ROAD, ROAD + number):
            rng = np.random.default_rng(seed)

            def act(now: Moment, rng: np.random.Generator = rng) -> int:
                packed, count, beyond = self.batch(sensor(now.seen, rng)[None])
                looked.append((count, beyond))
                return int(self.decide(packed)[0])

            ends.append(crossing.drive(start(seed), act))
            advance()
        count, beyond = np.mean(looked, axis=0)
        figures = {
            "return": np.array([x.total for x in ends]),
            "collisions": np.array([x.crashed for x in ends], float),
        }
        return figures, {"vehicles a decision": float(count), "over capacity": float(beyond)}


def _examples(seen: np.ndarray, mask: np.ndarray) -> list[dict[str, np.ndarray]]:
    told = np.concatenate([seen, foreseen(seen)], axis=-1)
    return [{"seen": x[m]} for x, m in zip(told, mask, strict=True)]


def _labels(seen: np.ndarray, value: np.ndarray) -> np.ndarray:
    """[B, ACTIONS + FEATURES] what each action loses, and the driver's row."""
    return np.concatenate([lost_by(value), seen[:, 0]], axis=1)


def lost_by(value: np.ndarray) -> np.ndarray:
    """[B, ACTIONS] how far each action's value is below the best."""
    return value.max(axis=1, keepdims=True) - value
