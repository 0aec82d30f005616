"""One call that works of what `tests.support.calls` leaves: models, states, meshes, tasks, texts."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import (
    adapters,
    attention,
    decode,
    explain,
    importance,
    multitask,
    place,
    rescale,
    resources,
    sharded,
)
from jbalance.tune import tune
from tests.support.calls import K4, OF, PLAN, Q4, SCORE, TILING, W, X, Y
from tests.support.window_models import model as make_model

MODEL = make_model()
PROMPT = np.arange(1, 20)
BUDGETS = [60_000]
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
ON_MESH = {"mesh": MESH}
UNITS = ON_MESH | {"axis_name": "x"}
GRADS = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 1), np.float32)}
LOADS = np.array([3.0, 2.0])
ASSOCIATION = np.ones((3, 2), np.float32)
PART = attention.Partial(np.ones((1, 2, 8), np.float32), np.zeros((1, 2), np.float32))
LOSSES = decode.MemoryLosses(
    (4, None),
    np.array([[1e-2, 0.0]] * MODEL.num_layers),
    np.array([[1_000, 9_000]] * MODEL.num_layers),
    np.array([2e-2, 0.0]),
    np.array([1_000, 9_000]),
    (0.25, 0.5),
    np.array([1e-2, 1e-3]),
)
PLANNED = decode.read(MODEL, PROMPT, BUDGETS)


@functools.cache
def _state() -> decode.State:
    return decode.create(MODEL, BUDGETS, num_requests=2, recent_tokens=16)


def state() -> decode.State:
    """Two free places; a copy, for calls give states up."""
    return jax.tree.map(lambda x: jnp.array(x) if isinstance(x, jax.Array) else x, _state())


@functools.cache
def _joined() -> decode.State:
    return decode.join(MODEL, state(), 0, PROMPT)


def joined() -> decode.State:
    """One of two places is taken."""
    return jax.tree.map(lambda x: jnp.array(x) if isinstance(x, jax.Array) else x, _joined())


def join(**given: Any) -> Any:
    return decode.join(MODEL, state(), **given)


def tell(**given: Any) -> Any:
    return decode.tell(MODEL, joined(), **given)


def leave(**given: Any) -> Any:
    return decode.leave(joined(), **given)


def worth(kept: Any) -> jax.Array:
    return jnp.sum(jnp.asarray(kept, jnp.float32), axis=1)


def weigh(weighting: multitask.TaskWeighting) -> Any:
    gram = jnp.array([[2.0, -1.0], [-1.0, 2.0]])
    stats = multitask.TaskStats(gram, jnp.ones(2))
    return weighting.weigh(stats, weighting.init(2))[0]


def weighed(make: Any) -> Any:
    """The weights by a weighting with these settings."""
    return functools.wraps(make)(lambda **given: weigh(make(**given)))


MORE_CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "feature_association": (
        importance.feature_association,
        {"x": X, "y": Y, "relevance": "anova", "discrimination": "anova", "complexity": "entropy"}
        | {"num_classes": 2},
        "num_classes",
    ),
    "combined": (
        lambda **given: importance.combined(**given)(Q4[0], K4[0], K4[0]),
        {"weights": {"key_norm": 1.0}, "normalize": "sum"},
        "",
    ),
    "knowledge": (
        importance.knowledge,
        {"rules": [importance.Keep(OF == 1)], "num_units": 3, "beta": 0.5},
        "num_units",
    ),
    "Matters": (
        lambda where, times: importance.knowledge([importance.Matters(where, times)], 3),
        {"where": OF == 1, "times": 2.0},
        "",
    ),
    "Keep": (
        lambda where: importance.knowledge([importance.Keep(where)], 3),
        {"where": OF == 1},
        "",
    ),
    "Implies": (
        lambda kept, then: importance.knowledge([importance.Implies(kept, then)], 3),
        {"kept": OF == 1, "then": OF == 0},
        "",
    ),
    "in_spans": (importance.in_spans, {"offsets": X.astype(int), "spans": [(0, 3)]}, ""),
    "device_budgets": (
        resources.device_budgets,
        {"devices": jax.devices()[:1], "fraction": 0.5, "given_bytes": [4096]},
        "",
    ),
    "human_bytes": (resources.human_bytes, {"amount_bytes": 4096}, ""),
    "kv_cache_bytes": (
        resources.kv_cache_bytes,
        {"dims": resources.AttentionDims(2, 4, 2, 8), "entries": 9, "bits": 8, "scale_bits": 0},
        "entries bits scale_bits",
    ),
    "parse_bytes": (resources.parse_bytes, {"text": "4MiB"}, ""),
    "over_layers_bound": (
        place.over_layers_bound,
        {"loads": X, "memory": X, "memory_capacity": 99 * W, "speed": W},
        "",
    ),
    "step_time": (place.step_time, {"placed": place.pack(W, 2), "seconds": 2.0}, ""),
    "literal": (rescale.literal, {"alpha": W, "association": ASSOCIATION, "attention": LOADS}, ""),
    "split": (rescale.split, {"alpha": W, "association": ASSOCIATION, "attention": LOADS}, ""),
    "renormalize": (
        rescale.renormalize,
        {"alpha": W, "association": ASSOCIATION, "attention": LOADS},
        "",
    ),
    "unclaimed": (rescale.unclaimed, {"alpha": W, "association": ASSOCIATION}, ""),
    "merge": (attention.merge, {"a": PART, "b": PART}, ""),
    "to_mask": (attention.to_mask, {"plan": PLAN}, ""),
    "union": (attention.union, {"a": PLAN, "b": PLAN}, ""),
    "intersection": (attention.intersection, {"a": PLAN, "b": PLAN}, ""),
    "transposed": (attention.transposed, {"plan": PLAN}, ""),
    "track": (
        functools.partial(
            adapters.track, mock.Mock(spec=("add_scalar", "add_histogram", "add_image"))
        ),
        {"step": 1, "values": {"loss": 1.0}, "maps": {"attention": np.ones((2, 3))}},
        "step",
    ),
    "TileBudget.of": (attention.TileBudget.of, {"fraction": 0.5}, ""),
    "TileBalancer": (attention.TileBalancer, {"rule": "priced", "decay": 0.5}, ""),
    "quantize_weights": (
        functools.partial(decode.quantize_weights, MODEL),
        {"layer_bits": 4, "table_bits": 8},
        "",
    ),
    "fit_memory": (
        functools.partial(decode.fit_memory, MODEL),
        {"losses": LOSSES, "budget_bytes": 500_000, "num_tokens": 40, "num_requests": 2},
        "budget_bytes num_tokens num_requests",
    ),
    "generate": (
        functools.partial(decode.generate, MODEL),
        {"prompts": [PROMPT, PROMPT[:3]], "budgets_bytes": BUDGETS, "max_new_tokens": 2}
        | {"num_requests": 2, "sampling": decode.Sampling(), "stop_tokens": (5,)},
        "num_requests",
    ),
    "read": (
        functools.partial(decode.read, MODEL),
        {"tokens": PROMPT, "budgets_bytes": BUDGETS, "reserve": decode.Reserve()}
        | {"devices": jax.devices()[:1], "known": importance.knowledge([], len(PROMPT))},
        "",
    ),
    "decode.create": (
        functools.partial(decode.create, MODEL),
        {"budgets_bytes": BUDGETS, "num_requests": 2, "recent_tokens": 16, "context": PLANNED}
        | {"devices": jax.devices()[:1]},
        "num_requests recent_tokens",
    ),
    "join": (
        join,
        {"request": 0, "prompt": PROMPT, "sampling": decode.Sampling(), "weight": 1.0}
        | {"capacity": 256, "known": importance.knowledge([], len(PROMPT))},
        "request capacity",
    ),
    "tell": (tell, {"request": 0, "tokens": PROMPT}, "request"),
    "leave": (leave, {"request": 0}, "request"),
    "explain.heads": (
        explain.heads,
        {"plan": PLANNED.plan, "codes": PLANNED.codes},
        "",
    ),
    "sentence": (
        explain.sentence,
        {"plan": PLANNED.plan, "codes": PLANNED.codes, "layer": 1, "head": 0, "more_bytes": 900},
        "layer head more_bytes",
    ),
    "ablate": (
        functools.partial(explain.ablate, MODEL),
        {"context": PROMPT, "continuation": PROMPT[:3], "layers": np.ones((1, 3), bool)}
        | {"tokens": np.ones((1, 19), bool), "heads": np.ones((1, 3, 4), bool), "batch": 1},
        "batch",
    ),
    "leave_one_out": (explain.leave_one_out, {"worth": worth, "num_units": 3}, "num_units"),
    "shapley": (
        explain.shapley,
        {"worth": worth, "num_units": 3, "key": jax.random.key(0), "num_permutations": 4},
        "num_units num_permutations",
    ),
    "exact_shapley": (explain.exact_shapley, {"worth": worth, "num_units": 3}, "num_units"),
    "sharded.blend": (
        functools.partial(sharded.blend, **UNITS),
        {"w": W, "prior": W, "beta": 0.5, "feedback": W / 3, "eta": 0.5},
        "",
    ),
    "sharded.shares": (
        functools.partial(sharded.shares, **UNITS),
        {"w": W, "rule": "proportional"},
        "",
    ),
    "sharded.whole": (
        functools.partial(sharded.whole, **UNITS),
        {"w": W, "budget": np.array([6, 6]), "floor": 0, "cap": 9, "device_of": OF},
        "",
    ),
    "sharded.ladder": (
        functools.partial(sharded.ladder, **UNITS),
        {"values": np.array([[0.0, 1], [0, 2], [0, 3]]), "costs": np.array([1, 2])}
        | {"budgets": np.array([5, 5]), "device_of": OF, "total_budget": 9},
        "",
    ),
    "sharded.choose": (
        functools.partial(sharded.choose, **ON_MESH),
        {"score": SCORE, "num_tiles": 6, "tiling": TILING},
        "",
    ),
    "block_order": (
        sharded.block_order,
        {"device_of": np.array([0, 1, 1, 0]), "num_ranks": 2},
        "num_ranks",
    ),
    "sharded.attend": (
        functools.partial(sharded.attend, **ON_MESH),
        {"q": Q4, "k": K4, "v": K4, "plan": PLAN},
        "",
    ),
    "token_importance": (
        functools.partial(sharded.token_importance, importance.key_norm, **ON_MESH),
        {"q": Q4, "k": K4, "v": K4},
        "",
    ),
    "tile_importance": (
        functools.partial(sharded.tile_importance, importance.tile_error, **ON_MESH),
        {"q": Q4, "k": K4, "v": K4, "tiling": TILING, "rows": 2},
        "rows",
    ),
    "aggregator": (
        lambda tasks: multitask.aggregator(multitask.mean(), tasks).init({"a": np.ones(3)}),
        {"tasks": 2},
        "tasks",
    ),
    "by_importance": (
        weighed(multitask.by_importance),
        {"association": X[:2], "floor": 0.1, "rule": "proportional"},
        "",
    ),
    "multitask.combine": (multitask.combine, {"weights": LOADS, "task_grads": GRADS}, ""),
    "gramian": (multitask.gramian, {"task_grads": GRADS}, ""),
    "dwa": (weighed(multitask.dwa), {"temperature": 2.0}, ""),
    "fair": (weighed(multitask.fair), {"alpha": 1.0, "ridge": 1e-6}, ""),
    "famo": (weighed(multitask.famo), {"learning_rate": 0.1, "decay": 0.1}, ""),
    "gradnorm": (weighed(multitask.gradnorm), {"asymmetry": 1.5, "learning_rate": 0.1}, ""),
    "uncertainty": (weighed(multitask.uncertainty), {"learning_rate": 0.1}, ""),
    "upgrad": (weighed(multitask.upgrad), {"ridge": 1e-6}, ""),
    "pcgrad": (weighed(multitask.pcgrad), {"key": jax.random.key(0)}, ""),
    "random": (weighed(multitask.random), {"key": jax.random.key(0)}, ""),
    "Tiles": (
        adapters.Tiles,
        {"block_q": 4, "block_k": 4, "rows": 2},
        "block_q block_k rows",
    ),
    "tune": (
        functools.partial(tune, lambda state, _: state, lambda *_: 1.0, None),
        {"settings": {"a": 1.0}, "ranges": {"a": (0.5, 2.0)}, "max_rounds": 2, "patience": 1},
        "max_rounds patience",
    ),
}
# Arguments that are objects of the library, names, or tuples.
OBJECTS = {
    *("weights", "normalize", "rules", "devices", "text", "placed", "plan", "a", "b", "rule"),
    *("prompts", "sampling", "reserve", "known", "context", "worth", "key", "tiling"),
    *("task_grads", "settings", "ranges", "dims", "spans", "relevance", "discrimination"),
    *("complexity", "stop_tokens", "losses"),
}
