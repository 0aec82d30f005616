"""One whole program for one pod: a process of its own, since a compiler may end its process.

python -m experiments.compiled.pod PROGRAM POD
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from experiments.compiled import pods
from experiments.harness import collectives


class Pod(NamedTuple):
    """Chips of one kind."""

    topology: str
    hbm_bytes: int  # of each


PODS = {
    "v5e, 16 chips": Pod("v5e:4x4", 16 * 2**30),
    "v5e, 256 chips": Pod("v5e:16x16", 16 * 2**30),
    "v5p, 4096 chips": Pod("v5p:16x16x16", 95 * 2**30),
}


def main(name: str, pod: str) -> dict[str, Any]:
    """Bytes of a chip and what it exchanges, or the compiler's reason."""
    start = time.perf_counter()
    topology = topologies.get_topology_desc(topology_name=PODS[pod].topology, platform="tpu")
    try:
        program = pods.programs()[name](np.array(topology.devices))
        jitted = jax.jit(program.run, donate_argnums=program.donated)
        executable = jitted.lower(*program.shapes).compile()
    except Exception as error:  # whatever a compiler says is what is asked for
        return {"reason": str(error).splitlines()[0][:300]}
    memory: Any = executable.memory_analysis()
    hlo: Any = executable.as_text()
    sent = collectives.by_kind(hlo, passes=1)
    return {
        "arguments bytes": memory.argument_size_in_bytes,
        "results bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary bytes": memory.temp_size_in_bytes,
        "part of the memory": (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        / PODS[pod].hbm_bytes,
        "collectives": {
            kind: {"count": x.collectives, "bytes": x.bytes} for kind, x in sorted(sent.items())
        },
        "kernels": hlo.count('custom_call_target="tpu_custom_call"'),
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
