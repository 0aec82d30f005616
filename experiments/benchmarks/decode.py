"""Decoding from end to end: milliseconds a token within a budget, against dense caches in the same run.

    python -m experiments.benchmarks.decode [--json OUT] [--quick]

Some twenty minutes on two cores; --quick takes four. SmolLM2-135M over contexts of a public-domain text,
the cache at 25 % and 10 % of its bytes at 16 bits, batches of one and four requests. The dense caches
are float32, donated, and written in place: one scan over stacked layers, and the layers unrolled, each
with arrays of its own, which takes a program thirty times as large. Ratios are to either, bars to the
scan. Times are medians of interleaved steps. Compile seconds are those of all
programs that a prompt and a step need, with nothing in JAX's compilation cache.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks import _report, _stock_model
from experiments.benchmarks._report import Bar, Row
from experiments.harness import cli, texts
from experiments.models import Transformer, load_gguf, prefill_attention, smollm2_path
from experiments.models.worth import decoder_of
from jbalance import decode
from jbalance.decode import Model, prefill

TEXT = "lcet10"
SIZES, BATCHES, FRACTIONS = (1280, 4096, 8192), (1, 4), (0.25, 0.1)
QUICK_SIZES, QUICK_BATCHES = (1280,), (1,)
SPEEDUP = {1280: 1.0, 4096: 1.2, 8192: 1.5}  # bars at 25 %, batch 1
STEPS = 8  # of each in a turn
ROOM = 512  # tokens behind the context that the dense caches have room for
TWO_DEVICES = 0.7
COMPILE_RATIO, STOCK_RATIO, COMPILE_S = 2.0, 3.0, 20.0


def main() -> None:
    cli.simulated_devices(2)
    _report.main("benchmarks.decode", __doc__, measure_all)


def measure_all(quick: bool) -> Iterator[Row]:
    _, model, tokenizer = load_gguf(smollm2_path())
    ids = texts.encode(tokenizer, texts.text_of(TEXT))
    decoder = decoder_of(model)
    yield from _compile_rows(model, decoder, ids)
    for size in QUICK_SIZES if quick else SIZES:
        for batch in QUICK_BATCHES if quick else BATCHES:
            yield from _speed_rows(model, decoder, ids, size, batch)
    yield from _device_rows(decoder, ids[:1280])


def _speed_rows(model: Transformer, decoder: Model, ids, size: int, batch: int) -> list[Row]:
    """One context size and batch: both dense caches and all fractions in one interleaved run."""
    prompts = [ids[i * 64 : i * 64 + size] for i in range(batch)]
    calls: dict[str, Callable[[], Any]] = {
        "scanned": _Dense(model, size, batch, unrolled=False),
        "unrolled": _Dense(model, size, batch, unrolled=True),
    }
    for fraction in FRACTIONS:
        calls[f"b{fraction:g}"] = _Budgeted(decoder, prompts, fraction)
    seconds = _report.interleaved(calls)
    dense = {name: seconds[name] / STEPS for name in ("scanned", "unrolled")}
    label = f"ctx{size}_batch{batch}"
    rows = [Row(label, f"dense_{name}_ms_per_token", 1e3 * x) for name, x in dense.items()]
    for fraction in FRACTIONS:
        own = seconds[f"b{fraction:g}"] / STEPS
        bar = Bar(SPEEDUP[size], at_least=True) if (fraction, batch) == (0.25, 1) else None
        case = f"{label}_b{fraction:g}"
        rows += [
            Row(case, "ms_per_token", 1e3 * own),
            Row(case, "speed_over_dense", dense["scanned"] / own, bar),
            Row(case, "speed_over_dense_unrolled", dense["unrolled"] / own),
        ]
    return rows


class _Dense:
    """Steps of the model over dense float32 caches, which are donated and written in place."""

    def __init__(self, model: Transformer, size: int, batch: int, *, unrolled: bool) -> None:
        c = model.config
        shape = (batch, c.num_kv_heads, size + ROOM, c.head_dim)
        rng = np.random.default_rng(0)
        caches = [
            tuple(jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
            for _ in range(c.num_layers)
        ]
        self.graph: Any
        self.state: Any
        self.graph, self.state = nnx.split(model)
        self.step: Any = _dense_unrolled if unrolled else _dense_scanned
        if unrolled:
            layers = [nnx.split(model.layer(i)) for i in range(c.num_layers)]
            self.graph = self.graph, layers[0][0]
            self.state = self.state, [state for _, state in layers]
        else:
            caches = jax.tree.map(lambda *x: jnp.stack(x), *caches)
        self.caches, self.token = caches, jnp.ones(batch, jnp.int32)
        self.first = self.position = size

    def __call__(self) -> jax.Array:
        if self.position + STEPS > self.first + ROOM:
            self.position = self.first
        for _ in range(STEPS):
            self.token, self.caches = self.step(
                self.graph, self.state, self.caches, self.token, self.position
            )
            self.position += 1
        return self.token


def _attend_dense(q, k, v, keys, values, position):
    """q [B, 1, H, D] over keys and values [B, K, S, D], into which k, v [B, 1, K, D] go first."""
    batch, kv_heads, size, head_dim = keys.shape
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(x, jnp.swapaxes(new, 1, 2), position, axis=2)
        for x, new in ((keys, k), (values, v))
    )
    grouped = q.reshape(batch, kv_heads, -1, head_dim) * head_dim**-0.5
    logits = jnp.einsum("bkgd,bksd->bkgs", grouped, keys)
    logits = jnp.where(jnp.arange(size) <= position, logits, -jnp.inf)
    y = jnp.einsum("bkgs,bksd->bkgd", jax.nn.softmax(logits), values)
    return y.reshape(q.shape), keys, values


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _dense_unrolled(graphs, states, caches, token, position):
    model = nnx.merge(graphs[0], states[0])
    positions = jnp.full((token.shape[0], 1), position)
    x, after = model.embed(token[:, None]), []
    for i, (keys, values) in enumerate(caches):
        layer = nnx.merge(graphs[1], states[1][i])
        q, k, v = layer.qkv(x, positions)
        y, keys, values = _attend_dense(q, k, v, keys, values, position)
        x = layer.finish(x, y)
        after.append((keys, values))
    return jnp.argmax(model.logits(x)[:, 0], axis=-1).astype(token.dtype), after


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _dense_scanned(graph, state, caches, token, position):
    model = nnx.merge(graph, state)
    positions = jnp.full((token.shape[0], 1), position)

    def attention(q, k, v, layer):
        y, keys, values = _attend_dense(q, k, v, layer[0], layer[1], position)
        return y, (keys, values)

    x, caches = model.hidden(token[:, None], positions, attention, caches)
    return jnp.argmax(model.logits(x)[:, 0], axis=-1).astype(token.dtype), caches


class _Budgeted:
    """Steps of the model over a cache of a fraction of the bytes."""

    def __init__(self, model: Model, prompts, fraction: float, devices: int = 1) -> None:
        full = model.dense_bytes(len(prompts[0]))
        budget = int(fraction * full * len(prompts)) // devices
        self.model = model
        self.state = decode.create(model, [budget] * devices, num_requests=len(prompts))
        for i, prompt in enumerate(prompts):
            self.state = decode.join(model, self.state, i, prompt)

    def __call__(self) -> jax.Array:
        for _ in range(STEPS):
            tokens, self.state = decode.step(self.model, self.state)
            np.asarray(tokens)  # as whoever shows them would
        return tokens


def _device_rows(decoder: Model, prompt: np.ndarray) -> list[Row]:
    """The same bytes on one device and on two."""
    calls = {f"{n}": _Budgeted(decoder, [prompt], 0.25, devices=n) for n in (1, 2)}
    seconds = _report.interleaved(calls)
    bar = Bar(TWO_DEVICES, at_least=True)
    return [Row("ctx1280_b0.25", "two_devices_over_one", seconds["1"] / seconds["2"], bar)]


def _compile_rows(model: Transformer, decoder: Model, ids: np.ndarray) -> list[Row]:
    """Seconds to compile a prompt of 1,280 tokens and a step, of the dense model and within a budget."""
    size = 1280
    jax.config.update("jax_enable_compilation_cache", False)
    graph, state = nnx.split(model)
    tokens = jnp.asarray(ids[:size])[None]

    def dense_prefill(state, tokens):
        model = nnx.merge(graph, state)
        x, cache = model.hidden(tokens, attention=prefill_attention)
        return jnp.argmax(model.logits(x[:, -1:])[:, 0], axis=-1), cache

    dense = _Dense(model, size, 1, unrolled=False)
    dense_s = _seconds(lambda: jax.jit(dense_prefill).lower(state, tokens).compile())
    dense_s += _seconds(
        lambda: _dense_scanned.lower(graph, state, dense.caches, dense.token, size).compile()
    )
    jax.clear_caches()
    full = decoder.dense_bytes(size)
    place = decode.create(decoder, [full // 4])
    warm_s = _seconds(lambda: _prompt_and_step(decoder, place, ids[:size]))
    place = decode.create(decoder, [full // 4])
    run_s = _seconds(lambda: _prompt_and_step(decoder, place, ids[:size]))
    own_s = warm_s - run_s
    stock_s, cached_s = _stock_model.compile_seconds()
    jax.config.update("jax_enable_compilation_cache", True)
    return [
        Row("ctx1280", "compile_s_dense", dense_s),
        Row("ctx1280", "compile_s", own_s, Bar(COMPILE_S)),
        Row("ctx1280", "compile_over_dense", own_s / dense_s, Bar(COMPILE_RATIO)),
        Row("stock_nnx_3_layers", "compile_s_stock", stock_s),
        Row("stock_nnx_3_layers", "compile_over_stock", cached_s / stock_s, Bar(STOCK_RATIO)),
    ]


def _prompt_and_step(model, state, prompt):
    state = decode.join(model, state, 0, prompt, capacity=prefill.capacity_for(len(prompt)))
    return np.asarray(decode.step(model, state)[0])


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
