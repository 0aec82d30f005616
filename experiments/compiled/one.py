"""One case for one chip: a process of its own, since a compiler may end its process.

python -m experiments.compiled.one CASE CHIP FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(name: str, chip: str, folder: Path) -> dict[str, Any]:
    """What the compiler made of a case, or its reason."""
    from experiments.compiled import cases, gpu, tpu

    case = cases.all_cases()[name]
    start = time.perf_counter()
    program = case.make()
    try:
        if case.platform == "gpu":
            found = {x.name: gpu.report(x, chip) for x in gpu.kernels(program)}
            kernels: dict[str, Any] = found
            temporaries = None
        else:
            executable = tpu.compiled(program, chip)
            temporaries = executable.memory_analysis().temp_size_in_bytes
            kernels = {
                kernel: {
                    "cycles of a step": x.cycles,
                    "cycles of a step, longest branch": x.step + max(x.branches, default=0),
                    "cycles beside": x.beside,
                    "cycles for its work": x.cycles / program.work,
                }
                for kernel, x in tpu.schedules(folder).items()
            }
    except Exception as error:  # whatever a compiler says is what is asked for
        return {"reason": str(error).splitlines()[0][:300]}
    return {
        "kernels": kernels,
        "work of a step": program.work,
        "temporary bytes": temporaries,
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
