"""What a run of the main job shows: files that stand alone, tables that fit, any report."""

from __future__ import annotations

import functools
import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from experiments.kv_budget.report import print_table, write
from experiments.kv_budget.report.wording import verdict
from jbalance.resources import human_bytes
from tests.support.report_cases import HOSTILE, POLICIES, Page, made_up_report

MANY = (*POLICIES, *(f"other-policy-{i}" for i in range(15)))


def written(report, folder):
    write(report, folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    strict = json.loads(
        (folder / "report.json").read_text(encoding="utf-8"),
        parse_constant=lambda literal: pytest.fail(f"{literal} is not JSON"),
    )
    return Page(text), text, strict


def printed(report, width):
    console = Console(file=io.StringIO(), width=width)
    print_table(report, console)
    return console.file.getvalue()


def hostile_report():
    report = made_up_report(policies=("full", HOSTILE, "ladder"))
    report["question"] = report["command"] = HOSTILE
    report["model"]["name"] = report["passkey"]["answer"] = HOSTILE
    report["text"] |= {"name": HOSTILE, "excerpt": f"{HOSTILE} \ud800 " + "x" * 100_000}
    report["text"]["pieces"][5] = report["reasons"][0] = f"{HOSTILE} \ud800"
    report["machine"]["platform"] = report["devices"][0]["name"] = HOSTILE * 50
    report["versions"][HOSTILE] = HOSTILE
    for row in report["policies"]:
        row["answer_text"] = HOSTILE * 100 + "https://example.org/ "
    return report


def not_finite_report():
    report = made_up_report()
    for figure in ("nll", "perplexity", "kl", "top1", "tokens_per_s"):
        report["policies"][1][figure] = math.nan
        report["policies"][4][figure] = math.inf
    report["policies"][4]["devices"][0]["price_per_byte"] = math.inf
    report["importance"]["mean"][7] = math.nan
    report["curve"][0]["kl"] = math.inf
    return report


def without(**changes):
    return made_up_report() | changes


REPORTS = {
    "as a run": made_up_report,
    "one device, one policy, one head": lambda: made_up_report(1, ("uniform",), kv_heads=1),
    "only the full cache": lambda: made_up_report(policies=("full",)),
    "eight devices, twenty policies": lambda: made_up_report(8, MANY, kv_heads=32),
    "no pass key": lambda: made_up_report(passkey=False),
    "one token": lambda: made_up_report(tokens=1, passkey=False),
    "no curve": lambda: without(curve=[]),
    "nothing important": lambda: without(
        importance=dict.fromkeys(("mean", "kept", "bits", "worth_per_byte"), [0.0] * 9),
        passkey=None,
    ),
    "hostile text": hostile_report,
    "not finite": not_finite_report,
    "read back": lambda: json.loads(
        re.sub("NaN|Infinity", "null", json.dumps(not_finite_report()))
    ),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Each of the reports as it is written, once: a second of pictures."""
    return functools.cache(lambda case: written(REPORTS[case](), tmp_path_factory.mktemp("report")))


@pytest.mark.parametrize("case", REPORTS)
def test_page_and_json_stand_alone(case, pages):
    page, text, strict = pages(case)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "iframe", "img", "a", "object", "base"})
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name == "src" for name in attrs)
        assert re.match(r"#|data:image/png;base64,", attrs.get("href") or "#")
        assert "http" not in attrs.get("href", "") + attrs.get("style", "")
        assert not re.search(r"url\((?!#)", " ".join(value or "" for value in attrs.values()))
    assert "@import" not in text
    assert "url(" not in re.search("<style>(.*?)</style>", text, re.S)[1]
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)
    assert strict.keys() == made_up_report().keys()


@pytest.mark.parametrize("case", REPORTS)
def test_pictures_have_a_text_and_their_own_ids(case, pages):
    page, text, _ = pages(case)
    pictures = page.all("svg")
    has_prices = case not in {"only the full cache", "one device, one policy, one head"}
    assert len(pictures) == (6 if has_prices else 5) == text.count("<figcaption>")
    assert all(len(picture["aria-label"]) > 20 and picture["role"] == "img" for picture in pictures)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {href[1:] for _, attrs in page.tags if (href := attrs.get("href", "")).startswith("#")}
    assert wanted <= set(ids)


def test_pictures_take_every_colour_from_the_page(pages):
    _, text, _ = pages("eight devices, twenty policies")
    for picture in re.findall("<svg.*?</svg>", text, re.S):
        assert not re.search(r"(fill|stroke): (#|rgb)", picture)
    used = set(re.findall(r"var\(--(\w+)\)", text))
    for scheme in re.findall(r":root \{(.*?)\}", text, re.S):
        assert used <= set(re.findall(r"--(\w+):", scheme))


def test_page_says_what_was_run_and_found(pages):
    report = made_up_report()
    page, text, _ = pages("as a run")
    for row in report["policies"]:
        assert row["policy"] in page.text
        assert row["answer_text"].strip() in page.text
    for words in (report["command"], report["question"], "48152", "33.75 MiB", "cpu:1", "jax"):
        assert words in page.text
    assert "one more byte is worth most on cpu:1 (6.2e-09) and least on cpu:0" in page.text
    assert "(over)" in page.text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_opens_with_the_text_as_it_is_remembered(tmp_path):
    report = made_up_report(tokens=9)
    report["importance"]["bits"] = [0.0, 0.1, 8.0, 4.0, 2.0, 0.0, 0.0, 0.0, 8.0]
    report["text"]["pieces"] = ["Call", " me", " Ish", "mael", ".", "\n", "Some", " years", " ago"]
    page, text, _ = written(report, tmp_path)
    assert page.text.index("as the cache remembers it") < page.text.index("Which tokens matter")
    assert "Call me Ish mael . Some years ago" in page.text  # the words of each tag apart
    spans = [x for x in page.all("span") if x.get("title", "").endswith("a KiB, price 6.35e-06")]
    assert [x["class"] for x in spans] == ["s0", "s1", "s8", "s4", "s2", "s0", "s0", "s0", "s8"]
    assert spans[2]["title"].startswith("8.0 bits, ")
    assert report["reasons"][0] in page.text
    assert text.count('class="text-map"') == 2


def test_a_long_text_is_cut(tmp_path):
    page, *_ = written(made_up_report(tokens=5000), tmp_path)
    assert "and 904 tokens more" in page.text
    assert len(page.all("span")) == 2 * 4096


def test_evenness_of_the_heads_is_measured(tmp_path):
    report = made_up_report()
    row = next(row for row in report["policies"] if row["policy"] == "ladder")
    row["entries"] = [[0, 0, 0, 10]]
    page, *_ = written(report, tmp_path)
    words = " ".join(picture["aria-label"] for picture in page.all("svg"))
    assert "hold 0.0 % of the tokens; Gini coefficient 0.75" in words


def test_hostile_text_is_text(pages):
    page, text, _ = pages("hostile text")
    assert "<script>alert('x')</script>" in page.text
    assert "<script" not in text
    assert len(text) < 400_000


def test_without_a_pass_key_nothing_is_said_of_one(pages):
    page, *_ = pages("no pass key")
    assert "was planted" not in page.text
    assert "marked band" not in page.text


def test_json_keeps_the_figures_and_is_stable(tmp_path):
    report = made_up_report()
    _, _, strict = written(report, tmp_path / "new" / "folder")
    assert strict == report
    backwards = dict(reversed(report.items()))
    arrays = {name: np.array(values) for name, values in report["importance"].items()}
    write(backwards | {"importance": arrays}, tmp_path)
    for name in ("report.json", "report.html"):
        want = (tmp_path / "new" / "folder" / name).read_bytes()
        assert (tmp_path / name).read_bytes() == want


def test_json_has_null_where_a_figure_is_not_finite(pages):
    _, _, strict = pages("not finite")
    assert strict["policies"][1]["kl"] is None
    assert strict["importance"]["mean"][7] is None


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("case", REPORTS)
def test_tables_fit(case, width):
    text = printed(REPORTS[case](), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [80, 100])
def test_tables_hold_every_figure_whole(width):
    words = printed(made_up_report(), width)
    for row in made_up_report()["policies"]:
        assert row["policy"] in words
        assert human_bytes(row["cache_bytes"]) in words
        assert f"{row['perplexity']:.2f}" in words
    assert "6.2e-09" in words


def test_tables_in_a_log(capsys):
    print_table(made_up_report())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("ladder" in line and "0.0312" in line for line in lines)


def test_tables_where_the_output_is_plain_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_table(hostile_report(), Console(file=stream, width=100))
    stream.flush()
    assert b"ladder" in raw.getvalue()


def test_verdict_compares_with_the_best_other_plan():
    report = made_up_report()
    assert "0.88 times that of proportional" in verdict(report)
    report["policies"][2]["kl"] = 0.02  # uniform: now better than the ladder
    assert "1.56 times that of uniform" in verdict(report)
    report["policies"][2]["within_budget"] = False
    assert "that of proportional" in verdict(report)


@pytest.mark.parametrize(
    ("amount_bytes", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (4 << 20, "4 MiB"), (3 << 40, "3072 GiB")],
)
def test_bytes_in_words(amount_bytes, words):
    assert human_bytes(amount_bytes) == words
