"""Commands killed at any moment, on a full disk, in a place that cannot be written, two together."""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from experiments.harness import runs
from tests.support.faulty_runs import ARMS, SEEDS
from tests.support.together import ROOT

COMMAND = [sys.executable, "-m", "tests.support.faulty_runs"]


def start(*arguments):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def ended(*arguments):
    """Exit code and what was said."""
    process = start(*arguments)
    said = process.communicate(timeout=120)[1]
    return process.returncode, [line for line in said.splitlines() if "error:" in line]


def recorded(out):
    return [(run["arm"], run["seed"]) for run in runs.read(out)["runs"]]


def killed_again_and_again(folder, seed, number):
    """A command that was killed so often, and then left alone: what its log and its file say."""
    rng, out, log = random.Random(seed), folder / "out.json", folder / "log"
    before: list[tuple[str, int]] = []
    for _ in range(number):
        process = start(out, log)
        begun = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > begun:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = recorded(out)
        assert now[: len(before)] == before  # nothing is lost
        before = now
    assert ended(out, log) == (0, [])
    return recorded(out), collections.Counter(log.read_text().split("\n")[:-1]), folder


@pytest.mark.parametrize(
    ("seed", "number"),
    [(0, 4), *(pytest.param(s, 12, marks=pytest.mark.slow) for s in range(1, 9))],
)
def test_killed_at_random_moments(tmp_path, seed, number):
    found, calls, folder = killed_again_and_again(tmp_path, seed, number)
    assert found == [(arm, seed) for seed in SEEDS for arm in ARMS]  # each once
    # Twice only what was under way when the command was killed.
    assert sum(calls.values()) <= len(found) + number
    assert sorted(path.name for path in folder.iterdir()) == ["log", "out.json"]


@pytest.mark.parametrize("most", [0, 1, 700, 4096])
def test_a_full_disk(tmp_path, most):
    out = tmp_path / "out.json"
    code, said = ended(out, tmp_path / "log", most)
    assert code == 2
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert str(out) in said[0]
    assert not list(tmp_path.glob(".*"))
    if out.exists():  # whole, of what fitted
        assert recorded(out) == [(a, s) for s in SEEDS for a in ARMS][: len(recorded(out))]
    assert ended(out, tmp_path / "log") == (0, [])
    assert len(recorded(out)) == len(ARMS) * len(SEEDS)


@pytest.mark.parametrize("place", ["/proc/out.json", "/dev/null/out.json"])
def test_a_place_that_nobody_can_write(tmp_path, place):
    code, said = ended(place, tmp_path / "log")
    assert code == 2
    assert len(said) == 1
    assert place in said[0]
    assert not (tmp_path / "log").exists()  # said before the work


def test_two_runs_with_one_file(tmp_path):
    out = tmp_path / "out.json"
    first = start(out, tmp_path / "log")
    while not out.exists() and first.poll() is None:
        time.sleep(0.005)
    code, said = ended(out, tmp_path / "other")
    assert code == 2
    assert "another run" in said[0]
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert len(recorded(out)) == len(ARMS) * len(SEEDS)
    assert not (tmp_path / "other").exists()


def test_an_interrupt(tmp_path):
    out, log = tmp_path / "out.json", tmp_path / "log"
    process = start(out, log)
    while not (out.exists() and recorded(out)) and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert recorded(out)
    assert ended(out, log) == (0, [])
    assert len(recorded(out)) == len(ARMS) * len(SEEDS)
