"""Shares into amounts under the budgets: real, whole, or levels of a ladder with prices."""

from jbalance._water_fill import water_fill
from jbalance.allocate.ladder import ladder
from jbalance.allocate.whole import ROUNDINGS, Rounding, whole

__all__ = ["ROUNDINGS", "Rounding", "ladder", "water_fill", "whole"]
