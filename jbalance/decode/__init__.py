"""Decoding within the memories that devices give: prompts read, planned, continued in fixed bytes."""

from jbalance.decode.context import Context, read
from jbalance.decode.engine import join, leave, step, tell
from jbalance.decode.generate import generate
from jbalance.decode.memory import Fit, MemoryLosses, fit_memory, memory_losses
from jbalance.decode.model import AttentionSpec, Model
from jbalance.decode.plan import Plan, Reserve, fit, ladder
from jbalance.decode.sampling import Sampling
from jbalance.decode.saved import notes_of, restore, save
from jbalance.decode.state import State, create
from jbalance.decode.weights import QuantizedArray, quantize_weights
from jbalance.decode.worth import fit_worth
from jbalance.importance.predicted_worth import WorthWeights

__all__ = [  # noqa: RUF022  (the order is the pipeline's)
    # what a decoder offers
    "AttentionSpec",
    "Model",
    "fit_worth",
    "WorthWeights",
    # its weights in fewer bits, and one memory for them and the cache
    "quantize_weights",
    "QuantizedArray",
    "memory_losses",
    "MemoryLosses",
    "fit_memory",
    "Fit",
    # prompts in, tokens out
    "generate",
    "Sampling",
    # a context that many requests read
    "read",
    "Context",
    "Reserve",
    "fit",
    "ladder",
    "Plan",
    # requests that come and go
    "State",
    "create",
    "join",
    "tell",
    "step",
    "leave",
    "save",
    "restore",
    "notes_of",
]
