"""The same result on any number of devices and processes; a lost process ends the others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.harness import processes
from experiments.kv_budget.__main__ import main
from tests.support import small_decode
from tests.support.small_models import make_sharp
from tests.support.together import ROOT, run_together

TEXT = str(ROOT / "LICENSE")
AS_HERE = {name: x for name, x in os.environ.items() if name != "GUARD_PIPE"}


def test_two_processes_decode_as_one_does(context, tmp_path):
    tokens, live_bytes = small_decode.decode(make_sharp(), context)
    coordinator = f"localhost:{processes._free_ports()}"
    outputs = [tmp_path / f"{i}.npz" for i in range(2)]
    read, write = os.pipe()  # as below a guard that never ends
    program = [sys.executable, "-m", "tests.support.small_decode", coordinator]
    environment = AS_HERE | {"GUARD_PIPE": str(write)}
    commands = [[*program, str(i), out] for i, out in enumerate(outputs)]
    try:
        run_together(commands, 300, env=environment, pass_fds=[write])
    finally:
        os.close(read)
        os.close(write)
    for out in outputs:
        with np.load(out) as got:
            np.testing.assert_array_equal(got["tokens"], tokens)
            np.testing.assert_array_equal(got["live_bytes"], live_bytes)


RUN = ["run", "--text", TEXT, "--device-memory", "4MiB,2MiB,1MiB,1MiB"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--processes", "0"], "--processes is 0"),
        (["--devices-per-process", "0"], "--devices-per-process is 0"),
        (
            ["--devices-per-process", "3"],
            "4 entries, but there are 1 processes of 3 devices: give 3",
        ),
        (["--process-id", "0"], "give both or neither"),
        (["--processes", "2", "--coordinator", "here", "--process-id", "0"], "HOST:PORT"),
        (["--processes", "2", "--coordinator", "a:1", "--process-id", "2"], "0 to 1"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, names):
    assert main([*RUN, *arguments]) == 2
    assert names in capsys.readouterr().err


SHORT = ["--context-tokens", "200", "--continuation-tokens", "8", "--policies", "ladder"]
COMMAND = [sys.executable, "-m", "experiments.kv_budget"]
BUDGETS = "800KiB,400KiB,200KiB,200KiB"
TWO = ["--processes", "2", "--devices-per-process", "2"]


AS_USERS = AS_HERE | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


def said_by(arguments):
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=AS_USERS,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def digest_of(said):
    return next(line for line in said.splitlines() if line.startswith("digest"))


@pytest.mark.slow
def test_the_real_model_in_two_processes_and_its_state_on_fewer_devices(tmp_path):
    run = ["run", "--text", TEXT, "--new-tokens", "8", *SHORT, "--device-memory", BUDGETS]
    one, two, saved = tmp_path / "one", tmp_path / "two", tmp_path / "state"
    first = said_by([*run, "--out", str(one)])
    second = said_by([*run, *TWO, "--out", str(two), "--save", str(saved)])
    reports = [json.loads((out / "report.json").read_text())["policies"][0] for out in (one, two)]
    assert digest_of(first) == digest_of(second)
    for device in reports[1]["devices"]:
        assert device["live_bytes"] <= device["budget_bytes"]
    tokens = reports[1]["answer_tokens"]
    assert tokens == reports[0]["answer_tokens"]
    for memory in ("900KiB,900KiB", "1800KiB"):
        resume = ["resume", "--state", str(saved), "--device-memory", memory]
        said = said_by(resume)
        assert f"tokens: {tokens}" in said.splitlines()
    resume = ["resume", "--state", str(saved), "--device-memory", "900KiB,900KiB"]
    said = said_by([*resume, "--processes", "2", "--devices-per-process", "1"])
    assert f"tokens: {tokens}" in said.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "struck", "process_id"),
    [
        ("SIGKILL", "worker", 1),
        ("SIGSTOP", "worker", 0),
        ("SIGKILL", "worker", 0),
        ("SIGSTOP", "worker", 1),
        ("SIGKILL", "guard", 1),
    ],
)
def test_a_lost_process_ends_the_others(tmp_path, sent, struck, process_id):
    """Started as a launcher would, without a parent that could see what happened."""
    coordinator = f"127.0.0.1:{processes._free_ports()}"
    policies = ["--policies", "ladder-eviction-only", "--new-tokens", "500"]
    run = ["run", "--text", TEXT, *SHORT[:-2], *policies, "--out", str(tmp_path / "out")]
    run += ["--device-memory", "8MiB,4MiB,4MiB,4MiB", *TWO, "--coordinator", coordinator]
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    guards = []
    for i, log in enumerate(logs):
        with log.open("w") as out:
            command = [*COMMAND, *run, "--process-id", str(i)]
            guards.append(subprocess.Popen(command, cwd=ROOT, env=AS_USERS, stdout=out, stderr=out))
    try:
        until = time.monotonic() + 400
        while "policy" not in logs[process_id].read_text():
            assert time.monotonic() < until, logs[process_id].read_text()
            time.sleep(0.5)
        time.sleep(10)  # decoding, or compiling for it
        victim = guards[process_id].pid
        if struck == "worker":
            victim = children_of(victim)[0]
        os.kill(victim, getattr(signal, sent))
        survivor = 1 - process_id
        assert guards[survivor].wait(timeout=60) == 1
        how = "stopped answering for 30 s" if sent == "SIGSTOP" else "is gone"
        if (struck, sent) == ("worker", "SIGKILL"):
            how = "was killed by SIGKILL"
        assert f"error: process {process_id} of 2 {how}" in logs[survivor].read_text()
    finally:
        for process in guards:
            for child in children_of(process.pid):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.wait()


def children_of(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []
