"""One of several processes that share a problem.

python -m tests.support.sharded_worker PORT PROCESSES ID DEVICES OUT NAMES

Runs the named ones of `sharded_cases.CASES` and `sharded_stages.STAGES` (separated by ";") over all
devices of all processes, and writes what this process sees.
"""

from __future__ import annotations

import sys

import jax


def main(port: str, processes: str, process_id: str, devices: str, out: str, names: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process_id))
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding

    from tests.support.sharded_cases import CASES, COMMON, UNITS, U
    from tests.support.sharded_stages import AXIS, STAGES

    mesh = jax.make_mesh((jax.device_count(),), ("units",), axis_types=(AxisType.Auto,))

    def placed(x, spec):
        return jax.make_array_from_callback(
            np.shape(x), NamedSharding(mesh, spec), lambda at: np.asarray(x)[at]
        )

    units = {name: placed(x, jax.P("units")) for name, x in UNITS.items()}
    common = {name: placed(x, jax.P()) for name, x in COMMON.items()}

    def gathered(leaf):
        whole = multihost_utils.process_allgather(leaf, tiled=True) if leaf.shape else leaf
        return np.asarray(whole)

    seen = {}
    stages_mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    for name in names.split(";"):
        if name in STAGES:
            leaves = jax.tree.leaves(jax.jit(lambda f=STAGES[name].over: f(stages_mesh))())
            seen |= {f"{name}/{i}": gathered(leaf) for i, leaf in enumerate(leaves)}
            continue
        shapes = jax.eval_shape(lambda u, c, f=CASES[name]: f(u, c, None), UNITS, COMMON)
        specs = jax.tree.map(lambda x: jax.P("units") if x.shape[:1] == (U,) else jax.P(), shapes)
        run = jax.shard_map(
            lambda u, c, f=CASES[name]: f(u, c, "units"),
            mesh=mesh,
            in_specs=(jax.P("units"), jax.P()),
            out_specs=specs,
        )
        leaves = jax.tree.leaves(jax.jit(run)(units, common))
        seen |= {f"{name}/{i}": gathered(leaf) for i, leaf in enumerate(leaves)}
    np.savez(out, processes=jax.process_count(), devices=jax.device_count(), **seen)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
