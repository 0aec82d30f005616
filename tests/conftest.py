"""Eight simulated devices for every test, and hypothesis without a clock."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for a device

from hypothesis import settings  # noqa: E402

settings.register_profile("jbalance", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("jbalance")
