"""Ctrl-C that is not lost: some libraries swallow what is raised while they call Python."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

CODE = 130
_AGAIN_S = 0.01


class Interrupt:
    """While entered, SIGINT raises KeyboardInterrupt and is remembered; a second one ends at once.

    An exception within a callback of the garbage collector is printed and forgotten by the interpreter,
    and JAX has such a callback: KeyboardInterrupt is raised again then, in whatever runs next.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        self._active = main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)
        if self._active:
            self._before: Any = signal.signal(signal.SIGINT, self._handle)
            self._alarm: Any = signal.signal(signal.SIGALRM, self._raise)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._forgotten

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGINT, self._before)
            signal.signal(signal.SIGALRM, self._alarm)
            sys.unraisablehook = self._hook

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            os._exit(CODE)
        self.came = True
        raise KeyboardInterrupt

    def _raise(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def _forgotten(self, about: Any) -> None:
        if self.came and issubclass(about.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            self._hook(about)


def until_the_command() -> None:
    """For the time in which a command's modules are imported: an interrupt is one line then too.

    Whatever an import makes of it: some end with an error of their own.
    """
    stop = Interrupt()
    stop.__enter__()

    def one_line(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if stop.came:
            print("interrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = one_line
