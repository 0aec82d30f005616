"""Long text: what a glossary and a book are cut into, and summaries of so many words."""

import types

import networkx
import numpy as np
import pytest

from experiments.long_text import data, summaries
from experiments.long_text.summaries import Part

PAGE = """<html><head><title>Chapter 1. Locks</title></head><body>
<div class="toc"><a href="sect.keys.html#x">Keys</a><a href="other.html">Other</a></div>
<div class="highlights"><div class="para">What <code>locks</code> are
 for.</div><div class="sidebar"><div class="para">A box.</div></div></div>
<div class="para">A lock &amp; a door.<pre>code</pre> It opens.</div><p>It closes.</p></body></html>"""


def test_a_page_is_its_summary_and_its_text():
    page = data._Page()
    page.feed(PAGE)
    assert page.title == "Chapter 1. Locks"
    assert page.summary == "What locks are for."
    assert page.text == "A lock & a door. It opens. It closes."
    assert list(page.sections) == ["sect.keys.html"]


def test_entries_of_a_glossary():
    body = "   A thing {that} has\n   many " + "words " * 15 + "in it.\n\n"
    text = (
        f"The Glossary\n\n   :a thing: n.\n\n{body}   :short: adj.\n\n   Few words.\n\n   :z:\n\n"
    )
    found = [(match["term"], match["body"]) for match in data.ENTRY.finditer(text + "End\n")]
    assert [term for term, _ in found] == ["a thing", "short", "z"]
    assert "many words" in found[0][1]
    assert "Few" not in found[0][1]


def test_sentences():
    assert data.sentences("It is 1.5 m. Is it? “Yes!” He said e.g. nothing.") == [
        "It is 1.5 m.",
        "Is it?",
        "“Yes!” He said e.g. nothing.",
    ]


@pytest.fixture
def part():
    sentences = [
        "the lock opens the old door",
        "nothing here",
        "the door has a lock and a key",
        "a key opens the lock of the door",
        " ".join(f"x{i}" for i in range(summaries.WORDS + 1)),
    ]
    number = np.repeat(np.arange(5), [6, 2, 8, 8, 51])
    return Part("a key opens the lock", np.zeros(len(number), int), sentences, number)


def test_textrank_puts_first_what_shares_most(part, monkeypatch):
    ranks = []
    monkeypatch.setattr(
        networkx, "pagerank", lambda graph: ranks.append(graph) or dict.fromkeys(graph, 1.0)
    )
    summaries.textrank(part, None, 0)
    (graph,) = ranks
    # the, lock, door of 5 and 7 different words: 3 / (log 5 + log 7)
    assert graph[0][2]["weight"] == pytest.approx(3 / (np.log(5) + np.log(7)))
    assert not graph.has_edge(0, 1)


def test_worth_a_word_takes_what_fits(part):
    worth = np.array([1.0, 9.0, 2.0, 3.0, 100.0])[part.sentence_of]  # of each token
    known = types.SimpleNamespace(w={"worth": np.broadcast_to(worth / 6, (2, 3, len(worth)))})
    text = summaries.by_worth("worth")(part, known, 0)
    # The last is worth most a word and does not fit; all others do, in the order of the text.
    assert text == " ".join(part.sentences[:4])
    assert len(summaries.lead(part, None, 0).split()) <= summaries.WORDS


def test_the_oracle_is_no_worse_than_any_arm(part):
    best = summaries._rouge(part, summaries.oracle(part, None, 0))["ROUGE-1"]
    for arm in (summaries.lead, summaries.chance, summaries.textrank):
        assert summaries._rouge(part, arm(part, None, 0))["ROUGE-1"] <= best
