"""Which vehicles a budget computes: of a batch of scenes together, or of one scene while driving."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.robotics.crossing import ROWS
from experiments.robotics.foresight import Worth
from jbalance import allocate, shares

ARMS = ("full", "uniform", "nearest", "proportional", "ladder")
COVERED = 0.99  # of the training part's scenes, whose vehicles fit into a driving program


def scores(arm: str, seen: np.ndarray, worth: Worth) -> np.ndarray:
    """[B, ROWS] by which an arm orders the others of a scene; -inf where there is nobody.

    Args:
      arm: of `ARMS`; `full` and `uniform` take the rows as they come, which say nothing.
      seen: [B, ROWS, FEATURES].
      worth: of the training part.
    """
    if arm in ("proportional", "ladder"):
        found = worth.of_rows(seen)
    elif arm == "nearest":
        found = -np.hypot(seen[..., 1], seen[..., 2])
    else:
        found = np.broadcast_to(-np.arange(ROWS, dtype=np.float32), seen.shape[:2])
    return np.where(present(seen), found, -np.inf)


def present(seen: np.ndarray) -> np.ndarray:
    """[B, ROWS] where there is somebody else."""
    there = seen[..., 0] > 0
    there[:, 0] = False
    return there


def best(scored: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """[B, ROWS] the so many highest scores of each scene."""
    rank = np.argsort(np.argsort(-scored, axis=1, kind="stable"), axis=1)
    return (rank < amount[:, None]) & np.isfinite(scored)


def amounts(arm: str, scored: np.ndarray, total: int) -> np.ndarray:
    """[B] how many of each scene's others are computed, of `total` in all."""
    there = np.isfinite(scored)
    count = there.sum(1)
    if arm == "full":
        return count
    if arm == "ladder":
        return (_levels(scored, total)[0] == 1).sum(1)
    w = np.ones(len(scored)) if arm != "proportional" else np.where(there, scored, 0).sum(1)
    alpha = shares.proportional(jnp.asarray(w, jnp.float32))
    return np.asarray(
        allocate.whole(alpha, min(total, int(count.sum())), 0, jnp.asarray(count)).amount
    )


def kept(arm: str, part: float, seen: np.ndarray, worth: Worth, chunk: int) -> np.ndarray:
    """[B, ROWS] what `part` of all others pays for, chunk by chunk of scenes."""
    scored, found = scores(arm, seen, worth), []
    for start in range(0, len(seen), chunk):
        own = scored[start : start + chunk]
        found.append(best(own, amounts(arm, own, int(part * np.isfinite(own).sum()))))
    return np.concatenate(found)


class Rule(NamedTuple):
    """An arm's budget for one scene at a time, as the training part set it.

    Attributes:
      arm: of `ARMS`.
      rate: `uniform` and `nearest`: how many of each scene; `proportional`: how many for a worth of 1;
        `ladder`: the price, above which a vehicle's worth is for it to be computed.
      capacity: of the program: what goes beyond is left out, the least first.
    """

    arm: str
    rate: float
    capacity: int

    @classmethod
    def of(cls, arm: str, part: float, seen: np.ndarray, worth: Worth) -> Rule:
        scored = scores(arm, seen, worth)
        total = int(part * np.isfinite(scored).sum())
        if arm == "full":
            return cls(arm, ROWS - 1, ROWS - 1)
        if arm in ("uniform", "nearest"):
            number = -(-total // len(seen))  # rounded up, in their favor
            return cls(arm, number, number)
        if arm == "ladder":
            rate = _levels(scored, total)[1]
        else:
            rate = total / float(scored[np.isfinite(scored)].sum())
        wanted = cls(arm, rate, ROWS - 1).wanted(scored)
        return cls(arm, rate, int(np.quantile(wanted, COVERED)))

    def wanted(self, scored: np.ndarray) -> np.ndarray:
        """[B] how many of each scene's others the rate asks for."""
        there = np.isfinite(scored)
        if self.arm == "ladder":
            return (scored > self.rate).sum(1)
        if self.arm == "proportional":
            return np.minimum(np.rint(self.rate * np.where(there, scored, 0).sum(1)), there.sum(1))
        return np.minimum(self.rate, there.sum(1))

    def keep(self, seen: np.ndarray, worth: Worth) -> tuple[np.ndarray, np.ndarray]:
        """[B, ROWS] what is computed of each scene, and [B] whether more was asked for."""
        scored = scores(self.arm, seen, worth)
        wanted = self.wanted(scored)
        return best(scored, np.minimum(wanted, self.capacity)), wanted > self.capacity


def _levels(scored: np.ndarray, total: int) -> tuple[np.ndarray, float]:
    """[B, ROWS] levels 0 or 1 at one price, and the price; what is worth nothing is not computed."""
    # Room up to a power of two, so that one program serves batches of other lengths.
    steps = np.zeros((1 << (scored.size - 1).bit_length(), 2), np.float32)
    steps[: scored.size, 1] = np.where(np.isfinite(scored), scored, 0).ravel()
    out = allocate.ladder(jnp.asarray(steps), jnp.array([0, 1]), jnp.asarray(total))
    return np.asarray(out.level)[: scored.size].reshape(scored.shape), float(out.price[0])
