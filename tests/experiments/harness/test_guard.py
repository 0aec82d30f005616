"""A lost process is one line that names it, for all others, within a stated time."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

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


@pytest.fixture(autouse=True)
def _own_token(tmp_path, monkeypatch):
    monkeypatch.delenv(guard.TOKEN, raising=False)
    monkeypatch.setattr(guard, "TOKEN_FILE", tmp_path / "cache" / "guard_token")


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


STRANGERS = {
    "a browser": b"GET / HTTP/1.1\n",
    "one that ends the job": b"1\nfailed \x1b[2Jall is lost\n",
    "one that says all is done": b"1\n" + b"00" * 16 + b"\n" + b"00" * 32 + b"\ndone\n",
    "a line without an end": b"1" * 100_000,
}


def test_strangers_on_the_port_are_ignored(capfd):
    port = processes._free_ports()
    done = []

    def one(i):
        command = [sys.executable, "-S", "-c", BEATS + "live(2)"]
        done.append(guard.run(command, f"127.0.0.1:{port}", i, 2))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    threads[0].start()
    time.sleep(0.5)
    with contextlib.ExitStack() as stack:
        for said in STRANGERS.values():
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port + 1)))
            stranger.sendall(said)
        threads[1].start()
        for thread in threads:
            thread.join(15)
    assert done == [0, 0]
    assert capfd.readouterr().err == ""


def test_a_stranger_in_the_place_of_process_0_is_not_believed(monkeypatch, capfd):
    """It sends the guest's own challenge and answer back to it."""
    monkeypatch.setattr(guard, "JOIN_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    guest, _ = server.accept()
                    lines = guest.recv(1000).split(b"\n")
                    guest.sendall(lines[1] + b"\n")
                    guest.sendall(guest.recv(1000) + b"failed by a stranger\n")

        threading.Thread(target=answer, daemon=True).start()
        coordinator = f"127.0.0.1:{server.getsockname()[1] - 1}"
        assert guard.run([sys.executable, "-S", "-c", LONG], coordinator, 1, 2) == 1
    said = capfd.readouterr().err
    assert "process 0 of 2 did not come within 1 s, or has another GUARD_TOKEN" in said
    assert "stranger" not in said


def test_what_is_printed_of_another_guard_has_no_control_characters(capfd):
    """A guard that knows the token, and says what it likes."""
    port = processes._free_ports()
    done = []

    def host():
        command = [sys.executable, "-S", "-c", LONG]
        done.append(guard.run(command, f"127.0.0.1:{port}", 0, 2))

    thread = threading.Thread(target=host)
    thread.start()
    secret = guard.token().encode()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port + 1)) as it:
            it.sendall(b"1\n" + b"ab" * 16 + b"\n")
            with it.makefile("rb") as lines:
                own = guard._answer(secret, 1, 0, 2, lines.readline().strip())
                it.sendall(own + b"\nfailed by \x1b[2J\x07chance\r\n")
                thread.join(10)
            break
        time.sleep(0.1)
    assert done == [1]
    assert capfd.readouterr().err == "error: by [2Jchance; all processes end\n"


def test_the_token_is_of_the_environment_or_this_users_alone(monkeypatch):
    first = guard.token()
    assert guard.token() == first
    assert len(first) == 64
    assert guard.TOKEN_FILE.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in guard.TOKEN_FILE.parent.iterdir()] == ["guard_token"]
    guard.TOKEN_FILE.chmod(0o644)
    with pytest.raises(ValueError, match="guard_token is no secret of this user's"):
        guard.token()
    monkeypatch.setenv(guard.TOKEN, "of the environment")
    assert guard.token() == "of the environment"


MODULE = """
import os, sys, time
from experiments.harness import guard, processes
if "--coordinator" not in sys.argv:
    sys.exit(processes.launch(sys.argv[0], [], 2))
if not guard.guarded():
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    command = [sys.executable, *sys.argv]
    sys.exit(guard.run(command, given["--coordinator"], int(given["--process-id"]), 2))
guard.beat()
print(os.getpid(), os.getppid(), file=open(os.environ["PIDS"], "a"), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_the_launchers_descendants_end_with_it(tmp_path, sent):
    (tmp_path / "job.py").write_text(MODULE)
    pids = tmp_path / "pids"
    # `launch` starts `python -m MODULE`; a module's name is what `sys.argv[0]` has to be.
    program = "import sys, runpy; sys.argv = ['job']; runpy.run_module('job', run_name='__main__')"
    paths = os.pathsep.join([str(tmp_path), str(processes_root())])
    launcher = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": paths, "PIDS": str(pids)},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 4)
        descendants = [int(pid) for pid in pids.read_text().split()]
        launcher.send_signal(sent)
        launcher.wait(10)
        wait_until(lambda: not any(map(lives, descendants)))
    finally:
        launcher.kill()


def processes_root():
    return Path(processes.__file__).resolve().parents[2]


def wait_until(holds):
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)


def lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
