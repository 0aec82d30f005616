"""Flash attention over lists of tiles, as loops that XLA compiles, written for the speed of a CPU.

One loop runs over the query blocks and, inside, one over the tiles of each, whose trip count is data.
What a CPU makes fast was measured:
- a tile's keys and values are read where they lie, so that nothing is laid out anew in advance;
- a product that contracts the first axis of both operands is slow: in the backward pass scores lie
  with keys before queries, which leaves one such;
- logits are in base 2, and `exp2` takes a third of the time of `jnp.exp`;
- heads that share keys and a plan are rows of one product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from jbalance._exp2 import LOG2_E, exp2
from jbalance.attention._blocks import Problem
from jbalance.attention._operands import Operands, Rules, Visibility
from jbalance.attention._slices import empty, pad, padded
from jbalance.attention.partial import EMPTY, NO_TOP, Partial

PLATFORM = None


def unsupported(
    operands: Operands, where: Visibility, rules: Rules, method: str = "forward"
) -> str | None:
    """Why this back end cannot run that, or None."""
    return None


def forward(rules: Rules, operands: Operands, where: Visibility) -> Partial:
    """y [B, T, H, E] in q's dtype and lse [B, T, H] float32.

    A vmapped loop would run for the longest list of all examples, hence `sequential_vmap`.
    """
    return sequential_vmap(functools.partial(_forward, rules))(operands, where)


def backward(
    rules: Rules, operands: Operands, where: Visibility, out: Partial, cotangent: Partial
) -> Operands:
    """The gradient to the operands, from the tiles computed once more."""
    return sequential_vmap(functools.partial(_backward, rules))(operands, where, out, cotangent)


@functools.partial(jax.jit, static_argnums=0)  # once for all eager calls of equal shapes
def _forward(rules, operands, where):
    problem = Problem(*padded(operands, where), rules)
    shape = problem.q_shape
    nothing = empty((*shape[:3], problem.operands.v.shape[-1]), operands.q.dtype)
    out = problem.varying((nothing, empty(shape[:3], jnp.float32)))

    def block(r, out):
        row = problem.row(r)
        query = problem.queries(row, problem.logit_scale)

        def step(tile, carry):
            y, mass, top = carry
            logits = _dot("qd,kd->qk", query, problem.keys(tile))
            logits = problem.logits(tile, logits)[0]
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            weight = exp2(logits - new_top[:, None])
            decay = exp2(top - new_top)
            y = y * decay[:, None] + _dot("qk,kd->qd", weight, problem.values(tile))
            return y, mass * decay + jnp.sum(weight, axis=-1), new_top

        rows = query.shape[0]
        start = (
            jnp.zeros((rows, nothing.shape[-1]), jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.full(rows, NO_TOP, jnp.float32),
        )
        y, mass, top = problem.over_tiles(row, step, problem.varying(start))
        some = mass > 0
        mass = jnp.where(some, mass, 1.0)
        lse = jnp.where(some, (top + jnp.log2(mass)) / LOG2_E, EMPTY)
        return problem.write(out[0], y / mass[:, None], row), problem.write(out[1], lse, row)

    y, lse = lax.fori_loop(0, problem.num_rows, block, out)
    return Partial(*(x[:, : where.plan.num_queries] for x in (y, lse)))


@functools.partial(jax.jit, static_argnums=0)
def _backward(rules, operands, where, out, cotangent):
    dtypes = [x.dtype for x in operands[:3]]
    num_queries, num_keys = where.plan.num_queries, where.plan.num_keys
    problem = Problem(*padded(operands, where), rules)
    short = problem.q_shape[1] - num_queries
    y, dy = (pad(x.y, 1, short) for x in (out, cotangent))
    # Where there is nothing, weights are exp2(x - infinity) = 0.
    lse = pad(jnp.where(out.lse <= NO_TOP, -EMPTY, out.lse * LOG2_E), 1, short, -EMPTY)
    dlse = pad(cotangent.lse, 1, short)
    sums = problem.zero_sums()

    def block(r, carry):
        row = problem.row(r)
        query = problem.queries(row, problem.logit_scale)
        scaled = query * (rules.scale / problem.logit_scale)
        dy_rows = problem.read(dy, row).astype(jnp.float32)
        delta = jnp.sum(dy_rows * problem.read(y, row).astype(jnp.float32), axis=-1)
        delta = delta - problem.read(dlse, row)
        lse_rows = problem.read(lse, row)

        def step(tile, carry):
            dq, sums = carry
            keys = problem.keys(tile)
            logits, slope = problem.logits(tile, _dot("kd,qd->kq", keys, query), keys_first=True)
            weight = exp2(logits - lse_rows)
            dlogits = weight * (_dot("kd,qd->kq", problem.values(tile), dy_rows) - delta)
            sums = problem.add_biases(sums, tile, dlogits)
            if slope is not None:
                dlogits = dlogits * slope
            sums = sums._replace(
                k=problem.add_keys(sums.k, tile, _dot("kq,qd->kd", dlogits, scaled)),
                v=problem.add_keys(sums.v, tile, _dot("kq,qd->kd", weight, dy_rows)),
            )
            return dq + _dot("kd,kq->dq", keys, dlogits), sums

        dq, sums = carry
        start = problem.varying(jnp.zeros(query.shape[::-1], jnp.float32)), sums
        dq_rows, sums = problem.over_tiles(row, step, start)
        return problem.write(dq, dq_rows.T * rules.scale, row), sums

    dq = problem.varying(empty(problem.q_shape, dtypes[0]))
    dq, sums = lax.fori_loop(0, problem.num_rows, block, (dq, sums))
    dbias, drelative = problem.cut_biases(sums)
    return Operands(
        dq[:, :num_queries],
        sums.k[:, :num_keys].astype(dtypes[1]),
        sums.v[:, :num_keys].astype(dtypes[2]),
        dbias,
        drelative,
    )


def _dot(spec, a, b):
    return jnp.einsum(spec, a, b, precision="highest")
