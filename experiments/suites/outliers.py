"""Outlier stress: keys and values with a few huge channels, in a model that computes what it did.

    python -m experiments.kv_budget cases --out out/cases.npz
    python -m experiments.suites.outliers --cases out/cases.npz --json out/outliers.json

Such keys break caches of 4 bits in some models. Here SmolLM2 gets them: the channels of some rotary
pairs of each key/value head are multiplied by a number and those of its queries divided by it, a value's
channel and its row of the output projection alike. Reports the KL of policies on both models, each
against its own full cache, and their ratio at the same bytes; the bar is 1.2.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.harness import cli, files
from experiments.models import Transformer
from experiments.models import options as models

BAR = 1.2  # of the KL on the model as it is


def rescaled(model: Transformer, seed: int, scale: float, pairs: int) -> Transformer:
    """A model with outlier channels in its keys and values and the same logits.

    Args:
      model: the decoder; it stays as it is.
      seed: of the choice of channels.
      scale: what they are multiplied by, > 0; a power of two rounds nothing.
      pairs: rotary pairs of each key/value head, in 0..D/2; as many, and one value channel.

    Raises:
      ValueError: a scale or a number of pairs out of range, or a model that normalizes its queries and
        keys: a norm would undo it.
    """
    c = model.config
    if c.qk_norm:
        raise ValueError("model normalizes queries and keys: a scale before a norm has no effect")
    if not 0 < scale < np.inf:
        raise ValueError(f"scale is {scale}: a finite number above 0")
    if not 0 <= pairs <= c.head_dim // 2:
        raise ValueError(f"pairs is {pairs}: it must be in 0..{c.head_dim // 2}")
    rng = np.random.default_rng(seed)
    keys, values = np.ones((2, c.num_layers, c.num_kv_heads, c.head_dim))
    for key, value in zip(
        keys.reshape(-1, c.head_dim), values.reshape(-1, c.head_dim), strict=True
    ):
        chosen = rng.choice(c.head_dim // 2, pairs, replace=False)
        key[chosen] = key[chosen + c.head_dim // 2] = scale
        value[rng.integers(c.head_dim)] = scale
    group = c.num_heads // c.num_kv_heads
    queries, outputs = (1 / np.repeat(x, group, axis=1) for x in (keys, values))
    graph, state = nnx.split(model)
    new = nnx.merge(graph, jax.tree.map(jnp.array, state))
    factors = {"query": queries, "key": keys, "value": values}
    for name, factor in factors.items():
        weight = getattr(new.layers, name)
        weight[...] = weight[...] * jnp.asarray(factor[:, None], weight[...].dtype)
        if c.qkv_bias:
            bias = getattr(new.layers, f"{name}_bias")
            bias[...] = bias[...] * jnp.asarray(factor, bias[...].dtype)
    output = new.layers.output
    output[...] = output[...] * jnp.asarray(outputs[..., None], output[...].dtype)
    return new


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.suites.outliers", __doc__)
    parser.add_argument("--cases", required=True, help="an .npz file of kv_budget's cases")
    parser.add_argument("--policy", default="ladder", help="names, with commas")
    parser.add_argument("--budget", default="0.25,0.1,0.05", help="fractions, with commas")
    parser.add_argument("--scale", default="2,8,30", help="with commas, of the channels")
    parser.add_argument("--pairs", type=int, default=2, help="channels of each head")
    parser.add_argument("--seed", type=int, default=0, help="of the channels that are scaled")
    cli.add_json(parser, required=True)
    models.add_options(parser)
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    from experiments.harness import progress
    from experiments.kv_budget import policies, score

    names = options.policy.split(",")
    for name in names:
        policies.policy_of(name)
    budgets = cli.numbers("--budget", options.budget)
    score.check_budgets(budgets)
    scales = cli.numbers("--scale", options.scale)
    keep = files.json_writer(options.json)
    model = models.loaded(options).model
    cases = score.read_cases(options.cases, model.config.vocab_size)
    if "lm_ctx" not in cases:
        raise ValueError(f"--cases {options.cases!r} lacks lm_ctx: there is nothing to predict")
    cases = {name: x for name, x in cases.items() if name.startswith("lm_")}
    rows: list[dict[str, Any]] = []
    plain: dict[tuple[str, float], float] = {}
    with progress.bar("contexts", (1 + len(scales)) * len(cases["lm_ctx"])) as advance:
        for scale in (1.0, *scales):
            stressed = rescaled(model, options.seed, scale, options.pairs)
            found = score.score(stressed, cases, names, budgets, lambda results: advance())
            for row in found["results"]:
                key, kl = (row["policy"], row["budget"]), row["mean"]["kl"]
                plain.setdefault(key, kl)
                rows.append(
                    {"policy": key[0], "budget": key[1], "scale": scale, "pairs": options.pairs}
                    | {"kl": kl, "ratio": kl / plain[key], "bytes": row["mean"]["cache_bytes"]}
                    | {"contexts": len(row["cases"])}
                )
            keep({"seed": options.seed, "bar": BAR, "results": rows})
    for row in rows:
        print(
            f"{row['policy']} at {row['budget']:g}, channels times {row['scale']:g}: KL "
            f"{row['kl']:.4g}, ratio {row['ratio']:.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
