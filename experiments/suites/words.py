"""Random names, numbers and words, all from one generator."""

from __future__ import annotations

import re
import string
import uuid
from collections import Counter

import numpy as np

from experiments.harness import texts

_ADJECTIVES = (
    "amber ancient awkward bitter bold brave breezy bright brittle broad bronze calm careful "
    "cheap clever cloudy coarse crimson curious dusty eager early fancy fearless fierce foggy "
    "frozen gentle giant golden grand gray happy hasty hollow honest humble icy jolly keen "
    "lazy lively lonely loud lucky mellow misty modest narrow noble odd pale patient plain "
    "polite proud purple quick quiet rapid rare rough rusty salty shallow sharp shiny shy "
    "silent silver sleepy smooth solid sour steady stormy sturdy sunny swift tall tame tender "
    "thirsty tidy tiny tired vast velvet vivid warm weary wild windy wise witty wooden young "
    "zesty"
)
_NOUNS = (
    "anchor apple arrow badger bakery barrel basket beacon beetle bell blanket bottle bridge "
    "bucket button cabin camel candle canyon carpet castle cavern cellar chimney circus clock "
    "cobra compass copper cotton cradle crystal curtain desert dolphin dragon engine falcon "
    "feather fiddle forest fountain garden garlic giraffe glacier goblet hammer harbor helmet "
    "hornet island jacket jungle kettle kitten ladder lantern lemon lizard magnet mango "
    "marble meadow mirror monkey mountain needle orchard otter oyster palace parrot pebble "
    "pepper piano pigeon pillow planet pocket puzzle rabbit ribbon rocket saddle sailor "
    "shovel spider statue tiger tunnel turtle valley violin wagon walnut whistle window"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
SHORTEST, LONGEST = 4, 9  # letters of a common word
TEXTS = ("alice29", "lcet10")


def keys(rng: np.random.Generator, number: int) -> list[str]:
    """Distinct pairs of an adjective and a noun."""
    chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), number, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen]


def numbers(rng: np.random.Generator, number: int, digits: int) -> list[str]:
    """Distinct whole numbers of so many digits."""
    low = 10 ** (digits - 1)
    found: dict[int, None] = {}
    while len(found) < number:
        found[int(rng.integers(low, 10 * low))] = None
    return list(map(str, found))


def uuids(rng: np.random.Generator, number: int) -> list[str]:
    """Of version 4 (RFC 9562)."""
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(number)]


def letters(
    rng: np.random.Generator, number: int, size: int, alphabet: str = string.ascii_uppercase
) -> list[str]:
    """Distinct words of so many random letters."""
    found: dict[str, None] = {}
    while len(found) < number:
        found["".join(rng.choice(list(alphabet), size))] = None
    return list(found)


def vocabulary() -> list[str]:
    """Words of lower case in the prose, by their number and then by the alphabet."""
    counts: Counter[str] = Counter()
    for name in TEXTS:
        counts.update(re.findall(r"(?<![\w'-])[a-z]+(?![\w'-])", texts.text_of(name)))
    found = [word for word in counts if SHORTEST <= len(word) <= LONGEST]
    return sorted(found, key=lambda word: (-counts[word], word))
