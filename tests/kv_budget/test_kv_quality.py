"""What the main job claims: at equal bytes, the ladder loses less than any other way to evict."""

import numpy as np
import pytest

from experiments.kv_budget import data, score

BAR = 0.95  # of the best of the others


@pytest.mark.slow
def test_the_ladder_loses_less_at_equal_bytes_on_two_texts(smollm2):
    _, model, tokenizer = smollm2
    cases = data.case_arrays(
        tokenizer,
        ["lcet10", "plrabn12"],
        per_text=4,
        context_tokens=1280,
        continuation_tokens=128,
    )
    cases = {name: x for name, x in cases.items() if name.startswith("lm")}
    others = ["uniform", "proportional", "sinks-recent"]
    results = score.score(model, cases, ["ladder", *others], [0.25, 0.1])["results"]
    kl = {(row["policy"], row["budget"]): row["mean"]["kl"] for row in results}
    for budget in (0.25, 0.1):
        best = min(kl[name, budget] for name in others)
        assert kl["ladder", budget] <= BAR * best
    for row in results:
        assert np.all([case["cache_bytes"] <= case["budget_bytes"] for case in row["cases"]])
