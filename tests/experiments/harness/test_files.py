"""Results are whole, of one run, unaltered; what cannot be read or written is one line that names it."""

import errno
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from experiments.harness import cli, docs, files, lines, runs, texts
from experiments.harness.tokens import byte_level_bpe
from experiments.kv_budget import score
from experiments.kv_budget.report import output
from tests.experiments.harness.test_harness import ABOUT, counted, ended
from tests.support.together import ROOT


def full_disk(monkeypatch, after=0):
    """The system has room for so many files more."""
    real, written = os.fsync, []

    def fsync(number):
        written.append(number)
        if len(written) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_the_old_result_and_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "it.npz"
    files.write_npz(path, {"x": np.arange(3)})
    full_disk(monkeypatch)
    with pytest.raises(OSError, match=r"cannot be written: No space left on device: '.*it\.npz'"):
        files.write_npz(path, {"x": np.arange(4)})
    np.testing.assert_array_equal(files.read_npz(path)["x"], [0, 1, 2])
    assert names(tmp_path) == ["it.npz"]


def test_what_killed_processes_left_goes_and_what_others_write_stays(tmp_path):
    path, gone = tmp_path / "it.[x].json", 2**22 + 1  # above what Linux gives to processes
    dead, alive, other = (
        tmp_path / f".{name}.part"
        for name in (f"it.[x].json.{gone}", f"it.[x].json.{os.getppid()}", f"another.json.{gone}")
    )
    for part in (dead, alive, other):
        part.write_text("half")
    files.write_json(path, [1])
    assert files.read_json(path) == [1]
    assert names(tmp_path) == sorted([alive.name, other.name, path.name])


def test_two_files_of_one_result_are_both_old_or_both_new(tmp_path, monkeypatch):
    both = [tmp_path / "report.json", tmp_path / "report.html"]
    monkeypatch.setattr(output.page, "render", lambda report: f"<p>{report['run']}")
    output.write({"run": 1}, tmp_path)
    full_disk(monkeypatch, after=1)
    with pytest.raises(OSError, match="No space left"):
        output.write({"run": 2}, tmp_path)
    assert [path.read_text() for path in both] == ['{\n "run": 1\n}\n', "<p>1"]


@pytest.mark.parametrize("place", ["folder", "file/below"])
def test_a_destination_is_tried_before_the_work(tmp_path, place, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    code, said = ended(lambda options: files.json_writer(tmp_path / place) and None, capsys)
    assert code == 2
    assert said.startswith("error: ")
    assert str(tmp_path / place) in said
    assert said.count("\n") == 1
    assert names(tmp_path) == ["file", "folder"]


def test_a_second_run_on_the_same_file_is_refused_and_loses_nothing(tmp_path):
    out, seen = tmp_path / "results.json", []

    def one(arm, seed, advance):
        with pytest.raises(ValueError, match=r"results\.json is being written by another run"):
            runs.run_all(out, ABOUT, ["b"], [7], 1, counted(seen))
        return counted([])(arm, seed, advance)

    runs.run_all(out, ABOUT, ["a"], [0, 1], 1, one)
    runs.run_all(out, ABOUT, ["b"], [7], 1, counted(seen))
    assert [(r["arm"], r["seed"]) for r in runs.read(out)["runs"]] == [("a", 0), ("a", 1), ("b", 7)]
    assert names(tmp_path) == ["results.json"]


def test_a_killed_run_leaves_no_lock(tmp_path):
    out = tmp_path / "results.json"
    program = "import sys, time; from pathlib import Path; from experiments.harness import files\n"
    program += f"with files.locked(Path({str(out)!r})): print(flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="another run"), files.locked(out):
            pass
        process.kill()
        process.wait()
    with files.locked(out):
        pass


def change_loss(report):
    report["runs"][0]["figures"]["score"] -= 1e-6


def change_settings(report):
    report["settings"]["steps"] = 4


ALTERED = {
    "a loss": (change_loss, "digest is not that of its settings and runs"),
    "settings": (change_settings, "digest is not that of its settings and runs"),
    "no digest": (lambda report: report.pop("digest"), "lacks 'digest'"),
    "no command": (lambda report: report.pop("command"), "lacks 'command'"),
    "no arm": (lambda report: report["runs"][0].pop("arm"), r"runs\[0\] has the arm None"),
    "no figures": (lambda report: report["runs"][1].pop("figures"), r"runs\[1\]\.figures is None"),
    "a word for a figure": (
        lambda report: report["runs"][0]["figures"].update(score="low"),
        r"runs\[0\]\.figures\['score'\] is 'low'",
    ),
    "a figure beyond floats": (
        lambda report: report["baselines"]["memory"].update(score=10**400),
        r"baselines\['memory'\]\['score'\] is 1000",
    ),
    "a list of runs": (lambda report: report["runs"].insert(0, []), r"runs\[0\] is \[\]"),
    "notes": (lambda report: report.update(baselines=[1]), r"baselines is \[1\], no dict"),
    "no note": (lambda report: report.update(notes=[None]), r"notes holds \[None\]"),
    "pairs": (lambda report: report.update(compare=[["a"]]), r"compare holds \['a'\]"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_altered_results_are_not_believed(tmp_path, case):
    change, message = ALTERED[case]
    out = tmp_path / "results.json"
    runs.run_all(out, ABOUT, ["a", "b"], [0], 1, counted([]))
    report = json.loads(out.read_text())
    change(report)
    out.write_text(json.dumps(report))
    for call in (
        lambda: runs.run_all(out, ABOUT, ["a", "b"], [0], 1, counted([])),
        lambda: docs.write(tmp_path, tmp_path / "page.md"),
    ):
        with pytest.raises(ValueError, match=f"results.json.*{message}"):
            call()
    assert json.loads(out.read_text()) == report


def test_the_kept_results_are_as_they_were_written():
    """Digests of runs hold; what has rows of its own is of a command that trains nothing."""
    folder = ROOT / "docs" / "results"
    kinds = ("benchmarks", "kv_budget", "tiles", "suites")
    others = {path for kind in kinds for path in folder.glob(f"{kind}.*json")}
    others |= {folder / f"{name}.json" for name in ("compiled", "hardening")}
    assert {*folder.glob("*.json")} - {*runs.read_all(folder)} == others


def test_the_kept_results_say_the_command_that_made_them():
    for path in (ROOT / "docs" / "results").glob("*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        said = [row.get("command") for row in results.get("campaigns", ())] or results.get(
            "commands", [results.get("command")]
        )
        if path.stem != "compiled":  # of make compiled
            assert any(said), path.name


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 100_000, b"9" * 5000]
)
def test_what_is_no_json_is_named(tmp_path, content):
    path = tmp_path / "it.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"it\.json cannot be read as JSON"):
        files.read_json(path)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def member(name, content, claimed=None):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def npy(shape, data=b""):
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


WHOLE = npz(lm_ctx=np.arange(300).reshape(2, 150), lm_cont=np.arange(10).reshape(2, 5))
DAMAGED = {
    "empty": b"",
    "cut": WHOLE[: len(WHOLE) // 2],
    "bit-flipped": bytes(b ^ (i == 900) for i, b in enumerate(WHOLE)),
    "no zip": b"no archive at all",
    "one array": npy((2, 1), bytes(16)),
    "a pickle": npz(lm_ctx=np.array([{}], object)),
    "2^62 numbers": member("lm_ctx.npy", npy((2**31, 2**31))),
    "less than it says": member("lm_ctx.npy", npy((2, 150), bytes(8))),
    "a negative size": member("lm_ctx.npy", npy((-1, 0))),
    "no array": member("lm_ctx.npy", b"{}"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_cases_are_named(tmp_path, case):
    path = tmp_path / "cases.npz"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(ValueError, match=r"--cases '.*cases\.npz' is no readable \.npz file"):
        score.read_cases(str(path), 300)


def test_errors_are_one_line_without_control_characters(capsys):
    def job(options):
        raise ValueError("a\x1b[31m file\n\r\x07name\u202e")

    assert ended(job, capsys) == (2, "error: a[31m file name\n")
    assert len(lines.plain("x" * 10_000)) == 2000


def test_an_interrupt_within_a_compiler_is_one_line(capsys):
    def job(options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RuntimeError("a compiler's own error") from None

    before = signal.getsignal(signal.SIGINT)
    assert ended(job, capsys) == (130, "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_the_garbage_collector_swallows_comes_again(capsys):
    """As JAX's callback does, in one of ten interrupts of a training."""

    def job(options):
        def callback(*args):
            gc.callbacks.remove(callback)
            os.kill(os.getpid(), signal.SIGINT)

        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(5)
        return 0

    assert ended(job, capsys) == (130, "interrupted\n")


def test_an_interrupt_while_modules_are_imported_is_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.tiles.train"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "interrupted\n"
    assert done.returncode == -signal.SIGINT


def test_an_interrupted_command_keeps_the_runs_that_are_done(tmp_path, capsys):
    out = tmp_path / "results.json"

    def one(arm, seed, advance):
        if arm == "b":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return counted([])(arm, seed, advance)

    code, said = ended(
        lambda options: runs.run_all(out, ABOUT, ["a", "b"], [0], 1, one) and 0, capsys
    )
    assert code == cli.INTERRUPTED
    assert said.splitlines()[-1] == "interrupted"
    assert [run["arm"] for run in runs.read(out)["runs"]] == ["a"]


def test_all_writers_write_whole_files():
    """No module but the helper's opens a place for results itself."""
    ways = ("np.savez", ".write_text(", ".write_bytes(", "savefig(", 'open("w', "json.dump(")
    allowed = {
        "harness/files.py": ways,
        "benchmarks/_peers.py": ("np.savez",),  # into a temporary folder
        "harness/_archive.py": (".write_bytes(",),  # into another
        "harness/packages.py": (".write_text(",),  # and another
        "peers/record_families.py": ways,
        "peers/record_logits.py": ways,  # in an environment without this package's
        "peers/record_transcripts.py": ways,
    }
    found = []
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        name = str(path.relative_to(ROOT / "experiments"))
        if ".venv" in name:
            continue
        for line in Path(path).read_text().splitlines():
            mine = line.replace("files.write_", "")
            if any(way in mine and way not in allowed.get(name, ()) for way in ways):
                found.append((name, line.strip()))
    in_memory = ("figure.savefig(file)", "figure.savefig(picture)", "figure.savefig(buffer")
    assert not [x for x in found if not x[1].startswith(in_memory)]


@pytest.mark.parametrize("marks", ["\ufeff", "\ufeff\ufeff"])
def test_byte_order_marks_go(tmp_path, marks):
    path = tmp_path / "text"
    path.write_bytes((marks + "Words.\r\nMore.\n").encode())
    assert texts.read_file(str(path)) == "Words.\nMore.\n"
    path.write_bytes((marks + " \n" + marks).encode())
    with pytest.raises(ValueError, match=r"--text '.*text' is empty"):
        texts.read_file(str(path))


def test_control_tokens_in_a_text_are_characters():
    tokenizer = byte_level_bpe(["some words"], 300, special=["<end>"], prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 0)]
    )
    ids = texts.encode(tokenizer, "a<end>b").tolist()
    assert len(ids) == 7
    assert 0 not in ids
    assert tokenizer.decode(ids) == "a<end>b"
    assert tokenizer.encode("a<end>b").ids == [0, ids[0], 0, ids[-1]]  # where it is asked for
