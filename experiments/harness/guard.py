"""What stands beside each of several processes, so that a lost one is an error and never a hang.

A process that waits in a collective cannot be interrupted, and JAX ends it with a page of a stack trace,
or not before minutes have passed. So each process of a job is two: this guard, which is what the
launcher sees, and below it the worker, which computes and writes a byte to a pipe every second. The
guards talk to that of process 0, over TCP on the port after the coordinator's, when both have shown that
they know the job's token. A guard whose worker died, or said nothing for `SILENT_S`, says so; all guards
then print the same line, stop their workers and exit with 1. So they do when a launcher on the same
machine is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

from experiments.harness.lines import plain

SILENT_S = 30.0  # without a sign of life for so long, a process counts as stopped
BEAT_S = 1.0
JOIN_S = 60.0  # in which all processes must have come
GRACE_S = 3.0  # in which one that failed may turn out to have failed because of another
BAD_INPUT = 2  # a worker's exit code after it has said what is wrong
PIPE = "GUARD_PIPE"  # environment of a worker: the number of the pipe to its guard
LAUNCHER = "GUARD_LAUNCHER"  # environment of a guard: the number of the pipe from its launcher
TOKEN = "GUARD_TOKEN"  # environment of a guard: the job's secret
# Else the secret is this user's: of all processes that see this folder.
TOKEN_FILE = Path(__file__).resolve().parents[2] / ".cache" / "guard_token"


def guarded() -> bool:
    """Whether this process is a worker below a guard."""
    return PIPE in os.environ


def token() -> str:
    """The job's secret: of the environment, or of a file that only this user can read.

    Raises:
      ValueError: neither is there nor can the file be made, or others can read it.
    """
    given = os.environ.get(TOKEN)
    if given:
        return given
    try:
        TOKEN_FILE.parent.mkdir(parents=True, exist_ok=True)
        draft = TOKEN_FILE.with_name(f".{TOKEN_FILE.name}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            os.write(descriptor, secrets.token_hex(32).encode())
            with contextlib.suppress(FileExistsError):  # the first one's stands
                os.link(draft, TOKEN_FILE)
        finally:
            os.close(descriptor)
            draft.unlink()
        about, content = TOKEN_FILE.stat(), TOKEN_FILE.read_text().strip()
    except OSError as error:
        raise ValueError(
            f"{TOKEN} is not set and {TOKEN_FILE} cannot be used: {error.strerror}; set {TOKEN} to one "
            f"secret for all processes"
        ) from None
    if about.st_mode & 0o077 or about.st_uid != os.getuid() or len(content) < 32:
        raise ValueError(f"{TOKEN_FILE} is no secret of this user's: remove it, or set {TOKEN}")
    return content


def beat() -> None:
    """In a worker: a sign of life every second; the worker ends when its guard is gone."""
    pipe = int(os.environ[PIPE])

    def forever():
        with contextlib.suppress(OSError):
            while True:
                os.write(pipe, b".")
                time.sleep(BEAT_S)
        os._exit(1)

    threading.Thread(target=forever, daemon=True).start()


def run(command: list[str], coordinator: str, process_id: int, processes: int) -> int:
    """Runs a command as the worker, guarded; the exit code for the launcher.

    Args:
      command: the program and its arguments; it must call `beat`.
      coordinator: HOST:PORT of process 0; the guards use PORT + 1.
      process_id: of this process, 0 to processes - 1.
      processes: of the job.

    Returns:
      0 when all have ended well; the worker's own code for bad input, which it has explained; else 1.

    Raises:
      ValueError: as `token`.
    """
    secret = token().encode()

    async def guard():
        return await _Guard(coordinator, process_id, processes, secret).run(command)

    return asyncio.run(guard())


class _Guard:
    """One guard: its worker, and the lines to and from the others."""

    def __init__(self, coordinator: str, process_id: int, processes: int, secret: bytes) -> None:
        self.secret = secret
        host, port = coordinator.rsplit(":", 1)
        self.address = host, int(port) + 1
        self.me, self.processes = process_id, processes
        self.verdict: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.lines: dict[int, asyncio.StreamWriter] = {}  # to the others: all, or process 0 alone
        self.done: set[int] = set()
        self.all_done = asyncio.Event()

    def name(self, process: int) -> str:
        return f"process {process} of {self.processes}"

    def fail(self, reason: str) -> None:
        """The first reason is the one that all will print."""
        if not self.verdict.done():
            self.verdict.set_result(plain(reason))

    def say(self, line: str) -> None:
        for writer in self.lines.values():
            with contextlib.suppress(OSError):
                writer.write(line.encode() + b"\n")

    async def run(self, command: list[str]) -> int:
        worker, pipe = await self._start(command)
        tasks = [self._meet(), self._watch(pipe), self._beats(), self._watch_launcher()]
        running = [asyncio.ensure_future(task) for task in tasks]
        code = await self._outcome(worker)
        for task in running:
            task.cancel()
        return code

    async def _start(self, command):
        """The worker, and the end of the pipe that it writes to."""
        read, write = os.pipe()
        own = {name: x for name, x in os.environ.items() if name not in (LAUNCHER, TOKEN)}
        worker = await asyncio.create_subprocess_exec(
            *command,
            env=own | {PIPE: str(write)},
            pass_fds=[write],
            start_new_session=True,  # Ctrl-C is for the guard, with which the worker ends
        )
        os.close(write)
        return worker, await _reader(read)

    async def _outcome(self, worker) -> int:
        """Until the worker has ended and the others too, or something has failed."""
        ended = asyncio.ensure_future(worker.wait())
        await self._or_verdict(ended)
        if ended.done():
            await self._after(ended.result())
        if not self.verdict.done():
            return ended.result()
        reason = self.verdict.result()
        self.say(f"failed {reason}")
        # One that was given the same bad input is about to say so; others are stuck.
        with contextlib.suppress(TimeoutError):
            if "exit code" in reason:
                await asyncio.wait_for(asyncio.shield(ended), GRACE_S)
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await ended
        if ended.result() == BAD_INPUT:
            return BAD_INPUT
        print(f"error: {reason}; all processes end", file=sys.stderr, flush=True)
        return 1

    async def _or_verdict(self, event: asyncio.Future) -> None:
        """Until the event, or until something has failed."""
        waits: list[asyncio.Future] = [event, self.verdict]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)

    async def _after(self, code: int) -> None:
        """The worker has ended: well, so the others are waited for, or because of what?"""
        if code == 0:
            self.say("done")
            self._is_done(self.me)
            await self._or_verdict(asyncio.ensure_future(self.all_done.wait()))
            return
        # JAX aborts where another process is lost, and collectives raise: whose fault was it?
        if code in (1, -signal.SIGABRT):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.verdict), GRACE_S)
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        verb = "ended with" if code > 0 or code == -signal.SIGABRT else "was killed by"
        self.fail(f"{self.name(self.me)} {verb} {how}")

    async def _watch_launcher(self) -> None:
        """The launcher holds the other end of a pipe, which the system closes when it is gone."""
        if LAUNCHER in os.environ:
            pipe = await _reader(int(os.environ[LAUNCHER]))
            await pipe.read()
            self.fail("the launcher is gone")

    async def _watch(self, pipe) -> None:
        """The worker must write."""
        await self._listen(lambda: pipe.read(64), self.me, lambda data: None)

    async def _listen(self, read, process, use) -> bool:
        """Uses what a process says until it says no more; False if it was silent for too long."""
        with contextlib.suppress(OSError, ValueError):  # a line without an end
            while True:
                try:
                    said = await asyncio.wait_for(read(), SILENT_S)
                except TimeoutError:
                    self.fail(f"{self.name(process)} stopped answering for {SILENT_S:.0f} s")
                    return False
                if not said:
                    break
                use(said)
        return True

    async def _beats(self) -> None:
        while True:
            self.say("beat")
            await asyncio.sleep(BEAT_S)

    async def _meet(self) -> None:
        """The other guards: process 0's is where all meet."""
        await (self._visit() if self.me else self._host())

    async def _host(self) -> None:
        guests = set()  # or their tasks would be collected

        def greet(reader, writer):
            guests.add(asyncio.ensure_future(self._greet(reader, writer)))

        try:
            server = await asyncio.start_server(greet, *self.address)
        except OSError as error:
            self.fail(f"{self.name(0)} cannot listen for the others' guards: {error}")
            return
        async with server:
            await asyncio.sleep(JOIN_S)
            missing = set(range(1, self.processes)) - self.lines.keys()
            if missing:
                self._missing(min(missing))
            await asyncio.Event().wait()

    async def _visit(self) -> None:
        until = time.monotonic() + JOIN_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(*self.address)
                if await self._known(0, reader, writer):
                    await self._hear(0, reader, writer)
                    return
                writer.close()
            await asyncio.sleep(0.2)
        self._missing(0)

    def _missing(self, process: int) -> None:
        self.fail(
            f"{self.name(process)} did not come within {JOIN_S:.0f} s, or has another {TOKEN}"
        )

    async def _greet(self, reader, writer) -> None:
        with contextlib.suppress(ValueError, TimeoutError, OSError):
            process = int(await asyncio.wait_for(reader.readline(), JOIN_S))
            mine = 0 < process < self.processes and process not in self.lines
            if mine and await self._known(process, reader, writer) and process not in self.lines:
                await self._hear(process, reader, writer)
        writer.close()

    async def _known(self, process: int, reader, writer) -> bool:
        """Whether the other end has the token as well: each answers the other's challenge.

        The answers say who answers whom, so that none can be sent back.
        """
        mine = secrets.token_hex(16)
        writer.write(f"{self.me}\n{mine}\n".encode() if self.me else f"{mine}\n".encode())
        with contextlib.suppress(ValueError, TimeoutError, OSError):
            theirs = (await asyncio.wait_for(reader.readline(), JOIN_S)).strip()
            writer.write(_answer(self.secret, self.me, process, self.processes, theirs) + b"\n")
            answer = (await asyncio.wait_for(reader.readline(), JOIN_S)).strip()
            right = _answer(self.secret, process, self.me, self.processes, mine.encode())
            return hmac.compare_digest(answer, right)
        return False

    async def _hear(self, process: int, reader, writer) -> None:
        """What another guard says, until it ends."""
        self.lines[process] = writer

        def use(line: bytes) -> None:
            word, _, reason = line.decode(errors="replace").strip().partition(" ")
            if word == "failed":
                self.fail(reason)
            elif word == "done":
                self._is_done(process)

        heard = await self._listen(reader.readline, process, use)
        if heard and process not in self.done:
            self.fail(f"{self.name(process)} is gone: killed, or its machine lost")

    def _is_done(self, process: int) -> None:
        """All are done when process 0 says so, which has heard of all."""
        self.done.add(process)
        if self.me or len(self.done) == self.processes:
            self.all_done.set()


def _answer(secret: bytes, process: int, other: int, processes: int, challenge: bytes) -> bytes:
    """What one who has the secret answers to a challenge of another process."""
    message = f"{process} to {other} of {processes}: ".encode() + challenge
    return hmac.new(secret, message, "sha256").hexdigest().encode()


async def _reader(descriptor: int) -> asyncio.StreamReader:
    """Reads a pipe."""
    pipe = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(pipe), os.fdopen(descriptor, "rb")
    )
    return pipe
