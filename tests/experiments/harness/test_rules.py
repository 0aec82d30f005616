"""Rules that a user gives as a regular expression."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.harness import rules

PIECES = ["Call", " me", " Ish", "mael", ".", "", " Some", " years"]


def test_what_a_pattern_matches_is_kept_in_whole_tokens():
    known = rules.kept_by_rule("Ishm|year", PIECES)
    np.testing.assert_array_equal(known.keep, [0, 0, 1, 1, 0, 0, 0, 1])


@pytest.mark.parametrize("pattern", ["whale", "(", "x*$^y"])
def test_patterns_that_keep_nothing_are_named(pattern):
    with pytest.raises(ValueError, match="--keep is"):
        rules.kept_by_rule(pattern, PIECES)
