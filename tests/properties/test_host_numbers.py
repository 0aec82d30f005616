"""Amounts of the host, of any type and size: exact, as float64 has them, or refused by name.

The oracles are Python's whole numbers and fractions.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jbalance import Status, allocate, importance, place, resources, tasks
from tests.support.calls import CALLS, RETURN_NO_ARRAYS
from tests.support.host_numbers import INT64_MAX, Numbers, as_given, devices, numbers

U, M, G, B = 4, 3, 2, 6
INT32_MAX, TINY = 2**31 - 1, float(np.finfo(np.float32).tiny)


def result_of(fn, *args, **given):
    """What fn returns of the `Numbers`; None for a ValueError that names one of them."""
    values = {name: x.given if isinstance(x, Numbers) else x for name, x in given.items()}
    try:
        return jax.tree.map(np.asarray, fn(*args, **values))
    except ValueError as error:
        if any(name.removesuffix("s") in str(error) for name in given):
            return None
        raise


def sums(of, values):
    """Exact sums on each device."""
    out = [Fraction(0)] * G
    for d, x in zip(of.values, values, strict=True):
        out[d] += x
    return out


def assert_close(got, want, size, rtol):
    """Within float64 (or another precision) of fractions that are sums of numbers up to `size`."""
    for x, y in zip(np.ravel(got).tolist(), want, strict=True):
        # (XLA takes numbers below float32's smallest normal one for 0.)
        assert abs(Fraction(x) - y) <= Fraction(rtol) * size + Fraction(TINY) * (rtol > 1e-9)


@given(capacity=numbers(G), demand=numbers(U), used=numbers(U), of=devices(U, G))
def test_what_is_left_is_exact(capacity, demand, used, of):
    three = capacity, demand, used
    good = capacity.fits_float32(positive=True) and demand.fits_float32() and used.fits_float32()
    tame = all(x.kind == "tame" for x in three)
    out = result_of(
        resources.status,
        capacity=capacity,
        demand=demand,
        used=used,
        device_of=of,
    )
    if out is None:
        assert not (good and tame)
        return
    assert good
    room, need, have = (x.exact for x in three)
    left = [c - s for c, s in zip(room, sums(of, have), strict=True)]
    remain = [c - s for c, s in zip(room, sums(of, map(min, need, have)), strict=True)]
    pairs = (out.available, left), (out.remaining, remain)
    pairs += (out.total_available, [sum(left)]), (out.total_remaining, [sum(remain)])
    for got, want in pairs:
        if all(x.is_whole for x in three):
            assert got.dtype == np.int64
            assert np.ravel(got).tolist() == want
        else:
            assert_close(got, want, sum(room + need + have), 1e-14)


@given(capacity=numbers(G), demand=numbers(G, M), used=numbers(G, M))
def test_what_tasks_leave_is_exact(capacity, demand, used):
    out = result_of(tasks.remaining, capacity=capacity, demand=demand, used=used)
    if out is not None and all(x.is_whole for x in (capacity, demand, used)):
        have = np.array(used.values, object).reshape(G, M).sum(axis=1)
        assert out.available.tolist() == (np.array(capacity.values, object) - have).tolist()


@given(capacity=numbers(), attention=numbers(U), of=devices(U, G))
def test_a_capacity_is_divided_in_float64(capacity, attention, of):
    good = capacity.fits_float32(positive=True) and attention.fits_float32()
    out = result_of(
        resources.partition,
        capacity=capacity,
        attention=attention,
        level_of=of,
        num_levels=G,
    )
    assert (out is not None) == good
    if out is None:
        return
    mass = sums(of, attention.exact)
    if not sum(mass):
        mass = sums(of, [Fraction(1)] * U)
    whole = capacity.exact[0]
    assert_close(out, [whole * x / sum(mass) for x in mass], whole, 1e-14)


@given(num_bytes=numbers(U), block_bytes=numbers())
def test_blocks_of_bytes_are_exact(num_bytes, block_bytes):
    out = result_of(resources.blocks, num_bytes=num_bytes, block_bytes=block_bytes)
    sizes, block = num_bytes.values, block_bytes.values[0]
    good = num_bytes.in_range(0, 2**80) and block_bytes.in_range(1, 2**80)
    good = good and max(sizes) // block <= INT32_MAX
    assert (out is not None) == good
    assert out is None or out.tolist() == [n // block for n in sizes]


@given(
    entries=st.one_of(numbers(), numbers(2, 2)),
    bits=st.sampled_from([1, 3, 4, 8, 16]),
    head_dim=st.integers(1, 300),
)
def test_bytes_of_a_cache_are_exact(entries, bits, head_dim):
    dims = resources.AttentionDims(2, 4, 2, head_dim)
    out = result_of(resources.kv_cache_bytes, dims, entries=entries, bits=bits)
    good = entries.in_range(0, 2**80) and 2 * head_dim * bits % 8 == 0
    assert (out is not None) == good
    if good:
        tokens = sum(entries.values) * (4 if entries.shape == () else 1)
        assert out.item() == tokens * 2 * head_dim * bits // 8


@given(
    text=st.from_regex(r"[0-9]{1,22}(\.[0-9]{1,6})?", fullmatch=True),
    unit=st.sampled_from(["", "B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB", "gib"]),
)
def test_texts_of_bytes_are_exact(text, unit):
    size = Fraction(text)
    for i, letter in enumerate("kmgt", 1):
        size *= (1024 if "i" in unit else 1000) ** i if unit.lower().startswith(letter) else 1
    if size < 1 or size.denominator != 1:
        with pytest.raises(ValueError, match="whole number >= 1"):
            resources.parse_bytes(f" {text} {unit}")
    else:
        assert resources.parse_bytes(f" {text} {unit}") == size


@given(given_bytes=numbers(G), fraction=numbers())
def test_parts_of_bytes_are_exact(given_bytes, fraction):
    out = result_of(
        resources.device_budgets, [None] * G, given_bytes=given_bytes, fraction=fraction
    )
    good = given_bytes.in_range(1, 2**80) and 0 < fraction.values[0] <= 1
    assert (out is not None) == good
    if good:
        want = [int(n * fraction.exact[0]) for n in given_bytes.values]
        assert np.asarray(out, object).tolist() == want


@given(w=numbers(U), budget=numbers(G), floor=numbers(U), cap=numbers(U), of=devices(U, G))
def test_whole_amounts_meet_their_budgets(w, budget, floor, cap, of):
    out = result_of(allocate.whole, w=w, budget=budget, floor=floor, cap=cap, device_of=of)
    if out is None:
        return
    assert all(x.in_range(0, INT32_MAX) for x in (budget, floor, cap))
    assert w.fits_float32()
    assert out.status == Status.OK
    amount = out.amount.tolist()
    for d, room in enumerate(budget.values):
        own = [i for i, x in enumerate(of.values) if x == d]
        counts = [float(w.values[i]) >= TINY for i in own]  # of no weight: the floor only
        most = [
            (cap if some or not any(counts) else floor).values[i]
            for i, some in zip(own, counts, strict=True)
        ]
        assert sum(amount[i] for i in own) == min(room, sum(most))
        assert out.slack[d] == room - sum(amount[i] for i in own)
    assert all(a <= x <= b for a, x, b in zip(floor.values, amount, cap.values, strict=True))


@given(
    values=numbers(U, M), steps=numbers(M), budgets=numbers(G), total=numbers(), of=devices(U, G)
)
def test_costs_of_a_ladder_are_exact(values, steps, budgets, total, of):
    if steps.finite and all(x >= 0 for x in steps.values) and steps.is_whole:
        up = [sum(steps.values[: i + 1]) + i for i in range(M)]
        given_costs = up if max(up) < 2**63 else np.array(up, object)
        costs = Numbers(given_costs, up, (M,), steps.kind)
    else:
        costs = steps
    out = result_of(
        allocate.ladder,
        values=values,
        costs=costs,
        budgets=budgets,
        total_budget=total,
        device_of=of,
    )
    if out is None:
        return
    assert all(x.in_range(0, INT32_MAX) for x in (costs, budgets, total))
    assert out.status == Status.OK
    spent = sums(of, [costs.values[i] for i in out.level.tolist()])
    assert out.spent.tolist() == spent
    assert out.slack.tolist() == [b - s for b, s in zip(budgets.values, spent, strict=True)]
    assert int(out.total_slack) == total.values[0] - sum(spent)
    assert min([*out.slack.tolist(), int(out.total_slack)]) >= 0


@given(w=numbers(U), budget=numbers(), cap=numbers(U))
def test_water_meets_its_budget(w, budget, cap):
    out = result_of(allocate.water_fill, w=w, budget=budget, cap=cap)
    if out is None:
        return
    assert w.fits_float32()
    assert budget.fits_float32(positive=True)
    assert out.status == Status.OK
    spent = sum(Fraction(x) for x in out.amount.tolist())
    off = abs(spent + Fraction(float(out.slack)) - budget.exact[0])
    # (XLA takes numbers below float32's smallest normal one for 0.)
    assert off <= budget.exact[0] / 10**5 + Fraction(TINY)


PLACERS = {
    "pack": functools.partial(place.pack, swaps=8),
    "contiguous": place.contiguous,
}


@pytest.mark.parametrize("name", PLACERS)
@given(loads=numbers(U), capacity=numbers(G), memory=numbers(U), room=numbers(G))
def test_loads_of_devices_are_the_sums(name, loads, capacity, memory, room):
    out = result_of(
        PLACERS[name],
        num_devices=G,
        loads=loads,
        capacity=capacity,
        memory=memory,
        memory_capacity=room,
    )
    if out is None:
        return
    assert all(x.fits_float32() for x in (loads, memory))
    assert all(x.fits_float32(positive=True) for x in (capacity, room))
    of = Numbers(None, out.device_of.tolist(), (U,), "tame")
    load, used = sums(of, loads.exact), sums(of, memory.exact)
    over = any(x > c for x, c in zip(load + used, capacity.exact + room.exact, strict=True))
    by_far = any(
        x * 10**5 > c * (10**5 + 1)
        for x, c in zip(load + used, capacity.exact + room.exact, strict=True)
    )
    assert not (by_far and out.status == Status.OK)
    assert over or out.status != Status.INFEASIBLE
    if out.status == Status.OK:
        assert_close(out.load, load, sum(load), 1e-6)


@given(
    w=numbers(M),
    batch=numbers(),
    tokens=numbers(),
    capacity=numbers(G),
    demand=numbers(G, M),
    used=numbers(G, M),
    active=st.lists(st.booleans(), min_size=M, max_size=M),
)
def test_tasks_get_all_there_is(w, batch, tokens, capacity, demand, used, active):
    out = result_of(
        tasks.divide,
        w=w,
        active=np.array(active),
        batch=batch,
        tokens=tokens,
        capacity=capacity,
        demand=demand,
        used=used,
    )
    if out is None:
        return
    amounts = batch, tokens, capacity, demand, used
    assert all(x.in_range(0, INT32_MAX) for x in amounts)
    assert out.status in (Status.OK, Status.INFEASIBLE)
    for given_out, there in ((out.examples, batch), (out.tokens, tokens)):
        assert sum(given_out.tolist()) == (there.values[0] if any(active) else 0)
    need = np.array(demand.values, object).reshape(G, M) * np.array(active)
    got = out.cache.astype(object)
    assert (got <= need).all()
    room = np.array(capacity.values, object)
    kept = np.minimum(need, np.array(used.values, object).reshape(G, M))
    most = np.where(out.alpha >= TINY, need, kept).sum(axis=1)
    kept = kept.sum(axis=1)
    assert (out.status == Status.INFEASIBLE) == (kept > room).any()
    assert (got.sum(axis=1) == np.minimum(room, most))[kept <= room].all()
    assert (got.sum(axis=1) <= room).all()


@given(x=numbers(B, 2), y=st.lists(st.integers(0, 1), min_size=B, max_size=B))
def test_correlation_of_large_features_is_that_of_float64(x, y):
    out = result_of(importance.correlation, x=x, y=np.array(y), num_classes=2)
    good = x.finite and (not x.is_whole or x.in_range(-INT64_MAX, INT64_MAX))
    assert (out is not None) == good
    if out is None:
        return
    mean_y = Fraction(sum(y), B)
    for score, feature in zip(out.tolist(), np.array(x.exact, object).reshape(B, 2).T, strict=True):
        off = [v - sum(feature) / B for v in feature]
        of_y = [v - mean_y for v in y]
        norms = sum(v * v for v in off) * sum(v * v for v in of_y)
        inner = sum(a * b for a, b in zip(off, of_y, strict=True))
        want = float(inner**2 / norms) ** 0.5 if norms else 0.0
        assert abs(score - want) < 2e-3


def _numeric(value):
    """Whether a call's argument is a number or an array of some."""
    array = np.asarray(value) if isinstance(value, int | float | np.ndarray) else None
    return array is not None and array.dtype.kind in "if"


# Of functions that take amounts: vectors of tokens come from devices.
AMOUNTS = {name: x for name, x in CALLS.items() if not {"q", "k", "cache", "codes"} & set(x[1])}
ARGUMENTS = [
    (name, argument)
    for name, (_, good, static) in AMOUNTS.items()
    if name not in RETURN_NO_ARRAYS
    for argument, value in good.items()
    if _numeric(value) and argument not in static.split()
]


@given(where=st.sampled_from(ARGUMENTS), data=st.data())
def test_no_number_of_the_host_is_misread(where, data):
    """Every public function: any numbers in one argument give what these in a list give, without NaN."""
    name, argument = where
    fn, good, _ = CALLS[name]
    x = data.draw(numbers(*np.shape(good[argument])))
    fn = functools.partial(fn, **{key: y for key, y in good.items() if key != argument})

    def outcome(given):
        return result_of(fn, **{argument: Numbers(given, x.values, x.shape, x.kind)})

    if not x.readable:
        assert outcome(x.given) is None
        return
    plain = np.array(x.values if x.is_whole else list(map(float, x.values)), object)
    got, want = outcome(x.given), outcome(plain.reshape(x.shape).tolist())
    assert (got is None) == (want is None)
    # Numbers of a device are summed there, those of the host in float64.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)
    if getattr(got, "status", Status.OK) == Status.OK:
        for leaf in jax.tree.leaves(got):
            assert leaf.dtype.kind != "f" or not np.isnan(leaf).any()


STATIC = [
    (name, argument)
    for name, (_, good, static) in CALLS.items()
    for argument in static.split()
    if isinstance(good[argument], int)
]


@given(where=st.sampled_from(STATIC), data=st.data())
def test_static_numbers_are_taken_in_any_type(where, data):
    name, argument = where
    fn, good, _ = CALLS[name]
    x = Numbers(data.draw(as_given([good[argument]], ())), [good[argument]], (), "tame")
    rest = functools.partial(fn, **{key: y for key, y in good.items() if key != argument})
    got = result_of(rest, **{argument: x})
    assert (got is not None) == x.is_whole
    if got is not None:
        jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(np.asarray, fn(**good)))
