"""The report as one HTML page without scripts or outside addresses, for any width, light or dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

from experiments.kv_budget.report import pictures, text_map
from experiments.kv_budget.report.rows import (
    DEVICE_COLUMNS,
    POLICY_COLUMNS,
    device_rows,
    policy_rows,
)
from experiments.kv_budget.report.style import CSS
from experiments.kv_budget.report.wording import (
    RIVAL,
    Report,
    chosen_policy,
    clean,
    find_policy,
    label,
    number,
    policy_name,
    verdict,
    yes_no,
)
from jbalance.resources import human_bytes

_TITLE = "What to keep when the key/value cache does not fit"
_TEXT_LIMIT, _ANSWER_LIMIT = 4000, 300


def render(report: Report) -> str:
    parts = (_introduction, _text, _pictures, _tables, _rest)
    body = "\n".join(line for part in parts for line in part(report))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_TITLE}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{_TITLE}</h1>
{body}
</main>
</body>
</html>
"""


def _introduction(report: Report) -> Iterator[str]:
    model, devices = report["model"], report["devices"]
    given = ", ".join(f"{label(d['name'])} {human_bytes(d['budget_bytes'])}" for d in devices)
    yield _paragraph(
        f"{label(model['name'])} ({model['num_layers']} layers, {model['num_kv_heads']} key/value "
        f"heads of dimension {model['head_dim']}) read {report['context_tokens']:,} tokens of "
        f"{label(report['text']['name'])}. Their keys and values take "
        f"{human_bytes(report['full_cache_bytes'])} at 16 bits; the devices give {given}. Each "
        "policy chose from the context alone which tokens every head keeps, and the model went on "
        f"from that smaller cache over the next {report['continuation_tokens']:,} tokens."
    )
    yield f'<p class="verdict">{_escape(verdict(report))}</p>'


def _text(report: Report) -> Iterator[str]:
    name = label(report["policies"][-1]["policy"])
    yield "<h2>The text as the cache remembers it</h2>"
    yield text_map.remembered(report)
    yield _caption(
        f"The darker a token, the more bits of it are kept under {name}, the mean over layers and "
        "heads; what is pale is gone from most of them. Hover over a token for its worth and the price."
    )
    for sentence in report["reasons"]:
        yield _paragraph(sentence)
    yield "<details><summary>What the queries ask for</summary>"
    yield text_map.asked_for(report)
    yield _caption("The same text; the darker a token, the higher the rank of its importance.")
    yield "</details>"


def _pictures(report: Report) -> Iterator[str]:
    name = label(chosen_policy(report)["policy"])
    yield "<h2>Which tokens matter, and which were kept</h2>"
    yield _figure(
        pictures.importance(report),
        "Above: the importance that the plan gave to every token of the context, mean over layers "
        "and heads (line: mean of neighbouring tokens that share a column; shade: the largest of "
        f"them). Below: the part of all heads that still held the token under {name}."
        + (" The marked band is the planted pass key." if report["passkey"] else ""),
    )
    yield "<h2>Where the memory went</h2>"
    beside = find_policy(report, RIVAL) not in (None, chosen_policy(report))
    yield _figure(
        pictures.entries(report),
        f"Tokens left in the cache of every layer and head under {name}"
        + (f", beside {RIVAL}, which gives every head the same." if beside else ".")
        + " Counted in the caches that the model decoded from.",
    )
    yield _figure(
        pictures.lorenz(report),
        f"The heads in the order of what they hold under {name}, against the part of all tokens that "
        "they hold together: the further from the straight line, the less even. The area between the "
        "two, doubled, is the Gini coefficient.",
    )
    yield _figure(
        pictures.loads(report),
        "Each device before, with an even part of the full cache, and after; the line is its budget.",
    )
    yield "<h2>What one more byte would be worth</h2>"
    yield from _prices(report)
    yield "<h2>Quality against bytes</h2>"
    yield _figure(
        pictures.quality(report),
        "How far the predicted words drift from those of the full cache (KL divergence, mean over "
        "the continuation's tokens, log axis; lower is better) for the bytes of cache that "
        "stayed resident. The full cache itself has a KL of 0, which a log axis cannot show; "
        "the dashed line marks its bytes.",
    )


def _prices(report: Report) -> Iterator[str]:
    name = label(chosen_policy(report)["policy"])
    if not pictures.has_prices(report):
        yield _paragraph(f"{name} sets no prices, so there is nothing to draw here.")
        return
    yield _figure(
        pictures.prices(report),
        f"The price on each device under {name}: how much the worth of what is kept (attention that "
        "would be missed without it) would grow with one more byte there, shown here for one KiB. "
        "The higher the price, the scarcer the memory; where it is zero, more memory would not "
        f"help.{_dearest(report)}",
    )


def _dearest(report: Report) -> str:
    held = zip(report["devices"], chosen_policy(report)["devices"], strict=True)
    known = [(row["price_per_byte"], label(device["name"])) for device, row in held]
    known = sorted(pair for pair in known if pair[0] is not None)
    if len(known) < 2 or known[0][0] == known[-1][0]:
        return ""
    (low, cheap), (high, dear) = known[0], known[-1]
    return (
        f" Here one more byte is worth most on {dear} ({number(high)}) and least on {cheap} "
        f"({number(low)})."
    )


def _tables(report: Report) -> Iterator[str]:
    yield "<h2>Figures</h2>"
    yield _table(
        "Every policy on the same continuation. NLL rise and KL are in nats per token against the "
        "full cache; top-1 is how often the most likely next token is the same; (over) marks more "
        "than the budget.",
        POLICY_COLUMNS,
        policy_rows(report),
    )
    yield _table(
        "Every policy on every device. Live bytes are those of the arrays on the device; an entry "
        "is one token's key and value in one head. A price is the value of one more byte there.",
        DEVICE_COLUMNS,
        device_rows(report),
    )


def _rest(report: Report) -> Iterator[str]:
    yield "<h2>The question</h2>"
    key = report["passkey"]
    yield f"<blockquote>{_escape(clean(report['question'], _TEXT_LIMIT))}</blockquote>"
    if key:
        yield _paragraph(
            f"The right answer, {label(key['answer'])}, was planted at tokens {key['start']:,} to "
            f"{key['stop'] - 1:,} of the context."
        )
    yield _table(
        "What the model answered from each cache.",
        ["policy", "answer", *(["right"] if key else [])],
        [
            [
                policy_name(row),
                clean(row["answer_text"], _ANSWER_LIMIT),
                *([yes_no(row["passkey_exact"])] if key else []),
            ]
            for row in report["policies"]
        ],
        kind="answers",
    )
    yield "<h2>The text</h2>"
    yield _paragraph(f"From {label(report['text']['name'])}:")
    yield f"<blockquote>{_escape(clean(report['text']['excerpt'], _TEXT_LIMIT))}</blockquote>"
    yield "<h2>To do it again</h2>"
    yield f"<pre>{_escape(clean(report['command'], _TEXT_LIMIT))}</pre>"
    machine = report["machine"]
    yield _paragraph(f"On {label(machine['platform'], 120)} with {machine['cores']} cores.")
    yield _table(
        "Versions.",
        ["package", "version"],
        [list(item) for item in sorted(report["versions"].items())],
        kind="answers",
    )


def _escape(text: str) -> str:
    return html.escape(clean(text))


def _paragraph(text: str) -> str:
    return f"<p>{_escape(text)}</p>"


def _caption(text: str) -> str:
    return f'<p class="caption">{_escape(text)}</p>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_escape(caption)}</figcaption></figure>"


def _table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "figures"
) -> str:
    def cells(row: Sequence[str]) -> str:
        first = f'<th scope="row">{_escape(row[0])}</th>'
        return first + "".join(f"<td>{_escape(cell)}</td>" for cell in row[1:])

    titles = "".join(f'<th scope="col">{_escape(title)}</th>' for title in head)
    body = "\n".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return (
        f'<p class="caption">{_escape(caption)}</p>\n'
        f'<div class="scroll" tabindex="0"><table class="{kind}">'
        f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )
