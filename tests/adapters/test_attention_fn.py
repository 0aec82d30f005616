"""Flax's modules with our attention at full budget are what they were: values, training, checkpoints."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jbalance import adapters, attention

B, T, WIDTH, HEADS, VOCABULARY, STEPS = 4, 24, 16, 2, 11, 200
OURS = adapters.attention_fn()
# Not Adam: it divides by gradients that are nearly zero, and so makes rounding visible in some 70 steps.
OPTIMISER = optax.sgd(0.1)
linen_stock = linen.dot_product_attention
nnx_stock = nnx.dot_product_attention


def padded_causal_mask():
    """[B, 1, T, T]: causal, and the last tokens of some sequences are padding that nobody sees."""
    length = np.array([T, T - 3, T - 7, T])
    seen = np.arange(T) < length[:, None]
    return jnp.asarray(np.tril(np.ones((T, T), bool)) & seen[:, None, None, :])


class Linen(linen.Module):
    attention_fn: object
    dropout: float = 0.0

    @linen.compact
    def __call__(self, tokens, mask):
        x = linen.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(2):
            x += linen.MultiHeadDotProductAttention(
                HEADS,
                dropout_rate=self.dropout,
                deterministic=False,
                attention_fn=self.attention_fn,
            )(linen.LayerNorm()(x), mask=mask)
            x += linen.Dense(WIDTH)(linen.relu(linen.Dense(2 * WIDTH)(linen.LayerNorm()(x))))
        return linen.Dense(VOCABULARY)(x)


class Nnx(nnx.Module):
    def __init__(self, attention_fn, dropout=0.0, *, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attend = nnx.List(
            nnx.MultiHeadAttention(
                HEADS,
                WIDTH,
                dropout_rate=dropout,
                decode=False,
                attention_fn=attention_fn,
                rngs=rngs,
            )
            for _ in range(2)
        )
        self.norm = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, mask):
        x = self.embed(tokens)
        for attend, norm in zip(self.attend, self.norm, strict=True):
            x += attend(norm(x), mask=mask, deterministic=False)
        return self.head(x)


def batches():
    """Sequences in which a token follows from the two before it, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        x = rng.integers(0, VOCABULARY, (B, T + 1))
        for t in range(2, T + 1):
            x[:, t] = (x[:, t - 1] + x[:, t - 2]) % VOCABULARY
        yield jnp.asarray(x)


def cross_entropy(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def linen_losses(attention_fn, dropout):
    model, mask = Linen(attention_fn, dropout), padded_causal_mask()
    key = jax.random.key(0)
    keys = {"params": key, "dropout": key}
    parameters = jax.jit(model.init)(keys, jnp.zeros((B, T), int), mask)
    optimiser = OPTIMISER
    state, losses = optimiser.init(parameters), []

    @jax.jit
    def step(parameters, state, tokens, key):
        def loss_of(parameters):
            return cross_entropy(
                model.apply(parameters, tokens[:, :-1], mask, rngs={"dropout": key}), tokens
            )

        loss, gradient = jax.value_and_grad(loss_of)(parameters)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, loss

    for i, tokens in enumerate(batches()):
        parameters, state, loss = step(parameters, state, tokens, jax.random.key(i))
        losses.append(float(loss))
    return np.array(losses)


def nnx_losses(attention_fn, dropout):
    model, mask = Nnx(attention_fn, dropout, rngs=nnx.Rngs(0)), padded_causal_mask()
    optimiser, losses = nnx.Optimizer(model, OPTIMISER, wrt=nnx.Param), []

    @nnx.jit
    def step(model, optimiser, tokens):
        loss, gradient = nnx.value_and_grad(
            lambda model: cross_entropy(model(tokens[:, :-1], mask), tokens)
        )(model)
        optimiser.update(model, gradient)
        return loss

    for tokens in batches():
        losses.append(float(step(model, optimiser, tokens)))
    return np.array(losses)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
@pytest.mark.parametrize(("train", "stock"), [(linen_losses, linen_stock), (nnx_losses, nnx_stock)])
def test_training_is_the_same_for_200_steps(train, stock, dropout):
    want, got = train(stock, dropout), train(OURS, dropout)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert want[-10:].mean() < 0.97 * want[:10].mean()


def test_checkpoints_load_both_ways():
    mask, tokens = padded_causal_mask(), next(batches())[:, :-1]
    stock, ours = Linen(linen_stock), Linen(OURS)
    key = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    for save, load in ((stock, ours), (ours, stock)):
        parameters = save.init(key, tokens, mask)
        assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(
            jnp.shape, load.init(key, tokens, mask)
        )
        np.testing.assert_allclose(
            load.apply(parameters, tokens, mask),
            save.apply(parameters, tokens, mask),
            rtol=1e-4,
            atol=1e-5,
        )
    model = Nnx(nnx_stock, rngs=nnx.Rngs(0))
    want = model(tokens, mask)
    graph, state = nnx.split(Nnx(OURS, rngs=nnx.Rngs(1)))
    np.testing.assert_allclose(
        nnx.merge(graph, nnx.state(model))(tokens, mask), want, rtol=1e-4, atol=1e-5
    )
    assert jax.tree.structure(state) == jax.tree.structure(nnx.state(model))
    balanced = adapters.set_attention_fn(model, OURS)
    assert balanced is model
    np.testing.assert_allclose(balanced(tokens, mask), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 1, T, T), (B, 1, 1, T), (B, HEADS, T, T), (T, T), (B, 1, T, T)]
)
def test_masks_of_any_broadcastable_shape_reach_the_attention(shape):
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random(shape) < 0.5).at[..., 0].set(True)
    q, k, v = jnp.asarray(rng.normal(size=(3, B, T, HEADS, 8)), jnp.float32)
    want = linen_stock(q, k, v, mask=mask)
    np.testing.assert_allclose(OURS(q, k, v, mask=mask), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        OURS(q, k, v, None, mask.astype(jnp.float32)), want, rtol=1e-4, atol=1e-5
    )
    bias = jnp.asarray(rng.normal(size=shape), jnp.float32)
    np.testing.assert_allclose(
        OURS(q, k, v, bias=bias, mask=mask),
        linen_stock(q, k, v, bias=bias, mask=mask),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_any_batch_axes_and_grouped_heads(lead):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(*lead, T, 4, 8)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, *lead, T, 2, 8)), jnp.float32)
    mask = jnp.asarray(rng.random((*lead, 1, T, T)) < 0.7).at[..., 0].set(True)
    want = linen_stock(q, jnp.repeat(k, 2, axis=-2), jnp.repeat(v, 2, axis=-2), mask=mask)
    got = OURS(q, k, v, mask=mask)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_takes_the_stock_functions_bits(broadcast):
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.normal(size=(3, B, T, HEADS, 8)), jnp.float32)
    given = {
        "dropout_rng": jax.random.key(3),
        "dropout_rate": 0.3,
        "broadcast_dropout": broadcast,
        "mask": padded_causal_mask(),
    }

    def loss(f):
        return lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v, **given)))

    np.testing.assert_allclose(
        OURS(q, k, v, **given), linen_stock(q, k, v, **given), rtol=1e-4, atol=1e-5
    )
    for got, want in zip(
        jax.grad(loss(OURS), (0, 1, 2))(q, k, v),
        jax.grad(loss(linen_stock), (0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_the_plans_tiles_are_what_is_computed():
    q, k, v = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 64, 2, 8)), jnp.float32)
    asked = []

    def window(q, k, v, /, *, causal):
        asked.append(causal)
        return attention.window(16, attention.Tiling(64, 64, 16, 16))

    got = adapters.attention_fn(window)(q, k, v, is_causal=True)
    want = attention.attend(
        q, k, v, attention.window(16, attention.Tiling(64, 64, 16, 16)), causal=True
    )
    np.testing.assert_array_equal(got, want.y)
    assert asked == [True]


MASKS = {
    "causal": (np.tri(T, dtype=bool), True),
    "causal, of numbers": (linen.make_causal_mask(jnp.zeros((B, T))), True),
    "causal with padding": (padded_causal_mask(), True),
    "full": (np.ones((T, T), bool), False),
    "one key after its query": (np.tri(T, dtype=bool) | (np.arange(T) == 9), False),
    "padding": (np.arange(T)[None] < T - 5, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_causal_masks_are_recognized(name):
    mask, causal = MASKS[name]
    told = []

    def plan_of(q, k, v, /, *, causal):
        told.append(causal)
        return attention.dense(attention.Tiling(T, T, causal=bool(causal)))

    q = jnp.ones((B, T, HEADS, 8))
    jax.eval_shape(lambda q: adapters.attention_fn(plan_of)(q, q, q, mask=mask), q)
    jax.eval_shape(lambda q, mask: adapters.attention_fn(plan_of)(q, q, q, mask=mask), q, mask)
    assert told == [causal, None]


@pytest.mark.parametrize("size", [1, 24])
def test_plans_are_told_what_masks_say(size):
    q = jnp.asarray(np.random.default_rng(0).normal(size=(B, size, HEADS, 8)), jnp.float32)
    k, v = jnp.asarray(np.random.default_rng(1).normal(size=(2, B, 24, HEADS, 8)), jnp.float32)
    told = []

    def plan_of(q, k, v, /, *, causal):
        told.append(causal)
        return attention.dense(attention.Tiling(q.shape[1], 24, 8, 8, bool(causal)))

    ours = adapters.attention_fn(plan_of)
    masks = [padded_causal_mask()[:, :, -size:], np.tri(size, 24, 24 - size, dtype=bool), None]
    masks += [np.ones((B, 1, size, 24), bool)]
    for mask in masks:
        want = nnx_stock(q, k, v, mask=mask)
        np.testing.assert_allclose(ours(q, k, v, mask=mask), want, rtol=1e-4, atol=1e-5)
        traced = jax.jit(lambda mask: ours(q, k, v, mask=mask))(mask)
        np.testing.assert_allclose(traced, want, rtol=1e-4, atol=1e-5)
    one = size == 1  # sees no key that comes after
    assert told[::2] == [True, True, False, one]
    assert told[1::2] == [one or None, one or None, False, one or None]


def test_queries_that_see_nothing_get_zero():
    q, k, v = jnp.ones((3, 1, 4, 1, 8))
    mask = jnp.ones((1, 1, 4, 4), bool).at[0, 0, 2].set(False)
    got = OURS(q, k, v, mask=mask, dropout_rng=jax.random.key(0), dropout_rate=0.1)
    assert (np.asarray(got[0, 2]) == 0).all()
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"module": object()}, ("sow_weights",)),
        ({"dropout_rate": 0.1}, ("dropout_rng is None",)),
        ({"is_causal": True, "query": jnp.ones((1, 1, 1, 8))}, ("1 queries and 4 keys", "mask")),
    ],
)
def test_what_it_cannot_do_is_named(given, names):
    x = jnp.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match=r"is|never") as error:
        OURS(**{"query": x, "key": x, "value": x, **given})
    for name in names:
        assert name in str(error.value)


def test_a_model_without_attention_is_named():
    with pytest.raises(ValueError, match=r"Linear without any nnx\.MultiHeadAttention"):
        adapters.set_attention_fn(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), OURS)
