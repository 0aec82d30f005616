"""The method's own weights: importance from indicators, as shares with floors."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from jbalance import checks, shares
from jbalance import importance as importances
from jbalance.multitask.types import TaskStats, TaskWeighting, not_negative, of_finite


def by_importance(
    association: ArrayLike, *, floor: ArrayLike = 0.0, rule: str = "proportional"
) -> TaskWeighting:
    """α of w = a · complexity, the losses of the step as the indicators' complexity (METHOD section 1).

    Args:
      association: [K, K] a_ik >= 0, how much task i is concerned by the loss of task k; the identity
        weighs each task by its own loss.
      floor: [K] or [] least share of a task.
      rule: a name in `shares.SHARE_RULES`.

    Raises:
      ValueError: as `importance.weighted` and `shares.constrained` do; an unknown rule; from
        update, a loss that is negative or not finite (under jit, a negative one counts as 0).
    """
    share = checks.choice("rule", rule, shares.SHARE_RULES)

    def weigh(stats: TaskStats, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        losses = not_negative(jax.lax.stop_gradient(stats.losses))
        alpha = share(importances.weighted(association, losses))
        return shares.constrained(alpha, floor=floor), state

    return TaskWeighting(lambda tasks: (), of_finite(weigh), needs_losses=True)
