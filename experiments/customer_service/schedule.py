"""Fair scheduling of requests into places: who is next, and a loop that drives any executor.

The loop is the one of continuous batching: as long as a place is free and somebody waits, the next
request joins; then all that are in a place take a step together. Its clock counts steps of the engine.
A prompt takes one for each `CHUNK_TOKENS` of its tokens, in which nobody else goes on, and then one for
each new token but the first. What is counted does not depend on how fast a machine is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jbalance import checks

CHUNK_TOKENS = 64
PROMPT_COST, OUTPUT_COST = 1, 2  # of a token
NOBODY = -1


class Request(NamedTuple):
    """What a customer asks for.

    Attributes:
      customer: 0..C-1.
      arrival: step at which it is there.
      prompt: [S] token ids.
      new_tokens: of its answer, at least 1.
    """

    customer: int
    arrival: int
    prompt: np.ndarray
    new_tokens: int

    @property
    def cost(self) -> int:
        """Of its prompt and its whole answer."""
        return PROMPT_COST * len(self.prompt) + OUTPUT_COST * self.new_tokens


class Executor(Protocol):
    """What runs the requests: a model, or a count of tokens in its place."""

    def join(self, place: int, request: Request) -> bool:
        """A request enters a free place and gets its first token; whether that was its last one."""

    def step(self) -> list[int]:
        """One more token for every request in a place; the places of those that are done."""

    def leave(self, place: int) -> None:
        """A place becomes free."""


class Counting:
    """The executor that counts tokens in place of a model."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}

    def join(self, place: int, request: Request) -> bool:
        self.left[place] = request.new_tokens - 1
        return self.left[place] == 0

    def step(self) -> list[int]:
        self.left = {place: left - 1 for place, left in self.left.items()}
        return [place for place, left in self.left.items() if left == 0]

    def leave(self, place: int) -> None:
        del self.left[place]


class Desk(NamedTuple):
    """What a policy sees, of C customers.

    Attributes:
      waiting: [C] requests.
      oldest: [C] number of each one's first waiting request, in the order of arrival.
      counter: [C] cost of all that was given to each, over its weight; lifted when one returns.
      last: customer whose request was the latest to join; `NOBODY` before the first.
    """

    waiting: np.ndarray
    oldest: np.ndarray
    counter: np.ndarray
    last: int


Policy = Callable[[Desk, np.ndarray], int]
"""(desk, [C] bool customers who may be next, at least one) -> the next customer."""


def first_come(desk: Desk, allowed: np.ndarray) -> int:
    """First come, first served."""
    return int(np.argmin(np.where(allowed, desk.oldest, np.iinfo(np.int64).max)))


def round_robin(desk: Desk, allowed: np.ndarray) -> int:
    """A request of each customer in turn."""
    turn = (np.arange(len(allowed)) - desk.last - 1) % len(allowed)
    return int(np.argmin(np.where(allowed, turn, len(allowed))))


def least_counter(desk: Desk, allowed: np.ndarray) -> int:
    """Who was given least over its weight: virtual token counter (Sheng et al., arXiv:2401.00588)."""
    return int(np.argmin(np.where(allowed, desk.counter, np.inf)))


class Served(NamedTuple):
    """What happened, of R requests in the order in which they were given, over E events.

    An event is a request that joined or a step of those in places.

    Attributes:
      joined: [R] step at which each left its queue; -1 for those that still wait.
      first_token: [R] step at which each had its first token; -1 likewise.
      order: requests in the order in which they joined, some of them again.
      clock: [E] step after each event.
      waiting: [E, C] requests of each customer that wait, after each event.
      given: [E, C] cost of what each was given up to then.
      free: [E] places that were free during the event; 0 where a request joined.
      tokens: of prompts and answers, in all; without those that were lost.
    """

    joined: np.ndarray
    first_token: np.ndarray
    order: list[int]
    clock: np.ndarray
    waiting: np.ndarray
    given: np.ndarray
    free: np.ndarray
    tokens: int


def serve(
    requests: Sequence[Request],
    policy: Policy,
    executor: Executor,
    *,
    places: int,
    horizon: int,
    weights: np.ndarray,
    takes_back: bool = False,
    most: int | None = None,
) -> Served:
    """Run requests through places until `horizon`, or until all are done.

    Args:
      requests: in the order of arrival.
      policy: who is next.
      executor: what runs them.
      places: at once.
      horizon: step after which nothing begins.
      weights: [C] of the customers, > 0; all 1 for plain token counters.
      takes_back: whether places are lent: a customer who has none, and was given less, takes one
        from a customer who has two or more. The request that joined last begins anew later, and
        what it was given is lost but stays counted.
      most: places that one customer may have at once, though others stay free; None for all.

    Raises:
      ValueError: a customer without a weight, requests out of order, or one that asks for nothing.
    """
    places = checks.static_int("places", places, 1)
    most = places if most is None else checks.static_int("most", most, 1, places)
    weights = np.asarray(checks.positive("weights", weights), float)
    _check(requests, len(weights))
    run = _Run(requests, weights, places)
    while run.clock < horizon:
        run.arrive()
        allowed = (run.waiting() > 0) & (run.held() < most)
        if allowed.any():
            following = policy(run.desk(), allowed)
            if takes_back and run.free_place() is None:
                run.take_back(following, executor)
        place = run.free_place()
        if place is not None and allowed.any():
            run.join(place, following, executor)
        elif run.in_place:
            run.step(executor)
        elif run.arrived < len(requests):
            run.clock = max(run.clock, requests[run.arrived].arrival)
        else:
            break
    return run.served()


def _check(requests: Sequence[Request], customers: int) -> None:
    for i, request in enumerate(requests):
        if not 0 <= request.customer < customers:
            raise ValueError(
                f"requests[{i}].customer is {request.customer}: there are {customers} weights"
            )
        if i and request.arrival < requests[i - 1].arrival:
            raise ValueError(
                f"requests[{i}].arrival is {request.arrival}: the one before it arrives at "
                f"{requests[i - 1].arrival}"
            )
        if request.new_tokens < 1 or not len(request.prompt):
            raise ValueError(
                f"requests[{i}] has {len(request.prompt)} prompt tokens and asks for "
                f"{request.new_tokens} new ones: at least 1 of each"
            )


class _Run:
    """The state of `serve`."""

    def __init__(self, requests: Sequence[Request], weights: np.ndarray, places: int) -> None:
        self.requests, self.weights, self.places = requests, weights, places
        self.clock, self.arrived, self.last, self.tokens = 0, 0, NOBODY, 0
        self.queues: list[deque[int]] = [deque() for _ in weights]
        self.counter, self.given = np.zeros(len(weights)), np.zeros(len(weights))
        self.in_place: dict[int, int] = {}  # in the order in which they joined
        self.answered = np.zeros(len(requests), int)  # tokens of each, if it is in a place
        self.joined = np.full(len(requests), -1)
        self.first_token = np.full(len(requests), -1)
        self.order: list[int] = []
        self.events: list[tuple[int, np.ndarray, np.ndarray, int]] = []

    def waiting(self) -> np.ndarray:
        return np.array([len(queue) for queue in self.queues])

    def held(self) -> np.ndarray:
        """[C] places of each customer."""
        own = [self.requests[i].customer for i in self.in_place.values()]
        return np.bincount(own, minlength=len(self.weights))

    def arrive(self) -> None:
        """Requests that are there by now; a customer who returns has stored no credit."""
        while self.arrived < len(self.requests):
            request = self.requests[self.arrived]
            if request.arrival > self.clock:
                break
            own, waiting = request.customer, self.waiting()
            if not waiting[own]:
                self.counter[own] = max(self.counter[own], self._least(waiting))
            self.queues[own].append(self.arrived)
            self.arrived += 1

    def _least(self, waiting: np.ndarray) -> float:
        """Counter of who is next among those who wait, or of who left the empty queue."""
        if waiting.any():
            return float(self.counter[waiting > 0].min())
        return 0.0 if self.last == NOBODY else float(self.counter[self.last])

    def free_place(self) -> int | None:
        return next((p for p in range(self.places) if p not in self.in_place), None)

    def desk(self) -> Desk:
        oldest = [queue[0] if queue else len(self.requests) for queue in self.queues]
        return Desk(self.waiting(), np.array(oldest), self.counter.copy(), self.last)

    def take_back(self, customer: int, executor: Executor) -> None:
        """The latest place of who has most of them, for a customer who has none."""
        held = self.held()
        lender = int(np.argmax(held))
        if held[customer] or held[lender] < 2 or self.counter[lender] <= self.counter[customer]:
            return
        own = [p for p, i in self.in_place.items() if self.requests[i].customer == lender]
        place = own[-1]
        index = self.in_place[place]
        self.tokens -= len(self.requests[index].prompt) + int(self.answered[index])
        self.joined[index] = self.first_token[index] = -1
        self.queues[lender].appendleft(index)
        self._leave(place, executor)

    def join(self, place: int, customer: int, executor: Executor) -> None:
        index = self.queues[customer].popleft()
        request = self.requests[index]
        self.last, self.joined[index] = customer, self.clock
        self.order.append(index)
        self.clock += -(-len(request.prompt) // CHUNK_TOKENS)
        self._give(customer, PROMPT_COST * len(request.prompt) + OUTPUT_COST)
        self.tokens += len(request.prompt) + 1
        self.first_token[index], self.answered[index] = self.clock, 1
        self.in_place[place] = index
        if executor.join(place, request):
            self._leave(place, executor)
        self._event(0)

    def step(self, executor: Executor) -> None:
        free = self.places - len(self.in_place)
        self.clock += 1
        done = executor.step()
        for index in self.in_place.values():
            self._give(self.requests[index].customer, OUTPUT_COST)
            self.answered[index] += 1
        self.tokens += len(self.in_place)
        for place in done:
            self._leave(place, executor)
        self._event(free)

    def _give(self, customer: int, cost: int) -> None:
        self.given[customer] += cost
        self.counter[customer] += cost / self.weights[customer]

    def _leave(self, place: int, executor: Executor) -> None:
        executor.leave(place)
        del self.in_place[place]

    def _event(self, free: int) -> None:
        self.events.append((self.clock, self.waiting(), self.given.copy(), free))

    def served(self) -> Served:
        clock, waiting, given, free = zip(*self.events, strict=True) if self.events else [()] * 4
        shape = len(self.events), len(self.weights)
        return Served(
            self.joined,
            self.first_token,
            self.order,
            np.array(clock, int),
            np.array(waiting, int).reshape(shape),
            np.array(given, float).reshape(shape),
            np.array(free, int),
            self.tokens,
        )
