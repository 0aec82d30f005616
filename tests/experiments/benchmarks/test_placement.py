"""The benchmark of placement reads files of loads, and says what is wrong with others."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.benchmarks import _drift, placement

LOADS = np.arange(12).reshape(2, 6)


def saved(tmp_path, **arrays):
    path = tmp_path / "loads.npz"
    np.savez(path, **arrays)
    return path


def test_a_file_and_what_overrides_it(tmp_path):
    path = saved(tmp_path, loads=LOADS, devices=3, replicas=np.array([9]))
    case = placement.from_file(path)
    np.testing.assert_array_equal(case.loads, LOADS)
    assert (case.devices, case.slots) == (3, 9)
    case = placement.from_file(path, devices=2, slots=0)
    assert (case.devices, case.slots) == (2, 0)
    assert placement.from_file(path, slots=6).slots == 0  # one each


def test_every_method_of_a_case_is_held_against_a_bound_that_it_does_not_beat(monkeypatch):
    monkeypatch.setattr(placement, "TILE", 4)
    document_of = np.stack([placement.document_of([40, 8, 16]), placement.document_of([64])])
    loads = np.stack([np.asarray(placement.place.visible_keys(x, 4)) for x in document_of])
    case = placement.Case("it", loads, 4, document_of=document_of)
    rows = {(row.case, row.metric): row.value for row in placement.rows_of(case)}
    methods = {name.removeprefix("it_g4_") for name, _ in rows} - {"bound"}
    assert {*placement.place.PLACERS, "causal_tiles", "zigzag", "contiguous_equal"} < methods
    assert rows["it_g4_bound", "bound_over_mean"] >= 1
    for method in methods:
        assert rows[f"it_g4_{method}", "max_over_bound"] >= 1 - 1e-6
    best, cut, alike = (
        rows[f"it_g4_{method}", "max_over_mean"]
        for method in ("causal_tiles", "contiguous", "contiguous_equal")
    )
    assert best <= cut < alike


def test_zigzag_balances_one_document_and_not_several():
    one, several = (
        np.asarray(placement.place.visible_keys(placement.document_of(x), 4))[None]
        for x in ([64], [40, 8, 16])
    )
    mean = one.sum() / 4
    assert placement.zigzag(placement.Case("one", one, 4)) == mean
    assert placement.zigzag(placement.Case("several", several, 4)) > several.sum() / 4 * 1.1


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"devices": 2}, ["no array `loads`", "devices"]),
        ({"loads": LOADS[0]}, ["shape (6,)", "[layers, units]"]),
        ({"loads": np.zeros((2, 0))}, ["shape (2, 0)"]),
        ({"loads": LOADS.astype(str)}, ["dtype <U", "numbers"]),
        ({"loads": np.where(LOADS == 7, np.nan, LOADS)}, ["loads[1, 1] is nan", "finite"]),
        ({"loads": LOADS - 1}, ["loads[0, 0] is -1.0", ">= 0"]),
        ({"loads": LOADS * 1e40}, ["loads[0, 1] is inf", "float32"]),
        ({"loads": LOADS, "replicas": 0}, ["no `devices`", "--devices"]),
        ({"loads": LOADS, "devices": 2}, ["no `replicas`", "--slots"]),
        ({"loads": LOADS, "devices": 2.5, "replicas": 0}, ["devices is 2.5", "whole"]),
        ({"loads": LOADS, "devices": 0, "replicas": 0}, ["devices is 0", "at least 1"]),
        ({"loads": LOADS, "devices": [2, 3], "replicas": 0}, ["devices is [2 3]", "one"]),
        ({"loads": LOADS, "devices": 2, "replicas": 5}, ["slots is 5", "6 to 12"]),
        ({"loads": LOADS, "devices": 2, "replicas": 13}, ["slots is 13", "6 to 12"]),
    ],
)
def test_files_that_do_not_fit(tmp_path, arrays, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        placement.from_file(saved(tmp_path, **arrays))
    for word in words:
        assert word in str(error.value)


def test_what_is_no_archive(tmp_path):
    path = tmp_path / "loads.npz"
    path.write_text("1 2 3")
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        placement.from_file(path)
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        placement.from_file(tmp_path / "none.npz")


def test_what_moves_under_loads_that_drift():
    loads = placement.zipf(np.random.default_rng(0), 2, 0.6)
    found = {(row.case.split("_")[-1], row.metric): row.value for row in _drift.rows(loads)}
    assert found["stay", "moved_a_round"] == 0
    assert 0 < found["rebalance", "moved_a_round"] < 0.2 * found["anew", "moved_a_round"]
    times = [found[name, "time_over_bound"] for name in ("anew", "rebalance", "stay")]
    assert 1 <= times[0] < times[1] < times[2] - 0.1
