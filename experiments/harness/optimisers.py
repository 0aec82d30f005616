"""How the experiments' models are trained."""

from __future__ import annotations

import optax


def adamw(
    steps: int,
    peak: float,
    *,
    weight_decay: float = 0.01,
    b2: float = 0.999,
    warm_up: float = 0.1,
) -> optax.GradientTransformation:
    """AdamW with a warm-up, then a cosine to zero; gradients clipped to length 1.

    Args:
      steps: of the training.
      peak: the largest rate.
      weight_decay: of AdamW.
      b2: of AdamW, the decay of the squared gradients' average.
      warm_up: part of the steps.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, int(warm_up * steps)), steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=b2, weight_decay=weight_decay)
    )
