"""The commands: results in the promised form, and one clear line for every bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.harness import files, texts
from experiments.kv_budget import resume, score
from experiments.kv_budget.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
TEXT = str(ROOT / "LICENSE")


def cases(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "lm_ctx": rng.integers(0, 61, (2, 150)),
        "lm_cont": rng.integers(0, 61, (2, 5)),
        "pk_ctx": rng.integers(0, 61, (3, 150)),
        "pk_query": rng.integers(0, 61, (3, 3)),
        "pk_answer": rng.integers(0, 61, (3, 2)),
    } | changes
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return str(path)


@pytest.mark.slow
def test_score_writes_what_was_promised(small_model, tmp_path):
    given = score.read_cases(cases(tmp_path / "c.npz"), 61)
    results = score.score(small_model, given, ["ladder", "full"], [0.5, 0.3])
    out = tmp_path / "new" / "out.json"
    files.write_json(out, results)
    read = json.loads(out.read_text())["results"]
    assert [(r["policy"], r["budget"]) for r in read] == [
        (name, budget) for name in ("ladder", "full") for budget in (0.5, 0.3)
    ]
    for row in read:
        full_bytes = 4 * 3 * 150 * 2 * 8 * 2
        mean, first = row["mean"], row["cases"][0]
        assert len(row["cases"]) == 3
        assert {"nll", "nll_full", "kl", "top1", "passkey_exact"} <= mean.keys() & first.keys()
        assert first["budget_bytes"] == int(row["budget"] * full_bytes)
        if row["policy"] == "full":
            assert first["cache_bytes"] > full_bytes  # its table too
            assert mean["kl"] < 1e-3
        else:
            assert first["cache_bytes"] <= first["budget_bytes"]
        assert mean["kl"] == pytest.approx(np.mean([c["kl"] for c in row["cases"][:2]]))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lm_cont": None}, "lacks lm_cont"),
        ({"pk_answer": None}, "lacks pk_answer"),
        ({"lm_ctx": np.full((2, 150), 61)}, "ids 61..61"),
        ({"lm_ctx": np.full((2, 150), -1)}, "ids -1..-1"),
        ({"lm_ctx": np.ones((2, 150))}, "token ids [N, L]"),
        ({"lm_ctx": np.ones(150, int)}, "token ids [N, L]"),
        ({"lm_ctx": np.ones((2, 90), int)}, "at least 129"),
        ({"lm_cont": np.ones((1, 5), int)}, "has 1 cases, the others 2"),
        ({"lm_cont": np.ones((2, 1), int)}, "one to predict"),
        (
            dict.fromkeys(("lm_ctx", "lm_cont", "pk_ctx", "pk_query", "pk_answer")),
            "it needs lm_ctx",
        ),
    ],
)
def test_bad_cases_are_named(tmp_path, changes, names):
    with pytest.raises(ValueError, match=r"--cases|lm_ctx") as error:
        score.read_cases(cases(tmp_path / "c.npz", **changes), 61)
    assert names in str(error.value)


RUN = ["run", "--device-memory"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([*RUN, "4MiB,", "--text", TEXT], "--device-memory: bytes: ''"),
        ([*RUN, "4 apples", "--text", TEXT], "write a number and one of B, kB"),
        ([*RUN, "0MiB", "--text", TEXT], "whole number >= 1"),
        (["run", "--device-memory=-4MiB", "--text", TEXT], "not an amount of memory"),
        ([*RUN, "4MiB", "--text", "no/such/file"], "--text 'no/such/file' cannot be read"),
        ([*RUN, "4MiB", "--source", "moby"], "text is 'moby'"),
        ([*RUN, "4MiB", "--text", TEXT, "--policies", "best"], "policy is 'best'"),
        ([*RUN, "4MiB", "--text", TEXT, "--out", TEXT], "is a file: give a folder"),
        ([*RUN, "4MiB", "--text", TEXT, "--context-tokens", "9999"], "a longer text"),
        ([*RUN, "4MiB", "--text", TEXT, "--context-tokens", "20"], "at least 129"),
        ([*RUN, "4MiB", "--text", TEXT, "--context-tokens", "100"], "at least 129"),
        ([*RUN, "4MiB", "--text", TEXT, "--new-tokens", "1"], "--new-tokens is 1"),
        ([*RUN, "4MiB", "--text", TEXT, "--keep", "("], "--keep is '(', no regular expression"),
        ([*RUN, "4MiB", "--text", TEXT, "--continuation-tokens", "0"], "at least 1"),
        ([*RUN, ",".join(["1MiB"] * 9), "--text", TEXT], "9 entries, but there are 8 devices"),
    ],
)
@pytest.mark.usefixtures("loaded_once")
def test_bad_arguments_of_run_are_one_line(capsys, tmp_path, arguments, names):
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert names in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("cases_file", "budget", "policy", "names"),
    [
        ("no.npz", "0.25", "ladder", "'no.npz' is no readable"),
        (TEXT, "0.25", "ladder", "is no readable .npz"),
        ("no.npz", "a quarter", "ladder", "--budget is 'a quarter'"),
        ("no.npz", "0.25", "snap", "policy is 'snap'"),
    ],
)
@pytest.mark.usefixtures("loaded_once")
def test_bad_arguments_of_score_are_one_line(capsys, tmp_path, cases_file, budget, policy, names):
    given = ["--cases", cases_file, "--budget", budget, "--policy", policy]
    assert main(["score", *given, "--json", str(tmp_path / "o.json")]) == 2
    assert names in capsys.readouterr().err


@pytest.mark.parametrize(
    ("notes", "names"),
    [
        ({}, "notes.tokens is None"),
        ({"tokens": [1, "2"], "new_tokens": 9}, r"notes.tokens is \[1, '2'\]"),
        ({"tokens": [1, 2]}, "notes.new_tokens is None"),
        ({"tokens": [1, 2], "new_tokens": 1}, "notes.new_tokens is 1: 2 or more"),
    ],
)
def test_a_state_of_something_else_is_named(monkeypatch, tmp_path, notes, names):
    monkeypatch.setattr(resume.decode, "notes_of", lambda folder: notes)
    with pytest.raises(ValueError, match=names):
        resume._begun(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        resume._begun(tmp_path)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, float("nan")])
def test_a_budget_that_is_no_fraction_is_named(small_model, tmp_path, budget):
    given = score.read_cases(cases(tmp_path / "c.npz"), 61)
    with pytest.raises(ValueError, match="a fraction of the full cache"):
        score.score(small_model, given, ["ladder"], [budget])


def test_empty_and_binary_texts_are_named(tmp_path):
    for content in (b"", b"  \n", b"\xff\xfe\x00"):
        path = tmp_path / "text"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is empty|cannot be read"):
            texts.read_file(str(path))


@pytest.mark.slow  # `make run` does it at full size
def test_the_real_model_runs_on_two_devices_within_their_memory(tmp_path):
    command = [sys.executable, "-m", "experiments.kv_budget", "run", "--text", TEXT]
    command += ["--device-memory", "900KiB,500KiB", "--context-tokens", "256"]
    command += ["--continuation-tokens", "16", "--new-tokens", "7", "--out", str(tmp_path)]
    command += ["--policies", "full,ladder"]  # the others are run over a small model
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert [row["policy"] for row in report["policies"]] == ["full", "ladder"]
    for row in report["policies"][1:]:
        assert row["within_budget"]
        assert [d["budget_bytes"] for d in row["devices"]] == [900 * 1024, 500 * 1024]
        assert all(d["live_bytes"] <= d["budget_bytes"] for d in row["devices"])
    full, ladder = report["policies"][0], report["policies"][-1]
    assert full["kl"] < 1e-3 < ladder["kl"]
    assert ladder["devices"][0]["price_per_byte"] > 0
