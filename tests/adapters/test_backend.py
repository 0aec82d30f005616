"""The attention backend of a serving engine: a small engine's loop over it, against dense attention."""

import functools
import types
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np

from jbalance.adapters import AttentionBackend, ForwardBatch
from jbalance.decode import AttentionSpec, devices

H, K, D, E, VOCAB, LAYERS = 4, 2, 16, 32, 40, 2
PLACES, ROWS, TOKENS = 4, 3, 64  # of the engine, and of a batch of its prompts
FREQUENCIES = tuple((100.0 ** (-np.arange(0, D, 2) / D)).tolist())
WINDOW, CAP, SCALE = 8, 3.0, 0.3  # of the second layer
SPECS = AttentionSpec(H, K, D, FREQUENCIES), AttentionSpec(H, K, D, FREQUENCIES, SCALE, WINDOW, CAP)
RULES = {}, {"window": WINDOW, "cap": CAP, "scale": SCALE}
BACKEND = AttentionBackend(SPECS, PLACES)
LONGEST, MOST_NEW = 200, 12
AMPLE = 800_000
DENSE = PLACES * (LONGEST + MOST_NEW + WINDOW) * K * 4 * D  # bytes of keys and values in 16 bits


class Mode(IntEnum):
    """As engines name what they do."""

    EXTEND = 1
    DECODE = 2


@functools.cache
def weights():
    """Of the model: an embedding, and q, k, v, output and MLP of each layer."""
    rng = np.random.default_rng(0)
    sizes = {"q": (E, H * D), "k": (E, K * D), "v": (E, K * D), "o": (H * D, E), "mlp": (E, E)}
    layers = [
        {name: rng.normal(size=s) / np.sqrt(s[0]) for name, s in sizes.items()}
        for _ in range(LAYERS)
    ]
    for layer in layers:
        layer["q"] *= 2
    embed = np.concatenate([rng.normal(size=(VOCAB, E)), np.full((1, E), np.nan)])
    return jax.tree.map(np.float32, {"embed": embed, "layers": layers})


def model(np_, params, ids, positions, attend):
    """Logits [T, V] of tokens [T]; `attend(layer, q, k, v)` is attention, `np_` NumPy or JAX's."""

    def norm(x):
        return x / np_.sqrt(np_.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def rotate(x):
        angle = positions[:, None, None] * np.float32(FREQUENCIES)
        first, second = x[..., : D // 2], x[..., D // 2 :]
        cos, sin = np_.cos(angle), np_.sin(angle)
        return np_.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x = params["embed"][ids]
    for i, w in enumerate(params["layers"]):
        q, k, v = ((norm(x) @ w[name]).reshape(len(ids), -1, D) for name in "qkv")
        x = x + attend(i, rotate(q), rotate(k), v).reshape(len(ids), H * D) @ w["o"]
        x = x + np_.tanh(norm(x) @ w["mlp"])
    return norm(x) @ params["embed"][:VOCAB].T


def dense(q, k, v, *, window=None, cap=None, scale=D**-0.5):
    """Causal attention of one request [S, H, D], in NumPy."""
    k, v = (np.repeat(x, H // K, axis=1) for x in (k, v))
    logits = scale * np.einsum("thd,shd->hts", q, k)
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    seen = np.tri(len(q), dtype=bool)
    if window is not None:
        seen &= ~np.tri(len(q), k=-window, dtype=bool)
    p = np.exp(np.where(seen, logits, -np.inf) - logits.max(axis=-1, keepdims=True))
    return np.einsum("hts,shd->thd", p / p.sum(axis=-1, keepdims=True), v)


def own_logits(ids):
    """The model's own [S, VOCAB] of one request."""
    attend = lambda layer, *qkv: dense(*qkv, **RULES[layer])  # noqa: E731
    return model(np, weights(), np.array(ids), np.arange(len(ids)), attend)


def greedy(prompt, number):
    """The model's own tokens after a prompt."""
    ids = list(prompt)
    for _ in range(number):
        logits = own_logits(ids)
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


LAYER_1 = types.SimpleNamespace(layer_id=1, scaling=SCALE, q_head_num=H, kv_head_num=K, head_dim=D)


@functools.partial(jax.jit, donate_argnums=4)
def forward(params, ids, positions, metadata, cache):
    """What an engine compiles: the model over a flat batch, and the cache that comes out of it.

    The second layer calls as engines do, with an object of its own and heads in one axis.
    """

    def attend(layer, q, k, v):
        nonlocal cache
        if layer == 1:
            q, k, v = (x.reshape(len(ids), -1) for x in (q, k, v))
        y, cache = BACKEND(q, k, v, (0, LAYER_1)[layer], metadata, cache)
        assert (y.shape, y.dtype) == (q.shape, q.dtype)
        return y

    return model(jnp, jax.tree.map(jnp.asarray, params), ids, positions, attend), cache


def padded(x, size, fill=0):
    return np.concatenate([x, np.full(size - len(x), fill)]).astype(np.int32)


def extend_batch(places, prefixes, pieces):
    """Padded as engines pad: to fixed numbers of tokens, whose embedding is NaN here, and of rows."""
    sizes = np.array([len(p) for p in pieces])
    return ForwardBatch(
        Mode.EXTEND,
        padded(np.concatenate(pieces), TOKENS, VOCAB),
        padded(places, ROWS, -1),
        padded(prefixes + sizes, ROWS),
        padded(prefixes, ROWS),
        padded(sizes, ROWS),
    )


def decode_batch(places, lengths, ids):
    return ForwardBatch(
        "decode", padded(ids, PLACES, VOCAB), padded(places, PLACES, -1), padded(lengths, PLACES)
    )


def holds(cache):
    """[PLACES, ...] of each request: tokens in the recent buffer, by level, and in the centroids."""
    tables = cache.recent_count, cache.clock.next, cache.arena.count, cache.centroids.count
    return np.concatenate([np.asarray(x).reshape(PLACES, -1) for x in tables], axis=1)


class Engine:
    """Continuous batching: prompts wait for places, are read in pieces of a flat batch, and leave."""

    def __init__(self, budget_bytes, releases=True):
        self.budget, self.releases = budget_bytes, releases
        self.pool = BACKEND.create(budget_bytes)
        self.left = {}  # of prompts, by their places: how much was read, and the whole
        self.seen = {}  # logits of each request

    def run(self, batch, positions):
        self.pool, metadata = BACKEND.init_forward_metadata(self.pool, batch)
        positions = padded(positions, len(batch.input_ids))
        others = ~np.isin(np.arange(PLACES), batch.req_pool_indices)
        before = holds(self.pool.cache)
        logits, cache = forward(weights(), batch.input_ids, positions, metadata, self.pool.cache)
        np.testing.assert_array_equal(holds(cache)[others], before[others])
        assert sum(x.nbytes for x in jax.tree.leaves(cache)) <= self.budget
        self.pool = self.pool.after(cache)
        return np.asarray(logits)

    def read(self):
        """One flat batch of what is left of the prompts; logits of those whose last token was in it."""
        spans, room = [], TOKENS
        for place, (done, prompt) in list(self.left.items())[:ROWS]:
            if room:
                spans.append((place, done, min(done + room, len(prompt))))
                room -= spans[-1][2] - done
        pieces = [self.left[place][1][a:b] for place, a, b in spans]
        places, starts, _ = np.array(spans).T
        positions = np.concatenate([np.arange(a, b) for _, a, b in spans])
        logits = self.run(extend_batch(places, starts, pieces), positions)
        ends, found = np.cumsum([len(p) for p in pieces]) - 1, {}
        for (place, _, b), end in zip(spans, ends, strict=True):
            _, prompt = self.left.pop(place)
            if b < len(prompt):
                self.left[place] = b, prompt
            else:
                found[place] = logits[end]
        return found

    def serve(self, prompts, most):
        """A batch of prompts, if any are left, and one of tokens in turns; the tokens of each prompt."""
        waiting, running, tokens = list(range(len(prompts))), {}, [[] for _ in prompts]

        def chose(place, request, logits):
            self.seen.setdefault(request, []).append(logits)
            tokens[request].append(int(logits.argmax()))
            if len(tokens[request]) == most[request]:
                running.pop(place)
                if self.releases:
                    self.pool = BACKEND.release(self.pool, [place])

        while waiting or running:
            for place in reversed(range(PLACES)):
                if waiting and place not in running:
                    running[place] = waiting.pop(0)
                    self.left[place] = 0, prompts[running[place]]
            if self.left:
                for place, logits in self.read().items():
                    chose(place, running[place], logits)
            begun = [(place, r) for place, r in running.items() if tokens[r]]
            if begun:
                places, requests = zip(*begun, strict=True)
                last = [tokens[r][-1] for r in requests]
                sizes = np.array([len(prompts[r]) + len(tokens[r]) for r in requests])
                logits = self.run(decode_batch(places, sizes, last), sizes - 1)
                for i, (place, request) in enumerate(begun):
                    chose(place, request, logits[i])
        return tokens


def prompts_of(number, seed, longest=LONGEST):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest + 1, number)
    most = rng.integers(1, MOST_NEW + 1, number).tolist()
    return [rng.integers(0, VOCAB, n) for n in sizes], most


def test_with_room_for_all_the_tokens_are_those_of_dense_attention():
    """Prompts of many lengths, more of them than places, and some in pieces of several batches."""
    prompts, most = prompts_of(9, seed=0)
    assert max(map(len, prompts)) > 2 * TOKENS
    engine = Engine(AMPLE)
    found = engine.serve(prompts, most)
    assert len({token for tokens in found for token in tokens}) > 5
    for request, (prompt, number) in enumerate(zip(prompts, most, strict=True)):
        assert found[request] == greedy(prompt, number)
        want = own_logits([*prompt, *found[request]])[len(prompt) - 1 : -1]
        assert np.linalg.norm(engine.seen[request] - want) < 0.01 * np.linalg.norm(want)
    assert not engine.pool.lengths.any()
    assert int(engine.pool.cache.held_pages.sum()) == 0


def test_with_room_for_all_a_request_is_served_as_if_it_were_alone():
    """Bit for bit, where nobody's prompt is cut into pieces; and in the place of one that never left."""
    prompts, most = prompts_of(7, seed=5, longest=TOKENS // ROWS)
    together = Engine(AMPLE)
    found = together.serve(prompts, most)
    for request, prompt in enumerate(prompts):
        want = own_logits(prompt)[-1]
        np.testing.assert_allclose(together.seen[request][0], want, rtol=0, atol=1e-4)
    alone = Engine(AMPLE, releases=False)
    for request in (0, 2, 6):
        alone.seen = {}
        assert alone.serve([prompts[request]], [most[request]]) == [found[request]]
        np.testing.assert_array_equal(alone.seen[0], together.seen[request])


def test_a_quarter_of_the_bytes_serves_any_number_of_requests_without_compiling_anew():
    prompts, most = prompts_of(32, seed=1)
    programs = forward, devices.release, devices.shrink
    before = [f._cache_size() for f in programs]
    engine = Engine(DENSE // 4)
    found = engine.serve(prompts, most)
    assert [len(tokens) for tokens in found] == most
    assert all(np.isfinite(logits).all() for own in engine.seen.values() for logits in own)
    kinds, released, shrunk = (f._cache_size() - n for f, n in zip(programs, before, strict=True))
    assert kinds == 2  # a batch of prompts, and one that decodes
    assert released == shrunk == 1


def test_what_others_say_does_not_change_a_bit_of_a_request():
    """At a quarter of the bytes, where all compete: they are seen by their number alone."""
    prompts, most = prompts_of(6, seed=2)
    rng = np.random.default_rng(3)
    others = [p if i == 3 else rng.integers(0, VOCAB, len(p)) for i, p in enumerate(prompts)]
    first, second = Engine(DENSE // 4), Engine(DENSE // 4)
    first.serve(prompts, most)
    second.serve(others, most)
    np.testing.assert_array_equal(first.seen[3], second.seen[3])
    assert not np.array_equal(first.seen[2], second.seen[2])
