"""Exported with `jax.export`: another process runs it without jbalance, and pruning makes it smaller."""

import importlib.util
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models.decoder import Decoder, DecoderConfig
from jbalance import adapters
from jbalance.adapters import NnxBalance, NnxCache, Tiles
from tests.support.versions import NEWER_FLAX

SIZES = {"num_layers": 1, "width": 16, "num_heads": 4, "head_dim": 8, "hidden": 16}
VOCABULARY, T = 11, 64
# jax and numpy alone: an import of jbalance or flax would fail.
READER = """
    import sys
    sys.modules |= dict.fromkeys(("jbalance", "flax"))
    import jax, jax.export, numpy as np
    folder = sys.argv[1]
    exported = jax.export.deserialize(bytearray(open(folder + "/step.bin", "rb").read()))
    given = np.load(folder + "/given.npz")
    leaves = [given[f"arr_{i}"] for i in range(len(given.files))]
    leaves = [jax.numpy.asarray(x).view(a.dtype) if x.dtype != a.dtype else x
              for x, a in zip(leaves, exported.in_avals)]
    out = exported.call(*leaves)
    np.savez(folder + "/out.npz", *[np.asarray(x, np.float32) for x in out])
"""


def rerun(folder, call, *leaves):
    """Results of `call`, exported, saved, and run by a process that has not even flax."""
    (folder / "step.bin").write_bytes(adapters.serialize(call, *leaves))
    plain = [np.asarray(x) for x in leaves]
    plain = [x.view(np.uint16) if x.dtype.name == "bfloat16" else x for x in plain]
    np.savez(folder / "given.npz", *plain)
    command = [sys.executable, "-c", textwrap.dedent(READER), str(folder)]
    subprocess.run(command, check=True, cwd=folder)
    out = np.load(folder / "out.npz")
    return [out[f"arr_{i}"] for i in range(len(out.files))]


def decoder():
    return Decoder(DecoderConfig(VOCABULARY, T, **SIZES), rngs=nnx.Rngs(0))


@NEWER_FLAX
def test_a_balanced_forward_is_exported_and_a_pruned_one_is_smaller(tmp_path):
    tokens = jax.random.randint(jax.random.key(0), (1, T), 0, VOCABULARY)
    taken, flops = [], []
    for keep in (4, 2):
        model = decoder()
        adapters.prune_heads(model, [np.arange(4) < keep])
        NnxBalance(model, 0.7, Tiles(16, 8, 4))
        graph, state = nnx.split(model)
        leaves, tree = jax.tree.flatten(state)

        def forward(tokens, *leaves, graph=graph, tree=tree):
            return [nnx.merge(graph, jax.tree.unflatten(tree, leaves))(tokens)]

        want = jax.jit(forward)(tokens, *leaves)
        (got,) = rerun(tmp_path, forward, tokens, *leaves)
        np.testing.assert_allclose(got, want[0], rtol=1e-6, atol=1e-6)
        taken.append(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
        cost = jax.jit(forward).lower(tokens, *leaves).cost_analysis()
        flops.append(cost["flops"])
    assert taken[1] < taken[0]
    assert flops[1] < flops[0]


@pytest.mark.slow
def test_a_step_of_decoding_is_exported_with_its_cache(tmp_path):
    x = jax.random.normal(jax.random.key(0), (1, 49, 16))
    model = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
    cache = NnxCache(model, 60_000)
    nnx.jit(lambda model, cache, x: model(x, is_causal=True))(model, cache, x[:, :48])
    graph, state = nnx.split((model, cache))
    leaves, tree = jax.tree.flatten(state)

    def step(x, *leaves):
        model, cache = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        y = model(x)
        return [y, *(jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(nnx.state(cache)))]

    want = jax.jit(step)(x[:, 48:], *leaves)
    got = rerun(tmp_path, step, x[:, 48:], *leaves)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@NEWER_FLAX
def test_a_model_is_exported_for_two_platforms_at_once():
    model = decoder()
    NnxBalance(model, 0.5, Tiles(16, 16, backend="xla"))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)

    def step(tokens, *leaves):
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(tokens)

    tokens = jnp.zeros((1, T), jnp.int32)
    both = adapters.serialize(step, tokens, *leaves, platforms=("cpu", "cuda"))
    assert jax.export.deserialize(bytearray(both)).platforms == ("cpu", "cuda")


def test_without_flatbuffers_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"jbalance\[export\]"):
        adapters.serialize(lambda x: x, jnp.ones(2))
