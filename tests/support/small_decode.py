"""A small model's decode over four devices, in a test or as one of two processes with two each.

python -m tests.support.small_decode COORDINATOR ID OUT
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

NUM_DEVICES, STEPS = 4, 6
BUDGETS = [20_000, 14_000, 12_000, 12_000]
NEW = np.array([5, 17, 42], np.int32)


def decode(model, context):
    """Tokens of a request that reads a context, and the bytes that this process's devices held."""
    import jax

    from experiments.models.worth import decoder_of
    from jbalance import decode
    from jbalance.decode import Reserve

    decoder, devices = decoder_of(model), jax.devices()[:NUM_DEVICES]
    read = decode.read(
        decoder, context, BUDGETS, reserve=Reserve(1, len(NEW) + STEPS), devices=devices
    )
    state = decode.create(decoder, BUDGETS, context=read, devices=devices)
    state = decode.join(decoder, state, 0, NEW)
    tokens = [int(state.tokens[0])]
    for _ in range(STEPS):
        new, state = decode.step(decoder, state)
        tokens.append(int(new[0]))
    return np.array(tokens), np.array(state.nbytes)


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

    from tests.support.small_models import make_context, make_sharp

    tokens, live = decode(make_sharp(), make_context())
    processes.agree(tokens.tolist())  # the same bits
    np.savez(out, tokens=tokens, live_bytes=processes.total(live))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
