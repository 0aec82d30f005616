"""Bad input: every error names the argument, its value and what would fit, before jax sees it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jbalance as jb
from jbalance import (
    Status,
    allocate,
    attention,
    importance,
    place,
    rescale,
    resources,
    sharded,
    shares,
)

TILING = attention.Tiling(8, 8, 4, 4)
NAN, INF = float("nan"), float("inf")
W = jnp.array([1.0, 2.0, 3.0])
OF = jnp.array([0, 1, 1])
VALUES, COSTS = jnp.array([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]), jnp.array([1, 2])
A = jnp.ones((3, 2))
DIMS = resources.AttentionDims(2, 4, 2, 8)


def fill(w=W, budget=6.0, *args, **kwargs):
    return allocate.water_fill(w, budget, *args, **kwargs)


def whole(w=W, budget=6, *args, **kwargs):
    return allocate.whole(w, budget, *args, **kwargs)


def ladder(values=VALUES, costs=COSTS, budgets=5, *args, **kwargs):
    return allocate.ladder(values, costs, budgets, *args, **kwargs)


def update(w=W, budget=6, units=3, **kwargs):
    balance = jb.balancer()
    return balance.update(w, balance.init(units), budget, **kwargs)


class Statless:
    """A device without memory statistics, as the CPU."""

    def memory_stats(self):
        return None


# What is called, and what the message must say: the argument, the value, what would fit.
KEY = jax.random.key(0)
MATRIX = np.ones((3, 2), np.float32)
HEADS = np.ones((8, 2, 8), np.float32)

CASES = {
    # kinds that a campaign found
    "spans of time are no numbers": (
        lambda: fill(np.array([1, 2], "timedelta64[s]")),
        "dtype timedelta64[s]",
        "numbers",
    ),
    "keys of random numbers are no numbers": (lambda: fill(W, KEY), "budget is Array", "numbers"),
    "a vector for a number": (
        lambda: importance.token_worth(HEADS, HEADS, HEADS, frequencies=None, num_tokens=[8]),
        "num_tokens must have shape []",
        "(1,)",
    ),
    "an angle beyond float32": (
        lambda: importance.leverage(HEADS, HEADS, HEADS, frequencies=[1e38] * 4),
        "frequencies[0] is 1e+38",
        "1e+28",
    ),
    "a budget beyond float64": (lambda: fill(W, 10**400), "budget is 1000", "finite"),
    "a temperature beyond float64": (
        lambda: shares.softmax(W, 10**400),
        "temperature is 1000",
        "finite",
    ),
    "an amount beyond float64": (
        lambda: resources.human_bytes(10**400),
        "amount_bytes is inf",
        "known before jit",
    ),
    "a scale beyond float32": (
        lambda: attention.attend(*[HEADS[None]] * 3, attention.dense(TILING), scale=1e38),
        "scale is 1e+38",
        "1000000000.0",
    ),
    "groups of other units": (
        lambda: shares.constrained(W, group_of=[0, 1], group_floor=[0.1, 0.1]),
        "group_of has 2 entries",
        "give group_of 3",
    ),
    "ranks that no number is": (
        lambda: sharded.block_order(np.array([0, 1]), True),
        "num_ranks is True",
        "whole number",
    ),
    "a rank at which numpy.bincount writes beyond its memory": (
        lambda: sharded.block_order(np.array([2**63 - 1, 0]), 2),
        "device_of[0] is 9223372036854775807",
        "0..1",
    ),
    "units that are there by numbers": (
        lambda: shares.proportional(W, where=[1, 0, 1]),
        "where has dtype int64",
        "bool [U]",
    ),
    "a placement that is none": (lambda: place.step_time("x"), "placed is 'x'", "a Placement"),
    "claims of text": (lambda: rescale.split("x", MATRIX, [1.0]), "alpha must have shape", "[N]"),
    "a plan that is none": (lambda: attention.union(3, 4), "a is 3", "a TilePlan"),
    "a game that is none": (
        lambda: jb.explain.leave_one_out(None, 3),
        "worth is None",
        "a function",
    ),
    "spans that are no pairs": (
        lambda: importance.in_spans([[0, 2]], [(0, 1, 2)]),
        "spans[0] has 3 entries",
        "start and stop",
    ),
    "seeds that are no keys": (lambda: jb.multitask.random(7), "key is 7", "jax.random.key"),
    "bytes by text": (lambda: resources.human_bytes("1"), "amount_bytes is '1'", "numbers"),
    # water-filling
    "fill: NaN weight": (lambda: fill([1, NAN, 3]), "w[1] is nan", ">= 0"),
    "fill: infinite weight": (lambda: fill([1, INF, 3]), "w[1] is inf", "finite"),
    "fill: negative weight": (lambda: fill([1, 2, -3]), "w[2] is -3", ">= 0"),
    "fill: no units": (lambda: fill([]), "w is empty", "at least one"),
    "fill: one number for w": (lambda: fill(1.0), "w must have shape [U]", "()"),
    "fill: ragged w": (lambda: fill([[1], [2, 3]]), "w has rows of different", "[U]"),
    "fill: complex w": (lambda: fill([1j, 2]), "w is [1j, 2]", "numbers"),
    "fill: nothing to share": (lambda: fill(W, 0.0), "budget is 0.0", "> 0"),
    "fill: NaN budget": (lambda: fill(W, NAN), "budget is nan", "finite"),
    "fill: budget as text": (lambda: fill(W, "4MiB"), "budget is '4MiB'", "numbers"),
    "fill: no budget": (lambda: fill(W, None), "budget is None", "numbers"),
    "fill: two budgets": (lambda: fill(W, [1.0, 2.0]), "budget must have shape []", "(2,)"),
    "fill: negative floor": (lambda: fill(W, 6, -1), "floor is -1", ">= 0"),
    "fill: floors for others": (
        lambda: fill(W, 6, [1.0, 1.0]),
        "floor has 2 entries",
        "give floor 3",
    ),
    "fill: infeasible floors": (lambda: fill(W, 6, 2.5), "floors sum to 7.5", "1.5 is missing"),
    "fill: NaN cap": (lambda: fill(W, 6, 0, NAN), "cap is nan", "[0, inf]"),
    "fill: floor above cap": (
        lambda: fill(W, 6, [0, 3, 0], [9, 1, 9]),
        "floor[1] is 3, above cap, which is 1",
        "must not exceed cap",
    ),
    "fill: segments without bounds": (
        lambda: fill(W, 6, segment_of=OF),
        "segment_of is given",
        "give one",
    ),
    "fill: bounds without segments": (
        lambda: fill(W, 6, segment_cap=[9, 9]),
        "segment_of, which is None",
        "need segment_of",
    ),
    "fill: no such segment": (
        lambda: fill(W, 6, segment_of=OF + 1, segment_cap=[9, 9]),
        "segment_of[1] is 2",
        "0..1",
    ),
    "fill: segment floors above the budget": (
        lambda: fill(W, 6, segment_of=OF, segment_floor=[4, 4]),
        "floors sum to 8",
        "2 is missing",
    ),
    "fill: unreachable segment floor": (
        lambda: fill(W, 6, 0, 1, segment_of=OF, segment_floor=[3, 0]),
        "segment_floor[0] is 3",
        "lower it by 2 or raise cap",
    ),
    "fill: unit floors above the segment's cap": (
        lambda: fill(W, 6, 1, segment_of=OF, segment_cap=[9, 1]),
        "segment 1 sum to 2, above segment_cap[1] = 1",
        "1 is missing",
    ),
    # whole amounts
    "whole: fractional budget": (
        lambda: whole(W, 6.5),
        "budget has dtype float64",
        "whole numbers",
    ),
    "whole: budget in bytes": (lambda: whole(W, 80 * 2**30), f"budget is {80 * 2**30}", "blocks"),
    "whole: budget as text": (lambda: whole(W, "4MiB"), "budget is '4MiB'", "blocks"),
    "whole: negative budget": (lambda: whole(W, -1), "budget is -1", "in 0..2147483647"),
    "whole: no budgets": (
        lambda: whole(W, np.array([], int)),
        "budget is empty",
        "at least one",
    ),
    "whole: budgets without devices": (
        lambda: whole(W, np.array([3, 3])),
        "device_of is None, but budget has 2",
        "which unit is where",
    ),
    "whole: no such device": (
        lambda: whole(W, np.array([3, 3]), device_of=OF + 1),
        "device_of[1] is 2",
        "0..1",
    ),
    "whole: fractional device": (
        lambda: whole(W, np.array([3, 3]), device_of=OF / 2),
        "device_of has dtype float32",
        "integers in 0..1",
    ),
    "whole: devices of others": (
        lambda: whole(W, np.array([3, 3]), device_of=OF[:2]),
        "device_of has 2 entries",
        "give device_of 3",
    ),
    "whole: infeasible floors": (
        lambda: whole(W, np.array([3, 3]), 2, device_of=OF),
        "floors on device 1 sum to 4, above its budget = 3",
        "1 is missing",
    ),
    "whole: fractional floor": (
        lambda: whole(W, 6, 0.5),
        "floor has dtype float64",
        "whole numbers",
    ),
    "whole: unknown method": (
        lambda: whole(W, 6, method="jefferson"),
        "method is 'jefferson'",
        "'webster', 'largest_remainder'",
    ),
    "whole: too much for the method": (
        lambda: whole(W, 2**23, method="largest_remainder"),
        f"budget is {2**23}",
        "4194304",
    ),
    "whole: NaN weight": (lambda: whole([1.0, NAN]), "w[1] is nan", "finite"),
    # ladder
    "ladder: NaN value": (
        lambda: ladder(VALUES.at[2, 1].set(NAN)),
        "values[(2, 1)] is nan",
        "finite",
    ),
    "ladder: flat values": (lambda: ladder(W), "values must have shape [U, M]", "(3,)"),
    "ladder: no units": (lambda: ladder(VALUES[:0]), "values is empty", "at least one"),
    "ladder: one level": (
        lambda: ladder(VALUES[:, :1], COSTS[:1]),
        "values has 1 level",
        "at least 2",
    ),
    "ladder: costs that fall": (
        lambda: ladder(costs=COSTS[::-1]),
        "the step up from costs[0] is -1",
        "at least 1",
    ),
    "ladder: costs of other levels": (
        lambda: ladder(costs=jnp.arange(3)),
        "costs has 3 entries along axis -1",
        "give costs 2",
    ),
    "ladder: fractional costs": (
        lambda: ladder(costs=COSTS / 2),
        "costs has dtype float32",
        "blocks",
    ),
    "ladder: budgets in bytes": (lambda: ladder(budgets=2**31), "budgets is 2147483648", "blocks"),
    "ladder: a budget too few": (
        lambda: ladder(VALUES, COSTS, np.array([9, 9]), OF + 1),
        "device_of[1] is 2",
        "0..1",
    ),
    "ladder: lowest levels do not fit": (
        lambda: ladder(VALUES, COSTS, np.array([1, 1]), OF),
        "budgets[1] is 1, but level 0 of its units costs 2",
        "1 is missing",
    ),
    "ladder: lowest levels above the total": (
        lambda: ladder(total_budget=2),
        "total_budget is 2, but level 0 of all units costs 3",
        "1 is missing",
    ),
    "ladder: fractional total": (
        lambda: ladder(total_budget=2.5),
        "total_budget has dtype",
        "whole numbers",
    ),
    # shares
    "shares: negative w": (lambda: shares.proportional([1, -2]), "w[1] is -2", ">= 0"),
    "shares: matrix": (lambda: shares.softmax(A), "w must have shape [U]", "(3, 2)"),
    "shares: no temperature": (lambda: shares.softmax(W, 0.0), "temperature is 0.0", "> 0"),
    "shares: no units": (lambda: shares.uniform(0), "num_units is 0", "at least 1"),
    "shares: floors above the whole": (
        lambda: shares.constrained(W / 6, floor=0.5),
        "floors sum to 1.5, above budget = 1",
        "0.5 is missing",
    ),
    "shares: caps below the whole": (
        lambda: shares.constrained(W / 6, cap=0.25),
        "cap: the caps let only 0.75",
        "raise them by 0.25",
    ),
    "shares: groups without floors": (
        lambda: shares.constrained(W / 6, group_of=OF),
        "group_floor is None",
        "give both",
    ),
    "shares: group floors above the whole": (
        lambda: shares.constrained(W / 6, group_of=OF, group_floor=[0.75, 0.5]),
        "floors sum to 1.25",
        "0.25 is missing",
    ),
    # resources
    "resources: no capacity": (lambda: resources.status(0.0, W, W), "capacity is 0.0", "> 0"),
    "resources: negative demand": (
        lambda: resources.status(9.0, -W, W),
        "demand[0] is -1.0",
        ">= 0",
    ),
    "resources: use of others": (
        lambda: resources.status(9.0, W, W[:2]),
        "used has 2 entries",
        "give used 3",
    ),
    "resources: devices unknown": (
        lambda: resources.status([9.0, 9.0], W, W),
        "device_of is None, but capacity has 2",
        "give one capacity",
    ),
    "resources: unit of memory": (
        lambda: resources.parse_bytes("4 lightyears"),
        "'4 lightyears'",
        "MiB",
    ),
    "resources: negative memory": (lambda: resources.parse_bytes("-4MiB"), "'-4MiB'", "number"),
    "resources: part of a byte": (
        lambda: resources.parse_bytes("0.3 B"),
        "'0.3 B' is 0.3 bytes",
        ">= 1",
    ),
    "resources: wrong device count": (
        lambda: resources.device_budgets([Statless()] * 2, given_bytes=[1, 2, 3]),
        "given_bytes has 3 budgets for 2 devices",
        "give one each",
    ),
    "resources: empty budget": (
        lambda: resources.device_budgets([Statless()], given_bytes=[0]),
        "given_bytes[0] is 0",
        "at least 1",
    ),
    "resources: no statistics": (
        lambda: resources.device_budgets([Statless()]),
        "given_bytes is None",
        "give its budget",
    ),
    "resources: fraction": (lambda: resources.device_budgets([], 1.5), "fraction is 1.5", "(0, 1]"),
    "resources: too many blocks": (
        lambda: resources.blocks(2**40, 2),
        f"{2**39} blocks of block_bytes = 2",
        "take block_bytes of at least 513",
    ),
    "resources: negative bytes": (lambda: resources.blocks(-8, 2), "num_bytes is -8", "at least 0"),
    "resources: heads": (
        lambda: resources.AttentionDims(2, 5, 2, 8),
        "num_heads is 5",
        "multiple of num_kv_heads = 2",
    ),
    "resources: fractional layers": (
        lambda: resources.AttentionDims(2.0, 4, 2, 8),
        "num_layers is 2.0",
        "whole number, at least 1",
    ),
    "resources: part of a byte for an entry": (
        lambda: resources.kv_entry_bytes(1, bits=3),
        "bits is 3: 6 bits",
        "no whole bytes",
    ),
    "resources: negative entries": (
        lambda: resources.kv_cache_bytes(DIMS, -1),
        "entries is -1",
        "at least 0",
    ),
    "resources: two layers": (lambda: resources.thirds(2), "num_layers is 2", "at least 3"),
    # placement
    "place: negative load": (lambda: place.pack(-W, 2), "loads[0] is -1.0", ">= 0"),
    "place: no device": (lambda: place.pack(W, 0), "num_devices is 0", "at least 1"),
    "place: part of a device": (lambda: place.pack(W, 2.5), "num_devices is 2.5", "whole number"),
    "place: too few places": (
        lambda: place.pack(W, 2, max_count=1),
        "max_count is 1",
        "at least 2",
    ),
    "place: no capacity": (
        lambda: place.pack(W, 2, jnp.array([1.0, 0.0])),
        "capacity[1] is 0.0",
        "> 0",
    ),
    "place: wrong device count": (
        lambda: place.pack(W, 2, jnp.ones(3)),
        "capacity has 3 entries",
        "num_devices = 2",
    ),
    "place: negative swaps": (lambda: place.pack(W, 2, swaps=-1), "swaps is -1", "at least 0"),
    # rescaling
    "rescale: unknown rule": (
        lambda: rescale.weights(W, A, jnp.ones(2), rule="scale"),
        "rule is 'scale'",
        "'literal', 'split', 'renormalize'",
    ),
    "rescale: units of others": (
        lambda: rescale.weights(W[:2], A, jnp.ones(2)),
        "association has 3",
        "2 entries",
    ),
    "rescale: keys of others": (
        lambda: rescale.weights(W, A, jnp.ones(3)),
        "attention has 3",
        "give attention 2",
    ),
    "rescale: NaN attention": (
        lambda: rescale.weights(W, A, [NAN, 1]),
        "attention[0] is nan",
        ">= 0",
    ),
    "rescale: negative share": (lambda: rescale.logit_bias(-W, A), "alpha[0] is -1.0", ">= 0"),
    # the balancer
    "balance: no memory": (lambda: jb.balancer(decay=1.0), "decay is 1.0", "below 1"),
    "balance: NaN decay": (lambda: jb.balancer(decay=NAN), "decay is nan", "[0, 1]"),
    "balance: unknown rule": (lambda: jb.balancer(rule="max"), "rule is 'max'", "'softmax'"),
    "balance: beta": (lambda: jb.balancer(beta=2.0), "beta is 2.0", "[0, 1]"),
    "balance: eta": (lambda: jb.balancer(eta=-1.0), "eta is -1.0", "in [0,"),
    "balance: state of others": (lambda: update(units=4), "w has 3 entries", "give w 4"),
    "balance: NaN importance": (lambda: update(w=[1, NAN, 2]), "w[1] is nan", ">= 0"),
    "balance: fractional budget": (lambda: update(budget=6.0), "budget has dtype", "whole numbers"),
    "balance: feedback of others": (
        lambda: update(feedback=jnp.ones(2)),
        "feedback has shape (2,)",
        "(3,)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_names_argument_value_and_what_fits(case):
    call, *words = CASES[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    message = str(error.value)
    for word in words:
        assert word in message, message
    raised_in = Path(error.traceback[-1].path)
    assert raised_in.parent.name in ("jbalance", "allocate", "importance"), raised_in


# Under jit nothing can raise: a status says it, and checkify, asked to, says what.
TRACED = {
    "fill: NaN weight": (lambda x: fill(x), W.at[1].set(NAN), Status.INVALID, "w must be finite"),
    "fill: negative weight": (lambda x: fill(x), -W, Status.INVALID, "w must be finite and >= 0"),
    "fill: infeasible floors": (lambda x: fill(W, 6.0, x), W + 1, Status.INFEASIBLE, None),
    "fill: floor above cap": (
        lambda x: fill(W, 6.0, x, 1.0),
        W / 2,
        Status.INVALID,
        "floor must not exceed cap",
    ),
    "whole: NaN weight": (lambda x: whole(x), W.at[1].set(NAN), Status.INVALID, "w must be finite"),
    "whole: negative weight": (lambda x: whole(x), -W, Status.INVALID, "w must be finite"),
    "whole: infeasible floors": (lambda x: whole(W, 6, x), OF + 3, Status.INFEASIBLE, None),
    "whole: negative budget": (
        lambda x: whole(W, x),
        jnp.int32(-1),
        Status.INVALID,
        "budget must be whole numbers in 0..2147483647",
    ),
    "whole: no such device": (
        lambda x: whole(W, jnp.array([3, 3]), device_of=x),
        OF + 1,
        None,
        "device_of must be integers in 0..1",
    ),
    "ladder: NaN value": (
        lambda x: ladder(x),
        VALUES * NAN,
        Status.INVALID,
        "values must be finite",
    ),
    "ladder: costs that fall": (lambda x: ladder(VALUES, x, 9), COSTS[::-1], Status.INVALID, None),
    "ladder: negative budget": (
        lambda x: ladder(VALUES, COSTS, x),
        jnp.int32(-1),
        Status.INVALID,
        "budgets must be",
    ),
    "ladder: lowest levels do not fit": (
        lambda x: ladder(VALUES, COSTS, x),
        jnp.int32(2),
        Status.INFEASIBLE,
        None,
    ),
    "place: over capacity": (lambda x: place.pack(x, 2, jnp.ones(2)), W, Status.INFEASIBLE, None),
    "shares: temperature": (
        lambda x: shares.softmax(W, x),
        jnp.float32(0),
        None,
        "temperature must be",
    ),
    "rescale: negative share": (
        lambda x: rescale.logit_bias(x, A),
        -W,
        None,
        "alpha must be finite",
    ),
    "balance: NaN importance": (
        lambda x: update(x)[0].allocation,
        W * NAN,
        Status.INVALID,
        "w must be",
    ),
}


@pytest.mark.parametrize("case", TRACED)
def test_under_jit_a_status_and_a_check(case):
    call, argument, status, message = TRACED[case]
    out = jax.jit(call)(argument)
    if status is not None:
        assert out.status == status
    error, _ = checkify.checkify(jax.jit(call))(argument)
    if message is not None:
        assert message in error.get()
    else:
        assert error.get() is None


@pytest.mark.parametrize("size", [3, 100, 5_000, 100_000])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_bad_entry_among_any_number_is_seen(size, value):
    x = np.zeros(size, np.float32)
    x[size // 2] = value
    with pytest.raises(ValueError, match=r"the largest \|x\| is (nan|inf)"):
        jb.checks.largest_finite("x", x)
