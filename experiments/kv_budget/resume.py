"""`resume`: a saved decode goes on, on other devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import processes, progress
from experiments.kv_budget.run import devices_for
from experiments.models import Transformer
from experiments.models.worth import decoder_of
from jbalance import decode
from jbalance.resources import device_budgets


def resume(folder: Path, model: Transformer, memory_bytes: list[int]) -> dict[str, Any]:
    """All tokens, those of before and those that were still to come, and what the devices held.

    Raises:
      ValueError: as `decode.restore`, or too few devices.
    """
    devices = devices_for(len(memory_bytes))
    budgets = device_budgets(devices, 1.0, memory_bytes)
    decoder = decoder_of(model)
    tokens, new_tokens = _begun(folder)
    state = decode.restore(folder, decoder, budgets, devices=devices)
    saved_tokens, most = len(tokens), np.array(state.nbytes)
    with progress.bar("tokens", new_tokens - saved_tokens) as advance:
        while len(tokens) < new_tokens:
            new, state = decode.step(decoder, state)
            tokens.append(int(new[0]))
            most = np.maximum(most, state.nbytes)
            advance()
    most = processes.total(most)
    if (most > budgets).any():
        raise RuntimeError(f"the devices hold {most} bytes, the budgets are {budgets}")
    return {
        "tokens": tokens,
        "saved_tokens": saved_tokens,
        "live_bytes": most.tolist(),
        "budget_bytes": budgets,
    }


def _begun(folder: Path) -> tuple[list[int], int]:
    """Tokens that `run` had generated, and how many there will be.

    Raises:
      ValueError: as `decode.notes_of`, or a state of something else.
    """
    notes = decode.notes_of(folder)
    tokens, new_tokens = notes.get("tokens"), notes.get("new_tokens")
    if not isinstance(tokens, list) or not all(type(x) is int and x >= 0 for x in tokens):
        raise ValueError(f"{folder}: notes.tokens is {tokens!r}: it is no state of run --save")
    if type(new_tokens) is not int or new_tokens < len(tokens):
        raise ValueError(f"{folder}: notes.new_tokens is {new_tokens!r}: {len(tokens)} or more")
    return list(tokens), new_tokens
