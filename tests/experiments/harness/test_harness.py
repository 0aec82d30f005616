"""The harness: runs resume, statistics are scipy's, pages say what files hold, errors are clear."""

import json

import numpy as np
import pytest
from scipy import stats

from experiments.harness import cli, docs, files, packages, progress, runs
from experiments.harness.__main__ import main
from experiments.harness.statistics import crossed_interval, paired_bootstrap, paired_interval

ABOUT = {
    "title": "A title",
    "command": "python -m it",
    "settings": {"steps": 3},
    "baselines": {"memory": {"score": 40.0}},
    "drawn": ["memory"],
    "compare": [["b", "a"], ["a", "b"]],
}


def counted(calls):
    def one(arm, seed, advance):
        calls.append((arm, seed))
        advance()
        return {"figures": {"score": 10.0 * seed + (arm == "b")}}

    return one


def test_paired_interval_is_scipys():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.3, 1, (2, 5))
    found = paired_interval(ours, theirs)
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(low)
    assert found.mean + found.half == pytest.approx(high)
    assert found.excludes_zero == (low > 0 or high < 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0]), "1 and 1 runs"),
        (([1.0, 2.0], [1.0]), "2 and 1 runs"),
        (([1.0, 2.0], [1.0, 3.0], 1.0), "confidence is 1.0"),
    ],
)
def test_paired_interval_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(*arguments)


def test_without_cases_that_differ_the_crossed_interval_is_the_paired_one():
    ours, theirs = np.random.default_rng(1).normal(0.3, 1, (2, 5))
    crossed = crossed_interval(np.tile(ours, (7, 1)).T, np.tile(theirs, (7, 1)).T)
    assert crossed == pytest.approx(paired_interval(ours, theirs))


def test_a_crossed_interval_covers_new_seeds_and_new_cases():
    """Of a difference whose seeds, cases and rest vary, in 95 of 100 samples or more."""
    rng, covered = np.random.default_rng(2), []
    for _ in range(1000):
        seeds, cases = rng.normal(0, 0.1, (3, 1)), rng.normal(0, 1, (1, 60))
        ours = 0.2 + seeds + cases + rng.normal(0, 1, (3, 60))
        found = crossed_interval(ours, np.zeros_like(ours))
        covered.append(abs(found.mean - 0.2) <= found.half)
    assert np.mean(covered) >= 0.95


def test_crossed_interval_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"shapes \(1, 4\) and \(1, 4\).*two of each"):
        crossed_interval(np.zeros((1, 4)), np.zeros((1, 4)))


def test_cases_of_runs_come_back_and_widen_the_interval(tmp_path):
    rng = np.random.default_rng(3)
    cases = {(arm, seed): rng.random(40).astype(np.float32) for arm in "ab" for seed in (0, 1, 2)}

    def one(arm, seed, advance):
        row = cases[arm, seed]
        return {"figures": {"score": float(row.mean())}, "cases": {"score": runs.packed(row)}}

    runs.run_all(tmp_path / "x.json", ABOUT, ["a", "b"], [2, 0, 1], 1, one)
    report = runs.read(tmp_path / "x.json")
    for arm in "ab":
        kept = runs.cases_of(report, arm, "score")
        np.testing.assert_array_equal(kept, [cases[arm, seed] for seed in (0, 1, 2)])
    found = docs.difference(report, "b", "a", "score")
    assert found == crossed_interval(*(runs.cases_of(report, arm, "score") for arm in "ba"))
    report["runs"][0]["cases"]["score"] = "no cases"
    files.write_signed(tmp_path / "x.json", report, "settings", "runs")
    with pytest.raises(ValueError, match=r"runs\[0\]\.cases\['score'\] are no packed cases"):
        runs.read(tmp_path / "x.json")


def test_paired_bootstrap_is_scipys():
    rng = np.random.default_rng(0)
    weights = rng.integers(20, 90, 15)
    theirs = rng.binomial(weights, 0.2)
    ours = theirs - rng.binomial(theirs, 0.4)

    def rate(ours, theirs, weights, axis=-1):
        return (ours - theirs).sum(axis=axis) / weights.sum(axis=axis)

    want = stats.bootstrap(
        (ours, theirs, weights), rate, paired=True, vectorized=True, method="percentile",
        n_resamples=20_000, random_state=1,
    ).confidence_interval  # fmt: skip
    found = paired_bootstrap(ours, theirs, weights, repeats=20_000)
    assert found.mean == pytest.approx(rate(ours, theirs, weights))
    np.testing.assert_allclose(found[1:], want, atol=0.003)
    assert found.excludes_zero
    assert not paired_bootstrap([1, 2, 3], [3, 2, 1], [9, 9, 9]).excludes_zero


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [1], [1]), "1, 1 and 1 cases"),
        (([1, 2], [1, 2], [1]), "2, 2 and 1 cases"),
        (([1, 2], [1, 2], [1, 0]), "weights holds 0"),
    ],
)
def test_paired_bootstrap_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(*arguments)


def test_runs_that_are_there_are_not_run_again(tmp_path):
    out, calls = tmp_path / "results.json", []

    def stopped(arm, seed, advance):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(calls)(arm, seed, advance)

    with pytest.raises(KeyboardInterrupt):
        runs.run_all(out, ABOUT, ["a", "b"], [0, 1], 1, stopped)
    assert len(json.loads(out.read_text())["runs"]) == 3
    report = runs.run_all(out, ABOUT, ["a", "b"], [0, 1], 1, counted(calls))
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert runs.figures_of(report, "b", "score") == [1.0, 11.0]
    assert json.loads(out.read_text()) == report


def test_other_settings_are_refused(tmp_path):
    out = tmp_path / "results.json"
    runs.run_all(out, ABOUT, ["a"], [0], 1, counted([]))
    with pytest.raises(ValueError, match=r"settings \{'steps': 3\}, not \{'steps': 4\}"):
        runs.run_all(out, ABOUT | {"settings": {"steps": 4}}, ["a"], [0], 1, counted([]))


@pytest.mark.parametrize(("content", "message"), [("{", "as JSON"), ("[]", "no file of results")])
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        runs.read(path)


def test_the_page_has_means_differences_and_pictures(tmp_path):
    folder, page = tmp_path / "results", tmp_path / "results.md"
    runs.run_all(folder / "it.json", ABOUT, ["a", "b"], [0, 1, 2], 1, counted([]))
    (folder / "others.json").write_text('[{"rows": "of another kind"}]')
    written = docs.write(folder, page)
    text = page.read_text()
    assert "| a | 3 | 10.0 |" in text
    assert "| *memory* |  | 40.0 |" in text
    assert "| b less a | +1 ± 0 |" in text  # every seed says the same
    assert "(results/it.png)" in text
    assert all(path.stat().st_size for path in written)


def test_an_empty_folder_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["docs"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: docs/results holds no *.json with runs")
    assert error.count("\n") == 1


def test_without_debians_clients_the_error_says_where_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="run this on Debian, Ubuntu or Colab"):
        packages.debian_tree("a-package")


def test_what_was_unpacked_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    (tmp_path / "debian" / "a-package").mkdir(parents=True)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    assert packages.debian_tree("a-package") == tmp_path / "debian" / "a-package"


def test_progress_in_a_log_is_lines(capsys):
    with progress.display() as bar:
        assert list(bar.track(range(9), description="Scoring")) == list(range(9))
        bar.advance(bar.add_task("Fetching [weights]", total=None))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "Scoring",
        *(f"Scoring: {done} of 9" for done in (3, 5, 7, 9)),
        "Fetching [weights]",
    ]


def test_progress_ends_with_the_error_of_its_step(capsys):
    with pytest.raises(KeyError), progress.display() as bar:
        list(bar.track(map({}.__getitem__, "ab"), total=2, description="Planning"))
    assert "Planning" in capsys.readouterr().err


def ended(job, capsys):
    code = cli.run(cli.parser("it", "What it does."), job, [])
    return code, capsys.readouterr().err


def test_a_command_ends_with_a_code_and_one_line(capsys):
    def fails(error):
        def job(options):
            raise error

        return job

    assert ended(lambda options: None, capsys) == (0, "")
    assert ended(lambda options: 3, capsys) == (3, "")
    assert ended(fails(ValueError("w is 3: at most 2")), capsys) == (
        2,
        "error: w is 3: at most 2\n",
    )
    assert ended(fails(KeyboardInterrupt), capsys) == (130, "interrupted\n")
    with pytest.raises(KeyError):  # a defect keeps its trace
        ended(fails(KeyError("x")), capsys)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "folder" / "it.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    with pytest.raises(TypeError):
        files.write_bytes(path, "no bytes")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["it.json"]
