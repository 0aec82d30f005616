"""What a model learns of its tokens' worth: measured by dense attention, used by every way to read."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbalance import decode
from jbalance.decode import prefill
from jbalance.decode import worth as fitting
from jbalance.importance.predicted_worth import predicted_worth
from jbalance.importance.token_worth import later_energy
from tests.support.small_models import VOCAB

TEXT = np.random.default_rng(5).integers(0, VOCAB, 512 + 80).astype(np.int32)
SIZE = len(TEXT) - 512


@pytest.fixture(scope="module")
def given(decoder):
    """What the fit was handed of each layer, and what it made of it."""
    rows = []
    fit = fitting.fit_predicted_worth
    with mock.patch.object(fitting, "fit_predicted_worth", lambda *a: rows.append(a) or fit(*a)):
        worth = decode.fit_worth(decoder, [TEXT, TEXT[::-1]])
    return rows, worth


def attention_of(decoder, tokens):
    """Dense causal attention of every layer, [L, H, T, T] in float64, and each layer's x."""
    x = decoder.embed(decoder.params, jnp.asarray(tokens)[None], jnp.arange(len(tokens))[None])
    weights, streams, qk = [], [], []
    for layer, own in enumerate(decoder.layers):
        f = decoder.functions(layer)
        q, k, v = f.qkv(own, x, jnp.arange(len(tokens))[None])
        streams.append(np.asarray(x[0], np.float64))
        qk.append((q[0], k[0], v[0]))
        group = q.shape[2] // k.shape[2]
        keys, values = (np.repeat(np.asarray(z[0], np.float64), group, axis=1) for z in (k, v))
        logits = np.einsum("thd,shd->hts", np.asarray(q[0], np.float64), keys)
        logits /= np.sqrt(q.shape[-1])
        logits = np.where(np.tri(len(tokens)), logits, -np.inf)
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        weights.append(p)
        y = np.einsum("hts,shd->thd", p, values)
        x = f.finish(own, x, jnp.asarray(y, x.dtype)[None])
    return weights, streams, qk


def test_it_is_fitted_to_what_dense_attention_receives(decoder, given):
    rows, worth = given
    assert len(rows) == len(worth) == decoder.num_layers
    followed, streams, qk = attention_of(decoder, TEXT)
    repeated, *_ = attention_of(decoder, np.concatenate([TEXT[:SIZE]] * 2))
    kv_heads = decoder.num_kv_heads
    for layer in range(decoder.num_layers):
        x, features, target = (np.asarray(part)[:SIZE] for part in rows[layer])
        assert len(rows[layer][0]) == 2 * SIZE
        energy = [
            (p[layer][:, SIZE:, :SIZE] ** 2).sum(axis=1).reshape(kv_heads, -1, SIZE).sum(axis=1)
            for p in (followed, repeated)
        ]
        np.testing.assert_allclose(
            target.T, np.sqrt(0.4 * energy[0] + 0.02 * energy[1]), rtol=2e-3, atol=1e-4
        )
        stream = streams[layer][:SIZE]
        unit = stream / np.sqrt(np.mean(stream**2, axis=-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(x, unit, rtol=2e-3, atol=2e-3)
        q, k, v = qk[layer]
        later = later_energy(q[SIZE - 64 : SIZE], k[:SIZE], v[:SIZE])
        np.testing.assert_allclose(
            features[:, 5 : 5 + kv_heads], np.log(np.asarray(later).T + 1e-8), rtol=5e-3, atol=5e-3
        )


def test_what_is_learned_is_certain_for_the_price(decoder, given, tmp_path):
    """Of contexts and of requests, those that were saved too, as by `ladder` and by no sketch."""
    assert not decoder.learned
    learned = dataclasses.replace(decoder, worth=given[1])
    assert learned.learned
    budget = [68_000]  # most tokens stay
    context = decode.read(learned, TEXT[:200], budget, reserve=decode.Reserve(1, 16))
    codes = context.codes.reshape(-1, 200)
    shape, dim = context.plan.level.shape, learned.head_dim
    for certain in (True, False):
        rule = decode.ladder(codes, certain=certain)
        plan = decode.fit(rule, shape, dim, budget, reserve=context.reserve)
        assert (plan.level == context.plan.level).all() == certain
    for model in (decoder, learned):
        state = decode.create(model, budget)
        decode.save(tmp_path / f"{model.learned}", model, state)
        again = decode.restore(tmp_path / f"{model.learned}", model, budget)
        beside = decode.create(model, budget, context=context)
        found = [x.caches[0].certain for x in (state, again, beside)]
        assert found == [model.learned, model.learned, False]


def test_a_prompt_is_weighed_by_it(decoder, given):
    """In chunks and behind padding as all at once; each layer by its own weights."""
    learned = dataclasses.replace(decoder, worth=given[1])
    prompt = TEXT[:300]
    _, streams, qk = attention_of(decoder, prompt)
    for layer, (_, held) in enumerate(prefill.layers_of(learned, prompt, 512)):
        q, k, v = qk[layer]
        later = later_energy(q[-64:], k, v)
        want = predicted_worth(jnp.asarray(streams[layer], jnp.float32), later, given[1][layer])
        np.testing.assert_allclose(held.w[:, :300], want, rtol=2e-2)
        assert (held.w[:, 300:] == 0).all()


def test_requests_and_contexts_are_kept_by_it(decoder, given):
    """At a budget that keeps a part, other tokens stay than without."""
    learned = dataclasses.replace(decoder, worth=given[1])
    prompt = np.resize(TEXT[::-1], 1200).astype(np.int32)
    levels = [decode.read(model, prompt, [60_000]).plan.level for model in (decoder, learned)]
    assert (levels[0] != levels[1]).any()
    budget = [60_000]
    for model in (decoder, learned):
        state = decode.join(model, decode.create(model, budget), 0, prompt)
        assert max(state.nbytes) <= budget[0]


def test_what_does_not_fit_is_refused(decoder, given):
    worth = given[1]
    with pytest.raises(ValueError, match="texts is empty"):
        decode.fit_worth(decoder, [])
    with pytest.raises(ValueError, match=r"texts\[1\] has 575 tokens: at least 576"):
        decode.fit_worth(decoder, [TEXT, TEXT[:575]])
    with pytest.raises(ValueError, match=r"texts\[0\] has dtype float64"):
        decode.fit_worth(decoder, [TEXT + 0.5])

    def read(model):
        return decode.read(model, TEXT[:200], [60_000])

    with pytest.raises(ValueError, match=r"model.worth has 1 entries for"):
        read(dataclasses.replace(decoder, worth=worth[:1]))
    other = jax.tree.map(lambda x: x[..., :1], worth[0])
    with pytest.raises(ValueError, match=r"model.worth\[0\] has weights of shapes"):
        read(dataclasses.replace(decoder, worth=(other, *worth[1:])))
    wide = worth[0]._replace(hidden=jnp.zeros((99, decoder.num_kv_heads)))
    with pytest.raises(ValueError, match=r"model.worth\[0\] is for a width of 99: the model has"):
        read(dataclasses.replace(decoder, worth=(wide, *worth[1:])))
    spec = dataclasses.replace(decoder.attention[0], window=64)
    windows = dataclasses.replace(decoder, attention=(spec, *decoder.attention[1:]))
    with pytest.raises(ValueError, match=r"model.worth\[0\] must be None: layer 0 has a window"):
        read(dataclasses.replace(windows, worth=worth))
