"""What the commands have in common: their parsers, and how they end."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.harness import interrupt
from experiments.harness.lines import plain

BAD_INPUT, INTERRUPTED = 2, interrupt.CODE
PROGRAMS = Path(__file__).resolve().parents[2] / ".cache" / "jax"


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they stand; what an option is if left out; N and X for whole and other numbers."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type in (int, float):
            return "N" if action.type is int else "X"
        return super()._get_default_metavar_for_optional(action)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `python -m MODULE`, whose help is the module's docstring as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=_Help
    )


def add_job(jobs: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """The parser of one of a command's jobs; `jobs` is what `add_subparsers` gave."""
    return jobs.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=_Help
    )


def add_json(
    parser: argparse.ArgumentParser, default: str | Path | None = None, required: bool = False
) -> None:
    """--json OUT, where a command writes its results."""
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        default=None if default is None else Path(default),
        required=required,
        help="file of results",
    )


def run(
    parser: argparse.ArgumentParser,
    job: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses the arguments and does the job.

    Args:
      parser: of the command.
      job: options -> exit code, None for 0.
      arguments: those of the process if left out.

    Returns:
      The exit code: the job's, 2 after bad input, 130 after Ctrl-C; one line on stderr says which.
    """
    options = parser.parse_args(arguments)
    keep_programs()
    stop = interrupt.Interrupt()
    try:
        with stop:
            return job(options) or 0
    except (ValueError, OSError) as error:
        if not stop.came:
            print(f"error: {plain(str(error))}", file=sys.stderr)
            return BAD_INPUT
    except KeyboardInterrupt:
        pass
    except BaseException:
        # A compiler or a library that is interrupted raises errors of its own.
        if not stop.came:
            raise
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


def of_job(out: Path, default: Path, job: str) -> Path:
    """Where a job of a command writes: its name is in that of the default, if --json is left out."""
    return default.with_stem(f"{default.stem}_{job}") if out == default else out


def memory(option: str, text: str) -> list[int]:
    """Bytes of each device, of an option such as "4MiB,2MiB".

    Raises:
      ValueError: that names the option.
    """
    from jbalance.resources import parse_bytes

    try:
        return [parse_bytes(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def numbers(option: str, text: str, kind: type[int] | type[float] = float) -> list[Any]:
    """Those of an option such as "0.25,0.1".

    Raises:
      ValueError: that names the option.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} is {text!r}: {what} with commas") from None


def simulated_devices(number: int) -> None:
    """So many devices on a CPU; a caller that has used JAX already keeps its own."""
    import jax

    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, unless the environment says where it is."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(PROGRAMS)  # for processes that this one starts
    if "jax" in sys.modules:  # which read its environment when it was imported
        import jax

        jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
