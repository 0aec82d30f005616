"""One of several processes that share a problem: python worker.py PORT PROCESSES ID DEVICES OUT.

Runs `sharded_cases.CASES` over all devices of all processes and writes what this process sees.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

NAMES = (
    "water_fill with segments",
    "webster on devices",
    "largest remainder",
    "ladder, devices and total",
    "balancer",
)


def main(port: str, processes: str, process_id: str, devices: str, out: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process_id))
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding
    from sharded_cases import CASES, COMMON, UNITS, U

    mesh = jax.make_mesh((jax.device_count(),), ("units",), axis_types=(AxisType.Auto,))

    def placed(x, spec):
        return jax.make_array_from_callback(
            np.shape(x), NamedSharding(mesh, spec), lambda at: np.asarray(x)[at]
        )

    units = {name: placed(x, jax.P("units")) for name, x in UNITS.items()}
    common = {name: placed(x, jax.P()) for name, x in COMMON.items()}
    seen = {}
    for name in NAMES:
        shapes = jax.eval_shape(lambda u, c, f=CASES[name]: f(u, c, None), UNITS, COMMON)
        specs = jax.tree.map(lambda x: jax.P("units") if x.shape[:1] == (U,) else jax.P(), shapes)
        run = jax.shard_map(
            lambda u, c, f=CASES[name]: f(u, c, "units"),
            mesh=mesh,
            in_specs=(jax.P("units"), jax.P()),
            out_specs=specs,
        )
        leaves = jax.tree.leaves(jax.jit(run)(units, common))
        for i, leaf in enumerate(leaves):
            whole = multihost_utils.process_allgather(leaf, tiled=True) if leaf.shape else leaf
            seen[f"{name}/{i}"] = np.asarray(whole)
    np.savez(out, processes=jax.process_count(), devices=jax.device_count(), **seen)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
