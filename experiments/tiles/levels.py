"""Budgets moved between the levels of a real model: feature extraction, middle and output layers.

    python -m experiments.tiles.levels [--tokens N] [--density D,...] [--json OUT]

All rules give the 30 layers of SmolLM2 the same number of tiles together. What the layers see on some
texts (their curves of worth) decides how many each gets, alone or, by `thirds`, with its neighbors of
the source's three levels; how far the predictions are then from those of dense attention is measured on
others. Each layer chooses its tiles alike. About eight minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.harness import cli, files, texts
from experiments.models import Loaded
from experiments.models import options as models
from experiments.tiles.policies import BLOCK_K, BLOCK_Q
from jbalance import adapters, resources
from jbalance.adapters import TileBalancer, TileBudget
from jbalance.importance import CURVE_BINS

SEEN, HELD_OUT = ("alice29", "hamlet"), ("lcet10", "plrabn12", "lear")
TILES = adapters.Tiles(BLOCK_Q, BLOCK_K)


def _by(rule: str) -> Callable[[TileBudget, float], TileBudget]:
    """Of what the layers saw on average."""

    def shared(seen: TileBudget, density: float) -> TileBudget:
        balancer = TileBalancer(rule, decay=0.0)
        return balancer.update(seen, balancer.init(seen), density)[0]

    return shared


def _sloped(first: float, last: float) -> Callable[[TileBudget, float], TileBudget]:
    """A line over the layers whose mean is the density."""

    def shared(seen: TileBudget, density: float) -> TileBudget:
        share = density * jnp.linspace(first, last, seen.fraction.size)
        return dataclasses.replace(seen, fraction=jnp.asarray(share, jnp.float32))

    return shared


def _thirds(seen: TileBudget, density: float) -> TileBudget:
    """The source's three levels: what the layers of each would have, for all of them alike."""
    of_layers = _by("proportional")(seen, density).fraction
    level_of = resources.thirds(of_layers.size)
    amount = resources.partition(density * of_layers.size, np.asarray(of_layers), level_of)
    fraction = amount[level_of] / np.bincount(level_of)[level_of]
    return dataclasses.replace(seen, fraction=jnp.asarray(fraction, jnp.float32))


RULES = {
    "uniform": _by("uniform"),
    "pyramid": _sloped(1.4, 0.6),
    "inverted pyramid": _sloped(0.6, 1.4),
    "proportional": _by("proportional"),
    "thirds": _thirds,
    "priced": _by("priced"),
}


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.tiles.levels", __doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="of each text")
    parser.add_argument("--density", default="0.5,0.3", help="parts of the causal tiles")
    cli.add_json(parser)
    models.add_options(parser)
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    keep = files.json_writer(options.json)
    loaded = functools.partial(models.loaded, options)
    rows = run(options.tokens, cli.numbers("--density", options.density), keep, loaded)
    _print(rows)


def run(
    tokens: int,
    densities: list[float],
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    loaded: Callable[[], Loaded] = models.smollm2,
) -> list[dict[str, Any]]:
    """One row for each density and rule; `keep` gets what there is after each.

    Raises:
      ValueError: densities outside (0, 0.7], where a pyramid would need more than all tiles; tokens
        that are no multiple of a block of queries, or more than the texts have.
    """
    for density in densities:
        if not 0 < density <= 0.7:
            raise ValueError(f"--density is {density}: a part of the causal tiles, in (0, 0.7]")
    if tokens < 8 * BLOCK_Q or tokens % BLOCK_Q:
        raise ValueError(f"--tokens is {tokens}: a multiple of {BLOCK_Q}, at least {8 * BLOCK_Q}")
    found = loaded()
    config, model, tokenizer = found.config, found.model, found.spoken.tokenizer
    graph, state = nnx.split(model)
    layers = config.num_layers
    all_tiles = TileBudget(
        jnp.ones(layers), jnp.zeros((layers, CURVE_BINS)), jnp.zeros((layers, 2), jnp.int32)
    )

    def predict(name: str, budgets: TileBudget) -> tuple[jax.Array, TileBudget]:
        ids = texts.encode(tokenizer, texts.text_of(name))
        start = len(ids) // 5
        if start + tokens > len(ids):
            raise ValueError(
                f"--tokens is {tokens}: {name} has {len(ids) - start} from its fifth on"
            )
        return _predict(graph, state, jnp.asarray(ids[start : start + tokens]), budgets)

    seen = [predict(name, all_tiles)[1] for name in SEEN]
    curve = jnp.mean(jnp.stack([x.curve for x in seen]), axis=0)
    seen_all = TileBudget(jnp.ones(layers), curve, seen[0].limits)
    full = {name: predict(name, all_tiles)[0] for name in HELD_OUT}
    rows = []
    for density in densities:
        for rule, shared in RULES.items():
            budgets = shared(seen_all, density)
            kl = {}
            for name in HELD_OUT:
                got, _ = predict(name, budgets)
                apart = jnp.sum(jnp.exp(full[name]) * (full[name] - got), axis=-1)
                kl[name] = float(apart.mean())
            thirds = [
                float(part.mean()) for part in np.array_split(np.asarray(budgets.fraction), 3)
            ]
            row = {"density": density, "rule": rule, "kl": float(np.mean(list(kl.values())))}
            rows.append(
                row | {"tiles": float(budgets.fraction.mean()), "thirds": thirds, "each": kl}
            )
            keep(rows)
            print(rows[-1], flush=True)
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _predict(graph, state, ids, budgets):
    """Log-probabilities of the second half, and what the layers saw."""
    model = nnx.merge(graph, state)

    def attend(q, k, v, budget):
        return adapters.attend_within(budget, q, k, v, TILES, is_causal=True)

    h, seen = model.hidden(ids[None], None, attend, budgets)
    return jax.nn.log_softmax(model.logits(h[:, ids.size // 2 :])[0]), seen


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("density", "rule", "KL to dense", "feature layers", "middle", "output layers")
    for row in rows:
        parts = (f"{x:.2f}" for x in row["thirds"])
        table.add_row(f"{row['density']:g}", row["rule"], f"{row['kl']:.4f}", *parts)
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
