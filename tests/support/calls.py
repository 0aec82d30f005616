"""One call that works of every public function, and which of its arguments are static."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

import jbalance as jb
from jbalance import allocate, attention, cache, importance, place, rescale, resources, shares
from jbalance.attention import Tiling

W = np.array([1.0, 2.0, 3.0])
OF = np.array([0, 1, 1])
X, Y = np.arange(12.0).reshape(6, 2), np.array([0, 1, 0, 1, 0, 1])
Q = np.linspace(-1, 1, 8 * 2 * 8).astype(np.float32).reshape(8, 2, 8)
K = Q[:, :1]
TILING = Tiling(8, 8, 4, 4)
Q4, K4 = Q[None], K[None]
PLAN = attention.dense(TILING)
SCORE = np.ones((1, 2, 2, 2), np.float32)
MEMORY = {"memory": W, "memory_capacity": np.array([9.0, 9.0])}
CACHE = cache.create(40_000, 1, 1, 8)
FRAMES = cache.create(40_000, 1, 1, 8, recent_tokens=0)
CODES = cache.quantize(K, 4)
SAMPLES = {"x": X, "y": Y, "num_classes": 2}
TOKENS = {"q": Q, "k": K, "v": K}
WHOLE = {"w": W, "budget": np.array([6, 6]), "floor": 0, "cap": 9, "device_of": OF}
LADDER = {
    "values": np.array([[0.0, 1], [0, 2], [0, 3]]),
    "costs": np.array([1, 2]),
    "budgets": np.array([5, 5]),
    "device_of": OF,
    "total_budget": 9,
}

# What works, and which of its arguments are static whole numbers.
CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "weighted": (importance.weighted, {"association": X, "complexity": W[:2]}, ""),
    "distribution_shift": (
        importance.distribution_shift,
        {"before": X + 1, "after": X[::-1] + 1},
        "",
    ),
    "entropy": (importance.entropy, SAMPLES | {"bins": 4}, "num_classes bins"),
    "mutual_information": (
        importance.mutual_information,
        SAMPLES | {"bins": 4},
        "num_classes bins",
    ),
    "correlation": (importance.correlation, SAMPLES, "num_classes"),
    "anova": (importance.anova, SAMPLES, "num_classes"),
    "chi_squared": (importance.chi_squared, SAMPLES, "num_classes"),
    "feature_importance": (importance.feature_importance, {"x": X, "y": Y, "weights": W}, ""),
    "tfidf": (importance.tfidf, {"counts": X}, ""),
    "attention_mass": (importance.attention_mass, TOKENS, ""),
    "max_attention": (importance.max_attention, TOKENS | {"min_distance": 1}, "min_distance"),
    "window": (importance.window, TOKENS | {"window": 2, "kernel": 3}, "window kernel"),
    "expected_attention": (
        importance.expected_attention,
        TOKENS | {"future": 4, "num_sinks": 1, "epsilon": 0.1, "frequencies": np.arange(1.0, 5.0)},
        "future num_sinks",
    ),
    "key_norm": (importance.key_norm, TOKENS, ""),
    "leverage": (
        importance.leverage,
        TOKENS | {"ridge": 0.1, "frequencies": np.arange(1.0, 5.0)},
        "",
    ),
    "sinks_recent": (importance.sinks_recent, TOKENS | {"num_sinks": 1}, "num_sinks"),
    "attention_energy": (
        importance.attention_energy,
        TOKENS | {"queries": 4, "min_distance": 1, "num_tokens": 8},
        "queries min_distance",
    ),
    "reconstruction": (
        importance.reconstruction,
        TOKENS
        | {"reach": 1, "samples": 4, "num_sinks": 1, "num_tokens": 8, "shift": 8, "start": 0},
        "reach samples num_sinks",
    ),
    "token_worth": (
        importance.token_worth,
        TOKENS | {"frequencies": np.arange(1.0, 5.0), "num_tokens": 8},
        "",
    ),
    "cross_worth": (
        importance.cross_worth,
        {"q": Q, "k": K, "scale": 0.5, "num_frames": 8},
        "",
    ),
    "protected": (
        importance.protected,
        {"w": W, "num_sinks": 1, "num_recent": 1},
        "num_sinks num_recent",
    ),
    "output_error": (
        importance.output_error,
        TOKENS | {"w": np.ones((1, 8)), "counts": (2, 4), "num_local": 1},
        "num_local",
    ),
    "tile_error": (
        importance.tile_error,
        {"q": Q4, "k": K4, "v": K4, "tiling": TILING, "rows": 2},
        "rows",
    ),
    "tile_sketch": (
        importance.tile_sketch,
        {"q": Q4, "k": K4, "v": K4, "tiling": TILING, "rows": 2},
        "rows",
    ),
    "worth_curve": (importance.worth_curve, {"value": W, "where": np.ones(3, bool)}, ""),
    "combine": (importance.combine, {"scores": X, "weights": np.ones(6)}, ""),
    "blend": (
        importance.blend,
        {"w": W, "prior": W, "beta": 0.5, "feedback": W / 3, "eta": 0.5},
        "",
    ),
    "decay_feedback": (
        importance.decay_feedback,
        {"feedback": W / 3, "decay": 0.5, "new": W / 3},
        "",
    ),
    "imply": (
        importance.imply,
        {"w": W, "known": importance.knowledge([importance.Keep(OF == 1)], 3)},
        "",
    ),
    "in_spans": (
        functools.partial(importance.in_spans, spans=[(0, 3)]),
        {"offsets": np.array([[0, 2], [2, 4]])},
        "",
    ),
    "AttentionDims": (
        resources.AttentionDims,
        {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "num_layers num_heads num_kv_heads head_dim",
    ),
    "kv_entry_bytes": (
        resources.kv_entry_bytes,
        {"head_dim": 8, "bits": 4, "scale_bits": 16},
        "head_dim bits scale_bits",
    ),
    "blocks": (resources.blocks, {"num_bytes": 100, "block_bytes": 10}, "block_bytes"),
    "partition": (
        resources.partition,
        {"capacity": 9.0, "attention": W, "level_of": OF, "num_levels": 2},
        "num_levels",
    ),
    "status": (
        resources.status,
        {"capacity": np.array([9, 9]), "demand": W, "used": W, "device_of": OF},
        "",
    ),
    "thirds": (resources.thirds, {"num_layers": 6}, "num_layers"),
    "water_fill": (allocate.water_fill, {"w": W, "budget": 6.0, "floor": 0.5, "cap": 9.0}, ""),
    "whole": (allocate.whole, WHOLE, ""),
    "explain.whole": (jb.explain.whole, WHOLE, ""),
    "rank_correlation": (jb.explain.rank_correlation, {"x": W, "y": W}, ""),
    "ladder": (allocate.ladder, LADDER, ""),
    "explain.ladder": (jb.explain.ladder, LADDER, ""),
    "what_if": (
        jb.explain.what_if,
        LADDER | {"change": np.array([1, -1]), "total_change": 1},
        "",
    ),
    "proportional": (shares.proportional, {"w": W, "where": np.ones(3, bool)}, ""),
    "softmax": (shares.softmax, {"w": W, "temperature": 1.0, "where": np.ones(3, bool)}, ""),
    "uniform": (shares.uniform, {"num_units": 3}, "num_units"),
    "constrained": (
        shares.constrained,
        {"alpha": W / 6, "floor": 0.1, "cap": 0.9, "group_of": OF, "group_floor": W[:2] / 9},
        "",
    ),
    "priced": (shares.priced, {"curves": np.ones((3, importance.CURVE_BINS)), "amount": 9.0}, ""),
    "bound": (
        place.bound,
        {"loads": W, "num_devices": 2, "capacity": W[:2], "max_count": 2},
        "num_devices max_count",
    ),
    "bound with slots": (
        place.bound,
        {"loads": W, "num_devices": 2, "num_slots": 4},
        "num_devices num_slots",
    ),
    "bound with groups": (
        place.bound,
        {"loads": W, "num_devices": 2, "group_of": OF, "num_nodes": 2},
        "num_devices num_nodes",
    ),
    "visible_keys": (place.visible_keys, {"segment_ids": OF, "block_q": 2}, "block_q"),
    "causal_tiles": (
        place.causal_tiles,
        {"segment_ids": OF, "num_ranks": 2, "block_q": 2, "swaps": 2},
        "num_ranks block_q swaps",
    ),
    "contiguous": (
        place.contiguous,
        {"loads": W, "num_devices": 2, "capacity": W[:2]} | MEMORY,
        "num_devices",
    ),
    "pack": (
        place.pack,
        {"loads": W, "num_devices": 2, "capacity": W[:2], "max_count": 2, "swaps": 2} | MEMORY,
        "num_devices max_count swaps",
    ),
    "over_layers": (
        place.over_layers,
        {"loads": X, "memory": X, "memory_capacity": 99 * W, "speed": W, "swaps": 2},
        "swaps",
    ),
    "rebalance": (
        place.rebalance,
        {
            "device_of": OF,
            "loads": W,
            "size": OF,
            "num_devices": 2,
            "capacity": W[:2],
            "max_count": 2,
            "memory_capacity": 9 * W[:2],
            "cost": 0.1,
            "threshold": 0.1,
            "swaps": 2,
        },
        "num_devices max_count swaps",
    ),
    "replicate": (
        place.replicate,
        {"loads": W, "num_devices": 2, "num_slots": 4, "swaps": 2},
        "num_devices num_slots swaps",
    ),
    "rescale.weights": (
        rescale.weights,
        {"alpha": W, "association": np.ones((3, 2)), "attention": W[:2]},
        "",
    ),
    "logit_bias": (rescale.logit_bias, {"alpha": W, "association": np.ones((3, 2))}, ""),
    "divide": (
        jb.tasks.divide,
        {
            "w": W,
            "active": np.ones(3, bool),
            "batch": 4,
            "tokens": 8,
            "capacity": np.array([9]),
            "demand": np.ones((1, 3), int),
            "used": np.ones((1, 3), int),
            "floor": 0.1,
        },
        "",
    ),
    "remaining": (
        jb.tasks.remaining,
        {"capacity": np.array([9]), "demand": np.ones((1, 3), int), "used": np.ones((1, 3), int)},
        "",
    ),
    "task_of": (jb.tasks.task_of, {"examples": OF, "batch": 4}, "batch"),
    "by_group": (
        jb.audit.by_group,
        {"attention": W, "group_of": OF, "num_groups": 2, "error": W},
        "num_groups",
    ),
    "Tiling": (
        Tiling,
        {"num_queries": 8, "num_keys": 8, "block_q": 4, "block_k": 4},
        "num_queries num_keys block_q block_k",
    ),
    "attention.window": (
        attention.window,
        {"size": 4, "tiling": TILING, "num_sinks": 1},
        "size num_sinks",
    ),
    "from_mask": (
        attention.from_mask,
        {"mask": np.tri(2, dtype=bool)[None, None], "tiling": TILING, "capacity": 2},
        "capacity",
    ),
    "segments": (
        attention.segments,
        {"q_ids": np.ones((1, 8), int), "k_ids": np.ones((1, 8), int), "tiling": TILING},
        "",
    ),
    "candidates": (attention.candidates, {"tiling": TILING}, ""),
    "dense": (attention.dense, {"tiling": TILING}, ""),
    "choose": (
        attention.choose,
        {"score": SCORE, "num_tiles": 6, "tiling": TILING, "floor": 0.5, "capacity": 2},
        "capacity",
    ),
    "balanced_plan": (
        attention.balanced_plan,
        {"q": Q4, "k": K4, "v": K4, "budget_tiles": 6, "tiling": TILING, "rows": 2},
        "rows",
    ),
    "attend": (
        attention.attend,
        {
            "q": Q4,
            "k": K4,
            "v": K4,
            "plan": PLAN,
            "window": 4,
            "soft_cap": 9.0,
            "scale": 0.5,
            "offset": 0,
            "segment_ids": (np.ones((1, 8), int), np.ones((1, 8), int)),
            "task_shares": np.ones((2, 8)) / 2,
        },
        "window",
    ),
    "cache.create": (
        cache.create,
        {
            "budget_bytes": 40_000,
            "num_layers": 1,
            "num_kv_heads": 1,
            "head_dim": 8,
            "num_requests": 1,
            "page_bytes": 512,
            "recent_tokens": 8,
        },
        "budget_bytes num_layers num_kv_heads head_dim num_requests page_bytes recent_tokens",
    ),
    "cache.release": (cache.release, {"cache": CACHE, "request": 0}, ""),
    "cache.allowance": (
        cache.allowance,
        {
            "cache": CACHE,
            "weights": np.ones(1),
            "active": np.ones(1, bool),
            "floors_pages": np.ones(1, int),
        },
        "",
    ),
    "cache.prefill": (
        cache.prefill,
        {"cache": CACHE, "layer": 0, "q": Q4, "k": K4, "v": K4, "frequencies": np.arange(1.0, 5.0)}
        | {"lengths": np.array([8]), "allowance_pages": np.array([40]), "scale": 0.5},
        "",
    ),
    "cache.step": (
        cache.step,
        {"cache": CACHE, "layer": 0, "q": Q4[:, 0], "k": K4[:, 0], "v": K4[:, 0]}
        | {"active": np.ones(1, bool), "allowance_pages": np.array([40]), "scale": 0.5},
        "",
    ),
    "cache.write": (
        cache.write,
        {"cache": FRAMES, "k": K4[None], "v": K4[None], "w": np.ones((1, 1, 1, 8), np.float32)}
        | {"lengths": np.array([8])},
        "",
    ),
    "cache.attend": (cache.attend, {"cache": FRAMES, "layer": 0, "q": Q4, "scale": 0.5}, ""),
    "quantize": (cache.quantize, {"x": K, "bits": 4}, "bits"),
    "dequantize": (cache.dequantize, {"codes": CODES, "head_dim": 8, "bits": 4}, "head_dim bits"),
    "AttentionSpec": (
        jb.decode.AttentionSpec,
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "window": 4,
            "soft_cap": 9.0,
            "scale": 1.0,
        },
        "num_heads num_kv_heads head_dim window",
    ),
    "Sampling": (
        jb.decode.Sampling,
        {"temperature": 1.0, "top_k": 2, "top_p": 0.5, "seed": 1},
        "top_k seed",
    ),
    "Reserve": (jb.decode.Reserve, {"num_requests": 2, "new_tokens": 3}, "num_requests new_tokens"),
    "padding": (jb.sharded.padding, {"num_units": 5, "num_devices": 2}, "num_units num_devices"),
    "balancer": (jb.balancer, {"decay": 0.5, "beta": 0.0, "eta": 0.0}, ""),
}
# Arguments that are objects of the library, or tuples.
STRUCTURES = {"known", "tiling", "plan", "cache", "codes", "segment_ids"}
RETURN_NO_ARRAYS = {"AttentionDims", "AttentionSpec", "Sampling", "Reserve", "Tiling", "balancer"}
