"""Balancing tasks in training: weights of their gradients, as optax aggregators.

`aggregator(upgrad(), tasks)` goes before an optimizer in `optax.chain`; its update takes the tasks'
gradients stacked, [K, ...] each, and gives their weighted sum.
"""

from jbalance.multitask.baselines import dwa, mean, random
from jbalance.multitask.by_importance import by_importance
from jbalance.multitask.fair import fair
from jbalance.multitask.famo import famo
from jbalance.multitask.gradnorm import gradnorm
from jbalance.multitask.gramian import combine, gramian
from jbalance.multitask.pcgrad import pcgrad
from jbalance.multitask.types import AggregatorState, TaskStats, TaskWeighting, aggregator
from jbalance.multitask.uncertainty import uncertainty
from jbalance.multitask.upgrad import upgrad

__all__ = [
    "AggregatorState",
    "TaskStats",
    "TaskWeighting",
    "aggregator",
    "by_importance",
    "combine",
    "dwa",
    "fair",
    "famo",
    "gradnorm",
    "gramian",
    "mean",
    "pcgrad",
    "random",
    "uncertainty",
    "upgrad",
]
