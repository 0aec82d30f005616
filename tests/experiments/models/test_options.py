"""Options of the decoder against what they say, written out with NumPy and one token at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import RopeScaling, Transformer, causal_attention, greedy
from experiments.models.attention import Scoring, decode_attention
from experiments.models.config import NO_WINDOW
from experiments.models.experts import Gated, mixture
from tests.support.small_models import small_config

LONG = RopeScaling(
    "longrope", 4.0, original_positions=16, short_factors=(1, 2), long_factors=(3, 4)
)
OPTIONS = small_config(
    num_layers=3,
    windows=(3, None, 1),
    local_rope_base=100.0,
    rotated_layers=(True, True, False),
    rotated_features=4,
    rope_scaling=LONG,
    scale=0.3,
    attention_soft_cap=2.0,
    logits_soft_cap=5.0,
    qkv_bias=True,
    qk_norm=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=3.0,
    num_experts=5,
    experts_per_token=2,
)


@pytest.fixture(scope="module")
def made():
    model = Transformer(OPTIONS, rngs=nnx.Rngs(0))
    state, rng = nnx.state(model, nnx.Param), np.random.default_rng(0)
    nnx.update(model, jax.tree.map(lambda x: 4 * x + 0.1 * rng.standard_normal(x.shape), state))
    return model


def written_out(q, k, v, scale, cap, window):
    """One query after the other."""
    groups = q.shape[1] // k.shape[1]
    y = np.zeros_like(q)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = slice(max(0, t - window + 1), t + 1)
            logits = k[seen, h // groups] @ q[t, h] * scale
            if cap:
                logits = cap * np.tanh(logits / cap)
            weights = np.exp(logits - logits.max())
            y[t, h] = weights @ v[seen, h // groups] / weights.sum()
    return y


@pytest.mark.parametrize("window", [1, 5, 300, NO_WINDOW])
@pytest.mark.parametrize(("scale", "cap"), [(None, None), (0.7, None), (0.7, 1.5)])
def test_scale_cap_and_window_of_dense_attention(window, scale, cap):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 290, heads, 4), np.float32) for heads in (4, 2, 2))
    want = written_out(q[0], k[0], v[0], scale or 0.5, cap, window)
    scoring = Scoring(scale, cap, jnp.int32(window))
    got = causal_attention(q, k, v, scoring=scoring)[0]
    np.testing.assert_allclose(got[0], want, atol=2e-5)
    cache = (jnp.asarray(k), jnp.asarray(v))
    last = decode_attention(jnp.array([289]))(
        q[:, -1:], k[:, -1:], v[:, -1:], cache, scoring=scoring
    )[0]
    np.testing.assert_allclose(last[0, 0], want[-1], atol=2e-5)


def test_layers_share_one_structure_and_their_specifications_differ(made):
    first, second, third = made.attention_specs
    assert [spec.window for spec in made.attention_specs] == [3, None, 1]
    assert {spec.scale for spec in made.attention_specs} == {0.3}
    assert {spec.soft_cap for spec in made.attention_specs} == {2.0}
    np.testing.assert_allclose(first.frequencies, [1, 0.1, 0, 0], rtol=1e-6)  # its own base
    np.testing.assert_allclose(second.frequencies, [1 / 3, 0.01 / 4, 0, 0], rtol=1e-6)
    assert third.frequencies == (0.0,) * 4
    layers = [nnx.split(made.layer(i)) for i in range(3)]
    assert len({graph for graph, _ in layers}) == 1
    assert [int(layer.window[...]) for layer in map(made.layer, range(3))] == [3, NO_WINDOW, 1]
    with pytest.raises(ValueError, match="take attention_specs"):
        _ = made.attention_spec


def test_stretched_features_alone_are_multiplied(made):
    """The second layer's factor is sqrt(1 + ln 4 / ln 16) on each side of the dot product."""
    factor = (1 + np.log(4) / np.log(16)) ** 0.5
    np.testing.assert_allclose(made.layer(1).amplitude[...], [factor, factor, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(made.layer(0).amplitude[...], np.ones(4))
    np.testing.assert_array_equal(made.layer(2).amplitude[...], np.ones(4))


def test_specification_and_layer_by_layer_equal_the_scan(made):
    """q, k and v of a layer with nothing but its AttentionSpec: what a decoder with a cache knows."""
    tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, 61)
    x, positions = made.embed(tokens), jnp.arange(9)
    for i, spec in enumerate(made.attention_specs):
        layer = made.layer(i)
        q, k, v = (np.asarray(part[0]) for part in layer.qkv(x, positions))
        y = written_out(q, k, v, spec.scale, spec.soft_cap, spec.window or NO_WINDOW)
        x = layer.finish(x, jnp.asarray(y)[None])
    np.testing.assert_allclose(made.logits(x), made(tokens), atol=3e-4)
    assert np.abs(made(tokens)).max() <= 5


def test_greedy_honors_every_option(made):
    tokens = np.arange(12).reshape(2, 6) % 61
    ids = np.concatenate([tokens, greedy(made, tokens, 4)], axis=1)
    logits = nnx.jit(lambda model, ids: model(ids))(made, ids)
    np.testing.assert_array_equal(np.argmax(logits[:, 5:-1], axis=-1), ids[:, 6:])


def test_an_attention_without_scoring_is_refused_by_models_that_need_it(made, model, tokens):
    def own(q, k, v, state):
        return causal_attention(q, k, v, state)

    assert nnx.jit(lambda model: model.hidden(tokens, attention=own)[0])(model).shape
    with pytest.raises(ValueError, match="'own' takes no `scoring`"):
        made.hidden(tokens, attention=own)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_mixture_is_the_chosen_experts_weighted(normalized):
    rng = np.random.default_rng(0)
    h, router = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 5))
    gate, up, down = (rng.standard_normal((5, *shape)) for shape in ((4, 6), (4, 6), (6, 4)))
    logits = h @ router
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = np.zeros_like(h)
    for at in np.ndindex(2, 3):
        chosen = np.argsort(-probability[at])[:2]
        whole = probability[at][chosen].sum() if normalized else 1
        for x in chosen:
            a = h[at] @ gate[x]
            part = (a / (1 + np.exp(-a)) * (h[at] @ up[x])) @ down[x]
            want[at] += probability[at][x] / whole * part
    got = mixture(
        jnp.asarray(h, jnp.float32),
        jnp.asarray(router, jnp.float32),
        Gated(*(jnp.asarray(x, jnp.float32) for x in (gate, up, down))),
        jax.nn.silu,
        per_token=2,
        normalized=normalized,
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


REFUSED = {
    "windows of other layers": ({"windows": (3, None)}, "windows has 2 entries for num_layers=3"),
    "an empty window": ({"windows": (3, None, 0)}, "windows must be at least 1"),
    "rotated layers": ({"rotated_layers": (True,)}, "rotated_layers has 1 entries"),
    "odd rotation": ({"rotated_features": 3}, "rotated_features=3 must be even"),
    "wide rotation": ({"rotated_features": 10}, "in 2..head_dim=8"),
    "factors": (
        {"rope_scaling": LONG},
        "have 2 entries each: they must have one for each of the 4",
    ),
    "no experts": ({"num_experts": 4}, "experts_per_token=0 must lie in 1..num_experts=4"),
    "more experts": ({"experts_per_token": 1}, "experts_per_token=1 must lie in 1..num_experts=0"),
    "a negative cap": ({"attention_soft_cap": -1.0}, "attention_soft_cap must be a finite number"),
    "an infinite scale": ({"scale": np.inf}, "scale must be a finite number above 0"),
    "a base below 1": ({"rope_base": 0.5}, "rope_base must be a finite number from 1 on, got 0.5"),
    "a local base of 0": ({"local_rope_base": 0.0}, "local_rope_base must be a finite number"),
    "an activation": ({"activation": "relu"}, "activation='relu' must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_are_checked(config, case):
    changes, words = REFUSED[case]
    with pytest.raises(ValueError, match=r"\S") as error:
        dataclasses.replace(config, **changes)
    assert words in str(error.value)


SCALINGS = {
    "two ends": ({"kind": "yarn", "beta_fast": 1.0}, "beta_slow=1.0 must be below beta_fast=1.0"),
    "no factors": ({"kind": "longrope"}, "have 0 and 0 entries under kind='longrope'"),
    "factors of another kind": (
        {"kind": "yarn", "short_factors": (1.0,), "long_factors": (1.0,)},
        "'longrope' alone",
    ),
    "a negative factor": (
        {"kind": "longrope", "short_factors": (1.0,), "long_factors": (-1.0,)},
        "long_factors=-1.0",
    ),
    "a kind": ({"kind": "su"}, "kind='su' must be one of linear, llama3, dynamic, yarn, longrope"),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_scalings_are_checked(case):
    changes, words = SCALINGS[case]
    with pytest.raises(ValueError, match=r"\S") as error:
        RopeScaling(**changes)
    assert words in str(error.value)
