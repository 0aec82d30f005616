"""A small model's decode over four devices, in a test or as one of two processes with two each.

python -m tests.support.small_decode COORDINATOR ID OUT
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

NUM_DEVICES = 4
NEW = np.array([5, 17, 42], np.int32)


def decode(model, context):
    """Logits of new tokens, and the bytes that this process's devices held in the end."""
    import jax

    from experiments.kv_budget import measure
    from experiments.kv_budget.decode import Decoder, Layout, live_bytes, place_caches
    from experiments.kv_budget.policies import Plan

    measured = measure.prefill(model, context, "sinks_recent")
    layers, heads, _ = measured.w.shape
    evicted = np.random.default_rng(0).random(measured.w.shape) < 0.5
    device_of = (np.arange(layers)[:, None] + np.arange(heads)).reshape(-1) % NUM_DEVICES
    plan = Plan(evicted.astype(np.int8), (16,), device_of.astype(np.int32), None)
    decoder = Decoder(model, jax.devices()[:NUM_DEVICES])
    caches = place_caches(measured, plan, decoder.devices, len(NEW))
    layout, logits = Layout.of(plan.device_of, (layers, heads)), []
    for i, token in enumerate(NEW):
        new = np.array([token])
        row, caches = decoder.forward(new, len(context) + i, caches, layout, i)
        logits.append(np.asarray(row[0]))
    return np.stack(logits), live_bytes(caches)


def main(coordinator: str, process_id: str, out: str) -> None:
    from experiments.harness import processes

    options = argparse.Namespace(
        processes=2,
        devices_per_process=2,
        coordinator=coordinator,
        process_id=int(process_id),
    )
    processes.join(options, NUM_DEVICES)
    import jax

    from tests.support.small_models import make_context, make_model

    logits, live = decode(make_model(), make_context())
    processes.agree(logits.tolist())  # the same bits
    np.savez(out, logits=logits, live_bytes=processes.total(live))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
