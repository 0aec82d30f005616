"""Adaptivity: what is kept is counted against what fitted importance keeps, arm by arm."""

import numpy as np
import pytest

from experiments.adaptivity import experiment
from experiments.adaptivity.experiment import ARMS, PART, Domain, Material, Sizes
from experiments.text_classification import tokens
from experiments.text_classification.tokens import Worth

SIZES = Sizes(3, 6, 30)


@pytest.fixture
def material(monkeypatch):
    """What tells the class in one domain, tokens 10..19, is noise in the other, where 20 and 21 do."""
    rng = np.random.default_rng(0)

    def domain(is_old, number=400):
        label = rng.integers(0, 2, number)
        noise = [rng.integers(30, 60, 5) if is_old else rng.integers(10, 20, 9) for _ in label]
        told = [10 + 5 * y + rng.integers(0, 5, 5) if is_old else [20 + y] for y in label]
        ids = [np.concatenate(x).astype(np.int32) for x in zip(noise, told, strict=True)]
        return Domain(ids, label.astype(np.int32))

    before, after, test = domain(True), domain(False), domain(False, SIZES.held)
    worth = Worth.of(after.ids, after.positive, tokens.VOCABULARY)
    both = tokens.counts(before.ids + after.ids, tokens.VOCABULARY)
    idf = tokens.inverse_document_frequency(both)
    verdict = np.zeros(tokens.VOCABULARY, np.float32)
    verdict[[20, 21]], verdict[10:20] = 1, -1
    found = Material(before, after, test.ids, worth.of_tokens(test.ids), idf, verdict)
    monkeypatch.setattr(experiment, "prepare", lambda held: found)
    return found


def test_who_follows_keeps_what_tells_the_new_domain_and_who_stays_does_not(material):
    found = {
        name: experiment.run(name, 0, SIZES, lambda: None)["figures"]
        for name in ("static", "carried")
    }
    assert found["static"]["kept at the end"] == found["static"]["kept at the change"]
    assert found["static"]["kept at the end"] < 0.8
    assert found["static"]["steps until good"] == SIZES.after + 1
    assert found["carried"]["kept at the change"] == found["static"]["kept at the change"]
    assert found["carried"]["kept at the end"] > 0.95
    assert found["carried"]["steps until good"] <= 3


def test_kept_tokens_are_half_of_all_and_the_best_of_each_text(material):
    w = np.ones(tokens.VOCABULARY, np.float32)
    w[[20, 21]] = 100.0
    kept = experiment.kept_by(w, material)
    assert kept.sum() == int(PART * kept.size)
    ends = np.cumsum([len(x) for x in material.held])
    assert np.all(kept[ends - 1])  # the token that tells the class stands last


def test_verdicts_help_at_once_and_are_of_the_texts_that_were_read(material):
    rng = np.random.default_rng(0)
    said = experiment._said([np.array([20, 12, 40]), np.array([12])], material.verdict, rng)
    assert said[[20, 12, 40, 21]].tolist() == [1, -1, 0, 0]
    kept = {
        name: experiment.run(name, 0, Sizes(3, 2, 30), lambda: None)["figures"]["kept at the end"]
        for name in ("carried", "carried, reviewed")
    }
    assert kept["carried, reviewed"] > kept["carried"]


def test_an_average_flaps_less(material):
    sizes = Sizes(3, 12, 30)
    changes = {
        name: experiment.run(name, 0, sizes, lambda: None)["figures"]["tokens that change a step"]
        for name in ("carried", "carried, no average")
    }
    assert changes["carried"] < changes["carried, no average"]
    assert set(changes) < set(ARMS)
