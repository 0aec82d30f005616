"""Why units got what they got: reasons and prices, what if, interventions, in numbers and in words."""

from jbalance.explain.ablation import Effect, ablate
from jbalance.explain.agreement import rank_correlation
from jbalance.explain.games import Shapley, exact_shapley, leave_one_out, shapley
from jbalance.explain.heads import HeadReasons, heads, sentence
from jbalance.explain.ladder import LadderReasons, WhatIf, ladder, what_if
from jbalance.explain.whole import WholeReasons, whole

__all__ = [  # noqa: RUF022  (pipeline order)
    # allocations, unit by unit
    "whole",
    "WholeReasons",
    "ladder",
    "LadderReasons",
    "what_if",
    "WhatIf",
    # a context's heads
    "heads",
    "HeadReasons",
    "sentence",
    # interventions
    "ablate",
    "Effect",
    "leave_one_out",
    "shapley",
    "exact_shapley",
    "Shapley",
    "rank_correlation",
]
