"""Shares into amounts under the budgets: real, whole, or levels of a ladder with prices."""

from jbalance._water_fill import water_fill
from jbalance.allocate.ladder import ladder
from jbalance.allocate.whole import ROUNDINGS, whole

__all__ = ["ROUNDINGS", "ladder", "water_fill", "whole"]
