"""Downloads a package's source archive with pip's own finder and session, and does nothing with it.

    python -m experiments.harness._archive REQUIREMENT FOLDER

`pip download` of a source distribution runs its build code, only to read the metadata; this does not.
The process ends with what is wrong as its last line.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(requirement: str, folder: str) -> None:
    from pip._internal.commands import create_command
    from pip._internal.network.utils import HEADERS
    from pip._vendor.packaging.requirements import Requirement

    wanted = Requirement(requirement)
    command = create_command("download")
    options, _ = command.parse_args(["--no-deps", "--no-binary", ":all:", requirement])
    with command.main_context():
        session = command.get_default_session(options)  # type: ignore[attr-defined]
        finder = command._build_package_finder(options, session)  # type: ignore[attr-defined]
        best = finder.find_best_candidate(wanted.name, wanted.specifier).best_candidate
        if best is None:
            raise SystemExit(f"no source distribution fits {requirement}")
        answer = session.get(best.link.url_without_fragment, headers=HEADERS)
        answer.raise_for_status()
        (Path(folder) / "archive").write_bytes(answer.content)


if __name__ == "__main__":
    main(*sys.argv[1:])
