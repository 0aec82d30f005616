"""One run: what a scorer says of a context, against what its parts cost the text that follows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.harness import texts
from experiments.kv_budget import measure
from experiments.models import load
from experiments.models.worth import decoder_of
from jbalance import explain, importance
from jbalance.decode import Model

TEXTS = ("lcet10", "plrabn12", "alice29")
RANDOM = "random"
SCORERS = (*importance.TOKEN_SCORERS, "combined", *measure.WORTHS)
GROUP = 16  # tokens that are hidden together
PARTS = 6  # of the context, whose Shapley values are exact: 64 coalitions


class Sizes(NamedTuple):
    """Of a study."""

    context: int  # tokens; those between the sinks and the recent ones are taken away
    continuation: int  # tokens that are predicted
    layers: int  # that are asked about, evenly from the first to the last


class Scored(NamedTuple):
    """Of the inner tokens of a context: those that any scorer may put anywhere."""

    effects: dict[str, np.ndarray]  # by kind of unit, [U] the causal effect in nats a token
    w: dict[str, np.ndarray]  # by scorer, [L, K, inner tokens]


@functools.cache
def loaded() -> tuple[Any, Any, Model]:
    found = load("smollm2")
    return found.model, found.spoken.tokenizer, decoder_of(found.model)


@functools.cache
def tokens_of(name: str) -> np.ndarray:
    return texts.encode(loaded()[1], texts.text_of(name))


class Read(NamedTuple):
    """A stretch of a text."""

    context: np.ndarray
    after: np.ndarray  # and the one token that is only predicted

    def kl(self, hidden: np.ndarray) -> np.ndarray:
        """Of interventions that hide some inner tokens [N, L, K, inner] of the context."""
        kept = np.ones((*hidden.shape[:3], self.context.size), bool)
        kept[..., inner_of(self.context.size)] = ~hidden
        return np.asarray(explain.ablate(loaded()[2], self.context, self.after, tokens=kept).kl)


def read(seed: int, sizes: Sizes) -> Read:
    """A stretch that the seed chooses."""
    ids, size = tokens_of(TEXTS[seed % len(TEXTS)]), sizes.context + sizes.continuation + 1
    start = int(np.random.default_rng([seed, 3]).integers(len(ids) - size))
    return Read(*np.split(ids[start : start + size], [sizes.context]))


def inner_of(size: int) -> slice:
    """The tokens of a context between the sinks and the recent ones."""
    return slice(measure.NUM_SINKS, size - measure.NUM_RECENT)


@functools.cache
def scored(seed: int, sizes: Sizes) -> Scored:
    """A stretch of a text that the seed chooses: all scorers, and every ablation."""
    text = read(seed, sizes)
    measured = measure.prefill(loaded()[0], text.context, SCORERS)
    inner = inner_of(sizes.context)
    w = {name: np.asarray(x, np.float64)[..., inner] for name, x in measured.w.items()}
    w[RANDOM] = np.random.default_rng([seed, 4]).random(w["sketch"].shape)
    return Scored(_effects(text.kl, w["sketch"].shape, sizes), w)


def worth_of_parts(seed: int, sizes: Sizes, kept: np.ndarray) -> np.ndarray:
    """[N] minus the KL with some parts [N, parts] of the context's inner tokens, in all heads."""
    text, model = read(seed, sizes), loaded()[2]
    inner = np.arange(sizes.context)[inner_of(sizes.context)].size
    part = np.arange(inner) * kept.shape[1] // inner
    everywhere = np.ones((1, model.num_layers, model.num_kv_heads, inner), bool)
    return -text.kl(~kept[:, part][:, None, None] & everywhere)


def _effects(kl, shape: tuple[int, ...], sizes: Sizes) -> dict[str, np.ndarray]:
    """KL of every kind of units."""
    layers, heads, inner = shape
    asked = asked_layers(layers, sizes)
    group = np.arange(inner) // GROUP
    of_tokens = np.arange(group[-1] + 1)[:, None] == group
    of_layers = asked[:, None] == np.arange(layers)
    of_heads = np.eye(heads, dtype=bool)
    everywhere = np.ones((1, layers, heads, inner), bool)
    part = np.arange(inner) * PARTS // inner

    def worth(kept: Any) -> np.ndarray:
        """Of coalitions of parts: the text is the less surprising, the more of them are there."""
        return -kl(~np.asarray(kept)[:, part][:, None, None] & everywhere)

    return {
        "tokens": kl(of_tokens[:, None, None] & everywhere),
        "heads": kl(
            np.einsum("nl,mk->nmlk", of_layers, of_heads).reshape(-1, layers, heads, 1) & everywhere
        ),
        "layers": kl(of_layers[:, :, None, None] & everywhere),
        "parts, Shapley": np.asarray(explain.exact_shapley(worth, PARTS).value),
    }


def asked_layers(layers: int, sizes: Sizes) -> np.ndarray:
    """[n] of which all heads are asked about."""
    return np.linspace(0, layers - 1, min(layers, sizes.layers)).round().astype(int)


def sums(w: np.ndarray, sizes: Sizes) -> dict[str, np.ndarray]:
    """What a scorer's w [L, K, inner] says of each kind of units: its sum over what is hidden."""
    layers, _, inner = w.shape
    asked = asked_layers(layers, sizes)
    of_token = w.sum(axis=(0, 1))
    return {
        "tokens": np.bincount(np.arange(inner) // GROUP, of_token),
        "heads": w.sum(axis=2)[asked].reshape(-1),
        "layers": w.sum(axis=(1, 2))[asked],
        "parts, Shapley": np.bincount(np.arange(inner) * PARTS // inner, of_token),
    }


def run(scorer: str, seed: int, sizes: Sizes) -> Mapping[str, Any]:
    """Rank correlations of a scorer with the ablations of a seed's context."""
    found = scored(seed, sizes)
    said = sums(found.w[scorer], sizes)
    return {
        "figures": {
            kind: float(explain.rank_correlation(jnp.asarray(_scaled(said[kind])), effect))
            for kind, effect in found.effects.items()
        }
    }


def _scaled(x: np.ndarray) -> np.ndarray:
    """Within float32, in the same order."""
    return x / max(abs(x).max(), 1e-30)
