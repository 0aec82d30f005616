"""Quality against compute in the prefill of a real model on real texts.

    python -m experiments.tiles.prefill [--texts NAMES] [--tokens N] [--density D,...] [--json OUT]

Every attention of the model runs over the tiles that a policy chose and over no others. KL is that of
the model's predictions to those of dense attention over the second half of each text; a pass key lies
at 30 % and is asked for at the end. About eight minutes on two cores for the defaults.
"""

from __future__ import annotations

import argparse
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
from tokenizers import Tokenizer

from experiments.harness import cli, files, statistics, texts
from experiments.kv_budget import data
from experiments.models import Loaded
from experiments.models import options as models
from experiments.tiles.policies import BLOCK_Q, POLICIES, overlap, tiling
from jbalance import attention, checks

KEY_AT = 0.3  # where in the text the pass key lies


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code; a bad input is one line on stderr."""
    parser = cli.parser("experiments.tiles.prefill", __doc__)
    parser.add_argument("--texts", default="lcet10,plrabn12,lear", help="names, with commas")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--density", default="0.5,0.25", help="parts of the causal tiles")
    parser.add_argument("--policies", default="window,uniform,ladder", help="names, with commas")
    cli.add_json(parser)
    models.add_options(parser)
    return cli.run(parser, _job, arguments)


def _job(options: argparse.Namespace) -> None:
    keep = files.json_writer(options.json)
    rows = run(
        options.texts.split(","),
        options.tokens,
        cli.numbers("--density", options.density),
        options.policies.split(","),
        keep,
        functools.partial(models.loaded, options),
    )
    _print(rows)


def run(
    texts: list[str],
    tokens: int,
    densities: list[float],
    policies: list[str],
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
    loaded: Callable[[], Loaded] = models.smollm2,
) -> list[dict[str, Any]]:
    """One row for each text, policy and density; `keep` gets what there is after each, with means.

    Raises:
      ValueError: unknown names, texts too short, densities outside (0, 1], tokens that are no multiple
        of a block of queries.
    """
    for name in policies:
        checks.choice("--policies", name, POLICIES)
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"--density is {density}: a part of the causal tiles, in (0, 1]")
    if tokens < 8 * BLOCK_Q or tokens % BLOCK_Q:
        raise ValueError(f"--tokens is {tokens}: a multiple of {BLOCK_Q}, at least {8 * BLOCK_Q}")
    found = loaded()
    model, tokenizer = found.model, found.spoken.tokenizer
    graph, state = nnx.split(model)
    rows = []
    for i, name in enumerate(texts):
        ids, answer = sequence(tokenizer, name, tokens, seed=i)
        full, _ = _predict(graph, state, ids, "dense", 1.0, tokens // 2)
        for density in densities:
            for policy in policies:
                start = time.perf_counter()
                got, (used, shared) = _predict(graph, state, ids, policy, density, tokens // 2)
                row = {"text": name, "tokens": tokens, "density": density, "policy": policy}
                row |= compare(full, got, ids, answer)
                row |= {"tiles": float(used), "as_window": float(shared)}
                row["seconds_with_compilation"] = time.perf_counter() - start
                rows.append(row)
                keep({"rows": rows, "means": means(rows)})
                print(
                    ", ".join(
                        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()
                    )
                )
    return rows


def sequence(
    tokenizer: Tokenizer, name: str, tokens: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Part of a text [tokens] with a pass key in it and the question and answer at its end; the answer.

    Raises:
      ValueError: a text too short.
    """
    ids = texts.encode(tokenizer, texts.text_of(name))
    digits = "".join(map(str, np.random.default_rng(seed).integers(0, 10, data.PASSKEY_DIGITS)))
    note, question, answer = (
        texts.encode(tokenizer, text)
        for text in (data.NOTE.format(digits, digits), data.QUESTION, digits)
    )
    size = tokens - len(note) - len(question) - len(answer)
    start = len(ids) // 5
    if start + size > len(ids):
        raise ValueError(f"--tokens is {tokens}: {name} has {len(ids) - start} from its fifth on")
    own, at = ids[start : start + size], int(KEY_AT * size)
    return np.concatenate([own[:at], note, own[at:], question, answer]), answer


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _predict(graph, state, ids, policy, density, first):
    """Log-probabilities [tokens - first, V]; the part of the causal tiles, and of the window's."""
    model = nnx.merge(graph, state)

    def attend(q, k, v, _):
        plan = POLICIES[policy](q, k, v, density)
        heads = q.shape[2] // plan.count.shape[1]
        latest = POLICIES["window"](q, k, v, density)
        numbers = heads * plan.num_tiles, overlap(plan, latest)
        return attention.attend(q, k, v, plan, causal=True).y, numbers

    h, (used, shared) = model.hidden(jnp.asarray(ids)[None], None, attend)
    all_tiles = used.size * model.config.num_heads * tiling(ids.size).num_tiles
    parts = jnp.sum(used) / all_tiles, jnp.mean(shared)
    return jax.nn.log_softmax(model.logits(h[:, first:])[0]), parts


def compare(full: jax.Array, got: jax.Array, ids: np.ndarray, answer: np.ndarray) -> dict[str, Any]:
    """KL of predictions [N, V] of the last N tokens, and whether the pass key is found."""
    kl = jnp.sum(jnp.exp(full) * (full - got), axis=-1)[:-1]
    asked = slice(len(got) - len(answer) - 1, len(got) - 1)
    found = {
        name: bool((np.argmax(x[asked], axis=-1) == answer).all())
        for name, x in (("passkey", got), ("passkey_dense", full))
    }
    return {"kl": float(kl.mean()), **found}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the texts, a row for each density and policy; pass keys of those that all tiles find."""
    found = []
    for density, policy in dict.fromkeys((row["density"], row["policy"]) for row in rows):
        own = [row for row in rows if (row["density"], row["policy"]) == (density, policy)]
        asked = [row["passkey"] for row in own if row["passkey_dense"]]
        kl = [row["kl"] for row in own]
        names = ("kl", "tiles", "as_window")
        mean = {name: float(np.mean([row[name] for row in own])) for name in names}
        if len(kl) > 1:
            mean["kl_interval"] = statistics.interval(kl).half
        keys = {"passkeys_found": sum(asked), "passkeys": len(asked)}
        found.append({"density": density, "policy": policy, **mean, **keys})
    return found


def _print(rows: list[dict[str, Any]]) -> None:
    """Means over the texts, beside what the ladder is held against."""
    table = Table(title="Mean over the texts")
    metrics = "tiles", "as window", "KL to dense", "pass keys", "ladder's KL over this"
    for name in ("density", "policy", *metrics):
        table.add_column(name, justify="right")
    found = means(rows)
    ladder = {mean["density"]: mean["kl"] for mean in found if mean["policy"] == "ladder"}
    for mean in found:
        ratio = f"{ladder[mean['density']] / mean['kl']:.2f}" if mean["density"] in ladder else ""
        table.add_row(
            f"{mean['density']:g}",
            mean["policy"],
            f"{mean['tiles']:.3f}",
            f"{mean['as_window']:.3f}",
            f"{mean['kl']:.4f}",
            f"{mean['passkeys_found']} of {mean['passkeys']}",
            ratio,
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
