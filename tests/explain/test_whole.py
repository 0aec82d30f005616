"""Reasons of whole amounts, against one unit after the other in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jbalance import Binding, explain
from tests.support.allocation_oracles import heap_greedy_on_devices

U, G = 6, 2
weights = arrays(np.float32, U, elements=st.integers(0, 9).map(np.float32))
floors = arrays(np.int32, U, elements=st.integers(0, 3))
rooms = arrays(np.int32, U, elements=st.integers(0, 9))
owners = arrays(np.int32, U, elements=st.integers(0, G - 1))
spare = arrays(np.int32, G, elements=st.integers(0, 30))


@given(w=weights, floor=floors, room=rooms, device_of=owners, spare=spare)
def test_one_more_comes_at_its_budget_and_not_before(w, floor, room, device_of, spare):
    budgets = np.bincount(device_of, floor, G).astype(np.int32) + spare
    cap = floor + room
    why = explain.whole(w, budgets, floor, cap, device_of)

    def amounts(of_device, d):
        changed = budgets.copy()
        changed[d] = of_device
        return heap_greedy_on_devices(w, changed, floor, cap, device_of)

    np.testing.assert_array_equal(why.got, amounts(budgets[0], 0))
    np.testing.assert_array_equal(why.asked, cap)
    for u, need in enumerate(why.next_budget):
        d = device_of[u]
        if need < 0:
            assert amounts(2000, d)[u] == why.got[u]
            continue
        assert need > budgets[d]
        assert amounts(need, d)[u] == why.got[u] + 1
        assert amounts(need - 1, d)[u] == why.got[u]


@given(w=weights, floor=floors, room=rooms, device_of=owners, spare=spare)
def test_claims_on_either_side_of_the_price(w, floor, room, device_of, spare):
    budgets = np.bincount(device_of, floor, G).astype(np.int32) + spare
    why = explain.whole(w, budgets, floor, floor + room, device_of)
    binding, price = np.asarray(why.allocation.binding), np.asarray(why.allocation.price)
    for u in range(U):
        if not np.bincount(device_of, w, G)[device_of[u]]:
            continue  # nothing is known of any unit there: all count alike
        claim = Fraction(float(w[u])) / (int(why.got[u]) + Fraction(1, 2))
        if why.got[u] < floor[u] + room[u]:
            np.testing.assert_allclose(why.marginal[u], float(claim), rtol=1e-6)
            assert why.marginal[u] <= price[device_of[u]] * (1 + 1e-6)
        else:
            assert why.marginal[u] == 0
            assert binding[u] == Binding.CAP
        if why.got[u] > floor[u]:
            assert why.last[u] >= price[device_of[u]] * (1 - 1e-6)
