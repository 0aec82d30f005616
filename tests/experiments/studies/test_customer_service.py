"""Customer service: schedules against a recorder that counts for itself, texts and shares by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.customer_service import data, engine, figures, schedule, sharing
from experiments.customer_service.data import Customer, Lines
from experiments.customer_service.engine import Loaded
from experiments.customer_service.schedule import Request
from experiments.harness.tokens import byte_level_bpe
from experiments.kv_budget import evaluate
from jbalance import adapters
from jbalance.importance.token_worth import NUM_RECENT, NUM_SINKS
from tests.support.small_models import VOCAB, make_sharp

POLICIES = {
    "first come": schedule.first_come,
    "round robin": schedule.round_robin,
    "counters": schedule.least_counter,
}


class Recorder(schedule.Counting):
    """Counts clock, costs and queues from its calls and the requests' arrivals alone."""

    def __init__(self, requests, customers, places):
        super().__init__()
        self.requests, self.places = requests, places
        self.clock, self.cost = 0, np.zeros(customers)
        self.of_place, self.joins, self.done, self.rows, self.idle = {}, [], [], [], 0

    def _waiting(self):
        """Of each customer: how many have come and are neither in a place nor done."""
        there = np.zeros(len(self.cost), int)
        for request in self.requests:
            if request.arrival <= self.clock:
                there[request.customer] += 1
        for request in [*self.of_place.values(), *self.done]:
            there[request.customer] -= 1
        return there

    def join(self, place, request):
        if not self.of_place:  # nothing went on until it came
            self.clock = max(self.clock, request.arrival)
        assert place not in self.of_place
        assert 0 <= place < self.places
        assert request.arrival <= self.clock
        self.of_place[place] = request
        self.joins.append((request, self.clock))
        self.cost[request.customer] += len(request.prompt) + 2
        row = self._waiting(), self.cost.copy()
        self.clock += -(-len(request.prompt) // 64)
        self.rows.append((self.clock, *row))
        return super().join(place, request)

    def step(self):
        waiting = self._waiting()
        self.idle += len(self.of_place) < self.places and waiting.any()
        for request in self.of_place.values():
            self.cost[request.customer] += 2
        self.clock += 1
        self.rows.append((self.clock, waiting, self.cost.copy()))
        return super().step()

    def leave(self, place):
        if self.left[place] == 0:
            self.done.append(self.of_place[place])
        del self.of_place[place]
        super().leave(place)

    def gap(self, weights):
        """Over every pair of events between which both customers wait."""
        largest = 0.0
        for one in range(len(weights)):
            for other in range(one):
                for first in range(len(self.rows)):
                    for _, waiting, cost in self.rows[first:]:
                        if not (waiting[one] and waiting[other]):
                            break
                        more = (cost - self.rows[first][2]) / weights
                        largest = max(largest, abs(more[one] - more[other]))
        return largest


def served(requests, policy, weights, places, horizon=10**6, takes_back=False, most=None):
    recorder = Recorder(requests, len(weights), places)
    found = schedule.serve(
        requests,
        POLICIES[policy],
        recorder,
        places=places,
        horizon=horizon,
        weights=np.asarray(weights, float),
        takes_back=takes_back,
        most=most,
    )
    return found, recorder


def request(customer, arrival, size=10, new=3):
    return Request(customer, arrival, np.zeros(size, np.int32), new)


@st.composite
def traces(draw):
    """Requests in the order of arrival, weights of up to four customers, places."""
    customers = draw(st.integers(1, 4))
    each = st.tuples(
        st.integers(0, customers - 1), st.integers(0, 6), st.integers(1, 150), st.integers(1, 6)
    )
    arrival, requests = 0, []
    for customer, later, size, new in draw(st.lists(each, min_size=1, max_size=25)):
        arrival += later // 3 * 4
        requests.append(request(customer, arrival, size, new))
    weights = draw(
        st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=customers, max_size=customers)
    )
    return requests, np.array(weights), draw(st.integers(1, 3))


@given(traces(), st.sampled_from(list(POLICIES)), st.booleans())
def test_a_schedule_is_what_a_recorder_saw(trace, policy, takes_back):
    requests, weights, places = trace
    found, seen = served(requests, policy, weights, places, takes_back=takes_back)
    assert [requests[i] for i in found.order] == [r for r, _ in seen.joins]
    np.testing.assert_array_equal(found.given, [cost for _, _, cost in seen.rows])
    np.testing.assert_array_equal(found.waiting, [waiting for _, waiting, _ in seen.rows])
    np.testing.assert_array_equal(found.clock, [clock for clock, _, _ in seen.rows])
    assert sorted(map(id, seen.done)) == sorted(map(id, requests))  # each is done, and once
    assert found.tokens == sum(len(r.prompt) + r.new_tokens for r in requests)
    assert found.first_token.min() > 0
    assert figures.service_gap(found, weights) == pytest.approx(seen.gap(weights))


@given(traces(), st.sampled_from(list(POLICIES)), st.booleans())
def test_no_place_is_free_while_somebody_waits(trace, policy, takes_back):
    found, seen = served(trace[0], policy, *trace[1:], takes_back=takes_back)
    assert seen.idle == figures.idle_steps(found) == 0


@given(traces())
def test_counters_keep_what_two_who_wait_are_given_together(trace):
    requests, weights, places = trace
    _, seen = served(requests, "counters", weights, places)
    # A customer who is next goes ahead by a prompt, and by the answers that it has in places.
    ahead = max(len(r.prompt) for r in requests) + 2 * places * max(r.new_tokens for r in requests)
    assert seen.gap(weights) <= 2 * ahead / weights.min()
    assert 2 * ahead / weights.min() <= figures.gap_bound(requests, places, weights)


def test_first_come_lets_a_flood_go_ahead_and_its_gap_grows():
    requests = [request(0, 0) for _ in range(200)] + [request(1, 1) for _ in range(50)]
    gaps = {name: served(requests, name, [1, 1], 2)[1].gap([1, 1]) for name in POLICIES}
    bound = figures.gap_bound(requests, 2, np.ones(2))
    assert gaps["first come"] > 10 * bound > bound > gaps["counters"]


def test_who_comes_back_has_stored_no_credit():
    flood = [request(0, 0) for _ in range(200)]
    late = [request(1, 200) for _ in range(50)]
    _, seen = served([*flood, *late], "counters", [1, 1], 2)
    after = [r.customer for r, clock in seen.joins if clock >= 200][:20]
    assert 9 <= sum(after) <= 11


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_two_names_of_one_customer_gain_nothing_by_half_its_weight_each(weight):
    """With a whole weight each they gain: half as much again."""
    given_to = []
    for names in (1, 2):
        requests = [request(i % names, 0) for i in range(300)]
        requests += [request(2, 0) for _ in range(300)]
        weights = [1 / names if weight == 0.5 else 1.0] * 2 + [1.0]
        found, _ = served(requests, "counters", weights, 2, horizon=400)
        given_to.append(found.given[-1, :2].sum() / found.given[-1].sum())
    assert given_to[0] == pytest.approx(1 / 2, abs=0.02)
    assert given_to[1] == pytest.approx(1 / 2 if weight == 0.5 else 2 / 3, abs=0.02)


def test_weights_are_the_parts_of_the_service_whatever_is_asked_for():
    requests = [request(i % 3, 0, (1, 20, 60)[i % 3], (20, 6, 2)[i % 3]) for i in range(900)]
    found, _ = served(requests, "counters", [1, 2, 3], 3, horizon=300)
    np.testing.assert_allclose(
        found.given[-1] / found.given[-1].sum(), [1 / 6, 1 / 3, 1 / 2], atol=0.02
    )


def test_a_lent_place_is_taken_back_from_who_has_two():
    requests = [request(0, 0, new=50), request(0, 0, new=50), request(1, 10)]
    waits = {}
    for takes_back in (False, True):
        found, seen = served(requests, "counters", [1, 1], 2, takes_back=takes_back)
        waits[takes_back] = found.first_token[2] - 10
        assert len(seen.joins) == 3 + takes_back  # the one that lost its place begins anew
    assert waits[True] <= 2 < 40 < waits[False]
    found, seen = served(
        [request(0, 0, new=50), request(1, 10)], "counters", [1, 1], 1, takes_back=True
    )
    assert found.order == [0, 1]  # its only place is not taken


def test_nobody_has_more_places_than_the_most():
    """A flood of one customer leaves the other places free, and who comes has one at once."""
    requests = [request(0, 0, new=30) for _ in range(9)] + [request(1, 10)]
    found, _ = served(requests, "counters", [1, 1], 4, most=2)
    assert found.joined[9] <= 11
    others = found.clock > found.first_token[9] + 3
    assert set(found.free[others]) <= {0, 2, 3}  # 0 where one joined, 3 when the last is alone
    assert figures.idle_steps(found) > 0
    assert found.tokens == sum(len(r.prompt) + r.new_tokens for r in requests)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match=r"requests\[0\].customer is 2: there are 2 weights"):
        served([request(2, 0)], "counters", [1, 1], 1)
    with pytest.raises(ValueError, match=r"requests\[1\].arrival is 0: the one before it .* 3"):
        served([request(0, 3), request(0, 0)], "counters", [1], 1)
    with pytest.raises(ValueError, match=r"requests\[0\] has 10 prompt tokens and asks for 0 new"):
        served([request(0, 0, new=0)], "counters", [1], 1)
    with pytest.raises(ValueError, match="weights"):
        served([request(0, 0)], "counters", [0.0], 1)


def test_waits_and_evenness_by_hand():
    requests = [request(0, 0), request(1, 0), request(1, 0), request(0, 3)]
    found, _ = served(requests, "first come", [1, 1], 1, horizon=5)
    # One step each for the prompts, two for the rest of an answer: joined at 0 and 3.
    np.testing.assert_array_equal(found.joined, [0, 3, -1, -1])
    np.testing.assert_array_equal(figures.waits(requests, found, 5, 2), [1, 4, 5, 2])
    np.testing.assert_array_equal(figures.waits(requests, found, 5, 1), [1, 2])
    np.testing.assert_array_equal(found.given[-1], [16, 14])
    assert figures.tokens_a_step(found) == pytest.approx((13 + 12) / 5)
    assert figures.jain(requests, found, 5) == pytest.approx(30**2 / (2 * (16**2 + 14**2)))
    # Customer 0 asks for 16 in all, less than half: it has all of its share.
    alone = [request(0, 0), *(request(1, 0) for _ in range(3))]
    found, _ = served(alone, "counters", [1, 1], 1)
    assert figures.jain(alone, found, 100) == pytest.approx(1)


def some_lines():
    text = [" it works well.", " the sound is awful and the screen broke.", " i like the size."]
    tokenizer = byte_level_bpe(
        [*text, data.PLEA, data.STUFFING, "What is my order number? 0123456789"], 400
    )
    tokens = [np.array(tokenizer.encode(x).ids, np.int32) for x in text]
    return tokenizer, Lines(text, tokens, np.array([False, True, False]))


@pytest.fixture
def known_words(monkeypatch):
    monkeypatch.setattr(data, "_lexicon", lambda: {"awful": -2.0, "broke": -1.0, "like": 1.5})


def test_texts_are_scored_by_their_words(known_words):
    assert data.scores_of("it is AWFUL, and like new: broke now") == (1 / 8, (2 + 1) / 4 / 8)
    assert data.scores_of("") == (0, 0)
    assert data.scores_of(data.STUFFING)[0] == 1


def test_a_stuffed_text_wins_no_more_than_the_cap(known_words):
    customers = [Customer(0.5, False, False)] * 8
    said = ["the sound is awful, answer me now please, it is my only player"] * 7
    honest, stuffed = (data.importances([*said, x], customers) for x in (said[0], data.STUFFING))
    assert data.proportional(honest)[-1] == pytest.approx(1 / 8)
    assert data.proportional(stuffed)[-1] > 0.4
    assert data.bounded(stuffed)[-1] == pytest.approx(data.CAP / 8)
    for w in (honest, stuffed, np.eye(8)[0] + 1e-3):
        assert data.bounded(w).sum() == pytest.approx(1)
        assert np.all(data.bounded(w) >= data.FLOOR / 8 - 1e-6)


def test_a_trace_is_the_same_but_for_what_a_flood_says(known_words):
    tokenizer, lines = some_lines()
    calm, stuffed = (data.trace(3, lines, tokenizer, 120, stuffed=x) for x in (False, True))
    arrivals = [r.arrival for r in calm.requests]
    assert arrivals == sorted(arrivals)
    assert [r.arrival for r in calm.requests if r.customer == data.FLOOD] == list(range(120))
    for one, other in zip(calm.requests, stuffed.requests, strict=True):
        assert one[:2] == other[:2]
        assert len(one.prompt) == len(other.prompt)
        assert data.LEAST_TOKENS <= len(one.prompt) <= data.MOST_TOKENS
        said = tokenizer.decode(one.prompt.tolist())
        assert said.startswith(" My order number is ")
        assert said.endswith("Your order number is")
        if one.customer != data.FLOOD:
            np.testing.assert_array_equal(one.prompt, other.prompt)
    assert stuffed.importance[-1] > 10 * stuffed.importance[:-1].max()
    np.testing.assert_array_equal(calm.importance[:-1], stuffed.importance[:-1])
    assert {r.customer for r in calm.without_flood()} == set(range(data.LIGHT))


@pytest.mark.parametrize("takes_back", [False, True])
def test_the_engine_serves_in_the_counted_order(takes_back, monkeypatch):
    monkeypatch.setattr(engine, "PLACE_BYTES", 26_000)
    model = make_sharp()
    rng = np.random.default_rng(0)
    when = [(1, 0), (0, 0), (1, 0), (1, 1), (0, 3), (1, 3), (0, 5)]
    requests = [
        Request(c, arrival, rng.integers(0, VOCAB, 10 + 9 * i).astype(np.int32), 3 + i % 3)
        for i, (c, arrival) in enumerate(when)
    ]
    by_model = engine.Engine(adapters.decoder(model, model.attention_specs), 2, np.ones(2))
    options = {"places": 2, "horizon": 100, "weights": np.ones(2), "takes_back": takes_back}
    found = schedule.serve(requests, schedule.least_counter, by_model, **options)
    counted, _ = served(requests, "counters", [1, 1], 2, 100, takes_back)
    assert found.order == counted.order
    np.testing.assert_array_equal(found.given, counted.given)
    assert [len(by_model.answers[r[:2]]) for r in (requests[1], *requests[3:])] == [4, 3, 4, 5, 3]
    assert not by_model.state.active.any()


@pytest.fixture
def asked_alike(known_words, monkeypatch):
    """Texts without a model: every token is as likely as any other over the whole cache."""
    tokenizer, lines = some_lines()
    size = tokenizer.get_vocab_size()
    monkeypatch.setattr(engine, "loaded", lambda: Loaded(None, tokenizer, None, lines))
    monkeypatch.setattr(
        evaluate, "reference", lambda model, prompt, fed: np.full((len(fed), size), -np.log(size))
    )
    return tokenizer


def test_customers_are_asked_for_what_only_a_budget_may_drop(asked_alike):
    calm, stuffed = (sharing.desk_of.__wrapped__(1, x) for x in (False, True))
    for c, (prompt, own) in enumerate(zip(calm.prompts, calm.cases, strict=True)):
        assert len(prompt) == sharing.SIZES[c]
        assert np.array_equal(prompt, stuffed.prompts[c]) == (c > 0)
        assert len(own) == 2 * (c > 0)  # the flood is not asked
        droppable = asked_alike.decode(prompt[NUM_SINKS:-NUM_RECENT].tolist())
        for kind, case in zip(sharing.KINDS, own, strict=False):
            number = asked_alike.decode(case.answer.tolist())
            assert f"My {kind} number is{number}." in droppable
            assert asked_alike.decode(case.fed.tolist()).endswith(f"{kind} number is{number[:-1]}")
    assert calm.urgent.sum() == 2
    np.testing.assert_array_equal(calm.importance[1:], stuffed.importance[1:])
    assert data.proportional(stuffed.importance)[0] > 0.5 > data.proportional(calm.importance)[0]


def test_answers_are_judged_by_hand(asked_alike):
    desk = sharing.desk_of.__wrapped__(1, False)
    known = np.log(0.9)
    found = []
    for own in desk.cases:
        found.append([])
        for case in own:
            said = np.full(case.full.shape, np.log(0.1 / (case.full.shape[1] - 1)))
            last = np.arange(len(said))[-len(case.answer) :]
            said[last, case.answer] = known
            found[-1].append(said)
    result = sharing._judged(desk, found)["figures"]
    assert result["answered"] == 1
    assert result["nats a token"] == pytest.approx(-known, rel=1e-5)
    found[1][0][-1, desk.cases[1][0].answer[-1]] = -50
    wrong = sharing._judged(desk, found)["figures"]
    assert wrong["answered"] == pytest.approx(0.9)
    assert wrong["KL, worst customer"] > wrong["KL"] > result["KL"] > 0
    full = sharing._judged(desk, [[case.full for case in own] for own in desk.cases])["figures"]
    assert full["KL"] == full["KL, worst customer"] == 0
