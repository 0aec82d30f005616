"""Whisper's parts against float64 NumPy, its checkpoint read whole or refused by name."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from experiments.models import ctranslate2
from experiments.models.whisper import assemble, attend_dense
from tests.support.whisper_files import (
    FRAMES,
    HEADS,
    LAYERS,
    MELS,
    POSITIONS,
    WIDTH,
    tensors,
    written,
)

STORED = tensors()
B, T = 2, 5


@pytest.fixture(scope="module")
def model():
    return assemble(ctranslate2.read(written(STORED), "it").tensors, "it")


def f64(name):
    return STORED[name].astype(np.float64)


def linear(name, x):
    return x @ f64(f"{name}/weight").T + f64(f"{name}/bias")


def norm(name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * f64(f"{name}/gamma") + f64(f"{name}/beta")


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def heads(x):
    return x.reshape(*x.shape[:-1], HEADS, -1)


def attended(q, k, v, seen=None):
    out = np.zeros(q.shape)
    for b in range(len(q)):
        for t in range(q.shape[1]):
            for h in range(HEADS):
                keys, values = k[b, :, h], v[b, :, h]
                if seen is not None:
                    keys, values = keys[: seen(t)], values[: seen(t)]
                weight = np.exp(keys @ q[b, t, h] / np.sqrt(q.shape[-1]))
                out[b, t, h] = weight @ values / weight.sum()
    return out.reshape(*out.shape[:2], -1)


def self_attention(layer, x, seen=None):
    q, k, v = np.split(linear(f"{layer}/linear_0", norm(f"{layer}/layer_norm", x)), 3, axis=-1)
    return x + linear(f"{layer}/linear_1", attended(*map(heads, (q, k, v)), seen))


def feed_forward(layer, x):
    h = gelu(linear(f"{layer}/linear_0", norm(f"{layer}/layer_norm", x)))
    return x + linear(f"{layer}/linear_1", h)


def convolved(name, x, stride):
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    weight = f64(f"encoder/{name}/weight")
    rows = range(0, x.shape[1], stride)
    out = [sum(padded[:, t + i] @ weight[:, :, i].T for i in range(3)) for t in rows]
    return gelu(np.stack(out, axis=1) + f64(f"encoder/{name}/bias"))


def encoded(mel):
    x = convolved("conv2", convolved("conv1", mel.astype(np.float64), 1), 2)
    x = x + f64("encoder/position_encodings/encodings")
    for i in range(LAYERS):
        x = self_attention(f"encoder/layer_{i}/self_attention", x)
        x = feed_forward(f"encoder/layer_{i}/ffn", x)
    return norm("encoder/layer_norm", x)


def decoded(tokens, frames):
    x = f64("decoder/embeddings/weight")[tokens]
    x = x + f64("decoder/position_encodings/encodings")[: tokens.shape[1]]
    for i in range(LAYERS):
        layer = f"decoder/layer_{i}"
        x = self_attention(f"{layer}/self_attention", x, lambda t: t + 1)
        own = f"{layer}/attention"
        q = heads(linear(f"{own}/linear_0", norm(f"{own}/layer_norm", x)))
        k, v = (heads(y) for y in np.split(linear(f"{own}/linear_1", frames), 2, axis=-1))
        x = x + linear(f"{own}/linear_2", attended(q, k, v))
        x = feed_forward(f"{layer}/ffn", x)
    return norm("decoder/layer_norm", x) @ f64("decoder/embeddings/weight").T


@pytest.fixture(scope="module")
def case(model):
    rng = np.random.default_rng(1)
    mel = rng.normal(size=(B, 2 * FRAMES, MELS)).astype(np.float32)
    return mel, rng.integers(0, 50_000, (B, T)), encoded(mel)


def test_the_encoder_is_the_definition(model, case):
    mel, _, want = case
    np.testing.assert_allclose(jax.jit(lambda x: model.encode(x))(mel), want, atol=2e-4)


def test_the_decoder_is_the_definition_at_once_and_token_by_token(model, case):
    _, tokens, frames = case
    k, v = model.memory(jnp.asarray(frames, jnp.float32))

    @jax.jit
    def step(tokens, start, kept):
        return model.decode(tokens, start, kept, lambda i, q: attend_dense(q, k[i], v[i]))

    want = decoded(tokens, frames)
    at_once, _, queries = step(jnp.asarray(tokens), 0, model.empty(B, T + 2))
    np.testing.assert_allclose(at_once, want, atol=2e-3)
    assert queries.shape == (LAYERS, B, T, HEADS, WIDTH // HEADS)
    kept = model.empty(B, T + 2)
    for t in range(T):
        logits, kept, _ = step(jnp.asarray(tokens[:, t : t + 1]), t, kept)
        np.testing.assert_allclose(logits[:, 0], want[:, t], atol=2e-3)


def test_half_precision_tensors_are_read():
    halves = {n: x.astype(np.float16) if x.ndim else x for n, x in STORED.items()}
    found = ctranslate2.read(written(halves), "it")
    assert found.kind == "WhisperSpec"
    for name, x in halves.items():
        np.testing.assert_array_equal(found.tensors[name], x)
    assert found.tensors["decoder/projection/weight"] is found.tensors["decoder/embeddings/weight"]
    config = assemble(found.tensors, "it").config
    assert (config.num_positions, config.encoder_layers) == (POSITIONS, LAYERS)


SMALL = {"x": np.ones((2, 3), np.float32)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (written(SMALL)[:1], "it ends within version"),
        (written(SMALL)[:40], "it ends within"),
        (b"\5" + written(SMALL)[1:], "version is 5"),
        (written(SMALL) + b"x", "3|1 bytes follow|alias"),
        (written(SMALL), "is of 'decoder/embeddings/weight', which is no tensor"),
        (written(SMALL, ())[:-30] + b"\xff" + written(SMALL, ())[-29:], "it|x"),
    ],
)
def test_a_damaged_file_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        ctranslate2.read(content, "it")


def test_every_byte_of_the_head_is_read_or_refused():
    """Whatever one changed byte before the numbers does, it is a ValueError or another tensor."""
    whole = written(SMALL, ())
    for at in range(len(whole) - 28):
        damaged = whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :]
        with contextlib.suppress(ValueError):
            found = ctranslate2.read(damaged, "it")
            assert all(x.nbytes <= len(whole) for x in found.tensors.values())


def changed(**changes):
    out = dict(STORED)
    for name, x in changes.items():
        name = name.replace("__", "/")
        if x is None:
            del out[name]
        else:
            out[name] = x
    return out


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (changed(encoder__conv2__bias=None), "lacks the tensor 'encoder/conv2/bias'"),
        (changed(decoder__num_heads=None), "lacks the tensor 'decoder/num_heads'"),
        (changed(decoder__num_heads=np.array(2, np.int16)), r"heads \(4, 2\)"),
        (changed(decoder__alibi=np.array(1, np.int8)), "decoder/alibi is 1"),
        (changed(more__weight=np.ones(3)), "not read: more/weight"),
        (changed(decoder__multi_query=np.array(1, np.int8)), "not read: decoder/multi_query"),
        (
            changed(encoder__conv2__bias=np.ones(WIDTH, np.int8)),
            "encoder/conv2/bias has the type int8: without a scale it is no weight",
        ),
        (
            changed(encoder__conv2__bias=np.ones(3, np.float32)),
            r"encoder/conv2/bias is \(3,\): it must be \(32,\)",
        ),
        (
            changed(decoder__layer_norm__beta=np.full(WIDTH, np.nan, np.float32)),
            "decoder/layer_norm/beta holds numbers that are not finite",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(stored, message):
    with pytest.raises(ValueError, match=message):
        assemble(stored, "it")
