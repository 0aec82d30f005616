"""Block-sparse attention over the tiles of a plan, and the choice of the back end that runs it."""

from __future__ import annotations

import functools
import math
import reprlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import _axes, _fallback, checks
from jbalance._bits import in_32_bits
from jbalance.attention import reference, tiles_gpu, tiles_tpu, tiles_xla
from jbalance.attention._operands import Operands, Rules, Visibility
from jbalance.attention._varying import axes_of
from jbalance.attention.partial import Partial
from jbalance.attention.plan import TilePlan, in_order

# In the order in which they are tried. A back end has `unsupported`, `forward` and `backward`, and the
# platform on which alone it runs, or None.
_TILED = {"gpu": tiles_gpu, "tpu": tiles_tpu, "xla": tiles_xla}
_BACKENDS = (*_TILED, "reference")
_KEYS = "[B, S, K, D]"
_DTYPES = ("float32", "bfloat16", "float16")


@in_32_bits
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: TilePlan,
    *,
    bias: jax.Array | None = None,
    relative_bias: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    task_shares: jax.Array | None = None,
    scale: float | None = None,
    offset: jax.Array | int | None = None,
    backend: str | None = None,
) -> Partial:
    """Block-sparse attention: the tiles of a plan are computed and no others.

    y_t = sum_s softmax_s(x_ts) v_s with x_ts = cap tanh(scale q_t k_s / cap) + bias_ts +
    relative_bias_(t - s + S - 1), over the keys s that query t sees: those in the tiles of its block
    and in none of the masks. Scores and sums are float32. Differentiable in q, k, v, both biases and
    task_shares, through y and lse; the gradient computes the same tiles again. New plans of the same
    capacity do not compile anew. Under vmap the examples run one after the other, on GPUs
    side by side.

    Args:
      q: [B, T, H, D] queries; float32, bfloat16 or float16.
      k: [B, S, K, D] keys of q's dtype; H is a multiple of K.
      v: [B, S, K, D] values of q's dtype.
      plan: the tiles, for T queries and S keys.
      bias: [B|1, H|1, T|1, S|1] added to the logits after the cap; axes of size 1 stay so in memory,
        and in the gradient. That of `rescale.logit_bias` is [1, 1, 1, S].
      relative_bias: [H|1, T + S - 1], that of query t and key s at t - s + S - 1.
      causal: mask keys s > t + offset.
      window: mask keys s <= t + offset - window and, unless causal, s >= t + offset + window.
      soft_cap: cap, > 0.
      segment_ids: ([B, T], [B, S]) int32; queries see the keys with their own id.
      task_shares: [N, S] >= 0, the part of each key's attention that goes to each of N tasks
        (`rescale`'s rule "split": columns that sum to 1). Scores are computed once for all tasks.
      scale: of the products; None for 1 / sqrt(D).
      offset: the position of query 0 among the keys; None for S - T, so that the last query sees every
        key. For query blocks that are split over devices.
      backend: "gpu" and "tpu", kernels that run on these alone; "xla", which runs on all; "reference"
        (dense). None for the kernel of the platform if it can run this, else "xla". An export for
        several platforms at once must name "xla".

    Returns:
      `Partial` with y [B, T, H, D] in q's dtype, or [B, T, N, H, D] with task_shares, and lse [B, T, H]
      float32. A query that sees no key has y = 0, lse = EMPTY and no gradient.

    Raises:
      ValueError: shapes or dtypes that do not fit; an unknown back end, or one that cannot run this.

    Method: Dao et al., FlashAttention (arXiv:2205.14135), over lists of tiles.
    """
    _axes.unsplit(q=q, k=k, v=v, bias=bias, relative_bias=relative_bias, task_shares=task_shares)
    q, k, v = (
        jnp.asarray(checks.floats(name, x, 4, hint))
        for name, x, hint in (("q", q, "[B, T, H, D]"), ("k", k, _KEYS), ("v", v, _KEYS))
    )
    _check_arrays(q, k, v, plan)
    _check_biases(q, k, bias, relative_bias)
    if window is not None:
        window = checks.static_int("window", window, 1, hint="it must be at least 1 key, or None")
    if soft_cap is not None:
        soft_cap = checks.static_float("soft_cap", soft_cap, 0, checks.FLOAT32_MAX, open_low=True)
    segment_ids, task_shares = _check_masks(q, k, segment_ids, task_shares)
    if scale is not None:
        scale = checks.static_float("scale", scale, -checks.SCALE_MAX, checks.SCALE_MAX)
    if offset is not None:
        offset = checks.one_int("offset", offset)
    plan = in_order(plan)
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}: it must be one of {_BACKENDS} or None")
    values = v if task_shares is None else _for_tasks(v, task_shares)
    bias, relative_bias = (
        None if x is None else jnp.asarray(x, jnp.float32) for x in (bias, relative_bias)
    )
    operands = Operands(q, k, values, bias, relative_bias)
    q_ids, k_ids = (None, None) if segment_ids is None else segment_ids
    where = Visibility(
        plan, q_ids, k_ids, None if offset is None else jnp.asarray(offset, jnp.int32)
    )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    rules = Rules(scale, soft_cap, bool(causal), window)
    out = _run(operands, where, rules, backend)
    if task_shares is None:
        return out
    y = out.y.reshape(*out.y.shape[:3], task_shares.shape[0], -1)
    return Partial(jnp.moveaxis(y, 3, 2), out.lse)


def _for_tasks(v, task_shares):
    """Values [B, S, K, N D] of N tasks: their products with the weights are all tasks' outputs."""
    values = jnp.einsum("ns,bskd->bsknd", jnp.asarray(task_shares, jnp.float32), v)
    return values.reshape(*v.shape[:3], -1).astype(v.dtype)


def _run(operands, where, rules, backend) -> Partial:
    """By the back end of that name, or the first that can."""
    if backend == "reference":
        return reference.attend(operands, where, rules)
    operands, where = _same_type((operands, where))
    return _attend(operands, where, rules, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(operands, where, rules, backend):
    return _dispatch("forward", backend, rules, operands, where)


def _attend_forward(operands, where, rules, backend):
    out = _attend(operands, where, rules, backend)
    return out, (operands, where, out)


@in_32_bits
def _attend_backward(rules, backend, saved, cotangent):
    return _dispatch("backward", backend, rules, *saved, cotangent), None


_attend.defvjp(_attend_forward, _attend_backward)


def _dispatch(method, backend, rules, operands, where, *rest):
    """One method of the back end that was asked for, or of the first for each platform."""
    args = operands, where, *rest

    def on(module):
        return functools.partial(getattr(module, method), rules)

    reasons = {name: m.unsupported(operands, where, rules, method) for name, m in _TILED.items()}
    if backend is not None:
        if reason := reasons[backend]:
            raise ValueError(f"backend is {backend!r}, which cannot run this: {reason}")
        return on(_TILED[backend])(*args)
    if reason := reasons.get(jax.default_backend()):
        _fallback.say("attend" if method == "forward" else "the gradient of attend", reason)
    able = [m for name, m in _TILED.items() if not reasons[name]]
    platforms = {m.PLATFORM: on(m) for m in reversed(able) if m.PLATFORM}
    default = next(on(m) for m in able if m.PLATFORM is None)
    return (
        lax.platform_dependent(*args, default=default, **platforms) if platforms else default(*args)
    )


def _same_type(tree):
    """Everything varying over the same mesh axes, as loops inside `shard_map` need it.

    Outside of the custom gradient, so that those of operands that devices share are summed.
    """
    types = [axes_of(x) for x in jax.tree.leaves(tree)]
    axes = frozenset().union(*types)

    def cast(x):
        missing = tuple(axes - axes_of(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def _check_arrays(q, k, v, plan):
    """ValueError unless queries, keys, values and plan fit."""
    checks.instance("plan", plan, TilePlan)
    for name, x in (("q", q), ("k", k)):
        checks.non_empty(name, x)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k has shape {k.shape}: its first and last axes must be those of q, {q.shape}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}: it must have that of k, {k.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads: they must be a multiple of the {k.shape[2]} of k"
        )
    if q.dtype.name not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}: they must be the same, one "
            f"of {', '.join(_DTYPES)}"
        )
    if (plan.num_queries, plan.num_keys) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"plan is for {plan.num_queries} queries and {plan.num_keys} keys: it must be for the "
            f"{q.shape[1]} of q and the {k.shape[1]} of k"
        )
    checks.rank("plan.blocks", plan.blocks, 4, "[B|1, H|1, I, C]")
    shape = (q.shape[0], q.shape[2], plan.num_query_blocks)
    checks.rank("plan.count", plan.count, 3, "[B|1, H|1, I]")
    lists, count = np.shape(plan.blocks), np.shape(plan.count)
    if lists[:3] != count or not _fits(count, shape, 2):
        raise ValueError(
            f"plan has blocks {lists} and count {count}: they must be "
            f"[B|1, H|1, I, C] and [B|1, H|1, I] with (B, H, I) = {shape}"
        )


def _check_biases(q, k, bias, relative_bias):
    """ValueError unless the biases fit queries and keys."""
    (batch, queries, heads), keys = q.shape[:3], k.shape[1]
    for name, x in (("bias", bias), ("relative_bias", relative_bias)):
        if x is not None and not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(f"{name} has dtype {jnp.result_type(x)}: it must be floating point")
    if bias is not None and not _fits(np.shape(bias), (batch, heads, queries, keys), 4):
        raise ValueError(
            f"bias has shape {np.shape(bias)}: it must be [B|1, H|1, T|1, S|1] with (B, H, T, S) = "
            f"{(batch, heads, queries, keys)}"
        )
    shape = heads, queries + keys - 1
    if relative_bias is not None and not _fits(np.shape(relative_bias), shape, 1):
        raise ValueError(
            f"relative_bias has shape {np.shape(relative_bias)}: it must be [H|1, T + S - 1] = "
            f"[{heads}|1, {shape[1]}]"
        )


def _check_masks(q, k, segment_ids, task_shares):
    """segment_ids in int32 and task_shares in float32; ValueError unless these fit."""
    if segment_ids is not None:
        if not isinstance(segment_ids, tuple | list):
            raise ValueError(
                f"segment_ids is {reprlib.repr(segment_ids)}: it must be the pair of ids"
            )
        want = (q.shape[:2], k.shape[:2])
        if len(segment_ids) != 2 or tuple(np.shape(x) for x in segment_ids) != want:
            raise ValueError(
                f"segment_ids has shapes {tuple(np.shape(x) for x in segment_ids)}: it must be the "
                f"pair ([B, T], [B, S]) = {want}"
            )
        segment_ids = tuple(
            checks.int_in_range(f"segment_ids[{i}]", x) for i, x in enumerate(segment_ids)
        )
    if task_shares is not None:
        checks.rank("task_shares", task_shares, 2, "[N, S]")
        checks.non_empty("task_shares", task_shares)
        if np.shape(task_shares)[1] != k.shape[1]:
            raise ValueError(
                f"task_shares has shape {np.shape(task_shares)}: it must be [N, S] with the S = "
                f"{k.shape[1]} of k"
            )
        task_shares = checks.non_negative("task_shares", task_shares)
    return segment_ids, task_shares


def _fits(shape, want, num_free):
    """Whether a shape is `want`, or 1 in its first `num_free` axes."""
    return len(shape) == len(want) and all(
        got in ((n, 1) if axis < num_free else (n,))
        for axis, (got, n) in enumerate(zip(shape, want, strict=True))
    )
