"""Doors of the adapters: whole models, functions, batches and files are honored, or refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jbalance import adapters
from jbalance.adapters import AttentionBackend, ForwardBatch, backend
from jbalance.decode import AttentionSpec
from tests.support.small_models import VOCAB, small_llama
from tests.support.versions import NEWER_FLAX

B, WIDTH, HEADS, BYTES = 2, 16, 2, 400_000
NAN = float("nan")
SPEC = AttentionSpec(2, 1, 8)
BACKEND = AttentionBackend((SPEC,), 2)
KEEP, WORTH = [np.ones(HEADS, bool)], [np.ones(HEADS)]


def attention(rngs):
    return nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)


class One(nnx.Module):
    """One layer, called as the test says."""

    def __init__(self, how=None):
        self.attend, self.how = attention(nnx.Rngs(0)), how

    def __call__(self, x):
        return self.how(self.attend, x)


class Stack(nnx.Module):
    """Three layers in one module, whose arrays have an axis of layers: that of heads would be cut."""

    def __init__(self):
        self.attend = nnx.vmap(attention, in_axes=0)(nnx.Rngs(0).split(3))


class Square(nnx.Module):
    """One layer in the place of a list, all of whose parameters have a first axis of its width."""

    def __init__(self, layers=None):
        layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.layers = layer if layers is None else layers(layer)

    def embed(self, tokens, positions):
        return jnp.zeros((*tokens.shape, 8))

    def logits(self, x):
        return x


def square(**layers):
    return adapters.decoder(
        Square(**layers),
        AttentionSpec(1, 1, 8),
        qkv=lambda layer, x, positions: (layer(x)[:, :, None],) * 3,
        finish=lambda layer, x, y: x + y[:, :, 0],
    )


@pytest.fixture(scope="module")
def llama():
    return small_llama(num_layers=2)


def decoder(model, **changes):
    return adapters.decoder(model, dataclasses.replace(model.attention_specs[0], **changes))


def batch(**changes):
    good = ForwardBatch("extend", [1] * 4, [0], [4], [0], [4])
    return BACKEND.init_forward_metadata(
        BACKEND.create(60_000), dataclasses.replace(good, **changes)
    )


def linen_call(fn, **given):
    """One linen layer, called as its users do."""
    rate = given.pop("dropout_rate", 0.0)
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=fn, dropout_rate=rate)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    mask = np.tri(8, dtype=bool)[None, None]
    return layer.init_with_output(keys, jnp.ones((B, 8, WIDTH)), mask=mask, **given)


CASES = {
    "stacked layers pruned": (lambda: adapters.prune_heads(Stack(), KEEP), "stacked in one module"),
    "stacked layers' gradients": (
        lambda: adapters.head_gradients(Stack(), nnx.state(Stack())),
        "stacked in one module",
    ),
    "stacked layers' heads": (
        lambda: adapters.heads_to_keep(Stack(), WORTH, 0.5),
        "stacked in one module",
    ),
    "stacked layers balanced": (
        lambda: adapters.NnxBalance(Stack(), 0.5),
        "stacked in one module",
    ),
    "heads by number": (
        lambda: adapters.prune_heads(One(), [np.arange(HEADS)]),
        r"keep\[0\] has dtype int64 .*it must be bool \[K\] = \(2,\)",
    ),
    "heads of negative worth": (
        lambda: adapters.heads_to_keep(One(), [np.array([1.0, -1.0])], 0.5),
        r"worth\[0\]\[1\] is -1.0",
    ),
    "heads of complex worth": (
        lambda: adapters.heads_to_keep(One(), [np.array([1, 1j])], 0.5),
        r"worth\[0\] is .*it must be numbers",
    ),
    "a part by text": (lambda: adapters.heads_to_keep(One(), WORTH, "0.5"), "part is '0.5'"),
    "gradients of another model": (
        lambda: adapters.head_gradients(One(), nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))),
        r"gradients has nothing at \('attend', 'out', 'kernel'\)",
    ),
    "a density by text": (lambda: adapters.NnxBalance(One(), "1"), "density is '1'"),
    "an attention_fn that is none": (
        lambda: adapters.set_attention_fn(One(), "xla"),
        "attention_fn is 'xla': it must be a function",
    ),
    "a plan that is no function": (lambda: adapters.attention_fn(None), "plan_of is None"),
    "a patch with nothing": (
        lambda: adapters.patch_dot_product_attention(None).__enter__(),
        "attention_fn is None",
    ),
    "a platform in one string": (
        lambda: adapters.serialize(jnp.sin, jnp.ones(3), platforms="cpu"),
        "platforms is 'cpu': it must be names such as 'cuda', a sequence",
    ),
    "a platform that there is not": (
        lambda: adapters.serialize(jnp.sin, jnp.ones(3), platforms=("gpu",)),
        r"platforms\[0\] is 'gpu': it must be one of 'cpu', 'cuda'",
    ),
    "a step that is none": (lambda: adapters.serialize(None), "step is None"),
    "one layer taken for a stack of eight": (
        square,
        r"qkv of layer 0 gives .*by its AttentionSpec",
    ),
    "layers by name": (
        lambda: square(layers=lambda x: nnx.Dict(a=x)),
        "model.layers is a mapping: the layers' order is that of a list",
    ),
    "layers that are none": (lambda: square(layers=lambda x: 5), "model.layers is 5"),
    "a decoder of nothing": (lambda: adapters.decoder(None, SPEC), "model is None: .*nnx or linen"),
    "dropout over a cache": (
        lambda: linen_call(
            adapters.LinenCachedAttention(BYTES), dropout_rate=0.5, deterministic=False
        ),
        "dropout_rate is 0.5: a cache is for inference",
    ),
    "weights of a cache": (
        lambda: linen_call(adapters.LinenCachedAttention(BYTES), sow_weights=True),
        "sow_weights is True",
    ),
    "weights of tiles": (
        lambda: linen_call(adapters.LinenBalancedAttention(1.0), sow_weights=True),
        "sow_weights is True",
    ),
    "too few bytes for a linen layer": (
        lambda: linen_call(adapters.LinenCachedAttention(3_000)),
        "budget_bytes is 3000: .*2676 more",
    ),
    "a backend without layers' attention": (
        lambda: AttentionBackend([None], 2),
        r"attention\[0\] is None: it must be a AttentionSpec",
    ),
    "a backend on no device": (
        lambda: BACKEND.create(60_000, device="cpu"),
        "device is 'cpu': it must be a Device",
    ),
    "no batch": (
        lambda: BACKEND.init_forward_metadata(BACKEND.create(60_000), {}),
        "batch is {}: it must be a ForwardBatch.*lacks forward_mode",
    ),
    "places beyond 32 bits": (
        lambda: batch(req_pool_indices=np.array([2**32])),
        r"req_pool_indices\[0\] is 4294967296",
    ),
    "lengths beyond 32 bits": (
        lambda: batch(seq_lens=np.array([2**32 + 4])),
        r"seq_lens\[0\] is 4294967300",
    ),
    "places that leave": (
        lambda: BACKEND.release(BACKEND.create(60_000), None),
        "req_pool_indices is None",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_honored_is_refused_by_name(case):
    call, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        call()


@NEWER_FLAX
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda attend, x: attend(x, mask=np.array([True, False])[:, None, None, None]),
            "mask hides keys from a single token",
        ),
        (
            lambda attend, x: attend(x, mask=(np.arange(9) > 1)[None, None, None]),
            "mask hides keys from a single token.*pad prompts on the right",
        ),
        (lambda attend, x: attend(x, sow_weights=True), "sow_weights is True"),
    ],
)
def test_a_single_token_over_a_cache_is_asked_as_a_prompt_is(how, message):
    model = One(how)
    adapters.NnxCache(model, BYTES, B)
    with pytest.raises(ValueError, match=message):
        model(jnp.ones((B, 1, WIDTH)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, r"qkv of layer 0 gives \[\(1, 1, 6, 8\).*\[\(1, 1, 4, 8\)"),
        ({"num_kv_heads": 3}, r"\(1, 1, 2, 8\)\] for one token: .*\(1, 1, 3, 8\)"),
        ({"head_dim": 16, "frequencies": None}, r"must be \[\(1, 1, 6, 16\)"),
    ],
)
def test_a_specification_of_other_heads_is_refused(llama, changes, message):
    with pytest.raises(ValueError, match=message):
        decoder(llama, **changes)


def test_functions_of_a_model_that_fail_are_named(llama):
    specs = llama.attention_specs
    with pytest.raises(ValueError, match="embed is 3: it must be a function"):
        adapters.decoder(llama, specs, embed=3)
    with pytest.raises(ValueError, match=r"finish of layer 0 gives \(1, 1\)"):
        adapters.decoder(llama, specs, finish=lambda layer, x, y: x[..., 0])
    with pytest.raises(ValueError, match="logits cannot be called on one token: ZeroDivisionError"):
        adapters.decoder(llama, specs, logits=lambda model, x: x / (1 // 0))
    with pytest.raises(ValueError, match="rotate is True: no AttentionSpec has frequencies"):
        adapters.decoder(llama, SPEC, rotate=True)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([[2**32 + 1]]), r"tokens\[\(0, 0\)\] is 4294967297"),
        (np.array([[VOCAB]]), rf"tokens\[\(0, 0\)\] is {VOCAB} .*integers in 0..{VOCAB - 1}"),
        (np.array([[-1]]), "tokens.* is -1"),
        (np.array([[1.0]]), "tokens has dtype float64"),
        (np.zeros((0, 8), int), "tokens is empty"),
    ],
)
def test_ids_of_a_forward_pass_are_those_of_the_vocabulary(llama, tokens, message):
    with pytest.raises(ValueError, match=message):
        adapters.forward(decoder(llama), tokens)


@pytest.mark.slow
def test_an_engine_may_call_without_jit():
    pool, metadata = batch(input_ids=[1] * 5)
    q, k = (np.ones((5, n, 8), np.float32) for n in (2, 1))
    q[4], k[4] = NAN, NAN
    y, _ = BACKEND(q, k, k, 0, metadata, pool.cache)
    np.testing.assert_allclose(y, np.concatenate([np.ones((4, 2, 8)), np.zeros((1, 2, 8))]))


def test_what_is_no_number_is_refused_but_in_padding(monkeypatch):
    given = []
    monkeypatch.setattr(backend, "_extend", lambda *x: given.append(x[3]) or (x[2][0], x[4]))
    pool, metadata = batch(input_ids=[1] * 5)
    q, k = (np.ones((5, n, 8), np.float32) for n in (2, 1))
    q[4] = NAN
    BACKEND(q, k, k, 0, metadata, pool.cache)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(given))  # not NumPy's
    for name, x in (("q", q), ("k", k)):
        for value in (NAN, 1e16):
            x[0] = value
            with pytest.raises(ValueError, match=rf"the largest \|{name}\| is"):
                BACKEND(q, k, k, 0, metadata, pool.cache)
            x[0] = 1
