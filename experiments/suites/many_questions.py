"""Several questions of one context, which is kept before any is known (as SCBench, arXiv:2412.10319)."""

from __future__ import annotations

import string
from collections.abc import Iterator

import numpy as np

from experiments.suites import haystacks, retrieval, tracking, words
from experiments.suites.cases import Case, Question, Writer, fitting

QUESTIONS = 5
KEY_DIGITS, PREFIX_DIGITS, CODE_DIGITS = 8, 5, 12
CHAINS, HOPS = 4, 2
HEXADECIMAL = "0123456789abcdef"
PAIRS_INTRO = "Every key below has a value.\n\n"
CODES_INTRO = f"Codes of {CODE_DIGITS} digits:\n\n"
CLASSES_INTRO = "Each word belongs to a class.\n\n"
MIXED_INTRO = (
    "Access codes, and names with values, are hidden in the text below. Remember all of them.\n\n"
)
CLASSES = {
    "animal": (
        "ant bear camel cat cow crab crow deer dog duck eagle fish fox frog goat goose "
        "hare hen horse lion mole mouse otter owl pig rabbit rat seal shark sheep snail "
        "snake spider swan tiger toad trout turtle whale wolf"
    ),
    "food": (
        "apple bacon banana bean bread butter cabbage cake carrot cheese cherry corn "
        "cream egg garlic grape ham honey jam lemon lentil melon milk mushroom noodle nut "
        "olive onion orange pasta pea peach pear pepper pie plum potato rice salad soup"
    ),
    "tool": (
        "anvil axe brush chisel clamp crowbar drill file funnel glue hammer hoe jack "
        "knife ladder lathe lever mallet nail needle pliers plow pulley rake rope ruler "
        "sander saw scissors screwdriver shears shovel sickle spade spanner tongs trowel "
        "vise wedge wrench"
    ),
    "color": (
        "amber aqua azure beige black blue bronze brown coral cream crimson cyan gold "
        "gray green indigo ivory khaki lavender lilac lime magenta maroon mauve navy "
        "olive pink purple red ruby scarlet silver tan teal turquoise umber vermilion "
        "violet white yellow"
    ),
}


def key_values(writer: Writer, rng: np.random.Generator) -> Case:
    """The values of five of many keys, all of hexadecimal digits."""
    most = writer.size // 8  # no line is as short
    every = words.letters(rng, 2 * most, KEY_DIGITS, HEXADECIMAL)
    pairs = list(zip(every[:most], every[most:], strict=True))
    lines = fitting(
        writer.lines(f"{key}: {value}" for key, value in pairs), writer.room(PAIRS_INTRO)
    )
    asked = [pairs[i] for i in rng.choice(len(lines), QUESTIONS, replace=False)]
    return Case(
        writer.context(PAIRS_INTRO, lines),
        tuple(
            writer.question(
                f"\n\nQuestion: Which value has the key {key}?\nAnswer: {key}:", f" {value}"
            )
            for key, value in asked
        ),
    )


def prefix_suffix(writer: Writer, rng: np.random.Generator) -> Case:
    """The ends of five of many codes, by their beginnings."""
    most = writer.size // 8
    codes = words.letters(rng, most, CODE_DIGITS, string.digits)
    first: dict[str, str] = {}
    for code in codes:  # one for each beginning
        first.setdefault(code[:PREFIX_DIGITS], code)
    codes = list(first.values())
    lines = fitting(writer.lines(codes), writer.room(CODES_INTRO))
    asked = [codes[i] for i in rng.choice(len(lines), QUESTIONS, replace=False)]
    return Case(
        writer.context(CODES_INTRO, lines), tuple(_code_question(writer, code) for code in asked)
    )


def _code_question(writer: Writer, code: str) -> Question:
    begin, end = code[:PREFIX_DIGITS], code[PREFIX_DIGITS:]
    text = f"\n\nQuestion: Which code begins with {begin}?\nAnswer: {begin}"
    return writer.question(text, end)


def values(writer: Writer, rng: np.random.Generator) -> Case:
    """The value of the last name of each of four chains among lines of noise."""
    chains = tracking.chains(rng, CHAINS, HOPS)
    lines = _interleaved(rng, [chain.lines for chain in chains])
    context = haystacks.in_lines(writer, rng, tracking.INTRO, lines)
    return Case(context, tuple(_value_question(writer, chain) for chain in chains))


def _value_question(writer: Writer, chain: tracking.Chain) -> Question:
    name = chain.names[-1]
    text = f"\n\nQuestion: Which value has {name}?\nAnswer: The value of {name} is "
    return writer.question(text, f"{chain.value}.")


def _interleaved(rng: np.random.Generator, lists: list[list[str]]) -> list[str]:
    """All lines in a random order that keeps that of each list."""
    order = rng.permutation(np.repeat(np.arange(len(lists)), [len(x) for x in lists]))
    left = [iter(x) for x in lists]
    return [next(left[i]) for i in order]


def many_shot(writer: Writer, rng: np.random.Generator) -> Case:
    """The classes of five words, by examples with others."""
    return by_examples(writer, rng, {name: name for name in CLASSES})


def by_examples(writer: Writer, rng: np.random.Generator, label_of: dict[str, str]) -> Case:
    """Five words to classify, by as many examples with other words as fit; label_of: of each class."""
    pairs = [(word, label_of[name]) for name, own in CLASSES.items() for word in own.split()]
    unclear = {word for word, _ in pairs if sum(word == other for other, _ in pairs) > 1}
    pairs = [pairs[i] for i in rng.permutation(len(pairs)) if pairs[i][0] not in unclear]
    asked, shown = pairs[:QUESTIONS], pairs[QUESTIONS:]
    lines = writer.lines(f"{word} -> {label}" for word, label in _again(rng, shown))
    return Case(
        writer.context(CLASSES_INTRO, fitting(lines, writer.room(CLASSES_INTRO))),
        tuple(writer.question(f"\n{word} ->", f" {label}") for word, label in asked),
    )


def _again(rng: np.random.Generator, pairs: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """All pairs, and all in another order, without an end."""
    while True:
        yield from (pairs[i] for i in rng.permutation(len(pairs)))


def codes_in_prose(writer: Writer, rng: np.random.Generator) -> Case:
    """Five access codes among prose, each asked for alone."""
    keys, codes = words.keys(rng, QUESTIONS), words.numbers(rng, QUESTIONS, retrieval.DIGITS)
    pairs = list(zip(keys, codes, strict=True))
    needles = [retrieval.needle(*pair) for pair in pairs]
    context = haystacks.in_prose(writer, rng, retrieval.INTRO, needles)
    return Case(context, tuple(retrieval.question(writer, [key], [code]) for key, code in pairs))


def mixed(writer: Writer, rng: np.random.Generator) -> Case:
    """Two access codes, a code by its beginning and the values of two chains, from one prose."""
    keys = words.keys(rng, 2)
    codes = words.numbers(rng, 2, retrieval.DIGITS)
    (long_code,) = words.letters(rng, 1, CODE_DIGITS, string.digits)
    chains = tracking.chains(rng, 2, 1)
    needles = [retrieval.needle(*pair) for pair in zip(keys, codes, strict=True)]
    needles += [f"One code of {CODE_DIGITS} digits is {long_code}."]
    needles += [line for chain in chains for line in chain.lines]
    context = haystacks.in_prose(writer, rng, MIXED_INTRO, needles)
    asked = [
        retrieval.question(writer, [key], [code]) for key, code in zip(keys, codes, strict=True)
    ]
    asked += [_code_question(writer, long_code)]
    asked += [_value_question(writer, chain) for chain in chains]
    return Case(context, tuple(asked))


TASKS = {
    "many_codes": codes_in_prose,
    "many_key_values": key_values,
    "many_prefix_suffix": prefix_suffix,
    "many_values": values,
    "many_shot": many_shot,
    "many_mixed": mixed,
}
