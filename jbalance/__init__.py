"""jbalance: balance attention over accelerators, as pure JAX functions.

The stages in the order in which data flows through them.
"""

from jbalance import importance, resources, shares, allocate, place, rescale  # noqa: I001
from jbalance import audit, tasks
from jbalance.improve import Improved, Round, improve
from jbalance.balance import Balance, BalanceState, balancer
from jbalance.types import (
    Allocation,
    Binding,
    Bound,
    FeatureScorer,
    Fill,
    GroupAudit,
    Placement,
    Placer,
    Rebalanced,
    Replicas,
    Resources,
    Rounding,
    ShareRule,
    Status,
    StepTime,
    TaskAmounts,
    Term,
    TokenScorer,
    Whole,
)

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  (pipeline order)
    # stages
    "importance",
    "resources",
    "shares",
    "allocate",
    "place",
    "rescale",
    # the steps composed
    "balancer",
    "Balance",
    "BalanceState",
    # the loop around training
    "improve",
    "Improved",
    "Round",
    # tasks of one step, and who got what
    "tasks",
    "audit",
    # what the stages hand to each other
    "Resources",
    "Fill",
    "Whole",
    "Allocation",
    "TaskAmounts",
    "GroupAudit",
    "Placement",
    "Replicas",
    "Rebalanced",
    "Bound",
    "StepTime",
    "Term",
    "Binding",
    "Status",
    "TokenScorer",
    "FeatureScorer",
    "ShareRule",
    "Rounding",
    "Placer",
]
