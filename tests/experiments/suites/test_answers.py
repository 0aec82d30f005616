"""Answers are the greedy ones, and what is retained is counted as it was found."""

import json

import numpy as np
import pytest
from scipy import stats

from experiments.harness import files, runs, texts
from experiments.kv_budget import evaluate
from experiments.suites import answers, page, prose, run, summary, tasks
from experiments.suites.__main__ import main
from experiments.suites.cases import Case, Question, Writer
from tests.support.small_models import VOCAB, greedy_alone, make_model, make_sharp
from tests.support.together import ROOT

SIZE = 150


class Numbers:
    """A tokenizer of token ids as words."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def sharp():
    return make_sharp()


def ids(seed, number):
    return np.random.default_rng(seed).integers(0, VOCAB, number).astype(np.int32)


def asked(model, context, right):
    """A question whose right answer is the model's own, or one that differs from the third token on."""
    query = ids(2, 5)
    answer = greedy_alone(model, np.concatenate([context, query]), 6)
    given = answer.copy()
    if not right:
        given[2:] = (given[2:] + 1) % VOCAB
    return Question(query, given, (" ".join(map(str, answer[1:5])),)), answer


@pytest.mark.parametrize("right", [True, False])
def test_an_answer_is_that_of_one_token_at_a_time(sharp, right):
    context, calls = ids(1, SIZE), []
    question, greedy = asked(sharp, context, right)

    def log_probs(tokens):
        calls.append(tokens)
        return evaluate.reference(sharp, context, tokens)

    width, wanted = answers.width_of([question]), question.references
    found = answers.reply(log_probs, question, Numbers(), width, wanted=wanted)
    assert found.text.split()[:5] == list(map(str, greedy[:5]))
    assert (len(calls) == 1) == right
    assert len({len(tokens) for tokens in calls}) == 1
    fed = np.concatenate([question.ids, question.answer])
    dense = np.asarray(evaluate.reference(sharp, context, fed))[len(question.ids) - 1 : -1]
    own = dense[np.arange(len(question.answer)), question.answer].sum()
    assert found.forced.log_likelihood == pytest.approx(own, rel=1e-4)
    np.testing.assert_array_equal(found.forced.likeliest, dense.argmax(axis=-1))


def test_an_answer_without_an_end_is_greedy_to_its_last_token(sharp):
    context = ids(1, SIZE)
    question, _ = asked(sharp, context, False)
    number = len(question.answer) + answers.MORE_TOKENS
    greedy = greedy_alone(sharp, np.concatenate([context, question.ids]), number)

    def log_probs(tokens):
        return evaluate.reference(sharp, context, tokens)

    for draft in (None, greedy[:9], greedy[::-1]):
        given = {"wanted": ("no such thing",), "draft": draft}
        found = answers.reply(log_probs, question, Numbers(), 32, **given)
        np.testing.assert_array_equal(found.tokens, greedy)


def test_an_answer_that_nobody_needs_takes_one_pass(sharp):
    context, calls = ids(1, SIZE), []
    question, _ = asked(sharp, context, False)

    def log_probs(tokens):
        calls.append(tokens)
        return evaluate.reference(sharp, context, tokens)

    found = answers.reply(log_probs, question, Numbers(), 32, wanted=())
    assert (found.text, len(calls)) == ("", 1)


@pytest.mark.parametrize("changed", [None, 3, 0])
def test_a_draft_saves_passes_and_changes_nothing(sharp, changed):
    """It is believed as far as the model says the same."""
    context, calls = ids(1, SIZE), []
    question, greedy = asked(sharp, context, False)
    draft = greedy.copy()
    if changed is not None:
        draft[changed] = (draft[changed] + 1) % VOCAB

    def log_probs(tokens):
        calls.append(tokens)
        return evaluate.reference(sharp, context, tokens)

    given = {"wanted": question.references, "draft": draft}
    found = answers.reply(log_probs, question, Numbers(), 32, **given)
    assert found.text.split()[:5] == list(map(str, greedy[:5]))
    np.testing.assert_array_equal(found.tokens[:5], greedy[:5])
    assert len(calls) == 2 or changed is not None


@pytest.mark.parametrize(
    ("text", "reference", "is_there"),
    [
        ("4711. ", "4711", True),
        ("the BRAVE-otter,", "brave-Otter", True),
        ("4711", "4711", False),  # it may go on
        ("47112\n", "4711", False),
        ("14711\n", "4711", False),
        ("animals\n", "animal", False),
        ("a 12ab-34.", "12ab-34", True),
    ],
)
def test_a_reference_is_whole(text, reference, is_there):
    assert answers.found(text, [reference]) == [is_there]


def test_a_cache_with_room_for_everything_retains_everything(monkeypatch):
    """And a tiny one changes likelihoods: figures depend on what is kept."""
    model, context = make_model(), ids(1, SIZE)
    question, _ = asked(model, context, True)
    other = Question(question.ids, question.answer, ("no such thing",))
    monkeypatch.setattr(tasks, "case_of", lambda *about: Case(context, (question, other)))
    settings = run.Settings(("vt",), (1024,), 2, ("ladder",), (1.0, 0.25))
    results, steps = [], []
    assert run.number_left(results, "small", settings) == 2
    run.run(model, Numbers(), "small", settings, results, lambda: steps.append(0))
    (entry,) = results
    assert len(entry["cases"]) == len(steps) == 2
    assert run.number_left(results, "small", settings) == 0
    for case in entry["cases"]:
        full, whole, tiny = (case[arm] for arm in ("full", "ladder at 1", "ladder at 0.25"))
        assert (full["strings"], full["found"], full["tokens"]) == (2, 1, 12)
        assert full["agreed"] == 12  # with itself
        assert whole["kept"] == 1
        near, far = (abs(x["log_likelihood"] - full["log_likelihood"]) for x in (whole, tiny))
        assert 0 < near < far
        assert tiny["bytes"] < 0.3 * full["bytes"]
    assert summary.screened(entry["cases"]) == 0.5
    assert summary.retained(entry["cases"], "ladder at 1").part.mean == 1
    json.dumps(results)
    few = run.Settings(("vt",), (1024,), 2, ("ladder",), (1.0,))
    with pytest.raises(ValueError, match="--json holds vt at 1024 with ladder at 1"):
        run.run(model, Numbers(), "small", few, results, lambda: None)


def row(found, kept, strings=4, tokens=8, agreed=6, loss=4.0):
    full = {"strings": strings, "found": found, "tokens": tokens, "log_likelihood": -1.0}
    return {"full": full, "a": {"kept": kept, "agreed": agreed, "log_likelihood": -1.0 - loss}}


def test_what_is_retained_is_a_part_of_what_was_found():
    cases = [row(4, 2), row(2, 2), row(0, 0), row(2, 1)]
    part = summary.retained(cases, "a")
    assert (part.contexts, part.strings) == (3, 8)
    assert part.part.mean == 5 / 8
    assert 0 < part.part.low < 0.2 < 5 / 8 < part.part.high <= 1  # of three contexts
    assert summary.screened(cases) == 8 / 16
    assert summary.likelihood(cases, "a") == (0.5, 0.75)


@pytest.mark.parametrize(("kept", "number"), [(8, 8), (0, 8), (3, 4), (1, 2)])
def test_few_contexts_promise_little(kept, number):
    """As of so many trials: the exact interval of Clopper and Pearson."""
    cases = [row(4, 4)] * kept + [row(4, 0)] * (number - kept)
    part = summary.retained(cases, "a").part
    exact = stats.binomtest(kept, number).proportion_ci(method="exact")
    assert part.mean == kept / number
    assert part.low <= exact.low + 1e-9
    assert part.high >= exact.high - 1e-9


def test_many_alike_contexts_have_the_interval_of_the_exact_test():
    part = summary.retained([row(2, 1)] * 10, "a").part
    exact = stats.binomtest(5, 10).proportion_ci(method="exact")
    assert (part.low, part.high) == pytest.approx((exact.low, exact.high))
    assert summary.retained([row(1, 1), row(0, 0)], "a").part is None


def test_distances_over_prose_are_those_of_all_tokens():
    kl = np.random.default_rng(0).exponential(size=(2, 500)).astype(np.float32)
    cases = [{"a": {"kl": runs.packed(x), "agreed": 450}} for x in kl]
    found = summary.over_prose(cases, "a")
    ordered = np.sort(kl.ravel())
    assert found["mean"] == pytest.approx(kl.mean(), rel=1e-5)
    assert ordered[498] <= found["median"] <= ordered[501]
    assert ordered[988] <= found["99 %"] <= ordered[991]
    assert ordered[997] <= found["99.9 %"] <= ordered[999]
    assert (found["top-1"], found["tokens"]) == (0.9, 1000)


def test_distances_are_zero_where_predictions_are_the_same():
    log_p = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    log_q = np.log(np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], np.float32))
    apart = prose.distances(log_q, log_p)
    np.testing.assert_allclose(apart.kl, [0, 0.7 * np.log(8)], rtol=1e-5, atol=1e-6)
    assert apart.same.tolist() == [True, False]


def test_a_passage_is_cut_where_its_continuation_begins(smollm2):
    writer = Writer(smollm2[2], 1024)
    first = prose.passage_of(writer, 1)
    assert len(first.context) == 512
    assert len(first.continuation) == 513
    text = writer.tokenizer.decode(np.concatenate(first).tolist())
    assert text in texts.text_of("plrabn12")
    assert not np.array_equal(prose.passage_of(writer, 5).context, first.context)


def test_the_page_has_every_task_and_arm():
    entry = {"model": "m", "task": "vt", "length": 1024, "arms": ["a"], "cases": [row(4, 4)] * 3}
    figures = {"kl": runs.packed(np.ones(4)), "agreed": 3}
    told = {**entry, "task": "prose", "cases": [{"full": figures, "a": figures}]}
    text = page.text_of([entry, told], ["the command"])
    assert "## m, 1,024 tokens" in text
    assert "| vt | 3 | 1.00 | 12 | 1.000 [0.29, 1.00] |" in text
    assert "| **RULER-like**, solved | 3 | 1.00 | 12 | 1.000" in text
    assert "| vt | 24 | +0.500, 0.750 |" in text
    assert "| a | 1 | 1 | 1 | 1 | 0.7500 | 4 |" in text


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--task", "niah"], "--task is 'niah': it must be one of niah_single_1"),
        (["--length", "long"], "--length is 'long'"),
        (["--length", "1023"], "--length is 1023: at least 1024"),
        (["--length", "1024,9000"], "--length take 9000 positions"),
        (["--samples", "0"], "--samples is 0"),
        (["--policy", "best"], "policy is 'best'"),
        (["--policy", "full"], "--policy names full"),
        (["--budget", "0"], "--budget is 0.0"),
        (["--budget", "all"], "--budget is 'all'"),
    ],
)
@pytest.mark.usefixtures("loaded_once")
def test_bad_arguments_are_one_line(capsys, tmp_path, arguments, names):
    assert main(["--json", str(tmp_path / "out.json"), *arguments]) == 2
    assert names in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda report: report["results"][0].update(task="vt"),
            "its digest is not that of results",
        ),
        (lambda report: report.pop("digest"), "lacks 'digest'"),
        (lambda report: report.pop("commands"), "lacks 'commands'"),
        (lambda report: report.update(results={}), "lacks 'results'"),
    ],
)
def test_altered_results_are_not_gone_on_from(capsys, tmp_path, change, message):
    path = tmp_path / "out.json"
    entry = {"model": "m", "task": "niah_single_1", "length": 1024, "arms": [], "cases": []}
    files.write_signed(path, {"commands": [], "results": [entry]}, "results")
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    assert main(["--json", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert json.loads(path.read_text()) == report


def test_a_file_of_something_else_is_named(capsys, tmp_path):
    path = tmp_path / "out.json"
    path.write_text("[]")
    assert main(["--json", str(path)]) == 2
    assert "out.json holds a list: it must be an object" in capsys.readouterr().err
    assert path.read_text() == "[]"


@pytest.mark.parametrize(
    ("name", "fields"), [("suites", ["results"]), ("compiled", ["versions", "cases", "pods"])]
)
def test_the_kept_results_can_be_gone_on_from(name, fields):
    path = ROOT / "docs/results" / f"{name}.json"
    assert files.read_signed(path, **dict.fromkeys(fields, list if name == "suites" else dict))
