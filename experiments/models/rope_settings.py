"""The rotary embedding that a config.json describes, by older writers' keys and by newer ones'."""

from __future__ import annotations

import math
from typing import Any

from experiments.models.rotary import RopeScaling
from experiments.models.settings import MOST, Settings

KINDS = ("default", "linear", "llama3", "dynamic", "yarn", "longrope")
ORIGINAL = "original_max_position_embeddings"
FULL, LOCAL = "full_attention", "sliding_attention"


def rope_options(
    raw: Settings, head_dim: int, trained: int, *, has_local: bool, has_partial: bool
) -> dict[str, Any]:
    """Fields of `TransformerConfig` about the rotary embedding.

    Newer writers gather them in rope_parameters, older ones have rope_theta and rope_scaling.

    Args:
      raw: the file.
      head_dim: D.
      trained: positions of training.
      has_local: whether layers with windows have a base of their own.
      has_partial: whether a part of the features may rotate.
    """
    given = {key: raw.get(key) for key in ("rope_parameters", "rope_scaling") if raw.has(key)}
    for key, value in given.items():
        if not isinstance(value, dict):
            raise raw.wrong(key, "an object")
    values = dict(*list(given.values())[:1])
    if any(value != values for value in given.values()):
        raise raw.wrong("rope_scaling", f"the same as rope_parameters, {values}")
    where = f"{' and '.join(given)} in {raw.where}"
    options: dict[str, Any] = {}
    if has_local:
        local = raw.positive("rope_local_base_freq")
        if LOCAL in values or FULL in values:
            values, local = _by_layer(where, values, local)
        options["local_rope_base"] = local
    rope = Settings(where, values)
    options["rope_base"] = raw.positive("rope_theta", 10_000.0)
    if rope.has("rope_theta"):
        options["rope_base"] = rope.positive("rope_theta")
    options |= _rotated(raw, rope, head_dim, has_partial)
    options["rope_scaling"] = _scaling(raw, rope, trained)
    return options


def _by_layer(where: str, values: dict[str, Any], local: float) -> tuple[dict[str, Any], float]:
    """(settings of the layers without a window, base of those with one)."""
    both = Settings(where, values)
    for key in (FULL, LOCAL):
        if not isinstance(both.get(key), dict):
            raise both.wrong(key, "an object")
    both.none_left(lambda key: False)
    of_local = Settings(f"{LOCAL} of {where}", values[LOCAL])
    of_local.only("rope_type", "default")
    base = of_local.positive("rope_theta", local)
    of_local.none_left(lambda key: False)
    return values[FULL], base


def _rotated(raw: Settings, rope: Settings, head_dim: int, has_partial: bool) -> dict[str, Any]:
    """A part of the features, by a factor in either place."""
    for settings in (raw, rope):
        if not has_partial:
            settings.only("partial_rotary_factor", 1.0)
        elif settings.has("partial_rotary_factor"):
            part = settings.positive("partial_rotary_factor")
            rotated = int(head_dim * part)
            if part > 1 or rotated < 2 or rotated % 2:
                raise settings.wrong(
                    "partial_rotary_factor",
                    f"at most 1, and an even number of the head's {head_dim} features",
                )
            return {"rotated_features": None if rotated == head_dim else rotated}
    return {}


def _scaling(raw: Settings, rope: Settings, trained: int) -> RopeScaling | None:
    kind = _kind(raw, rope)
    # Beside the frequencies in some files, in their object in others.
    original = raw.whole(ORIGINAL, 2, MOST) if raw.has(ORIGINAL) else None
    scaling: dict[str, Any] | None
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = {"factor": rope.positive("factor")}
        rope.has(ORIGINAL)
    elif kind == "llama3":
        scaling = {
            "factor": rope.positive("factor"),
            "low_frequency_factor": rope.positive("low_freq_factor"),
            "high_frequency_factor": rope.positive("high_freq_factor"),
            "original_positions": rope.whole(ORIGINAL, 1, MOST),
        }
    elif kind == "dynamic":
        scaling = {"factor": rope.positive("factor"), "original_positions": trained}
    elif kind == "yarn":
        scaling = _yarn(rope, trained)
    else:
        scaling = _longrope(rope, trained, original)
    rope.none_left(lambda key: False)
    return None if scaling is None else rope.made(RopeScaling, kind=kind, **scaling)


def _kind(raw: Settings, rope: Settings) -> str:
    kinds = {rope.text(key) for key in ("rope_type", "type") if rope.has(key)}
    if len(kinds) > 1:
        raise rope.wrong("rope_type", f"the same as type, {rope.values['type']!r}")
    kind = kinds.pop() if kinds else "default"
    # What Phi-3's first writers called it.
    if kind == "su" or (kind == "yarn" and rope.has("short_factor")):
        kind = "longrope"
    if kind not in KINDS:
        raise ValueError(
            f"unsupported rope_scaling rope_type={kind!r} in {raw.where}: "
            f"{', '.join(map(repr, KINDS))} are implemented"
        )
    return kind


def _yarn(rope: Settings, trained: int) -> dict[str, Any]:
    factor = rope.positive("factor")
    own = rope.positive("attention_factor") if rope.has("attention_factor") else None
    scales = [rope.positive(key) for key in ("mscale", "mscale_all_dim") if rope.has(key)]
    if own is None and len(scales) == 2 and factor > 1:
        above, below = (0.1 * scale * math.log(factor) + 1 for scale in scales)
        own = above / below
    return {
        "factor": factor,
        "original_positions": rope.whole(ORIGINAL, 1, MOST, trained),
        "attention_factor": own,
        "beta_fast": rope.positive("beta_fast", 32.0),
        "beta_slow": rope.positive("beta_slow", 1.0),
        "truncate": rope.flag("truncate", True),
    }


def _longrope(rope: Settings, trained: int, original: int | None) -> dict[str, Any]:
    if rope.has(ORIGINAL):
        original = rope.whole(ORIGINAL, 2, MOST)
    factor = rope.positive("factor", None if original is None else trained / original)
    return {
        "factor": factor if original is None else trained / original,
        "original_positions": trained if original is None else original,
        "attention_factor": (
            rope.positive("attention_factor") if rope.has("attention_factor") else None
        ),
        "short_factors": rope.positives("short_factor"),
        "long_factors": rope.positives("long_factor"),
    }
