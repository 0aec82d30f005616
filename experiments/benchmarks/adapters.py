"""One model's layers through every adapter: agreement, bytes, compilations.

    python -m experiments.benchmarks.adapters [--json OUT] [--quick]

Some fifteen minutes on one core; --quick takes five. The first layers of SmolLM2-135M over a
public-domain text, and what its head reads from them; `kl` is the divergence of these predictions from
those with dense attention, the same weights everywhere.

`tiles_*` compute half of the causal tiles: `patch` (`jax.nn.dot_product_attention` is replaced where the
model calls it), `forward` (`adapters.forward`, by the four functions of a decoder) and `linen` (a
`LinenBalancedAttention` a layer), which choose alike; `apart` is the largest difference of their
logits from those of `forward`, over the spread of these. `linen_priced` is `linen` once `TileBalancer`
has moved tiles between the layers.

`cache_*` read a prompt and then go on token by token, with a quarter of a 16-bit cache's bytes: `linen`
(a `LinenCachedAttention` a layer), `engine` (`AttentionBackend`, as a serving engine calls it) and
`functions` (`cache.create`, `prefill` and `step`), of which the latter two share bytes between layers.
Then another request takes the place of the first: `programs` are the compilations of attention in all,
one for prompts and one for tokens (an engine numbers its layers, each of which has its own).
`cache_weight3` and `cache_weight1` are two requests that read the same in one cache of as much for each,
with these weights in `cache.allowance`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import _report
from experiments.benchmarks._report import Bar, Row
from experiments.harness import texts
from experiments.models import load_gguf, smollm2_path
from experiments.models.worth import decoder_of
from jbalance import adapters, cache
from jbalance.adapters import AttentionBackend, ForwardBatch, TileBalancer, TileBudget, Tiles
from jbalance.cache import KVCache
from jbalance.decode import Model

TEXT = "lcet10"
LAYERS, QUICK_LAYERS = 4, 2
PROMPT, QUICK_PROMPT = 1024, 512
STEPS, QUICK_STEPS = 64, 16
FRACTION, PART = 0.5, 0.25  # of the tiles, and of a cache's bytes
WEIGHTS = (3.0, 1.0)
TILES = Tiles(causal=True)

# Attention of layer i: q [B, T, H, D], k and v [B, T, K, D] -> y [B, T, H, D].
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def main() -> None:
    _report.main("benchmarks.adapters", __doc__, measure_all)


def measure_all(quick: bool) -> Iterator[Row]:
    _, whole, tokenizer = load_gguf(smollm2_path())
    ids = texts.encode(tokenizer, texts.text_of(TEXT))
    model = first_layers(decoder_of(whole, learned=False), QUICK_LAYERS if quick else LAYERS)
    prompt, steps = (QUICK_PROMPT, QUICK_STEPS) if quick else (PROMPT, STEPS)
    yield from tiles_rows(model, ids[:prompt])
    yield from cache_rows(model, ids, prompt, steps)
    yield from weights_rows(model, ids, prompt, steps)


def first_layers(model: Model, number: int) -> Model:
    """The model without its later layers."""
    return dataclasses.replace(
        model, layers=model.layers[:number], attention=model.attention[:number]
    )


def predict(model: Model, tokens: Any, start: int = 0, *, attend: Attend) -> jax.Array:
    """Log-probabilities [B, T, V] of tokens [B, T] at positions from `start` on."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    x = _run(model.functions(0).embed, model.params, tokens, positions)
    for i, weights in enumerate(model.layers):
        f = model.functions(i)
        q, k, v = _run(f.qkv, weights, x, positions)
        x = _run(f.finish, weights, x, attend(i, q, k, v))
    return jax.nn.log_softmax(_run(model.functions(0).logits, model.params, x))


@functools.partial(jax.jit, static_argnums=0)
def _run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def stock(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """A model's own call of attention, by the name that the patch replaces."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def dense(model: Model, tokens: Any) -> jax.Array:
    """`predict` with all keys."""
    attend = jax.jit(stock)
    return predict(model, tokens, attend=lambda i, *qkv: attend(*qkv))


def kl_of(full: jax.Array, got: jax.Array) -> float:
    """Mean divergence of log-probabilities [..., V]."""
    return float(jnp.mean(jnp.sum(jnp.exp(full) * (full - got), axis=-1)))


# Tiles.


def tiles_rows(model: Model, ids: np.ndarray) -> list[Row]:
    """Half of the tiles, chosen by every adapter from the same queries and keys."""
    tokens = ids[None]
    full = dense(model, tokens)
    by = {"forward": jax.nn.log_softmax(_forward(model)((model.params, model.layers), tokens))}
    by["patch"] = predict(model, tokens, attend=lambda i, *qkv: patched(*qkv))
    by["linen"], seen = balanced(model, tokens, [{}] * model.num_layers)
    by["linen_priced"], _ = balanced(model, tokens, moved(seen))
    rows = []
    for name, got in by.items():
        rows.append(Row(f"tiles_{name}", "kl", kl_of(full, got)))
        if name in ("patch", "linen"):
            apart = jnp.max(jnp.abs(got - by["forward"])) / jnp.std(by["forward"])
            rows.append(Row(f"tiles_{name}", "apart", float(apart), Bar(1e-3)))
    return rows


def _forward(model: Model) -> Callable[..., jax.Array]:
    """(parameters, tokens) -> logits: parameters that a program closed over would be its constants."""

    def call(parameters: Any, tokens: jax.Array) -> jax.Array:
        params, layers = parameters
        given = dataclasses.replace(model, params=params, layers=layers)
        return adapters.forward(given, tokens, fraction=FRACTION, tiles=TILES)

    return jax.jit(call)


def _within(query: jax.Array, key: jax.Array, value: jax.Array, **given: Any) -> jax.Array:
    """An `attention_fn` over a part of the tiles."""
    return adapters.attend_within(TileBudget.of(FRACTION), query, key, value, TILES, **given)[0]


@jax.jit
def patched(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The model's own call, which reaches `_within` instead."""
    with adapters.patch_dot_product_attention(_within):
        return stock(q, k, v)


@jax.jit
def _balanced(variables: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    """One layer's attention, and its collection "balance"."""
    mask = np.tri(q.shape[1], dtype=bool)[None, None]
    module = adapters.LinenBalancedAttention(FRACTION, TILES)
    return module.apply(variables, q, k, v, mask=mask, mutable=["balance"])


def balanced(model: Model, tokens: Any, variables: list[Any]) -> tuple[jax.Array, list[Any]]:
    """`predict` by linen's modules, of each layer its variables, and what these are then."""
    variables = list(variables)

    def attend(i: int, *qkv: jax.Array) -> jax.Array:
        y, variables[i] = _balanced(variables[i], *qkv)
        return y

    return predict(model, tokens, attend=attend), variables


def moved(variables: list[Any]) -> list[Any]:
    """The variables after a balancer's first update, at as many tiles."""
    balancer = TileBalancer(decay=0.0)
    return balancer.update(variables, balancer.init(variables), FRACTION)[0]


# Caches.


class Reader(NamedTuple):
    """An adapter as a reader of B requests in step."""

    nbytes: int  # that stay resident
    begin: Callable[[np.ndarray], jax.Array]  # [B, S] -> log-probabilities [B, S, V]; none is held
    step: Callable[[np.ndarray, int], jax.Array]  # [B, 1] at a position -> [B, 1, V]
    programs: Callable[[], int]  # compilations of attention so far


def linen_reader(model: Model, num_bytes: int) -> Reader:
    """A cache of its own in each layer."""
    spec = model.attention[0]
    module = adapters.LinenCachedAttention(num_bytes // model.num_layers, spec.frequencies)

    def one(variables: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        mask = np.tri(q.shape[1], dtype=bool)[None, None]
        return module.apply(variables, q, k, v, mask=mask, mutable=["cache"])

    call: Any = jax.jit(one)
    layers: list[Any] = [{}] * model.num_layers

    def attend(i: int, *qkv: jax.Array) -> jax.Array:
        y, layers[i] = call(layers[i], *qkv)
        return y

    def begin(prompts: np.ndarray) -> jax.Array:
        layers[:] = [{}] * model.num_layers
        return predict(model, prompts, attend=attend)

    q, k = (jnp.zeros((1, 1, h, model.head_dim)) for h in (spec.num_heads, spec.num_kv_heads))
    made = jax.eval_shape(one, {}, q, k, k)[1]
    nbytes = model.num_layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made))
    return Reader(nbytes, begin, functools.partial(predict, model, attend=attend), call._cache_size)


def engine_reader(model: Model, num_bytes: int) -> Reader:
    """A serving engine's backend, with a place for one request."""
    backend = AttentionBackend(model.attention, num_requests=1)
    call: Any = jax.jit(backend, static_argnums=3)
    pool = backend.create(num_bytes)

    def run(batch: ForwardBatch, tokens: np.ndarray, start: int) -> jax.Array:
        nonlocal pool
        pool, metadata = backend.init_forward_metadata(pool, batch)

        def attend(i: int, *qkv: jax.Array) -> jax.Array:
            nonlocal pool
            y, held = call(*(x[0] for x in qkv), i, metadata, pool.cache)
            pool = pool.after(held)
            return y[None]

        return predict(model, tokens, start, attend=attend)

    def begin(prompts: np.ndarray) -> jax.Array:
        size = np.array([prompts.size])
        return run(ForwardBatch("extend", prompts[0], [0], size, [0], size), prompts, 0)

    def step(tokens: np.ndarray, at: int) -> jax.Array:
        return run(ForwardBatch("decode", tokens[0], [0], [at + 1]), tokens, at)

    return Reader(pool.nbytes, begin, step, call._cache_size)


def functions_reader(
    model: Model, held: KVCache, allowance_pages: jax.Array | None = None
) -> Reader:
    """The functions of `jbalance.cache`, for any attention."""
    prefill: Any = jax.jit(functools.partial(cache.prefill, frequencies=model.attention[0].rotary))
    step: Any = jax.jit(cache.step)
    given = {"allowance_pages": allowance_pages}

    def attend(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal held
        if q.shape[1] > 1:
            y, held = prefill(held, jnp.int32(i), q, k, v, **given)
            return y
        y, held = step(held, jnp.int32(i), q[:, 0], k[:, 0], v[:, 0], **given)
        return y[:, None]

    def begin(prompts: np.ndarray) -> jax.Array:
        nonlocal held
        for request in range(held.num_requests):
            held = cache.release(held, request)
        return predict(model, prompts, attend=attend)

    def programs() -> int:
        return prefill._cache_size() + step._cache_size()

    return Reader(held.nbytes, begin, functools.partial(predict, model, attend=attend), programs)


def created(model: Model, num_bytes: int, requests: int = 1) -> KVCache:
    """One cache for all layers."""
    sizes = model.num_layers, model.num_kv_heads, model.head_dim
    return cache.create(num_bytes, *sizes, num_requests=requests)


def read(reader: Reader, tokens: np.ndarray, prompt: int) -> jax.Array:
    """Log-probabilities [B, N, V] of the N tokens after the prompt, each read by itself."""
    reader.begin(tokens[:, :prompt])
    size = tokens.shape[1]
    return jnp.concatenate([reader.step(tokens[:, t : t + 1], t) for t in range(prompt, size)], 1)


def cache_rows(model: Model, ids: np.ndarray, prompt: int, steps: int) -> Iterator[Row]:
    """A prompt and what follows, by every adapter; then another request."""
    size = prompt + steps
    tokens, others = ids[None, :size], ids[None, size : 2 * size]
    full, whole = dense(model, tokens), model.dense_bytes(size)
    budget = int(PART * whole)
    for name, reader, layers in (
        ("linen", linen_reader(model, budget), 1),
        ("engine", engine_reader(model, budget), model.num_layers),
        ("functions", functions_reader(model, created(model, budget)), 1),
    ):
        got = read(reader, tokens, prompt)
        read(reader, others, prompt)
        yield Row(f"cache_{name}", "kl", kl_of(full[:, prompt:], got))
        yield Row(f"cache_{name}", "resident_bytes", reader.nbytes, Bar(budget))
        yield Row(f"cache_{name}", "bytes_over_dense", reader.nbytes / whole)
        yield Row(f"cache_{name}", "programs", reader.programs(), Bar(2 * layers))


def weights_rows(model: Model, ids: np.ndarray, prompt: int, steps: int) -> Iterator[Row]:
    """Two requests that read the same, with unequal weights."""
    size = prompt + steps
    tokens = np.stack([ids[:size]] * len(WEIGHTS))
    budget = int(len(WEIGHTS) * PART * model.dense_bytes(size))
    held = created(model, budget, len(WEIGHTS))
    pages = cache.allowance(held, jnp.array(WEIGHTS), jnp.ones(len(WEIGHTS), bool))
    full = dense(model, tokens)[:, prompt:]
    got = read(functions_reader(model, held, pages), tokens, prompt)
    for weight, number, *predicted in zip(WEIGHTS, np.asarray(pages), full, got, strict=True):
        label = f"cache_weight{weight:g}"
        yield Row(label, "part_of_the_pages", number / held.arena.num_pages)
        yield Row(label, "kl", kl_of(*predicted))


if __name__ == "__main__":
    main()
