"""Eight simulated devices, quick compilation, programs kept on disk, hypothesis without a clock."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# JAX reads these when it is imported: here, and in every process and notebook that a test starts.
# Most of the time goes into compilation, so little effort is put into it (a quarter of the time, or
# less), and none of it twice. `make test-all` sets the first two as they are for users.
EFFORT = "JAX_DISABLE_MOST_OPTIMIZATIONS"
QUICK = {
    EFFORT: "1",
    "XLA_FLAGS": (  # every core has a worker of the tests: one thread compiles a program
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    ),
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
for name, value in QUICK.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for a device

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A shell that starts the tests in the background has them ignore Ctrl-C, and all processes of theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
LIBC = ctypes.CDLL(None)
MOST_BYTES = 3 << 30  # of a worker, before it forgets what was compiled

settings.register_profile("jbalance", deadline=None, derandomize=True, max_examples=50)
# `make test-all`; and hours of it: HYPOTHESIS_PROFILE=long, with the tests' names.
settings.register_profile("more", deadline=None, print_blob=True, max_examples=300)
settings.register_profile("long", deadline=None, print_blob=True, max_examples=100_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "jbalance"))


def pytest_collection_finish() -> None:
    """Tracing makes so many tuples that a tenth of a worker's time went into looking for cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def _resident_bytes() -> int:
    """Of this process now; its peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return pages * resource.getpagesize()


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled():
    """A worker would end up with gigabytes of programs that no later test calls."""
    yield
    if _resident_bytes() > MOST_BYTES:
        jax.clear_caches()
        if hasattr(LIBC, "malloc_trim"):  # else glibc keeps what was freed
            LIBC.malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def _full_effort(request):
    """A module marked `full_effort`, and the processes that it starts, compile as users do."""
    if request.node.get_closest_marker("full_effort") is None:
        yield
        return
    little_effort = os.environ[EFFORT] == "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EFFORT, "0")
        jax.clear_caches()
        jax.config.update(EFFORT.lower(), False)
        yield
    jax.config.update(EFFORT.lower(), little_effort)
    jax.clear_caches()
