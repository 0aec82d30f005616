"""`resume`: a saved decode goes on, on other devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import processes
from experiments.kv_budget import state
from experiments.kv_budget.decode import Decoder, live_bytes
from experiments.kv_budget.run import devices_for
from experiments.models import Llama
from jbalance.resources import device_budgets


def resume(folder: Path, model: Llama, memory_bytes: list[int]) -> dict[str, Any]:
    """All tokens, those of before and those that were still to come, and what the devices held.

    Raises:
      ValueError: as `state.load`, or too few devices.
    """
    devices = devices_for(len(memory_bytes))
    budgets = device_budgets(devices, 1.0, memory_bytes)
    decoder = Decoder(model, devices)
    progress, new_tokens = state.load(folder, decoder, budgets)
    before, most = len(progress.tokens), live_bytes(progress.caches)
    while len(progress.tokens) < new_tokens:
        progress = progress.next(decoder)
        most = np.maximum(most, live_bytes(progress.caches))
    most = processes.total(most)
    if (most > budgets).any():
        raise RuntimeError(f"the devices hold {most} bytes, the budgets are {budgets}")
    return {
        "tokens": list(progress.tokens),
        "saved_tokens": before,
        "live_bytes": most.tolist(),
        "budget_bytes": budgets,
    }
