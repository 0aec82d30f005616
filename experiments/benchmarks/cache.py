"""The cache: attention straight from its pages against dense caches, admission, bytes, compilations.

    python -m experiments.benchmarks.cache [--json OUT] [--quick]

Some ten minutes; --quick takes two. One layer of SmolLM2-135M (3 key/value heads, 9 query
heads, D = 64): real keys, values and worth of a public-domain text, cut into pieces that the model can
read and laid one after the other. A case `ctxS_bF` holds S tokens at the fraction F of their bytes at 16
bits, all metadata counted, as the ladder allots them. Times are medians of interleaved calls, and
ratios are those of one run: against a dense cache that keeps a token's key in a row, as decoders append
it, and (`any_layout`) against the faster of that and one that keeps the keys in columns.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks import _report
from experiments.benchmarks._report import Bar, Row
from experiments.harness import texts
from experiments.kv_budget import measure
from experiments.models import Transformer, load_gguf, prefill_attention, smollm2_path
from experiments.models.worth import decoder_of
from jbalance import cache, importance
from jbalance.cache import KVCache, _codec, _prefill, _settle
from jbalance.cache._attend import attend_pages
from jbalance.cache._cache import bits_of
from jbalance.cache._pages import Arena
from jbalance.importance.predicted_worth import predicted_worth
from jbalance.importance.token_worth import NUM_QUERIES, later_energy
from jbalance.resources import kv_entry_bytes

TEXT, LAYER, PIECE_TOKENS = "lcet10", 14, 2048
SIZES, QUICK_SIZES = (1024, 4096, 16384, 32768), (1024, 4096)
FRACTIONS = (0.25, 0.1, 0.05)
BARS = {
    (16384, 0.25): {"step_speedup_vs_dense_f32": 0.8, "step_speedup_vs_dense_bf16": 3.0},
    (16384, 0.1): {"step_speedup_vs_dense_f32": 1.3},
    (16384, 0.05): {"step_speedup_vs_dense_f32": 2.5},
}
LONG_STEPS, LONG_CONTEXT = 20_000, 1024
CODED_VECTORS = 16384
PROMPT_TOKENS = 4096


class Context(NamedTuple):
    """One layer's tokens."""

    q: jax.Array  # [H, D] the last query
    k: jax.Array  # [S, K, D]
    v: jax.Array  # [S, K, D]
    w: jax.Array  # [K, S]


def main() -> None:
    _report.main("benchmarks.cache", __doc__, measure_all)


def measure_all(quick: bool) -> Iterator[Row]:
    sizes = QUICK_SIZES if quick else SIZES
    context = real_context(max(sizes))
    for size in sizes:
        yield from _sized(_first(context, size))
    yield from _scorers()
    yield from _codec_rows()
    yield from _long_decode(_first(context, LONG_CONTEXT), 2_000 if quick else LONG_STEPS)


def real_context(size: int) -> Context:
    """Tokens of a text through the model's first layers, in pieces laid one after the other."""
    _, model, tokenizer = load_gguf(smollm2_path())
    ids = texts.encode(tokenizer, texts.text_of(TEXT))
    graph, state = nnx.split(model)
    worth = _worth_of(model)

    @jax.jit
    def layer_of(state, ids):
        q, k, v = nnx.merge(graph, state).hidden(ids[None], None, _keep)[1]
        return q[LAYER], k[LAYER], v[LAYER], worth(q[LAYER], k[LAYER], v[LAYER])

    piece = min(PIECE_TOKENS, size)
    starts = range(0, size, piece)
    parts = [layer_of(state, jnp.asarray(ids[start : start + piece])) for start in starts]
    q, k, v, w = zip(*parts, strict=True)
    return Context(q[-1][-1], jnp.concatenate(k), jnp.concatenate(v), jnp.concatenate(w, axis=1))


def _keep(q, k, v, _):
    y, (k, v) = prefill_attention(q, k, v)
    return y, (q[0], k[0], v[0])


def _first(context: Context, size: int) -> Context:
    return Context(context.q, context.k[:size], context.v[:size], context.w[:, :size])


def _sized(context: Context) -> list[Row]:
    """One size: dense caches and all fractions in one interleaved run."""
    size, heads, head_dim = context.k.shape
    q = context.q.reshape(heads, -1, head_dim)
    calls: dict[str, Callable[[], Any]] = {}
    for name, dtype in (("f32", jnp.float32), ("bf16", jnp.bfloat16)):
        k, v = (jnp.asarray(jnp.moveaxis(x, 1, 0), dtype) for x in (context.k, context.v))
        turned = jnp.asarray(jnp.swapaxes(k, 1, 2))
        calls[f"{name}/rows"] = functools.partial(_dense, q.astype(dtype), k, v)
        calls[f"{name}/columns"] = functools.partial(_dense_turned, q.astype(dtype), turned, v)
    held = {}
    for fraction in FRACTIONS:
        held[fraction], calls[f"admit_b{fraction}"] = _held(context, fraction)
        calls[f"b{fraction}"] = functools.partial(_attend, q, held[fraction].arena)
    seconds = _report.interleaved(calls)
    dense = {name: seconds[f"{name}/rows"] for name in ("f32", "bf16")}
    dense |= {f"{name}_any_layout": min(dense[name], seconds[f"{name}/columns"]) for name in dense}
    rows = []
    for fraction in FRACTIONS:
        label = f"ctx{size}_b{fraction:g}"
        bars = BARS.get((size, fraction), {})
        step = seconds[f"b{fraction}"]
        arena = held[fraction].arena
        number = np.asarray(arena.count).sum(axis=0)
        budget = budget_bytes(context, fraction)
        flush, between = _flush_seconds(context, held[fraction])
        rows += [
            *(
                Row(label, metric, dense[name] / step, _at_least(bars.get(metric)))
                for name in dense
                for metric in [f"step_speedup_vs_dense_{name}"]
            ),
            Row(label, "resident_bytes", held[fraction].nbytes, Bar(budget)),
            Row(label, "budget_bytes", budget),
            Row(label, "bytes_read_per_step", _bytes_read(arena)),
            Row(label, "bytes_read_over_dense_bf16", _bytes_read(arena) / _dense_bytes(context)),
            Row(label, "tokens_kept", number.sum() / (heads * size)),
            *(
                Row(label, f"tokens_at_{bits}_bits", n / (heads * size))
                for bits, n in zip(arena.bits, number, strict=True)
            ),
            Row(label, "admit_steps", seconds[f"admit_b{fraction}"] / step),
            Row(label, "admission_share", flush / (flush + between * step), Bar(0.05)),
        ]
    rows.append(Row(f"ctx{size}", "dense_bf16_over_f32", dense["bf16"] / dense["f32"]))
    return rows


def _at_least(limit: float | None) -> Bar | None:
    return None if limit is None else Bar(limit, at_least=True)


def budget_bytes(context: Context, fraction: float) -> int:
    """So much of the context's bytes at 16 bits."""
    return int(fraction * _dense_bytes(context))


def _dense_bytes(context: Context) -> int:
    size, heads, head_dim = context.k.shape
    return size * heads * kv_entry_bytes(head_dim)


def _held(context: Context, fraction: float) -> tuple[KVCache, Callable[[], Any]]:
    """The context in a cache of that budget, and the call that put it there."""
    _, heads, head_dim = context.k.shape
    made = cache.create(budget_bytes(context, fraction), 1, heads, head_dim)

    @jax.jit
    def admit(made, k, v, w):
        return _prefill.admit(made, 0, 0, k, v, w, made.arena.num_pages)[0]

    call = functools.partial(admit, made, context.k, context.v, context.w)
    return call(), call


@jax.jit
def _attend(q, arena):
    return attend_pages(q, arena, jnp.arange(q.shape[0]))


@jax.jit
def _dense(q, k, v):
    logits = jnp.einsum("ktd,ksd->kts", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("kts,ksd->ktd", jax.nn.softmax(logits), v)


@jax.jit
def _dense_turned(q, k, v):
    logits = jnp.einsum("ktd,kds->kts", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("kts,ksd->ktd", jax.nn.softmax(logits), v)


def _bytes_read(arena: Arena) -> int:
    """Of pages and tables in one step: what an accelerator's memory would have to deliver."""
    used = -(-np.asarray(arena.count) // np.array(arena.page_tokens))
    return int(used.sum()) * (arena.page_bytes + 4) + arena.offset.nbytes + arena.count.nbytes


def _worth_of(model: Transformer) -> Callable[..., jax.Array]:
    """The worth of a layer's tokens, as a function of q, k and v."""
    frequencies = np.asarray(model.attention_spec.frequencies, np.float32)
    return functools.partial(importance.token_worth, frequencies=frequencies)


def _scorers() -> list[Row]:
    """What the worth of a prompt's tokens costs besides the prefill, in prefills."""
    _, model, tokenizer = load_gguf(smollm2_path())
    ids = texts.encode(tokenizer, texts.text_of(TEXT))[:PROMPT_TOKENS]
    graph, state = nnx.split(model)

    @jax.jit
    def prefill(state, ids):
        return nnx.merge(graph, state).hidden(ids[None], None, prefill_attention)

    @jax.jit
    def queries(state, ids):
        return nnx.merge(graph, state).hidden(ids[None], None, _keep)[1]

    q, k, v = (x[LAYER] for x in queries(state, jnp.asarray(ids)))
    learned = decoder_of(model).worth
    assert learned is not None
    x = jax.random.normal(jax.random.key(0), (len(ids), model.config.embed_dim))

    @jax.jit
    def predicted(weights, x, q, k, v):
        return predicted_worth(x, later_energy(q[-NUM_QUERIES:], k, v), weights)

    seconds = _report.interleaved(
        {
            "prefill": functools.partial(prefill, state, jnp.asarray(ids)),
            "predicted": functools.partial(predicted, learned[LAYER], x, q, k, v),
            "sketch": functools.partial(jax.jit(_worth_of(model)), q, k, v),
            "thorough": functools.partial(measure.prefill, model, ids, ("repetition",)),
        }
    )
    label = f"prompt{len(ids)}"
    share = model.config.num_layers / seconds["prefill"]
    return [
        Row(label, "predicted_worth_over_prefill", share * seconds["predicted"], Bar(0.02)),
        Row(label, "sketched_worth_over_prefill", share * seconds["sketch"], Bar(0.15)),
        Row(label, "thorough_over_prefill", seconds["thorough"] / seconds["prefill"] - 1, Bar(3.0)),
    ]


def _codec_rows() -> list[Row]:
    """Quantizing and dequantizing, beside a float32 copy of the same vectors."""
    x = jax.random.normal(jax.random.key(0), (CODED_VECTORS, 64))
    copy = jax.jit(lambda x: x + 1)
    calls: dict[str, Callable[[], Any]] = {"copy": functools.partial(copy, x)}
    for bits in _codec.BITS:
        codes = cache.quantize(x, bits)
        quantize, dequantize = (
            jax.jit(functools.partial(cache.quantize, bits=bits)),
            jax.jit(functools.partial(cache.dequantize, head_dim=64, bits=bits)),
        )
        calls[f"quantize_{bits}"] = functools.partial(quantize, x)
        calls[f"dequantize_{bits}"] = functools.partial(dequantize, codes)
    seconds = _report.interleaved(calls)
    return [
        Row(f"codec_{bits}bits", f"{name}_over_copy", seconds[f"{name}_{bits}"] / seconds["copy"])
        for bits in _codec.BITS
        for name in ("quantize", "dequantize")
    ]


def _long_decode(context: Context, steps: int) -> list[Row]:
    """Steps far beyond the context in a cache of a quarter of its bytes: all of it stays the same."""
    size, heads, head_dim = context.k.shape
    budget = budget_bytes(context, 0.25)
    made = cache.create(budget, 1, heads, head_dim)
    pages = made.arena.num_pages
    made, _ = _prefill.admit(made, 0, 0, context.k, context.v, context.w, pages)
    traces = 0

    def step(made, k, v, q):
        nonlocal traces
        traces += 1
        y, made = cache.step(made, 0, q[None], k[None], v[None])
        return made, y

    compiled = jax.jit(step, donate_argnums=0)
    largest = 0
    queries = jnp.roll(jnp.repeat(context.k, context.q.shape[0] // heads, axis=1), 1, axis=0)
    q, k, v = (np.asarray(x) for x in (queries, context.k, context.v))
    for i in range(steps):
        at = i % size
        made, y = compiled(made, k[at], v[at], q[at])
        largest = max(largest, made.nbytes)
    jax.block_until_ready(y)
    label = f"decode{steps}"
    return [
        Row(label, "largest_resident_bytes", largest, Bar(budget)),
        Row(label, "traces", traces, Bar(1)),
    ]


def _flush_seconds(context: Context, held: KVCache) -> tuple[float, int]:
    """Median seconds of letting half a recent buffer into the arena, and the steps that lie between two.

    One after the other, with new tokens each time, as the steps are timed that they are held against.
    """
    size, recent = len(context.k), held.recent_tokens
    allowance = jnp.array([held.arena.num_pages])

    def tokens(start: int) -> tuple[jax.Array, ...]:
        index = np.arange(start, start + recent) % size
        k, v = (bits_of(jnp.moveaxis(x[index], 1, 0)) for x in (context.k, context.v))
        return k, v, jnp.square(context.w[:, index]) * recent

    @functools.partial(jax.jit, donate_argnums=0)
    def flush(made: KVCache, new: tuple[jax.Array, ...]) -> KVCache:
        made = dataclasses.replace(
            made,
            recent_keys=new[0],
            recent_values=new[1],
            recent_energy=new[2],
            recent_count=jnp.array([recent]),
        )
        return _settle.settle(made, allowance)[0]

    made, taken = jax.tree.map(jnp.copy, held), []
    news = [jax.block_until_ready(tokens(i * recent)) for i in range(2 * _report.REPETITIONS)]
    for new in news:
        start = time.perf_counter()
        made = jax.block_until_ready(flush(made, new))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[_report.REPETITIONS :]), recent // 2


if __name__ == "__main__":
    main()
