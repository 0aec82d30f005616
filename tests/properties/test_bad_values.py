"""Bad values of every kind for every argument of every public function: a right answer, or our error.

A call may refuse a value by a ValueError or TypeError that was raised by the library's own code and
names the argument (for a shape that does not fit another argument: one of the two), or do what the
value asks for, without NaN that no status tells of. A part of the values in `make test`, all of them
in `make test-all`.
"""

from __future__ import annotations

import inspect
import re
from enum import EnumMeta

import jax
import numpy as np
import pytest

import jbalance as jb
from tests.support import bad_values, more_calls
from tests.support.calls import CALLS, STRUCTURES

ALL_CALLS = CALLS | more_calls.MORE_CALLS
OBJECTS = STRUCTURES | more_calls.OBJECTS
SAID = {"text": "bytes"}  # how a message calls the argument, where it has another word
FIT = ("type", "rank", "length", "empty")  # kinds that may not fit another argument
# Every so many values are tried in `make test`.
PART = 40


def values_for(name, argument, draws):
    """`Bad` values in place of an argument that is good."""
    _, good, static = ALL_CALLS[name]
    value = good[argument]
    if argument in static.split():
        return bad_values.no_sizes()
    numbers = isinstance(value, np.ndarray | jax.Array | np.number | int | float | list | tuple)
    named = argument in OBJECTS and not isinstance(value, np.ndarray)
    if named or not numbers:
        return bad_values.no_objects()
    return bad_values.no_arrays(value, np.random.default_rng(len(name)), draws)


def tried(name, every, draws):
    """How many values were tried, and what was wrong."""
    fn, good, _ = ALL_CALLS[name]
    count, wrong = 0, []
    for argument in good:
        for bad in list(values_for(name, argument, draws))[len(argument) % every :: every]:
            count += 1
            names = [*good] if bad.kind in FIT else [argument]
            names = [SAID.get(x, x) for x in names]
            said = bad_values.outcome(lambda: fn(**good | {argument: bad.value}), names)  # noqa: B023
            if said is not None:
                shown = f"{type(bad.value).__name__} {str(bad.value)[:60]!r}"
                wrong.append(f"{argument} = {shown} ({bad.kind}): {said}")
    return count, wrong


@pytest.mark.parametrize("name", ALL_CALLS)
def test_some_bad_values(name):
    assert not tried(name, PART, 4)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_CALLS)
def test_all_bad_values(name, record_property):
    count, wrong = tried(name, 1, 40)
    record_property("inputs", count)
    assert not wrong


def public():
    """Functions of all stages by name, and classes that check what they are made of."""
    for stage in jb.__all__:
        module = getattr(jb, stage)
        names = getattr(module, "__all__", None) or [
            x
            for x, value in vars(module).items()
            if not x.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        for name in names:
            value = getattr(module, name)
            checked = hasattr(value, "__post_init__") and not isinstance(value, EnumMeta)
            if checked or (inspect.isfunction(value) and inspect.ismodule(module)):
                yield f"{stage}.{name}", value


def unwrapped(value):
    return inspect.unwrap(value) if inspect.isfunction(value) else value


# Whose arguments are models of other packages, programs, or states of the caller's: tests of their own.
ELSEWHERE = {
    *("adapters.attention_fn", "adapters.set_attention_fn", "adapters.patch_dot_product_attention"),
    *("adapters.attend_within", "adapters.budgets_of", "adapters.decoder", "adapters.forward"),
    *("adapters.head_gradients", "adapters.heads_to_keep", "adapters.prune_heads"),
    *(
        "adapters.serialize",
        "decode.fit",
        "decode.fit_worth",
        "decode.memory_losses",
        "decode.ladder",
        "decode.step",
    ),
    *("adapters.AttentionBackend", "adapters.LinenBalancedAttention"),
    *(
        "adapters.LinenCachedAttention",
        "decode.save",
        "decode.restore",
        "decode.notes_of",
        "types.container",
        "multitask.mean",
    ),
}


def test_every_public_function_is_called():
    called = set()
    for fn, _, _ in ALL_CALLS.values():
        inner = inspect.unwrap(getattr(fn, "func", fn))
        called.add(id(inner))
        if inspect.isfunction(inner):
            words = set(re.findall(r"\w+", inspect.getsource(inner)))
            called |= {id(unwrapped(x)) for name, x in public() if name.split(".")[1] in words}
    missing = {name for name, value in public() if id(unwrapped(value)) not in called} - ELSEWHERE
    assert not missing
