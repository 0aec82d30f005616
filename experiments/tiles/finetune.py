"""Fine-tune SmolLM2 with attention that computes a part of its causal tiles, forward and backward.

    python -m experiments.tiles.finetune [--steps N] [--tokens N] [--density D] [--json OUT]
    python -m experiments.tiles.finetune speed [--json OUT]

The first trains all parameters on the same pieces of texts in the same order for every policy, and
reports the loss on held-out pieces: with the attention that was trained with, and with dense attention.
Some 20 minutes on two cores for the defaults. The second measures steps per second where attention is
most of the work: two layers of the model over 16,384 tokens, the loss on the last 512, the embedding
(four fifths of the parameters that are left) frozen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import _report
from experiments.harness import cli, files, optimisers
from experiments.harness.texts import encode, text_of
from experiments.models import Loaded, Transformer
from experiments.models import options as models
from experiments.tiles import finetuning
from experiments.tiles.policies import BLOCK_Q, POLICIES
from jbalance import attention, checks
from jbalance.attention import TilePlan, Tiling

PEAK_RATE = 3e-5
HELD_OUT_PIECES = 3  # of each text
CHECKED = 4  # times that the held-out loss is looked at, besides before
SPEED_LAYERS, SPEED_TOKENS, SPEED_SCORED, SPEED_ROWS = 2, 16384, 512, 8


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.tiles.finetune", __doc__)
    parser.add_argument(
        "job", nargs="?", choices=("train", "speed"), default="train", help="as above"
    )
    parser.add_argument("--texts", default="lcet10,plrabn12,lear", help="names, with commas")
    parser.add_argument("--steps", type=int, default=200, help="of each policy")
    parser.add_argument("--tokens", type=int, default=512, help="of a piece of text")
    parser.add_argument("--density", type=float, default=0.5, help="part of the causal tiles")
    parser.add_argument("--policies", default="dense,ladder", help="names, with commas")
    cli.add_json(parser)
    models.add_options(parser)
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    keep = files.json_writer(options.json)
    loaded = functools.partial(models.loaded, options)
    if options.job == "speed":
        rows = speed(options.density, loaded)
        keep(rows)
    else:
        names = options.texts.split(","), options.policies.split(",")
        rows = train(*names, options.tokens, options.steps, options.density, keep, loaded)
    _print(rows)


def train(
    texts: list[str],
    policies: list[str],
    tokens: int,
    steps: int,
    density: float,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    loaded: Callable[[], Loaded] = models.smollm2,
) -> list[dict[str, Any]]:
    """One row for each policy; `keep` gets what there is after each.

    Raises:
      ValueError: unknown names, numbers outside their range, texts too short.
    """
    for name in policies:
        checks.choice("--policies", name, POLICIES)
    if not 0 < density <= 1:
        raise ValueError(f"--density is {density}: a part of the causal tiles, in (0, 1]")
    if tokens < 4 * BLOCK_Q or tokens % BLOCK_Q:
        raise ValueError(f"--tokens is {tokens}: a multiple of {BLOCK_Q}, at least {4 * BLOCK_Q}")
    if steps < CHECKED:
        raise ValueError(f"--steps is {steps}: at least {CHECKED}")
    found = loaded()
    model, tokenizer = found.model, found.spoken.tokenizer
    graph, start, *fixed = nnx.split(model, nnx.Param, ...)
    own, held = finetuning.pieces(tokenizer, texts, tokens)
    pieces = [jnp.asarray(ids) for parts in held.values() for ids in parts[:HELD_OUT_PIECES]]
    dense = finetuning.make_step(
        graph, finetuning.policy_plan("dense", 1.0), _optimiser(steps), frozen=fixed
    )
    rows: list[dict[str, Any]] = []
    for policy in policies:
        plan_of = finetuning.policy_plan(policy, density)
        step = (
            dense
            if policy == "dense"
            else finetuning.make_step(graph, plan_of, _optimiser(steps), frozen=fixed)
        )
        row = _train_one(step, dense, start, own, pieces, tokens, steps)
        rows.append({"policy": policy, "tokens": tokens, "density": density, "steps": steps} | row)
        for name in ("held_out", "held_out_dense_attention"):
            if rows[0]["policy"] == "dense":
                row_ratio = row[name][-1] / rows[0]["held_out"][-1]
                rows[-1][f"{name}_over_dense"] = row_ratio - 1
        keep(rows)
    return rows


def _optimiser(steps: int) -> Any:
    return optimisers.adamw(steps, PEAK_RATE)


def _train_one(
    step: finetuning.Step,
    dense: finetuning.Step,
    parameters: Any,
    own: dict[str, np.ndarray],
    pieces: list[jax.Array],
    tokens: int,
    steps: int,
) -> dict[str, Any]:
    """Losses, and what else there is to say, of one policy from the given parameters."""
    state = step.init(parameters)
    losses, tiles, seconds = [], [], []
    held: dict[str, list[float]] = {"held_out": [], "held_out_dense_attention": []}

    def check() -> None:
        for name, by in (("held_out", step), ("held_out_dense_attention", dense)):
            held[name].append(float(np.mean([by.loss(parameters, ids) for ids in pieces])))

    check()
    for i, ids in enumerate(finetuning.batches(own, tokens, steps), 1):
        begin = time.perf_counter()
        parameters, state, loss, used = step.train(parameters, state, jnp.asarray(ids))
        losses.append(float(loss))
        seconds.append(time.perf_counter() - begin)
        tiles.append(float(used))
        if i % (steps // CHECKED) == 0:
            check()
            print(
                f"step {i}: loss {np.mean(losses[-20:]):.4f}, held out {held['held_out'][-1]:.4f}"
            )
    return held | {
        "train_loss_last_20": float(np.mean(losses[-20:])),
        "not_finite": int(np.sum(~np.isfinite(losses))),
        "traces": len(step.traces),
        "tiles_per_head": float(np.mean(tiles)),
        "median_seconds": float(np.median(seconds)),
    }


def speed(density: float, loaded: Callable[[], Loaded] = models.smollm2) -> list[dict[str, Any]]:
    """Steps per second of a truncated model over a long text, as ratios to dense in one run."""
    found = loaded()
    config, model, tokenizer = found.config, found.model, found.spoken.tokenizer
    graph, layers, *rest = nnx.split(
        truncated(model, SPEED_LAYERS), nnx.All(nnx.PathContains("layers"), nnx.Param), ...
    )
    texts = [encode(tokenizer, text_of(name)) for name in ("lcet10", "plrabn12")]
    ids = jnp.asarray(np.concatenate(texts)[:SPEED_TOKENS])
    plans: dict[str, Callable[..., TilePlan]] = {
        "dense": finetuning.policy_plan("dense", 1.0),
        "ladder 64 x 16": finetuning.policy_plan("ladder", density),
        "ladder 128 x 128": functools.partial(wide_ladder, density=density),
        "no attention": no_tiles,
    }
    calls = {}
    for name, plan_of in plans.items():
        step = finetuning.make_step(graph, plan_of, _optimiser(100), SPEED_SCORED, rest)
        calls[name] = functools.partial(step.train, layers, step.init(layers), ids)
    seconds = _report.interleaved(calls, 3)
    shape = f"{SPEED_LAYERS} layers, {config.num_heads} heads, {SPEED_TOKENS} tokens"
    return [
        {
            "shape": shape,
            "policy": name,
            "density": density,
            "steps_ratio_vs_own_dense": seconds["dense"] / taken,
            "attention_part_of_the_step": 1 - seconds["no attention"] / taken,
        }
        for name, taken in seconds.items()
    ]


def truncated(model: Transformer, layers: int) -> Transformer:
    """The first layers of a model, with its embedding and head."""
    graph, like = nnx.split(
        Transformer(dataclasses.replace(model.config, num_layers=layers), rngs=nnx.Rngs(0))
    )
    state = jax.tree.map(
        lambda new, old: old if old.shape == new.shape else old[:layers], like, nnx.state(model)
    )
    return nnx.merge(graph, state)


def wide_ladder(q: jax.Array, k: jax.Array, v: jax.Array, density: float) -> TilePlan:
    """The ladder over blocks of 128 x 128, which compute fastest."""
    tiling = Tiling(q.shape[1], k.shape[1])
    number = int(density * q.shape[2] * tiling.num_tiles)
    return attention.balanced_plan(q, k, v, number, tiling, rows=SPEED_ROWS)


def no_tiles(q: jax.Array, k: jax.Array, v: jax.Array) -> TilePlan:
    """A plan without any: what is left of a step is not attention."""
    plan = attention.dense(Tiling(q.shape[1], k.shape[1]))
    return dataclasses.replace(plan, count=jnp.zeros_like(plan.count))


def _print(rows: list[dict[str, Any]]) -> None:
    """All single numbers of the rows, and the last of those that are lists."""
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        last = [row[name][-1] if isinstance(row[name], list) else row[name] for name in rows[0]]
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in last))
    Console(width=160).print(table)


if __name__ == "__main__":
    sys.exit(main())
