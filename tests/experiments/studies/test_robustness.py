"""Robustness: what happens to texts, what floors and caps keep, and attacks where they can be solved."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.tokens import byte_level_bpe
from experiments.robustness import arms, attacks, data, experiment
from experiments.text_classification.data import SOURCES
from experiments.text_classification.tokens import MOST_TOKENS, Worth

NUMBER, VOCABULARY = 24, 50


def some():
    """Texts of which those of the last source are worth little."""
    rng = np.random.default_rng(0)
    group = np.arange(NUMBER) % len(SOURCES)
    scored = [rng.random(rng.integers(6, 30)) * (0.02 if g == 3 else 1) for g in group]
    return scored, group


def test_typos_are_letters_and_gaps_are_words():
    text = "Some words, and 12 numbers; " * 40
    rng = np.random.default_rng(1)
    typos, gaps = data.with_typos(text, rng), data.with_gaps(text, rng)
    changed = [(a, b) for a, b in zip(text, typos, strict=True) if a != b]
    letters = sum(x.isalpha() for x in text)
    assert 0.5 * data.NOISE < len(changed) / letters < 1.5 * data.NOISE
    assert all(a.isalpha() and b in data.LETTERS for a, b in changed)
    words = iter(text.split())
    assert all(word in words for word in gaps.split())  # in their order
    assert len(gaps.split()) == pytest.approx(2 / 3 * len(text.split()), rel=0.15)


def test_who_stuffs_begins_with_what_scores_best():
    rng = np.random.default_rng(2)
    worth = Worth(rng.random(VOCABULARY), rng.random(VOCABULARY))
    ids = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in (5, 60, 7)]
    found = data.stuffed(ids, np.array([True, True, False]), worth)
    best = sorted(range(VOCABULARY), key=lambda i: -worth.w[i] * worth.idf[i])[: data.STUFFING]
    for own, x in zip(ids[:2], found[:2], strict=True):
        assert x.tolist() == [*best, *own.tolist()][:MOST_TOKENS]
    assert found[2] is ids[2]


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", list(arms.ARMS))
def test_a_budget_is_spent_and_every_text_has_a_token(arm, part):
    scored, group = some()
    every = sum(map(len, scored))
    kept = arms.ARMS[arm](scored, group, int(part * every))
    assert sum(m.sum() for m in kept) == (every if arm == "full" else int(part * every))
    assert [len(m) for m in kept] == [len(x) for x in scored]
    assert min(m.sum() for m in kept) >= 1


def parts(kept, scored, group):
    """Of each source's tokens over that of all."""
    got, whole = (
        np.array([sum(x[i] for i in np.flatnonzero(group == g)) for g in range(len(SOURCES))])
        for x in ([m.sum() for m in kept], [len(x) for x in scored])
    )
    return got / whole / (got.sum() / whole.sum())


def test_floors_lift_the_source_that_is_worth_little():
    scored, group = some()
    total = sum(map(len, scored)) // 2
    before, after = (
        parts(arms.ARMS[arm](scored, group, total), scored, group)
        for arm in ("ladder", "ladder with floors")
    )
    assert before[3] < 0.6
    assert after.min() > arms.FLOOR - 0.03  # whole tokens
    assert after[3] == pytest.approx(arms.FLOOR, abs=0.03)


@pytest.mark.parametrize("rule", ["proportional", "ladder"])
def test_a_stuffed_text_wins_no_more_than_its_cap(rule):
    scored, group = some()
    total = sum(map(len, scored)) // 4
    scored[0] = np.full(60, 20.0)
    cap = int(arms.CAP * total / NUMBER)
    won, held = (
        [m.sum() for m in arms.ARMS[arm](scored, group, total)]
        for arm in (rule, f"{rule} with caps")
    )
    assert won[0] > 2 * cap
    assert held[0] == max(held) == cap
    assert sum(held[1:]) > sum(won[1:])


def test_who_is_near_the_price_by_brute_force():
    scored, group = some()
    kept = arms.ARMS["ladder"](scored, group, sum(map(len, scored)) // 2)
    adds = {}
    for text, x in enumerate(scored):
        order = sorted(range(len(x)), key=lambda i, x=x: -x[i])
        adds |= {(text, i): x[i] / (k + 1) for k, i in enumerate(order) if k}
    price = min(value for (text, i), value in adds.items() if kept[text][i])
    wanted = {key: np.log(value / price) for key, value in adds.items()}
    near = arms.near_the_price(scored, kept, 0.2)
    found = dict(
        zip(zip(near.text.tolist(), near.at.tolist(), strict=True), near.margin, strict=True)
    )
    assert found == pytest.approx({k: v for k, v in wanted.items() if abs(v) <= 0.2})
    assert 0 < len(found) < len(adds)
    assert np.all(np.diff(np.abs(near.margin)) >= 0)


def test_attacks_of_a_linear_loss_go_to_the_corner_and_stay_in_the_box():
    slope, x = jnp.array([1.0, -2.0, 0.5]), jnp.zeros(3)
    for attack in (attacks.sign_gradient, attacks.projected_gradient):
        np.testing.assert_allclose(attack(lambda y: y @ slope, x, 0.3), [0.3, -0.3, 0.3], rtol=1e-6)


def test_an_iterated_attack_turns_where_one_step_passes_the_top():
    top = jnp.array([0.1, -0.05])

    def loss(y):
        return -jnp.sum((y - top) ** 2)

    one, more = (
        float(loss(attack(loss, jnp.zeros(2), 0.3)))
        for attack in (attacks.sign_gradient, attacks.projected_gradient)
    )
    assert one < 5 * more < 0


def test_a_fair_objective_counts_the_hardest_source_again():
    each = jnp.array([1.0, 3.0, 0.5, 4.0, 0.0])
    labels = jnp.array([[1, 0], [0, 0], [1, 1], [0, 2], [-1, -1]])
    assert float(experiment.objective(each, labels, 0.0)) == pytest.approx(8.5 / 4)
    assert float(experiment.objective(each, labels, 1.5)) == pytest.approx(8.5 / 4 + 1.5 * 4)


def test_verdicts_are_of_whole_words(monkeypatch):
    lines = ["it is awful and the sound is awful", "a good table and a good sound"] * 20
    tokenizer = byte_level_bpe(lines, 300, lower_case=True)
    monkeypatch.setattr(experiment.texts, "lexicon", lambda: {"awful": -2.0, "good": 0.4})
    vocabulary = tokenizer.get_vocab()
    asked = np.array([vocabulary[x] for x in ("Ġawful", "a", "Ġgood", "Ġsound", "Ġawful")])
    assert experiment.verdicts(asked, tokenizer).tolist() == [1, 0, -1, -1, 1]
