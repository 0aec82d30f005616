"""Decoding over the cache: exact in the recent buffer, close in the arena, constant in bytes, deaf to
other requests; over the heads of several devices and over a context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import cache
from jbalance.cache import _cache, _requests, _settle, _step
from tests.support.small_cache import (
    ALL,
    BITS,
    BUDGET,
    FREQUENCIES,
    MANY,
    ORDER,
    B,
    D,
    G,
    K,
    L,
    R,
    S,
    attention,
    compiled,
    create,
    drawn,
    just,
    of_parts,
    rounded,
)

UNITS = L * K
FIRST = np.array([True, False])
FLOORS = np.array([0, 22])
both, single = compiled("two requests"), compiled("one request")
over_context = compiled("context", jax.jit)
part = compiled("some heads", jax.jit, scale=0.5)
release, shares = jax.jit(cache.release), jax.jit(cache.allowance)


def test_the_recent_buffer_is_exact_and_measures_attention():
    rng, held = np.random.default_rng(0), create()
    keys, values, gained = [], [], np.zeros((L, K, R))
    for t in range(R - 1):
        q, k, v = drawn(rng)
        keys, values = [*keys, rounded(k)], [*values, rounded(v)]
        y, held = both.step(held, q, k, v, np.array([20, 20], np.int32), FIRST, ORDER)
        for layer in range(L):
            want, weight = attention(
                q[layer, 0], *(np.stack(x)[:, layer, 0] for x in (keys, values))
            )
            np.testing.assert_allclose(y[layer, 0], want, atol=1e-5)
            gained[layer, :, :t] += np.square(weight[:, :t]).reshape(K, G, -1).sum(axis=1)
    energy = held.recent_energy.reshape(B, L, K, R)
    np.testing.assert_allclose(energy[0], gained, atol=1e-5)
    np.testing.assert_array_equal(held.recent_count, [R - 1, 0])
    np.testing.assert_array_equal(energy[1], 0)
    assert held.arena.count.sum() == 0


def test_attention_is_over_all_tokens_when_nothing_must_go():
    rng, held = np.random.default_rng(0), create()
    size, new = held.nbytes, drawn(rng, size=S)
    keys, values = ([list(x[layer, 0]) for layer in range(L)] for x in new[1:])
    _, held = both.prefill(held, *new, np.array([S, 0]), MANY)
    for _ in range(30):
        q, k, v = drawn(rng)
        y, held = both.step(held, q, k, v, MANY, FIRST, ORDER)
        for layer in range(L):
            keys[layer].append(rounded(k)[layer, 0])
            values[layer].append(rounded(v)[layer, 0])
            want, _ = attention(q[layer, 0], keys[layer], values[layer])
            np.testing.assert_allclose(y[layer, 0], want, atol=0.03)
    assert held.arena.count[:, 0].sum() + UNITS * held.recent_count[0] == UNITS * (S + 30)
    assert not held.centroids.count.any()
    assert held.nbytes == size


def test_a_prompt_sees_what_is_recent_too():
    rng, held = np.random.default_rng(0), create()
    keys, values = [], []
    for _ in range(R + 2):  # half of the buffer enters the arena
        _, k, v = new = drawn(rng)
        keys, values = [*keys, rounded(k)], [*values, rounded(v)]
        _, held = both.step(held, *new, MANY, FIRST, ORDER)
    assert held.recent_count[0] > 0
    assert held.arena.count.sum() > 0
    q, k, v = drawn(rng, size=S)
    y, held = both.prefill(held, q, k, v, np.array([S, 0]), MANY)
    for layer in range(L):
        before = (np.stack(x)[:, layer, 0] for x in (keys, values))
        every = [np.append(a, b[layer, 0], 0) for a, b in zip(before, (k, v), strict=True)]
        for t in (0, 7, S - 1):
            want, _ = attention(q[layer, 0, t], *(x[: R + 3 + t] for x in every))
            np.testing.assert_allclose(y[layer, 0, t], want, atol=0.03)


def test_the_order_of_the_layers_does_not_matter():
    rng = np.random.default_rng(0)
    new, few = drawn(rng, size=S), np.array([10, 12], np.int32)
    (_, one), (_, other) = (both.prefill(create(), *new, np.full(B, S), few) for _ in range(2))
    for t in range(2 * R):
        new = drawn(rng)
        y, one = both.step(one, *new, few, ALL, ORDER)
        y_other, other = both.step(other, *new, few, ALL, ORDER[:: -1 if t % 3 else 1])
        np.testing.assert_array_equal(y, y_other)
    assert one.centroids.count.any()
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_attention_is_over_what_stays_of_tokens_too():
    rng, held = np.random.default_rng(0), create()
    _, held = both.prefill(held, *drawn(rng, size=S), np.array([S, 0]), MANY)
    held, report = jax.jit(_requests.shrink)(held, 0, held.floor_pages)
    assert held.centroids.count.sum() == report.evicted > 20
    low = np.full(B, held.floor_pages, np.int32)
    q, k, v = drawn(rng)
    want = [of_parts(held, i, q[i, 0], k[i, 0], v[i, 0])[0] for i in range(L)]
    y, held = both.step(held, q, k, v, low, FIRST, ORDER)
    np.testing.assert_allclose(y[:, 0], np.stack(want), atol=1e-4)
    q, k, v = drawn(rng)
    gained = [of_parts(held, i, q[i, 0], k[i, 0], v[i, 0])[1] for i in range(L)]
    _, held = both.step(held, q, k, v, low, FIRST, ORDER)
    energy = held.recent_energy.reshape(B, L, K, R)
    np.testing.assert_allclose(energy[0, :, :, 0], np.stack(gained), atol=1e-5)


@pytest.mark.slow
def test_a_shortfall_while_decoding_loses_tokens_to_the_centroids():
    rng, held = np.random.default_rng(0), create()
    _, held = both.prefill(held, *drawn(rng, size=S), np.array([S, 0]), MANY)
    low = np.array([held.floor_pages - 1, 0], np.int32)  # traced, it cannot be refused
    for _ in range(R):
        y, held = both.step(held, *drawn(rng), low, FIRST, ORDER)
    assert held.centroids.count.sum() == UNITS * R // 2
    assert held.arena.count.sum() == UNITS * S
    assert np.isfinite(y).all()


@pytest.mark.slow
def test_what_settled_is_reported():
    rng, held = np.random.default_rng(0), create()
    _, held = both.prefill(held, *drawn(rng, size=S), np.array([S, 0]), MANY)
    for _ in range(R - 1):
        _, held = both.step(held, *drawn(rng), MANY, FIRST, ORDER)
    before = held.arena.count.sum()
    held = dataclasses.replace(held, recent_count=held.recent_count + np.array([1, 0]))
    settle = jax.jit(_settle.settle)
    same, report = settle(held, np.array([held.floor_pages - 1, 0], np.int32))
    np.testing.assert_array_equal(report.shortfall > 0, FIRST)
    np.testing.assert_array_equal(report.rejected, FIRST * UNITS * R // 2)
    assert same.centroids.count.sum() == UNITS * R // 2
    held, report = settle(held, MANY)
    np.testing.assert_array_equal(report.held, FIRST * (before + UNITS * R // 2))
    np.testing.assert_array_equal(report.held_pages, held.held_pages)
    assert not any(x.any() for x in (report.shortfall, report.rejected, report.evicted))
    np.testing.assert_array_equal(held.recent_count, [R // 2, 0])
    np.testing.assert_array_equal(held.recent_start, [R // 2, 0])


def test_two_thousand_tokens_in_constant_bytes():
    rng, held = np.random.default_rng(0), create()
    size, total = held.nbytes, held.arena.num_pages
    tokens, entered = [drawn(rng) for _ in range(7)], 0
    for t in range(2000):
        # Allowances change as they like, within the arena.
        allowed = np.array([total // 2 - t % 3, total // 2 - t % 5], np.int32)
        active = np.array([True, t % 3 > 0])
        y, held = both.step(held, *tokens[t % 7], allowed, active, ORDER)
        entered += active
        if t % 100 < 3:
            arena = jax.device_get(held.arena)
            there = (arena.count, held.centroids.count, held.recent_count[:, None] * UNITS)
            there = sum(np.asarray(x).reshape(B, -1).sum(axis=1) for x in there)
            np.testing.assert_array_equal(there, UNITS * entered)
            assert np.isfinite(y).all()
            assert (held.held_pages <= total // 2).all()
            np.testing.assert_array_equal(np.sort(arena.order), np.arange(total))
            assert (arena.count <= arena.capacity).all()
            assert (held.recent_count < R).all()
    assert held.nbytes == size
    assert (held.held_pages > total // 2 - 8).all()


@pytest.mark.parametrize("layers_of", ["one", "loop"])
def test_a_step_writes_in_place(layers_of):
    """Neither arena nor recent buffers are copied, nor held in another type meanwhile."""
    held = create(32_000_000, num_layers=64, recent_tokens=512)
    buffers = held.arena.data.nbytes, held.recent_keys.nbytes
    token = [jax.ShapeDtypeStruct((B, n, D), jnp.float32) for n in (K * G, K, K)]

    def one(held, layer, q, k, v):
        return _step.attend_token(held, layer, q, k, v, ALL)

    def loop(held, layer, q, k, v):
        def body(held, layer):
            y, held = one(held, layer, q, k, v)
            return held, y

        held, y = jax.lax.scan(body, held, jnp.arange(64))
        return y, held

    step = jax.jit(one if layers_of == "one" else loop, donate_argnums=0)
    memory = step.lower(held, jnp.int32(0), *token).compile().memory_analysis()
    assert memory.temp_size_in_bytes < min(buffers) / 4


def test_a_prompt_writes_in_place():
    """Its request's tokens are read, if there are any, and the arena is not copied for that."""
    held = create(32_000_000, num_layers=64)
    prompt = [jax.ShapeDtypeStruct((B, S, n, D), jnp.float32) for n in (K * G, K, K)]
    enter = jax.jit(functools.partial(cache.prefill, frequencies=FREQUENCIES), donate_argnums=0)
    memory = enter.lower(held, jnp.int32(0), *prompt).compile().memory_analysis()
    assert memory.temp_size_in_bytes < held.arena.data.nbytes / 4


def run(held, calls, present, floors, num_tokens=60, of_others=1.0):
    """y of the last request, which has weight 0, with the others present, or idle, or not there.

    What the others are given is multiplied by `of_others`.
    """
    rng, out, requests = np.random.default_rng(0), [], held.num_requests
    active = np.array([present] * (requests - 1) + [True])
    weights = np.array([1.0] * (requests - 1) + [0.0], np.float32)
    factor = np.array([of_others] * (requests - 1) + [1], np.float32)[:, None, None]
    new = [x[:, B - requests :] * factor[..., None] for x in drawn(rng, size=S)]
    allowed = shares(held, weights, active, floors_pages=floors)
    y, held = calls.prefill(held, *new, S * active.astype(np.int32), allowed)
    first = np.asarray(y[:, -1])
    there = (held.arena.count, held.centroids.count)
    there = sum(np.asarray(x).reshape(requests, -1).sum(axis=1) for x in there)
    np.testing.assert_array_equal(there, UNITS * S * (active & np.isfinite(factor[:, 0, 0])))
    for _ in range(num_tokens):
        allowed = shares(held, weights, active, floors_pages=floors)
        new = [x[:, B - requests :] * factor for x in drawn(rng)]
        y, held = calls.step(held, *new, allowed, active, ORDER)
        out.append(np.asarray(y[:, -1]))
        assert (held.held_pages <= allowed).all()
        assert allowed[-1] == floors[-1]
    return first, np.stack(out), held


def test_a_flood_leaves_others_as_if_they_were_alone_with_their_floor():
    *y, held = run(create(), both, True, FLOORS)
    assert held.held_pages[0] > held.arena.num_pages - FLOORS[1] - 4  # the flood took the rest
    assert held.centroids.count[UNITS:].any()
    for *alone, other in (
        run(create(), both, False, FLOORS),
        run(just(FLOORS[1]), single, False, FLOORS[1:]),
    ):
        jax.tree.map(np.testing.assert_array_equal, y, alone)
        jax.tree.map(np.testing.assert_array_equal, of_last(held), of_last(other))


@pytest.mark.parametrize("factor", [30.0, np.nan])
def test_what_others_are_given_changes_no_bit(factor):
    (*y, held), (*other, held_other) = (
        run(create(), both, True, FLOORS, of_others=x) for x in (1.0, factor)
    )
    jax.tree.map(np.testing.assert_array_equal, y, other)
    jax.tree.map(np.testing.assert_array_equal, of_last(held), of_last(held_other))
    held = release(held_other, 0)  # who takes the place sees nothing of it
    y, held = both.step(held, *drawn(np.random.default_rng(1)), MANY, ALL, ORDER)
    assert np.isfinite(y).all()


def of_last(held):
    """What the last request holds, and what stays of its other tokens."""
    recent = held.recent_keys, held.recent_values, held.recent_energy
    return [x[-UNITS:] for x in (held.arena.count, *jax.tree.leaves(held.centroids), *recent)]


def test_release_gives_back_and_leaves_no_trace():
    *_, held = run(create(), both, True, FLOORS)
    before = jax.tree.map(np.array, held)
    held = release(held, 0)
    np.testing.assert_array_equal(held.held_pages, before.held_pages * np.array([0, 1]))
    np.testing.assert_array_equal(held.recent_count, before.recent_count * np.array([0, 1]))
    assert before.centroids.count[UNITS:].any()
    for now, was in zip(*(jax.tree.leaves(x.centroids) for x in (held, before)), strict=True):
        np.testing.assert_array_equal(now[:UNITS], 0 * was[:UNITS])
        np.testing.assert_array_equal(now[UNITS:], was[UNITS:])
    first, last = before.arena.offset[UNITS * len(BITS)], before.arena.offset[-1]
    np.testing.assert_array_equal(held.arena.order[: last - first], before.arena.order[first:last])
    np.testing.assert_array_equal(held.arena.data, before.arena.data)
    held = release(held, 1)
    assert not any(x.any() for x in jax.tree.leaves(held.centroids))
    *again, _ = run(held, both, True, FLOORS, num_tokens=10)
    *fresh, _ = run(create(), both, True, FLOORS, num_tokens=10)
    jax.tree.map(np.testing.assert_array_equal, again, fresh)


def test_heads_on_two_devices_sum_to_those_on_one():
    rng = np.random.default_rng(0)
    slots = [np.array([[0, -1], [-1, 1]]), np.array([[-1, 0], [1, -1]])]
    whole, parts = create(), [create(BUDGET // 2, slots=x) for x in slots]
    lengths = np.array([S, 13], np.int32)
    q, *kv = drawn(rng, size=S)
    y, whole = both.prefill(whole, 2 * q, *kv, lengths, MANY)  # logits / 2 in place of / sqrt(D)
    got, parts = zip(*(part.prefill(x, q, *kv, lengths, MANY) for x in parts), strict=True)
    assert_sum(y, got, slots, 1e-5)
    for _ in range(R + 2):
        q, *kv = drawn(rng)
        y, whole = both.step(whole, 2 * q, *kv, MANY, ALL, ORDER)
        got, parts = zip(*(part.step(x, q, *kv, MANY, ALL, ORDER) for x in parts), strict=True)
        assert_sum(y, got, slots, 1e-5)
    count = np.zeros((B, L, K, len(BITS)), int)
    for held, at in zip(parts, slots, strict=True):
        count[:, at >= 0] = np.asarray(held.arena.count).reshape(B, 2, -1)[:, at[at >= 0]]
    np.testing.assert_array_equal(count.reshape(whole.arena.count.shape), whole.arena.count)
    assert whole.arena.count[:, 0].sum() > 0
    assert not whole.centroids.count.any()


def assert_sum(y, parts, slots, atol):
    """y [L, B, ..., H, D] is the sum of the parts, each of which is 0 where it has no head."""
    np.testing.assert_allclose(sum(parts), y, atol=atol)
    for x, at in zip(parts, slots, strict=True):
        x = np.asarray(x)
        for layer, head in np.argwhere(at < 0):
            np.testing.assert_array_equal(x[layer, ..., head * G : (head + 1) * G, :], 0)
        assert (x != 0).sum() == (np.asarray(y) != 0).sum() / 2


def test_a_context_is_as_if_every_request_held_it():
    rng = np.random.default_rng(0)
    context, own = just(FLOORS[1]), create()
    shared = drawn(rng, requests=1, size=S)
    _, context = single.prefill(context, *shared, np.array([S]), MANY[:1])
    for _ in range(3):  # what is recent in it is seen too
        new = drawn(rng, requests=1)
        _, context = single.step(context, *new, MANY[:1], ALL[:1], ORDER)
        shared = [np.append(a, b[:, :, None], 2) for a, b in zip(shared, new, strict=True)]
    before = jax.tree.map(np.array, context)
    prompt, lengths = drawn(rng, size=S), np.array([S, 13])
    _, own = both.prefill(own, *prompt, lengths, MANY)
    keys, values = (
        [[[*a[i, 0], *b[i, j, :n]] for j, n in enumerate(lengths)] for i in range(L)]
        for a, b in zip(shared[1:], prompt[1:], strict=True)
    )
    for _ in range(R + 2):
        q, k, v = new = drawn(rng)
        y, own = over_context.step(own, *new, MANY, ALL, ORDER, context)
        for layer, request in np.ndindex(L, B):
            keys[layer][request].append(rounded(k)[layer, request])
            values[layer][request].append(rounded(v)[layer, request])
            want, _ = attention(q[layer, request], keys[layer][request], values[layer][request])
            np.testing.assert_allclose(y[layer, request], want, atol=0.03)
    jax.tree.map(np.testing.assert_array_equal, context, before)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"q": np.ones((B, 3, D))}, ("q has shape (2, 3, 16)", "multiple of 2")),
        ({"q": np.ones((B, D))}, ("q must have shape [B, H or K, D]",)),
        ({"k": np.ones((B, K, 8))}, ("k has shape (2, 2, 8)", "(2, 2, 16)")),
        ({"v": np.ones((1, K, D))}, ("v has shape (1, 2, 16)", "(2, 2, 16)")),
        ({"layer": 2}, ("layer is 2", "0..1")),
        ({"allowance_pages": 3}, ("allowance_pages must have shape [B]", "()")),
        ({"allowance_pages": np.array([8, 7])}, ("allowance_pages[1] is 7", "8..")),
        ({"context": create()}, ("context is of B, L, K, D = (2, 2, 2, 16)", "(1, 2, 2, 16)")),
        (
            {"cache": _cache.around(create().arena, np.arange(4).reshape(2, 2), B, 0)},
            ("cache has no recent buffer", "only read"),
        ),
    ],
)
def test_bad_input_is_named(change, names):
    q, k, v = (x[0] for x in drawn(np.random.default_rng(0)))
    good = {"cache": create(), "layer": 0, "q": q, "k": k, "v": v}
    with pytest.raises(ValueError, match=r"must|has") as error:
        cache.step(**(good | change))
    for name in names:
        assert name in str(error.value)


def test_values_that_are_not_finite_are_refused_before_they_stay():
    shape = (B, K, D)
    for name in ("q", "k", "v"):
        given = dict.fromkeys(("q", "k", "v"), np.ones(shape, np.float32))
        given[name] = np.full(shape, np.nan, np.float32)
        with pytest.raises(ValueError, match=rf"\|{name}\| is nan"):
            cache.step(create(), 0, **given)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])  # products of the last are not finite
def test_a_traced_token_that_is_not_finite_is_as_if_it_had_not_been(name, value):
    """One in a prompt and one of a step, in one unit: neither stays, and the others attend as before."""
    rng, held = np.random.default_rng(0), create()
    new = dict(zip("qkv", drawn(rng, size=S), strict=True))
    prompt = {key: x.copy() for key, x in new.items()}
    prompt[name][0, 0, 9, 0, 3] = value
    _, held = both.prefill(held, *prompt.values(), np.array([S, 0]), MANY)
    lost = int(name != "q")
    np.testing.assert_array_equal(held.arena.count[:UNITS].sum(axis=1), [S - lost, S, S, S])
    keys, values = ([list(x[0, 0])] for x in (new["k"], new["v"]))
    gone = {9} if lost else set()
    for t in range(2 * R):
        token = dict(zip("qkv", drawn(rng), strict=True))
        given = {key: x.copy() for key, x in token.items()}
        if t == 3:
            given[name][0, 0, 0, 3] = value
            gone |= {S + 3} if lost else set()
        keys[0].append(rounded(token["k"])[0, 0])
        values[0].append(rounded(token["v"])[0, 0])
        y, held = both.step(held, *given.values(), MANY, FIRST, ORDER)
        if t == 3:
            assert not np.isfinite(y[0, 0, :G]).all() or value == 3e38
            continue
        stay = [i for i in range(S + t + 1) if i not in gone]
        want, _ = attention(token["q"][0, 0], *(np.stack(x[0])[stay] for x in (keys, values)))
        np.testing.assert_allclose(y[0, 0, :G], want[:G], atol=0.04)
    assert held.recent_count[0] < R
    kept = held.arena.count[:UNITS].sum(axis=1) + int(held.recent_count[0])
    np.testing.assert_array_equal(kept, S + 2 * R - np.array([2 * lost, 0, 0, 0]))
    for x in jax.tree.leaves(held):
        assert not np.issubdtype(x.dtype, np.floating) or np.isfinite(x).all()
