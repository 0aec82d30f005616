"""Contexts hold what their questions ask for, at exact lengths; oracles read the texts themselves."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from experiments.suites import answers, haystacks, tasks, tracking
from experiments.suites.cases import QUESTION_TOKENS, Writer

INDEX = 3
SHORT, LONG = 1024, 4096
CODE = r"The access code of (\S+) is (\S+)\."


@pytest.fixture(scope="module")
def made(smollm2):
    """(task, length) -> the case, its context's text, and each question's text, answer, references."""
    tokenizer, known = smollm2[2], {}

    def of(name, length=SHORT):
        if (name, length) not in known:
            case = tasks.case_of(name, Writer(tokenizer, length), INDEX)
            said = [
                (
                    tokenizer.decode(x.ids.tolist()),
                    tokenizer.decode(x.answer.tolist()),
                    x.references,
                )
                for x in case.questions
            ]
            known[name, length] = case, tokenizer.decode(case.context.tolist()), said
        return known[name, length]

    return of


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("length", [SHORT, 1500])
def test_lengths_are_exact_and_answers_right(made, smollm2, name, length):
    case, text, questions = made(name, length)
    assert len(case.context) == length - QUESTION_TOKENS
    for question, (asked, answer, references) in zip(case.questions, questions, strict=True):
        assert len(question.ids) + len(question.answer) <= QUESTION_TOKENS
        assert all(answers.found(answer + "\n", references))
        told = rf"^{re.escape(asked.strip())} ?{re.escape(answer.strip())}"
        assert not re.search(told, text, re.M)
    again = tasks.case_of(name, Writer(smollm2[2], length), INDEX)
    np.testing.assert_array_equal(again.context, case.context)
    other = tasks.case_of(name, Writer(smollm2[2], length), INDEX + 1)
    assert not np.array_equal(other.context, case.context)


@pytest.mark.parametrize(
    ("name", "keys", "values", "asked"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_so_many_needles_are_hidden(made, name, keys, values, asked):
    _, text, [(question, _, references)] = made(name)
    pairs = re.findall(CODE, text)
    assert len({key for key, _ in pairs}) == keys
    assert len(set(pairs)) == len(pairs) == keys * values
    wanted = {key for key, _ in pairs if re.search(rf"\b{key}\b", question)}
    assert len(wanted) == asked
    assert sorted(references) == sorted(value for key, value in pairs if key in wanted)
    pattern = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if name.endswith("_3") else r"\d{7}"
    assert all(re.fullmatch(pattern, value) and text.count(value) == 1 for _, value in pairs)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_has_room_for_no_other(made, smollm2, name):
    _, text, [(question, _, references)] = made(name)
    pairs = dict(re.findall(CODE, text))
    lines = text.strip().split("\n\n")[1].split("\n")
    assert len(pairs) == len(lines) > 8
    asked = [key for key in pairs if key in question]
    assert [pairs[key] for key in asked] == list(references)
    noise = text[: text.index("\nAccess codes are hidden")]
    line = len(smollm2[2].encode(lines[0] + "\n").ids)
    assert len(smollm2[2].encode(noise).ids) < line + 8  # lines differ by some tokens


def test_needles_stand_at_forty_depths(smollm2, monkeypatch):
    monkeypatch.setattr(haystacks, "prose", lambda: tuple(f"Sentence {i}." for i in range(500)))
    writer, seen = Writer(smollm2[2], SHORT), set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        needles = [f"Needle {name}!" for name in "abc"]
        text = smollm2[2].decode(haystacks.in_prose(writer, rng, "Intro:", needles).tolist())
        order = re.findall(r"(Needle \w!|Sent\w*(?: \d*)?)", text)
        assert sorted(x for x in order if x.startswith("N")) == needles
        number = sum(x.startswith("S") for x in order)
        allowed = {math.floor(number * i / 39 + 1e-9) for i in range(40)}
        before = [
            sum(x.startswith("S") for x in order[: order.index(needle)]) for needle in needles
        ]
        assert set(before) <= allowed
        assert len(set(before)) == 3
        seen |= {round(39 * x / number) for x in before}
    assert len(seen) > 30


def resolved(lines):
    """The value of every name, by running the program."""
    known = {}
    for name, source in lines:
        known[name] = known.get(source, source)
    return known


LET = r"LET (\w+) = (\w+)\."


def test_names_get_their_value_through_four_hops(made, smollm2):
    _, text, [(question, _, references)] = made("vt")
    example, program = text.rsplit(tracking.INTRO, 1)
    lines = re.findall(LET, program)
    known = resolved(lines)
    (value,) = set(re.findall(r"\d{5}", question))
    assert (
        list(references) == [name for name, _ in lines] == [n for n in known if known[n] == value]
    )
    assert len(references) == 5
    assert all(re.fullmatch("[A-Z]{5}", name) for name in references)
    assert [source for _, source in lines[1:]] == [name for name, _ in lines[:-1]]
    shown = resolved(re.findall(LET, example))
    said = example.strip().splitlines()[-1]
    assert [name for name in shown if name in said] == list(shown)
    assert 400 < len(smollm2[2].encode(example[example.index("The lines") :]).ids) <= 501


@pytest.mark.parametrize(("length", "common", "others"), [(SHORT, 6, 1), (LONG, 30, 3)])
def test_ten_words_are_the_most_common(made, length, common, others):
    _, text, [(_, _, references)] = made("cwe", length)
    items = re.findall(r"(\d+)\. (\w+)", text.rsplit("\n\n", 1)[1])
    assert [int(i) for i, _ in items] == list(range(1, len(items) + 1))
    counts = Counter(word for _, word in items)
    assert {word for word, n in counts.items() if n == common} == set(references)
    assert set(counts.values()) == {common, others}
    assert len(references) == 10
    for word, other in itertools.product(references, counts):
        assert word == other or word not in other


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_coded_words_stand_as_often_as_a_zeta_distribution_says(made, smollm2, length):
    _, text, [(_, _, references)] = made("fwe", length)
    body = text.rsplit("\n\n", 1)[1].split()
    counts = Counter(body)
    ordered = counts.most_common()
    assert ordered[0][0] == "..."
    assert [word for word, _ in ordered[1:4]] == list(references)
    assert len({n for _, n in ordered[:5]}) == 5
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ordered[1:])
    number = (length - 50) // 50

    def wanted(total):
        found = [int(total * 6 / math.pi**2 / rank**2) for rank in range(1, number + 1)]
        return [x for x in found if x]

    def fits(total):
        return wanted(total) == [n for _, n in ordered]

    assert any(fits(total) for total in range(len(body), 2 * len(body)))


def test_every_code_among_prose_is_asked_for(made):
    _, text, questions = made("many_codes")
    pairs = re.findall(CODE, text)
    assert len(set(pairs)) == len(pairs) == len(questions) == 5
    asked = [(re.findall(r"code of (\S+) is", x)[0], value) for x, _, (value,) in questions]
    assert sorted(asked) == sorted(pairs)


def test_keys_have_the_values_that_are_asked_for(made):
    _, text, questions = made("many_key_values")
    pairs = re.findall(r"^(\w{8}): (\w{8})$", text, re.M)
    assert len(dict(pairs)) == len(pairs) > 20
    assert len(questions) == 5
    for question, _, references in questions:
        (key,) = set(re.findall(r"[0-9a-f]{8}", question))
        assert references == (dict(pairs)[key],)


def test_codes_are_told_apart_by_their_beginnings(made):
    _, text, questions = made("many_prefix_suffix")
    codes = re.findall(r"^\d{12}$", text, re.M)
    for question, _, references in questions:
        (begin,) = set(re.findall(r"\d{5}", question))
        assert [code[5:] for code in codes if code.startswith(begin)] == list(references)


def test_chains_among_noise_have_their_values(made):
    _, text, questions = made("many_values")
    lines = re.findall(LET, text)
    known = resolved(lines)
    assert len(lines) == 12
    assert len(set(known.values())) == len(questions) == 4
    for question, _, references in questions:
        (name,) = set(re.findall(r"\b[A-Z]{5}\b", question))
        assert references == (known[name],)


@pytest.mark.parametrize("name", ["many_shot", "random_labels"])
def test_labels_are_learnt_from_other_words(made, name):
    _, text, questions = made(name)
    shown = dict(re.findall(r"^(\w+) -> (\w+)$", text, re.M))
    assert len(set(shown.values())) == 4
    assert len(shown) > 60
    for question, _, references in questions:
        (word,) = re.findall(r"(\w+) ->", question)
        assert word not in shown
        assert references[0] in shown.values()


def test_mixed_questions_are_of_three_kinds(made):
    _, text, questions = made("many_mixed")
    codes, known = dict(re.findall(CODE, text)), resolved(re.findall(LET, text))
    (long_code,) = re.findall(r"\b\d{12}\b", text)
    kinds = []
    for question, _, (reference,) in questions:
        if "access code" in question:
            kinds.append("code")
            assert codes[re.findall(r"of (\S+) is", question)[0]] == reference
        elif "begins" in question:
            kinds.append("begin")
            assert re.findall(r"\d{5}", question)[0] + reference == long_code
        else:
            kinds.append("value")
            assert known[re.findall(r"\b[A-Z]{5}\b", question)[0]] == reference
    assert Counter(kinds) == {"code": 2, "begin": 1, "value": 2}


def added(text):
    return str(sum(map(int, re.findall(r"\d+", text))))


def counted(text):
    return str(len(text.rstrip(": ").split()))


def computed(text):
    program, name = re.fullmatch(r"(.*)\. (\w) is ?", text).groups()
    known = {}
    exec(program.replace(", ", "\n"), {}, known)
    return str(known[name])


@pytest.mark.parametrize(
    ("name", "line", "oracle"),
    [
        ("sums_of_two_digits", r"^(\d\d \+ \d\d =) (\d+)$", added),
        ("sums_of_three_digits", r"^(\d{3} \+ \d{3} =) (\d+)$", added),
        ("counting", r"^([a-z ]+:) (\d)$", counted),
        ("assignments", r"^([A-Z] = .* is) (\d+)$", computed),
    ],
)
def test_examples_and_answers_are_right(made, name, line, oracle):
    _, text, questions = made(name)
    shown = re.findall(line, text, re.M)
    assert len(shown) > 20
    assert all(oracle(question) == answer for question, answer in shown)
    assert len({question for question, _, _ in questions}) == 5
    for question, answer, _ in questions:
        assert oracle(question) == answer
        assert question.strip() not in dict(shown)


def test_a_linear_rule_is_that_of_the_context(made):
    _, text, questions = made("linear_rule")
    known = {int(x): int(y) for x, y in re.findall(r"^f\((\d+)\) = (\d+)$", text, re.M)}
    factor, shift = np.polyfit(list(known), list(known.values()), 1).round(6)
    assert factor >= 2
    for question, answer, _ in questions:
        x = int(re.findall(r"\d+", question)[0])
        assert x not in known
        assert int(answer) == factor * x + shift


def test_a_length_that_is_too_small_is_named(smollm2):
    with pytest.raises(ValueError, match="--length is 300: the task needs at least"):
        tasks.case_of("vt", Writer(smollm2[2], 300), 0)
    with pytest.raises(ValueError, match="--task is 'niah'"):
        tasks.case_of("niah", Writer(smollm2[2], SHORT), 0)
