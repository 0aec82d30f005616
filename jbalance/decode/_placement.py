"""Units on devices, by the tokens that attention reads of them and their bytes, and how even that is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jbalance import place


class Evenness(NamedTuple):
    """How even the parts of several devices are."""

    layer_time: float  # tokens that the fullest device of each layer reads, summed over the layers
    layer_time_bound: float  # that no placement within the budgets beats
    memory_over_even: float  # the fullest device's part of its budget over the mean part, less 1


def place_units(tokens: np.ndarray, size_bytes: np.ndarray, room_bytes: np.ndarray) -> np.ndarray:
    """device_of [U] of units [L, K] by the tokens that attention reads of them and their bytes.

    A device may end up with more than its room [G] where the units do not fit: callers look.
    """
    if room_bytes.size == 1:
        return np.zeros(tokens.size, np.int32)
    placed = place.over_layers(*(x.astype(np.float32) for x in (tokens, size_bytes, room_bytes)))
    return np.asarray(placed.device_of).reshape(-1)


def evenness(
    tokens: np.ndarray, size_bytes: np.ndarray, device_of: np.ndarray, budgets: np.ndarray
) -> Evenness | None:
    """Of units [L, K] at device_of [U]; None of one device."""
    if budgets.size == 1:
        return None
    time = np.zeros((len(tokens), budgets.size))
    np.add.at(time, (np.arange(len(tokens))[:, None], device_of.reshape(tokens.shape)), tokens)
    bound = place.over_layers_bound(*(x.astype(np.float32) for x in (tokens, size_bytes, budgets)))
    held = np.bincount(device_of, size_bytes.reshape(-1), budgets.size)
    over = (held / budgets).max() / (held.sum() / budgets.sum()) - 1
    return Evenness(float(time.max(axis=1).sum()), float(bound), float(over))
