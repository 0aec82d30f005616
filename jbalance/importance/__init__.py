"""w: how much each unit matters, by indicators, features, terms or tokens (METHOD step 1)."""

from jbalance.importance.anova import anova
from jbalance.importance.attention_energy import attention_energy
from jbalance.importance.attention_mass import attention_mass
from jbalance.importance.blending import blend, decay_feedback
from jbalance.importance.chi_squared import chi_squared
from jbalance.importance.combine import combine, combined
from jbalance.importance.correlation import correlation
from jbalance.importance.cross_worth import cross_worth
from jbalance.importance.distribution_shift import distribution_shift
from jbalance.importance.entropy import entropy
from jbalance.importance.expected_attention import expected_attention
from jbalance.importance.features import FEATURE_SCORERS, feature_association, feature_importance
from jbalance.importance.key_norm import key_norm
from jbalance.importance.knowledge import (
    Implies,
    Keep,
    Knowledge,
    Matters,
    imply,
    in_spans,
    knowledge,
)
from jbalance.importance.leverage import leverage
from jbalance.importance.max_attention import max_attention
from jbalance.importance.mutual_information import mutual_information
from jbalance.importance.output_error import output_error, protected
from jbalance.importance.reconstruction import reconstruction
from jbalance.importance.sinks_recent import sinks_recent
from jbalance.importance.tfidf import tfidf
from jbalance.importance.tile_error import tile_error
from jbalance.importance.tile_sketch import tile_sketch
from jbalance.importance.token_worth import token_worth
from jbalance.importance.tokens import TOKEN_SCORERS
from jbalance.importance.weighted import weighted
from jbalance.importance.window import window
from jbalance.importance.worth_curve import CURVE_BINS, worth_curve

__all__ = [  # noqa: RUF022  (the order is the pipeline's)
    # units and indicators
    "weighted",
    "distribution_shift",
    # features: relevance, discrimination, complexity
    "mutual_information",
    "correlation",
    "anova",
    "chi_squared",
    "entropy",
    "FEATURE_SCORERS",
    "feature_association",
    "feature_importance",
    # terms of documents
    "tfidf",
    # cached tokens: attended to, about to be, or unlike the rest
    "attention_mass",
    "max_attention",
    "window",
    "expected_attention",
    "key_norm",
    "leverage",
    "sinks_recent",
    "attention_energy",
    "reconstruction",
    "token_worth",
    "cross_worth",
    "TOKEN_SCORERS",
    # heads: what evicting their tokens costs
    "protected",
    "output_error",
    # tiles of attention: what leaving them out costs
    "tile_error",
    "tile_sketch",
    # layers, heads, ...: how many of their tiles or tokens are worth how much
    "worth_curve",
    "CURVE_BINS",
    # several scores, prior knowledge and feedback
    "combine",
    "combined",
    "blend",
    "decay_feedback",
    # rules
    "Matters",
    "Keep",
    "Implies",
    "knowledge",
    "Knowledge",
    "imply",
    "in_spans",
]
