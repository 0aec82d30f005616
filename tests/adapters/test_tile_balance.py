"""Budgets of tiles that move between the layers of a Flax model while it trains: linen and nnx."""

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jbalance import adapters, attention, importance, shares
from jbalance.adapters import NnxBalance, TileBalancer, TileBudget, Tiles
from tests.support.versions import NEWER_FLAX

B, T, WIDTH, HEADS, LAYERS, STEPS = 1, 128, 16, 2, 2, 60
TILES = Tiles(block_q=16, block_k=8, rows=4)
SEEN, ALWAYS = attention.candidates(attention.Tiling(T, T, 16, 8))
MOST, LEAST = HEADS * int(SEEN.sum()), HEADS * int(ALWAYS.sum())


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.List(
            nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs) for _ in range(LAYERS)
        )
        self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, **given):
        for attend in self.attend:
            x += attend(x, **(given or {"is_causal": True}))
        return self.head(x)


class LinenLayer(linen.Module):
    density: float = 0.5

    @linen.compact
    def __call__(self, x, mask):
        tiles = Tiles(TILES.block_q, TILES.block_k, TILES.rows, causal=True)
        own = adapters.LinenBalancedAttention(self.density, tiles)
        x += linen.MultiHeadDotProductAttention(HEADS, attention_fn=own)(x, mask=mask)
        return x, None


class Linen(linen.Module):
    scanned: bool

    @linen.compact
    def __call__(self, x, mask):
        if self.scanned:
            layers = linen.scan(
                LinenLayer,
                variable_axes={"params": 0, "balance": 0},
                split_rngs={"params": True},
                in_axes=linen.broadcast,
                length=LAYERS,
            )
            x, _ = layers()(x, mask)
        else:
            for _ in range(LAYERS):
                x, _ = LinenLayer()(x, mask)
        return linen.Dense(WIDTH)(x)


def inputs(i):
    return jax.random.normal(jax.random.key(i), (B, T, WIDTH))


def tiles_of(budgets):
    """Whole tiles of all layers together."""
    each = jax.tree.leaves(budgets, is_leaf=lambda x: isinstance(x, TileBudget))
    return np.concatenate([np.round(np.atleast_1d(x.fraction) * MOST) for x in each])


def nnx_tiles(model):
    return tiles_of(adapters.budgets_of(model))


@NEWER_FLAX
def test_steps_with_changing_budgets_are_traced_once_and_keep_each():
    model = Nnx(nnx.Rngs(0))
    balance = NnxBalance(model, 0.5, TILES)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(1)
    def step(model, optimizer, balance, x, density):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x[:, ::-1]) ** 2))(
            model
        )
        optimizer.update(model, gradient)
        balance.update(model, density)
        return loss

    density = np.linspace(0.4, 0.9, STEPS).astype(np.float32)
    losses = []
    for i in range(STEPS):
        losses.append(float(step(model, optimizer, balance, inputs(i % 3), density[i])))
        if i % 10 == 0:
            given = nnx_tiles(model)
            assert given.sum() == np.floor(density[i] * np.float32(LAYERS * MOST))
            assert (given >= LEAST).all()
            assert (given <= MOST).all()
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_linen_budgets_move_between_layers_too(scanned):
    model, mask = Linen(scanned), linen.make_causal_mask(jnp.zeros((B, T)))
    variables = jax.jit(model.init)(jax.random.key(0), inputs(0), mask)
    params, budgets = variables["params"], variables["balance"]
    balancer = TileBalancer()
    state = balancer.init(budgets)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def step(budgets, state, x, density):
        _, new = model.apply({"params": params, "balance": budgets}, x, mask, mutable=["balance"])
        return balancer.update(new["balance"], state, density)

    for i, density in enumerate((0.5, 0.6, 0.45)):
        before = tiles_of(budgets)
        budgets, state = step(budgets, state, inputs(i), density)
        assert tiles_of(budgets).sum() == np.floor(np.float32(density) * LAYERS * MOST)
    assert (tiles_of(budgets) != before).any()
    frozen = jax.jit(model.apply)({"params": params, "balance": budgets}, inputs(0), mask)
    assert frozen.shape == (B, T, WIDTH)  # without `mutable`, as in evaluation


@NEWER_FLAX
def test_the_parameters_are_those_of_the_stock_model():
    stock, model = Nnx(nnx.Rngs(0)), Nnx(nnx.Rngs(1))
    NnxBalance(model, 1.0, Tiles(TILES.block_q, TILES.block_k, TILES.rows, causal=True))
    nnx.update(model, nnx.state(stock, nnx.Param))
    call = nnx.jit(lambda model, x, **given: model(x, **given))
    want = call(stock, inputs(0))
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(nnx.state(stock))
    seen = jnp.tril(jnp.ones((T, T), bool))[None, None]
    np.testing.assert_allclose(call(model, inputs(0), mask=seen), want, rtol=1e-4, atol=1e-5)


def test_a_layer_that_needs_more_gets_more():
    """To one layer a few keys matter, to the other all alike."""
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.normal(size=(3, 1, T, HEADS, 8)), jnp.float32)
    see = jax.jit(
        lambda q, k, v: adapters.attend_within(TileBudget.of(0.5), q, k, v, TILES, is_causal=True)[
            1
        ]
    )
    budgets = []
    for sharpness in (8.0, 0.01):
        budgets.append(see(sharpness * q, k, v))
    balancer = TileBalancer(decay=0.0)
    new, _ = balancer.update(budgets, balancer.init(budgets), 0.5)
    sharp, flat = tiles_of(new)
    assert sharp < flat
    uniform = TileBalancer(rule="uniform")
    new, _ = uniform.update(budgets, uniform.init(budgets), 0.5)
    assert abs(np.subtract(*tiles_of(new))) <= 1


def test_the_price_is_one_for_all_layers():
    """Tiles above the price and none below, but for the half octave in which it lies."""
    rng = np.random.default_rng(0)
    value = np.exp(3 * rng.normal(size=(4, 1, 3000)) + np.arange(4)[:, None, None])
    curves = jnp.stack([importance.worth_curve(x) for x in value])
    amount = 5000
    got = amount * shares.priced(curves, amount)
    price = np.sort(value.ravel())[::-1][amount]
    within = [((x > price / 1.5).sum(), (x > price * 1.5).sum()) for x in value]
    for taken, (most, least) in zip(got, within, strict=True):
        assert least <= taken <= most
    np.testing.assert_allclose(got.sum(), amount, rtol=1e-5)


def _linen_budget(tiles, mask, jit=jax.jit):
    """A linen layer's outputs and budget; None for a mask that is made inside of the call."""
    own = adapters.LinenBalancedAttention(0.5, tiles)
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=own)

    def apply(x, ids):
        seen = linen.make_causal_mask(ids) if mask is None else mask
        return layer.init_with_output(jax.random.key(0), x, mask=seen)

    y, variables = jit(apply)(inputs(0), jnp.zeros((B, T)))
    (budget,) = jax.tree.leaves(variables["balance"], is_leaf=lambda x: isinstance(x, TileBudget))
    return y, budget


def _nnx_budget(tiles, mask, jit=nnx.jit):
    layer = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    NnxBalance(layer, 0.5, tiles)

    def call(layer, x, ids):
        return layer(x, mask=nnx.make_causal_mask(ids) if mask is None else mask)

    y = jit(call)(layer, inputs(0), jnp.zeros((B, T)))
    return y, adapters.budgets_of(layer)[0]


@pytest.mark.parametrize("budget_of", [_linen_budget, _nnx_budget])
def test_a_budget_is_a_part_of_the_tiles_that_masks_show(budget_of):
    causal = linen.make_causal_mask(jnp.zeros((B, T)))
    want, budget = budget_of(TILES, causal)  # made outside of the jitted function
    assert budget.limits[1] == MOST
    with pytest.raises(ValueError, match=r"mask is traced.*is_causal=True.*Tiles\(causal=True\)"):
        budget_of(TILES, None)
    y, budget = budget_of(Tiles(16, 8, 4, causal=True), None)
    assert budget.limits[1] == MOST
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    _, budget = budget_of(TILES, None, jit=lambda call: call)  # eager: the mask has values
    assert budget.limits[1] == MOST
    _, budget = budget_of(TILES, jnp.ones_like(causal))
    assert budget.limits[1] == HEADS * SEEN.size


def test_tiles_say_what_traced_masks_are():
    for causal, number in ((True, SEEN.sum()), (False, SEEN.size)):
        assert Tiles(16, 8, 4, causal).tiling(T, T, None).num_tiles == number


@pytest.mark.parametrize("given", [{}, {"mask": jnp.ones((1, 1, T, T), bool)}])
def test_what_tiles_say_of_masks_must_be_so(given):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, T, HEADS, 8))
    with pytest.raises(ValueError, match=r"tiles\.causal is True, but"):
        adapters.attend_within(TileBudget.of(0.5), q, k, v, Tiles(16, 8, 4, causal=True), **given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NnxBalance(Nnx(nnx.Rngs(0)), 0.0), "density is 0.0"),
        (lambda: NnxBalance(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 0.5), "model is a Linear"),
        (lambda: TileBalancer(rule="fair"), "rule is 'fair'"),
        (lambda: TileBalancer(decay=1.0), "decay is 1.0"),
        (lambda: Tiles(rows=65), "rows is 65"),
        (lambda: Tiles(block_k=0), "block_k is 0"),
        (lambda: TileBalancer().init({}), "budgets holds no TileBudget"),
        (
            lambda: TileBalancer().update([TileBudget.of(0.5)], None, 1.5),
            "density is 1.5",
        ),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call()
