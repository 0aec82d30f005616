"""The benchmark of adapters: each runs the same weights, and is held against dense attention."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.benchmarks import adapters as benchmark
from jbalance import adapters
from tests.support.small_models import VOCAB, small_llama

IDS = np.random.default_rng(0).integers(0, VOCAB, 400).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    small = small_llama()
    return adapters.decoder(small, small.attention_specs)


def test_layers_one_after_the_other_are_the_model(model):
    small = small_llama()
    got = np.asarray(benchmark.dense(model, IDS[None, :40]))
    want = np.array(small(IDS[None, :40]))
    want -= np.log(np.exp(want).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert benchmark.first_layers(model, 1).num_layers == 1


def test_adapters_of_tiles_choose_alike(model):
    rows = {(row.case, row.metric): row for row in benchmark.tiles_rows(model, IDS[:256])}
    for name in ("patch", "linen"):
        assert rows[f"tiles_{name}", "apart"].bar.holds(rows[f"tiles_{name}", "apart"].value)
    assert rows["tiles_forward", "kl"].value > 0


@pytest.mark.slow
def test_caches_hold_their_bars_and_more_weight_is_more_pages(model, monkeypatch):
    monkeypatch.setattr(benchmark, "PART", 4.0)  # so small a model needs more than its tokens
    rows = [
        *benchmark.cache_rows(model, IDS, 40, 2),
        *benchmark.weights_rows(model, IDS, 40, 2),
    ]
    assert all(row.bar is None or row.bar.holds(row.value) for row in rows)
    parts = [row.value for row in rows if row.metric == "part_of_the_pages"]
    assert parts[0] > parts[1]
