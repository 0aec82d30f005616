"""Eight simulated devices for every test, hypothesis without a clock, and no pile of programs."""

from __future__ import annotations

import resource

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for a device

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

MOST_KIB = 3 << 20  # of a worker, before it forgets what was compiled

settings.register_profile("jbalance", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("jbalance")


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled():
    """A worker would end up with gigabytes of programs that no later test calls."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MOST_KIB:
        jax.clear_caches()
