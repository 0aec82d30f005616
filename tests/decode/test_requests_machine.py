"""Requests in any order of joining, telling, stepping, leaving, saving: as a list of tokens says.

The model is what each request was given and has said. In a roomy arena its next token must be one that
dense attention in float64 over those tokens calls the most likely, or nearly so; in a tight one the
bytes stay what they are. A state that was saved and restored goes on bit for bit.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jbalance import decode
from tests.support.compilations import compilations
from tests.support.examples import few
from tests.support.window_models import VOCAB, dense_logits, model, specs

MODEL = model()
PLACES, ROOMY = 3, 400_000
TIGHT = {False: 40_000, True: 84_000}  # a context's centroids take more
CONTEXT = np.random.default_rng(1).integers(0, VOCAB, 40)
NEARLY = 0.03  # logits below the most likely token's: of codes of 8 bits
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


@functools.cache
def read(budget):
    return decode.read(MODEL, CONTEXT, [budget], reserve=decode.Reserve(PLACES, 48))


class Requests(RuleBasedStateMachine):
    roomy = True

    @initialize(shared=st.booleans())
    def create(self, shared):
        self.budget = ROOMY if self.roomy else TIGHT[shared]
        context = read(self.budget) if shared else None
        self.state = decode.create(
            MODEL, [self.budget], num_requests=PLACES, context=context, recent_tokens=16
        )
        self.before = CONTEXT.tolist() if shared else []
        self.bytes = self.state.nbytes
        self.given: dict[int, list[int]] = {}  # all tokens of each request, said ones among them

    def heard(self, request):
        """The latest token of a request, which the model learns."""
        token = int(self.state.tokens[request])
        if self.roomy:
            known = np.array(self.before + self.given[request])
            logits = dense_logits(known, specs())[-1]
            assert logits[token] >= logits.max() - NEARLY
        self.given[request].append(token)

    @precondition(lambda self: len(self.given) < PLACES)
    @rule(data=st.data(), prompt=TOKENS, weight=st.sampled_from([1.0, 0.2, 8.0]))
    def join(self, data, prompt, weight):
        free = [r for r in range(PLACES) if r not in self.given]
        request = data.draw(st.sampled_from(free))
        prompt = np.array(prompt)
        self.state = decode.join(MODEL, self.state, request, prompt, weight=weight, capacity=256)
        self.given[request] = prompt.tolist()
        self.heard(request)

    @precondition(lambda self: self.given)
    @rule(data=st.data(), tokens=TOKENS)
    def tell(self, data, tokens):
        request = data.draw(st.sampled_from(sorted(self.given)))
        self.state = decode.tell(MODEL, self.state, request, np.array(tokens))
        self.given[request] += tokens
        self.heard(request)

    @rule(times=st.integers(1, 9))
    def step(self, times):
        for _ in range(times):
            tokens, self.state = decode.step(MODEL, self.state)
            np.testing.assert_array_equal(tokens, self.state.tokens)
            for request in self.given:
                self.heard(request)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def leave(self, data):
        request = data.draw(st.sampled_from(sorted(self.given)))
        self.state = decode.leave(self.state, request)
        del self.given[request]
        with pytest.raises(ValueError, match="its place is free"):
            decode.tell(MODEL, self.state, request, np.array([1]))

    @precondition(lambda self: len(self.given) == PLACES)
    @rule(request=st.integers(0, PLACES - 1))
    def join_a_taken_place(self, request):
        with pytest.raises(ValueError, match="its place is taken"):
            decode.join(MODEL, self.state, request, np.array([1]))

    @rule()
    def save_and_restore(self):
        with tempfile.TemporaryDirectory() as above:
            folder = pathlib.Path(above) / "state"
            decode.save(folder, MODEL, self.state)
            again = decode.restore(folder, MODEL, [self.budget])
        want, self.state = decode.step(MODEL, self.state)
        got, again = decode.step(MODEL, again)
        np.testing.assert_array_equal(got, want)
        for x, y in zip(again.caches, self.state.caches, strict=True):
            np.testing.assert_array_equal(x.recent_keys, y.recent_keys)
        for request in self.given:
            self.heard(request)

    @invariant()
    def bytes_and_places_are_as_they_should(self):
        assert self.state.nbytes == self.bytes
        assert self.bytes[0] <= self.budget
        active = np.asarray(self.state.active)
        assert np.flatnonzero(active).tolist() == sorted(self.given)
        held, most = np.asarray(self.state.caches[0].held_pages), self.state.allowances[0]
        assert held.sum() <= self.state.caches[0].arena.num_pages
        for request, tokens in self.given.items():
            assert held[request] <= most[request]
            assert int(self.state.positions[request]) == len(self.before) + len(tokens) - 1
            assert int(self.state.tokens[request]) == tokens[-1]
        assert not held[~active].any()


class TightRequests(Requests):
    roomy = False


EXAMPLES = few(8, stateful_step_count=12)
TestRoomy, TestTight = Requests.TestCase, TightRequests.TestCase
TestRoomy.settings = TestTight.settings = EXAMPLES


def test_requests_that_come_and_go_compile_nothing_anew():
    """A process that compiles for each would end once the system has no room for programs."""
    state = decode.create(MODEL, [ROOMY], num_requests=2, recent_tokens=16)

    def come_and_go(state, size):
        sampling = decode.Sampling(0.5 * (size % 2), top_k=size, seed=size)
        prompt = np.arange(size) % VOCAB
        state = decode.join(MODEL, state, 1, prompt, sampling=sampling, weight=size, capacity=256)
        state = decode.tell(MODEL, state, 1, prompt[: size // 2 + 1])
        return decode.leave(decode.step(MODEL, state)[1], 1)

    state = come_and_go(come_and_go(state, 3), 4)
    with compilations() as compiled:
        for size in range(5, 12):
            state = come_and_go(state, size)
    assert not compiled
