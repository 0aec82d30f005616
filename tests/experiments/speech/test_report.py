"""What the speech runs say: recordings once each, intervals of pairs of arms, bad options named."""

import numpy as np
import pytest

from experiments.harness.statistics import paired_bootstrap
from experiments.speech import __main__ as command
from experiments.speech import experiment, report


def run(arm, seed, wrong):
    """Of a novel, of words and of two windows of sentences, `wrong` more by each condition."""
    rows = []
    for i, condition in enumerate(experiment.CONDITIONS):
        known = {"said": 70, "wrong": wrong + i}
        rows += [{"condition": condition, "heard": 70, "changed": wrong} | known]
        rows += [{"condition": condition, "heard": 30, "changed": wrong + seed} | known]
        rows += [{"condition": condition, "heard": 50, "changed": 2 * wrong}] * 2
    return {"arm": arm, "seed": seed, "figures": {}, "details": rows}


REPORT = {
    "runs": [run(a, s, w) for s in (0, 1) for a, w in (("ladder, 10%", 1), ("subsample, 10%", 9))]
}


def test_the_novel_is_one_recording_of_all_seeds():
    found = report.recordings(REPORT, "subsample, 10%", "clean", "changed")
    want = [[18, 140], [9, 30], [18, 50], [18, 50], [10, 30], [18, 50], [18, 50]]
    np.testing.assert_array_equal(found, want)
    known = report.recordings(REPORT, "ladder, 10%", "0 dB", "wrong")
    np.testing.assert_array_equal(known, [[6, 140], [3, 70], [3, 70]])


def test_intervals_are_of_the_ladder_less_others_at_equal_bytes():
    (line,) = report.intervals(REPORT)
    a, b = (
        report.recordings(REPORT, f"{x}, 10%", "clean", "changed") for x in ("ladder", "subsample")
    )
    want = paired_bootstrap(a[:, 0], b[:, 0], a[:, 1])
    assert line.startswith("- ladder, 10% less subsample, 10%: ")
    assert f"{want.mean:+.3f} [{want.low:+.3f}, {want.high:+.3f}]" in line
    assert want.high < 0
    assert report.draw(REPORT).startswith(b"\x89PNG")


def test_rates_are_over_the_recordings_that_have_them():
    rows = REPORT["runs"][0]["details"]
    assert experiment.rate(rows, "10 dB", "wrong", "said") == 4 / 140
    assert experiment.rate(rows, "10 dB", "changed", "heard") == 6 / 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "ladder, 7%"], "--arms is 'ladder, 7%'"),
        (["--seeds", "0,3"], "seeds are 0..2"),
        (["--seeds", "x"], "--seeds is 'x'"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err
