"""The same answer in two real processes, which exchange their sums over the network."""

from __future__ import annotations

import os
import socket
import sys
from functools import partial

import jax
import numpy as np
import pytest

from tests.support.sharded_cases import CASES, COMMON, UNITS, assert_same
from tests.support.sharded_stages import STAGES
from tests.support.together import run_together

pytestmark = pytest.mark.full_effort  # the other tests of many devices do with little


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


NAMES = (
    "largest remainder",
    "ladder, devices and total",
    "balancer",
    "ladder of own budgets",
    "choice of tiles",
    "attention over queries",
)


def test_two_processes(tmp_path):
    assert_as_one(tmp_path, 2, NAMES)


@pytest.mark.slow
def test_two_processes_of_one_device(tmp_path):
    assert_as_one(tmp_path, 1, NAMES)


@pytest.mark.slow
def test_two_processes_do_all(tmp_path):
    assert_as_one(tmp_path, 2, (*CASES, *STAGES))


def assert_as_one(tmp_path, devices_each, names):
    """Two processes of so many devices each get what one device gets."""
    port = str(free_port())
    outputs = [tmp_path / f"{i}.npz" for i in range(2)]
    program = [sys.executable, "-m", "tests.support.sharded_worker", port, "2"]
    run_together(
        [
            [*program, str(i), str(devices_each), out, ";".join(names)]
            for i, out in enumerate(outputs)
        ],
        900,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )

    wanted = {}
    for name in names:
        if name in STAGES:
            alone = jax.jit(partial(STAGES[name].alone, 2 * devices_each))()
        else:
            alone = jax.jit(partial(CASES[name], axis=None))(UNITS, COMMON)
        wanted[name] = jax.tree.leaves(alone)
    for output in outputs:
        with np.load(output) as seen:
            assert int(seen["processes"]) == 2
            assert int(seen["devices"]) == 2 * devices_each
            for name, leaves in wanted.items():
                got = [seen[f"{name}/{i}"] for i in range(len(leaves))]
                assert_same(got, leaves, rtol=1e-5)
