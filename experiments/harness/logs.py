"""Training curves for TensorBoard."""

from __future__ import annotations

from pathlib import Path

from tensorboardX import SummaryWriter

LOGS = Path("out/logs")


def writer(experiment: str, arm: str, seed: int) -> SummaryWriter:
    """Writes `out/logs/EXPERIMENT/ARM-SEED`, to be used with `with`; `tensorboard --logdir out/logs`."""
    return SummaryWriter(str(LOGS / experiment / f"{arm}-{seed}"))
