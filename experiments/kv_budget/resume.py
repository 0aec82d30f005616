"""`resume`: a saved decode goes on, on other devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import processes
from experiments.kv_budget.evaluate import decoder_of
from experiments.kv_budget.run import devices_for
from experiments.models import Llama
from jbalance import decode
from jbalance.resources import device_budgets


def resume(folder: Path, model: Llama, memory_bytes: list[int]) -> dict[str, Any]:
    """All tokens, those of before and those that were still to come, and what the devices held.

    Raises:
      ValueError: as `decode.restore`, or too few devices.
    """
    devices = devices_for(len(memory_bytes))
    budgets = device_budgets(devices, 1.0, memory_bytes)
    decoder = decoder_of(model)
    notes = decode.notes_of(folder)
    state = decode.restore(folder, decoder, budgets, devices=devices)
    tokens, most = list(notes["tokens"]), np.array(state.nbytes)
    while len(tokens) < notes["new_tokens"]:
        new, state = decode.step(decoder, state)
        tokens.append(int(new[0]))
        most = np.maximum(most, state.nbytes)
    most = processes.total(most)
    if (most > budgets).any():
        raise RuntimeError(f"the devices hold {most} bytes, the budgets are {budgets}")
    return {
        "tokens": tokens,
        "saved_tokens": len(notes["tokens"]),
        "live_bytes": most.tolist(),
        "budget_bytes": budgets,
    }
