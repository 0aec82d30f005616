"""The live cache: exact in the ring, close in the arena, constant in bytes, deaf to others' floods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance.cache import live, pages, remainder, worth

B, L, K, G, D, R = 2, 2, 2, 2, 16, 8
BITS, PAGE = (8, 3), 256  # two levels: less to compile
PROMPT = 24
BUDGET = 21_000


def create(*args, **changes):
    """`live.create` of small pages and rings."""
    good = {"num_requests": B, "page_bytes": PAGE, "ring_tokens": R, "bits": BITS}
    return live.create(*args, **(good | changes))


@functools.partial(jax.jit, donate_argnums=0)
def step(cache, q, k, v, allowance, active):
    """One token of each request through all layers: [L, B, ...] to y [L, B, H, D]."""

    def layer(_, x):
        index, ring, q, k, v = x
        return None, live.attend_step(cache, ring, index, q, k, v, active=active)

    _, (y, rings) = jax.lax.scan(layer, None, (jnp.arange(L), cache.rings, q, k, v))
    cache, report = live.end_step(cache, rings, allowance, active=active)
    return cache, y, report


@functools.partial(jax.jit, donate_argnums=0)
def prefill(cache, request, layer, k, v, w, allowance, number):
    return live.admit_layer(
        cache, request, layer, k, v, w, allowance, num_sinks=2, num_recent=3, num_tokens=number
    )


release = jax.jit(live.release)
shares = jax.jit(live.allowance)


def drawn(rng, requests=B):
    """q, k, v of one step, [L, B, ...]; keys with a mean of their own."""
    heads = {"q": K * G, "k": K, "v": K}
    q, k, v = (rng.normal(size=(L, requests, n, D)).astype(np.float32) for n in heads.values())
    return q, k + 1.5, v


def prompt(seed, size=PROMPT):
    """k, v [S, K, D] and worth [K, S] of one layer."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, size, K, D)).astype(np.float32)
    return k + 1.5, v, rng.uniform(0.01, 1, (K, size)).astype(np.float32)


def attention(q, keys, values):
    """y and weights of q [H, D] over [S, K, D] in float64."""
    keys, values = (np.repeat(np.asarray(x, float), G, axis=1) for x in (keys, values))
    logits = np.einsum("hd,shd->hs", np.asarray(q, float), keys) / np.sqrt(D)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.einsum("hs,shd->hd", weight, values), weight


def rounded(x):
    """As the ring stores it."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


@pytest.mark.parametrize("budget", [30_000, 123_457])
def test_bytes_are_the_budget_but_for_less_than_a_page(budget):
    cache = create(budget, L, K, D)
    assert budget - PAGE - 4 < cache.nbytes <= budget
    assert cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
    assert (cache.num_requests, cache.num_kv_heads, cache.ring_tokens) == (B, K, R)


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("budget", [10**5, 10**6, 10**7, 10**9])
def test_pages_waste_little(budget, head_dim):
    size = live.page_bytes_for(budget, 90, head_dim, (8, 4, 3))
    assert live.LEAST_PAGE_BYTES <= size <= live.MOST_PAGE_BYTES
    waste = [size % pages.token_bytes(head_dim, b) / size for b in (8, 4, 3)]
    assert np.mean(waste) < (0.12 if head_dim > 64 else 0.08)
    if head_dim <= 64 and budget == 10**7:  # where neither end of the range binds
        assert 0.75 < budget / 90 / size / live.GROUP_PAGES < 1.3


def test_the_ring_is_exact_and_measures_attention():
    rng, cache = np.random.default_rng(0), create(BUDGET, L, K, D)
    keys, values, gained = [], [], np.zeros((L, K, R))
    for t in range(R - 1):
        q, k, v = drawn(rng)
        keys, values = [*keys, rounded(k)], [*values, rounded(v)]
        cache, y, _ = step(cache, q, k, v, np.array([20, 20]), np.array([True, False]))
        for layer in range(L):
            want, weight = attention(
                q[layer, 0], *(np.stack(x)[:, layer, 0] for x in (keys, values))
            )
            np.testing.assert_allclose(y[layer, 0], want, atol=1e-5)
            gained[layer, :, :t] += np.square(weight[:, :t]).reshape(K, G, -1).sum(axis=1)
    np.testing.assert_allclose(cache.rings.worth[:, 0], gained, atol=1e-5)
    np.testing.assert_array_equal(cache.ring_count, [R - 1, 0])
    np.testing.assert_array_equal(cache.rings.worth[:, 1], 0)
    assert cache.arena.count.sum() == 0


def test_attention_is_over_all_tokens_when_nothing_must_go():
    rng, cache = np.random.default_rng(0), create(BUDGET, L, K, D)
    keys, values = [], []
    for layer in range(L):
        k, v, w = prompt(layer)
        keys, values = [*keys, list(k)], [*values, list(v)]
        cache, report = prefill(cache, 0, layer, k, v, w, 200, PROMPT)
        assert report.rejected == report.evicted == 0
    mean = np.asarray(cache.key_mean[: L * K], np.float32)
    want = np.stack([np.stack(x)[2:].mean(axis=0) for x in keys]).reshape(-1, D)
    np.testing.assert_allclose(mean, want, atol=0.01)
    for _ in range(30):
        q, k, v = drawn(rng)
        cache, y, report = step(cache, q, k, v, np.array([200, 0]), np.array([True, False]))
        assert report.evicted.sum() == report.rejected.sum() == report.shortfall.sum() == 0
        for layer in range(L):
            keys[layer].append(rounded(k)[layer, 0])
            values[layer].append(rounded(v)[layer, 0])
            want, _ = attention(q[layer, 0], keys[layer], values[layer])
            np.testing.assert_allclose(y[layer, 0], want, atol=0.03)
    assert cache.arena.count[:, 0].sum() + L * K * cache.ring_count[0] == L * K * (PROMPT + 30)
    assert not cache.remainder.count.any()


@pytest.mark.slow
def test_attention_is_over_what_stays_of_tokens_too():
    rng, cache = np.random.default_rng(0), create(BUDGET, L, K, D)
    for layer in range(L):
        cache, _ = prefill(cache, 0, layer, *prompt(layer), 200, PROMPT)
    cache, report = jax.jit(live.shrink)(cache, 0, L * K)
    assert cache.remainder.count.sum() == report.evicted > 20
    q, k, v = drawn(rng)
    want = [of_parts(cache, i, q[i, 0], k[i, 0], v[i, 0])[0] for i in range(L)]
    cache, y, _ = step(cache, q, k, v, np.array([0, 0]), np.array([True, False]))
    np.testing.assert_allclose(y[:, 0], np.stack(want), atol=1e-4)
    q, k, v = drawn(rng)
    gained = [of_parts(cache, i, q[i, 0], k[i, 0], v[i, 0])[1] for i in range(L)]
    cache, _, _ = step(cache, q, k, v, np.array([0, 0]), np.array([True, False]))
    np.testing.assert_allclose(cache.rings.worth[:, 0, :, 0], np.stack(gained), atol=1e-5)


def of_parts(cache, layer, q, k, v):
    """y of request 0's query [H, D], and what its ring's first token gains, over decoded parts."""
    ring, out, gained = jax.tree.map(lambda x: x[layer, 0], cache.rings), [], []
    there = int(cache.ring_count[0])
    for head in range(K):
        unit, mean = layer * K + head, np.asarray(cache.key_mean[layer * K + head], float)
        held = [pages.read(cache.arena, unit, m) for m in range(len(BITS))]
        left = jax.tree.map(lambda x: x[0], remainder.load(cache.remainder, np.array([unit])))
        many = np.asarray(left.count)
        parts = [(x.k[x.valid] + mean, x.v[x.valid]) for x in held]
        parts += [tuple(np.repeat(x, many, axis=0) for x in (left.keys + mean, left.values))]
        parts += [(ring.keys[head, :there], ring.values[head, :there])]
        parts += [(rounded(k[head])[None], rounded(v[head])[None])]
        keys, values = (np.concatenate([np.asarray(x[i], float) for x in parts]) for i in range(2))
        own = q[head * G : (head + 1) * G].astype(float)
        weight = np.exp(own @ keys.T / np.sqrt(D))
        weight /= weight.sum(axis=1, keepdims=True)
        out.append(weight @ values)
        gained.append(np.square(weight[:, -1 - there]).sum())
    return np.concatenate(out), np.array(gained)


@pytest.mark.slow
def test_a_shortfall_while_decoding_loses_tokens_to_the_remainder():
    rng, cache = np.random.default_rng(0), create(BUDGET, L, K, D)
    cache, _ = prefill(cache, 0, 0, *prompt(0), 200, PROMPT)
    for _ in range(R):
        cache, y, report = step(cache, *drawn(rng), np.array([1, 0]), np.array([True, False]))
    assert report.shortfall[0] > 0
    assert report.rejected[0] == L * K * R // 2 == cache.remainder.count.sum()
    assert cache.arena.count.sum() == K * PROMPT
    assert np.isfinite(y).all()


def test_two_thousand_steps_in_constant_bytes():
    rng, cache = np.random.default_rng(0), create(BUDGET, L, K, D)
    size, total = cache.nbytes, cache.arena.num_pages
    steps = [drawn(rng) for _ in range(7)]
    entered = left = 0
    for t in range(2000):
        # Allowances change as they like, within the arena.
        allowed = np.array([total // 2 - t % 3, total // 2 - t % 5])
        active = np.array([True, t % 3 > 0])
        cache, y, report = step(cache, *steps[t % 7], allowed, active)
        entered, left = entered + active, left + report.evicted + report.rejected
        if t % 100 < 3:
            arena = jax.device_get(cache.arena)
            held = arena.count.reshape(B, -1).sum(axis=1) + L * K * cache.ring_count
            np.testing.assert_array_equal(held + left, L * K * entered)
            np.testing.assert_array_equal(cache.remainder.count.reshape(B, -1).sum(axis=1), left)
            assert np.isfinite(y).all()
            assert (report.shortfall == 0).all()
            assert (cache.held_pages <= total // 2).all()
            np.testing.assert_array_equal(np.sort(arena.order), np.arange(total))
            assert (arena.count <= arena.capacity).all()
            assert (cache.ring_count < R).all()
    assert cache.nbytes == size
    assert (cache.held_pages > total // 2 - 8).all()
    assert step._cache_size() == 1


def run(cache, present, floors, num_steps=60):
    """y of the last request, which has weight 0, with the others present, or idle, or not there."""
    rng, out = np.random.default_rng(0), []
    requests = cache.num_requests
    active = np.array([present] * (requests - 1) + [True])
    weights = np.array([1.0] * (requests - 1) + [0.0], np.float32)
    for layer in range(L):
        for request in np.flatnonzero(active):
            allowed = shares(cache, floors, weights, active)
            content = prompt(7 * (request - requests) + layer + 20)
            cache, report = prefill(cache, int(request), layer, *content, allowed[request], PROMPT)
            assert report.shortfall == 0
    for _ in range(num_steps):
        allowed = shares(cache, floors, weights, active)
        new = [x[:, B - requests :] for x in drawn(rng)]
        cache, y, _ = step(cache, *new, allowed, active)
        out.append(np.asarray(y[:, -1]))
        assert (cache.held_pages <= allowed).all()
        assert allowed[-1] == floors[-1]
    return np.stack(out), cache


FLOORS = np.array([0, 22])


def test_a_flood_leaves_others_as_if_they_were_alone_with_their_floor():
    y, cache = run(create(BUDGET, L, K, D), True, FLOORS)
    assert cache.held_pages[0] > cache.arena.num_pages - FLOORS[1] - 4  # the flood took the rest
    for alone in (
        run(create(BUDGET, L, K, D), False, FLOORS),
        run(just(FLOORS[1]), False, FLOORS[1:]),
    ):
        np.testing.assert_array_equal(y, alone[0])
        for held in zip(*(of_last(x) for x in (cache, alone[1])), strict=True):
            np.testing.assert_array_equal(*held)


def of_last(cache):
    """What the last request holds, and what stays of its other tokens."""
    return [x[-L * K :] for x in (cache.arena.count, *jax.tree.leaves(cache.remainder))]


def just(num_pages):
    """A cache of one request and so many pages."""
    fixed = create(BUDGET, L, K, D, num_requests=1)
    budget = fixed.nbytes - (fixed.arena.num_pages - num_pages) * (PAGE + 4)
    out = create(budget, L, K, D, num_requests=1)
    assert out.arena.num_pages == num_pages
    return out


def test_sinks_and_recent_tokens_stay_and_padding_does_not_enter():
    cache = create(BUDGET, L, K, D)
    k, v, w = prompt(0)
    cache, report = prefill(cache, 1, 1, k, v, w, 100, PROMPT - 4)
    assert report.held == K * (PROMPT - 4)
    cache, report = jax.jit(live.shrink)(cache, 1, K)  # a page holds the 5 protected, and the best
    assert report.held == K * 6
    np.testing.assert_array_equal(cache.arena.count[(L + 1) * K :, 0], 6)
    left = cache.remainder.count.sum(axis=1)
    np.testing.assert_array_equal(left[(L + 1) * K :], PROMPT - 4 - 6)
    assert left.sum() == report.evicted
    for head in range(K):
        kept = pages.read(cache.arena, (L + 1) * K + head, 0, num_pages=1)
        protected = np.flatnonzero(kept.worth == worth.PROTECTED)
        mean = np.asarray(cache.key_mean[(L + 1) * K + head], np.float32)
        want = k[[0, 1, *range(PROMPT - 7, PROMPT - 4)], head]
        np.testing.assert_allclose(kept.k[protected] + mean, want, atol=0.05)
    cache, report = prefill(cache, 1, 0, k, v, w, K, PROMPT)
    assert report.shortfall == K
    assert report.rejected == K * PROMPT
    np.testing.assert_array_equal(cache.remainder.count.sum(axis=1), left)


def test_release_gives_back_and_leaves_no_trace():
    _, cache = run(create(BUDGET, L, K, D), True, FLOORS)
    before = jax.tree.map(np.asarray, cache)
    cache = release(cache, 0)
    np.testing.assert_array_equal(cache.held_pages, before.held_pages * np.array([0, 1]))
    np.testing.assert_array_equal(cache.ring_count, before.ring_count * np.array([0, 1]))
    assert before.remainder.count[L * K :].any()
    jax.tree.map(np.testing.assert_array_equal, cache.remainder, before.remainder)
    first, last = (before.arena.offset[L * K * len(BITS)], before.arena.offset[-1])
    np.testing.assert_array_equal(cache.arena.order[: last - first], before.arena.order[first:last])
    np.testing.assert_array_equal(cache.arena.data, before.arena.data)
    cache = release(cache, 1)
    assert not any(x.any() for x in jax.tree.leaves(cache.remainder))
    again, _ = run(cache, True, FLOORS, num_steps=10)
    fresh, _ = run(create(BUDGET, L, K, D), True, FLOORS, num_steps=10)
    np.testing.assert_array_equal(again, fresh)


@pytest.mark.parametrize(
    ("floors", "weights", "active", "want"),
    [
        ((0, 0), (1, 1), (True, True), (0.5, 0.5)),
        ((0, 0), (3, 1), (True, True), (0.75, 0.25)),
        ((0, 90), (1, 0), (True, True), (0.1, 0.9)),
        ((20, 90), (1, 1), (True, False), (1, 0)),
        ((0, 0), (0, 0), (True, True), (0, 0)),
        ((30, 0), (0, 1), (True, True), (0.3, 0.7)),
    ],
)
def test_allowances_of_an_empty_arena(floors, weights, active, want):
    cache = create(100 * (PAGE + 4) + 20_000, L, K, D)
    total = cache.arena.num_pages
    floors = np.array(floors) * total // 100
    got = shares(cache, floors, np.array(weights, np.float32), np.array(active))
    np.testing.assert_allclose(got, np.array(want) * total, atol=1)
    assert got.sum() <= total


def test_what_others_hold_is_not_allowed_twice():
    cache = create(BUDGET, L, K, D)
    total = cache.arena.num_pages
    held = jnp.zeros(cache.arena.count.shape, jnp.int32).at[0, 0].set(total - 5)
    arena, _ = pages.reallocate(cache.arena, held)
    cache = dataclasses.replace(cache, arena=arena)
    even = np.ones(2, np.float32)
    got = shares(cache, np.array([0, 10]), even, np.array([True, True]))
    np.testing.assert_array_equal(got, [total // 2, 5])  # until request 0 has shrunk


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: create(100, L, K, D), ("budget_bytes is 100", "6032")),
        (lambda: create(BUDGET, 0, K, D), ("num_layers is 0",)),
        (lambda: create(BUDGET, L, K, D, ring_tokens=7), ("ring_tokens is 7", "even")),
        (lambda: create(BUDGET, L, K, D, bits=(4, 8)), ("(4, 8)", "descend")),
        (lambda: attend_with(q=np.ones((B, 3, D))), ("q has shape (2, 3, 16)", "multiple of 2")),
        (lambda: attend_with(k=np.ones((B, K, 8))), ("k has shape (2, 2, 8)",)),
        (lambda: attend_with(ring=create(BUDGET, L, K, D).rings), ("ring.keys", "one layer")),
        (lambda: end_with(allowance_pages=3), ("allowance_pages has shape ()", "(2,)")),
        (lambda: end_with(rings=one_layer()), ("rings has shapes",)),
        (lambda: live.release(create(BUDGET, L, K, D), 2), ("request is 2", "[0, 1]")),
        (lambda: admit_with(layer=2), ("layer is 2",)),
        (lambda: admit_with(w=np.ones(3)), ("w has shape (3,)", "(2, 24)")),
        (lambda: admit_with(k=np.ones((3, K, 8))), ("(3, 2, 8)",)),
        (lambda: share_with(weights=np.array([-1.0, 1])), ("weights[0] is -1",)),
        (lambda: share_with(floors_pages=np.array([999, 1])), ("sum to 1000", "the arena has")),
        (lambda: share_with(active=np.array([True])), ("active has shape (1,)",)),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=r"must|take|has") as error:
        call()
    for name in names:
        assert name in str(error.value)


def one_layer():
    return live.Ring(*(x[0] for x in create(BUDGET, L, K, D).rings))


def attend_with(**changes):
    q, k, v = (x[0] for x in drawn(np.random.default_rng(0)))
    good = {"cache": create(BUDGET, L, K, D), "ring": one_layer(), "layer": 0}
    return live.attend_step(**(good | {"q": q, "k": k, "v": v} | changes))


def end_with(**changes):
    cache = create(BUDGET, L, K, D)
    good = {"cache": cache, "rings": cache.rings, "allowance_pages": np.array([1, 1])}
    return live.end_step(**(good | changes))


def admit_with(**changes):
    k, v, w = prompt(0)
    good = {"cache": create(BUDGET, L, K, D), "request": 0, "layer": 0, "k": k, "v": v, "w": w}
    return live.admit_layer(**(good | {"allowance_pages": 9} | changes))


def share_with(**changes):
    good = {"cache": create(BUDGET, L, K, D), "floors_pages": np.array([1, 1])}
    rest = {"weights": np.ones(2), "active": np.array([True, True])}
    return live.allowance(**(good | rest | changes))
