"""What the main job claims: at equal bytes, the ladder loses less, with and without fewer bits."""

import numpy as np
import pytest

from experiments.kv_budget import data, evaluate, score
from tests.support.small_models import SIZE, VOCAB, sharpened, small_llama

BAR = 0.95  # of the best of the others


# KL to the full cache, and the part of the pass keys found, by policy and fraction of the bytes.
LIMITS = {
    ("ladder", 0.25): (0.004, 0.95),
    ("ladder", 0.1): (0.035, 0.95),
    ("ladder", 0.05): (0.08, 0.85),
    ("ladder-thorough", 0.25): (0.002, 0.95),
    ("ladder-thorough", 0.1): (0.02, 0.95),
    ("ladder-thorough", 0.05): (0.045, 0.85),
}


def cases_of(smollm2, per_text, accept=lambda case: True):
    return data.case_arrays(
        smollm2[2],
        ["lcet10", "plrabn12"],
        per_text=per_text,
        context_tokens=1280,
        continuation_tokens=128,
        accept=accept,
    )


def test_a_model_with_windows_is_scored_beyond_them():
    """What is kept whole changes nothing, and the budget is that of the layers without a window."""
    windows, rng = (16, None, 24, None), np.random.default_rng(0)
    model = sharpened(small_llama(num_layers=4, windows=windows, max_positions=256))
    cases = {"lm_ctx": rng.integers(0, VOCAB, (1, SIZE)), "lm_cont": rng.integers(0, VOCAB, (1, 9))}
    results = score.score(model, cases, ["full", "ladder", "uniform-bits"], [0.3])["results"]
    whole, *budgeted = [row["cases"][0] for row in results]
    assert abs(whole["kl"]) < 1e-6
    for row in budgeted:
        assert 1e-6 < row["kl"] < 1
        assert 0.7 * row["budget_bytes"] < row["cache_bytes"] <= row["budget_bytes"]


@pytest.mark.slow
def test_few_bits_predict_the_text_and_remember_what_nobody_asked_for(smollm2):
    model = smollm2[1]
    cases = cases_of(smollm2, 4, evaluate.answers_with_everything(model))
    results = score.score(model, cases, ["ladder", "ladder-thorough"], [0.25, 0.1, 0.05])
    for row in results["results"]:
        kl, found = LIMITS[row["policy"], row["budget"]]
        assert row["mean"]["kl"] <= kl
        assert row["mean"]["passkey_exact"] >= found
        for case in row["cases"]:
            assert case["cache_bytes"] <= case["budget_bytes"]
            assert case["passkey_cache_bytes"] <= case["budget_bytes"]


@pytest.mark.slow
def test_evicting_by_the_ladder_loses_less_at_equal_bytes(smollm2):
    cases = cases_of(smollm2, 4)
    cases = {name: x for name, x in cases.items() if name.startswith("lm")}
    others = ["uniform", "proportional", "sinks-recent"]
    policies = ["ladder-eviction-only", *others]
    results = score.score(smollm2[1], cases, policies, [0.25, 0.1])["results"]
    kl = {(row["policy"], row["budget"]): row["mean"]["kl"] for row in results}
    for budget in (0.25, 0.1):
        best = min(kl[name, budget] for name in others)
        assert kl["ladder-eviction-only", budget] <= BAR * best
    for row in results:
        assert np.all([case["cache_bytes"] <= case["budget_bytes"] for case in row["cases"]])
