"""The table of token scorers: what `combined` and the property tests run."""

from __future__ import annotations

from jbalance.importance.attention_mass import attention_mass
from jbalance.importance.expected_attention import expected_attention
from jbalance.importance.key_norm import key_norm
from jbalance.importance.leverage import leverage
from jbalance.importance.max_attention import max_attention
from jbalance.importance.sinks_recent import sinks_recent
from jbalance.importance.window import window
from jbalance.types import TokenScorer

TOKEN_SCORERS: dict[str, TokenScorer] = {
    "attention_mass": attention_mass,  # what was attended to
    "max_attention": max_attention,
    "window": window,
    "expected_attention": expected_attention,  # what will be attended to
    "key_norm": key_norm,  # what no query is asked about
    "leverage": leverage,
    "sinks_recent": sinks_recent,
}
