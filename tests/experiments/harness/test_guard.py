"""A lost process is one line that names it, for all others, within a stated time."""

import socket
import sys
import threading
import time

import pytest

from experiments.harness import guard, processes

BEATS = "import os, time, sys, signal\npipe = int(os.environ['GUARD_PIPE'])\n"
BEATS += "def live(s):\n for _ in range(int(10 * s)): os.write(pipe, b'.'); time.sleep(0.1)\n"
ENDS_WELL = BEATS + "live(0.5)"
LONG = BEATS + "live(20)"
KILLED = BEATS + "live(0.3); os.kill(os.getpid(), 9)"
STOPPED = BEATS + "os.kill(os.getpid(), signal.SIGSTOP)"
CASES = {
    "all end well": ([ENDS_WELL, ENDS_WELL, ENDS_WELL], 0, ""),
    "killed": ([LONG, KILLED, LONG], 1, "1 of 3 was killed by SIGKILL"),
    "the first is killed": ([KILLED, LONG, LONG], 1, "0 of 3 was killed by SIGKILL"),
    "stopped": ([LONG, LONG, STOPPED], 1, "2 of 3 stopped answering for 1 s"),
    "the first is stopped": ([STOPPED, LONG, LONG], 1, "0 of 3 stopped answering for 1 s"),
    "an error": ([LONG, BEATS + "sys.exit(1)", LONG], 1, "1 of 3 ended with exit code 1"),
    # A consequence: JAX aborts because the first was killed.
    "abort": ([KILLED, BEATS + "live(0.3); os.abort()", LONG], 1, "0 of 3 was killed by SIGKILL"),
    "bad input": ([BEATS + "sys.exit(2)"] * 3, 2, ""),
}


@pytest.fixture(autouse=True)
def _sooner(monkeypatch):
    monkeypatch.setattr(guard, "SILENT_S", 1.0)
    monkeypatch.setattr(guard, "BEAT_S", 0.2)
    monkeypatch.setattr(guard, "GRACE_S", 1.0)


def run_all(scripts, number=None):
    """Exit codes of the guards, each in a thread, and the seconds until the last has ended."""
    coordinator, codes = f"127.0.0.1:{processes._free_ports()}", {}

    def one(i):
        command = [sys.executable, "-S", "-c", scripts[i]]
        codes[i] = guard.run(command, coordinator, i, number or len(scripts))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(scripts))]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
        assert not thread.is_alive()
    return [codes[i] for i in range(len(scripts))], time.monotonic() - start


@pytest.mark.parametrize("case", CASES)
def test_all_processes_end_alike_and_name_the_one_that_failed(case, capfd):
    scripts, code, names = CASES[case]
    codes, seconds = run_all(scripts)
    assert codes == [code] * 3
    said = capfd.readouterr().err
    assert said.count(f"error: process {names}") == (3 if names else 0)
    assert seconds < 12  # the workers that are well would live for 20 s


def test_a_process_that_never_comes_is_named(monkeypatch, capfd):
    monkeypatch.setattr(guard, "JOIN_S", 1.0)
    codes, _ = run_all([LONG], number=2)
    assert codes == [1]
    assert "process 1 of 2 did not come within 1 s" in capfd.readouterr().err


def test_a_port_that_is_taken_is_named(capfd):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        coordinator = f"127.0.0.1:{other.getsockname()[1] - 1}"
        assert guard.run([sys.executable, "-S", "-c", LONG], coordinator, 0, 2) == 1
    assert "process 0 of 2 cannot listen" in capfd.readouterr().err


def test_strangers_on_the_port_are_ignored():
    port = processes._free_ports()
    done = []

    def one(i):
        command = [sys.executable, "-S", "-c", BEATS + "live(2)"]
        done.append(guard.run(command, f"127.0.0.1:{port}", i, 2))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    threads[0].start()
    time.sleep(0.5)
    with socket.create_connection(("127.0.0.1", port + 1)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
    threads[1].start()
    for thread in threads:
        thread.join(15)
    assert done == [0, 0]
