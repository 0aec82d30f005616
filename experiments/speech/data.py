"""Spoken English with known words, and more of it without; windows of 30 s that are full of speech.

LibriVox (public domain): five sentences of a novel that Debian's `pocketsphinx-testdata` carries with
their text. Asterisk's prompts (CC-BY-SA 3.0, one voice, `asterisk-core-sounds-en-wav`): of those below
the name says the words; the others are sentences without a text here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.harness import files, packages
from experiments.speech import audio, words

LIBRIVOX, ASTERISK = "pocketsphinx-testdata", "asterisk-core-sounds-en-wav"
GAP_SAMPLES = audio.RATE // 4  # between clips
LEAST_S, MOST_S = 2.0, 16.0  # of a prompt without a text: a sentence
_ALPHABET = [
    "alpha",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliet",
    "kilo",
    "lima",
    "mike",
    "november",
    "oscar",
    "papa",
    "quebec",
    "romeo",
    "sierra",
    "tango",
    "uniform",
    "victor",
    "whiskey",
    "x-ray",
    "yankee",
    "zulu",
]
_DAYS = ["sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday"]
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_BY_NAME = [
    "activated",
    "added",
    "call-forwarding",
    "call-waiting",
    "cancelled",
    "disabled",
    "do-not-disturb",
    "enabled",
    "extension",
    "goodbye",
    "hello-world",
    "hours",
    "im-sorry",
    "is-in-use",
    "location",
    "lowercase",
    "minutes",
    "number",
    "one-moment-please",
    "please-try-again",
    "removed",
    "seconds",
    "speed-dial",
    "telephone-number",
    "to-call-this-number",
    "uppercase",
    "you-entered",
    "digits/dollars",
    "digits/hundred",
    "digits/million",
    "digits/thousand",
    "digits/today",
    "digits/tomorrow",
    "digits/yesterday",
    "vm-Family",
    "vm-first",
    "vm-Friends",
    "vm-last",
    "vm-message",
    "vm-password",
    "vm-Urgent",
    "vm-Work",
]


class Clip(NamedTuple):
    """A recording, and the words that are said in it where they are known."""

    name: str
    samples: np.ndarray  # at 16 kHz
    said: list[str] | None


class Window(NamedTuple):
    """Clips one after the other in at most 30 s."""

    samples: np.ndarray
    said: list[str] | None
    clips: int


def librivox() -> list[Clip]:
    """The sentences, in the novel's order.

    Raises:
      ValueError: the package cannot be fetched, or its files are not those that are known.
    """
    folder = packages.debian_tree(LIBRIVOX) / "usr/share/pocketsphinx/test/data/librivox"
    lines = files.decoded(files.read_bytes(folder / "transcription")).splitlines()
    clips = []
    for line in lines:
        found = re.fullmatch(r"<s> (.*) </s> \((\S+)\)", line.strip())
        if found is None:
            raise ValueError(f"{folder / 'transcription'} has the line {line!r}")
        clips.append(_clip(folder, found[2], found[1]))
    return clips


def named() -> list[Clip]:
    """The prompts whose names say the words."""
    spoken = {f"phonetic/{x[0]}_p": x for x in _ALPHABET}
    spoken |= {f"digits/day-{i}": x for i, x in enumerate(_DAYS)}
    spoken |= {f"digits/mon-{i}": x for i, x in enumerate(_MONTHS)}
    for i in (*range(20), *range(20, 100, 10)):
        spoken[f"digits/{i}"] = words.cardinal(i)[0]
        if i:
            spoken[f"digits/h-{i}"] = words.ordinal(words.cardinal(i)[0])
    spoken |= {x: re.sub(r"digits/|vm-", "", x) for x in _BY_NAME}
    return [_clip(_asterisk(), name, said) for name, said in spoken.items()]


def sentences() -> list[Clip]:
    """The other prompts of 2 to 16 s, whose words are not given."""
    folder = _asterisk()
    clips = [_clip(folder, path.stem, None) for path in sorted(folder.glob("*.wav"))]
    known = {clip.name for clip in named()}
    seconds = [len(clip.samples) / audio.RATE for clip in clips]
    return [
        clip
        for clip, length in zip(clips, seconds, strict=True)
        if LEAST_S <= length <= MOST_S and clip.name not in known
    ]


def _asterisk() -> Path:
    return packages.debian_tree(ASTERISK) / "usr/share/asterisk/sounds/en_US_f_Allison"


def _clip(folder: Path, name: str, said: str | None) -> Clip:
    path = folder / f"{name}.wav"
    samples = audio.read_wav(files.read_bytes(path), str(path))
    return Clip(name, samples, None if said is None else words.normalized(said))


def windows(clips: list[Clip], seed: int | None = None) -> list[Window]:
    """Clips packed into windows of 30 s, in a random order of the seed, or as they are.

    A window ends before the first clip that it has no room for; the last one may be short.
    """
    order = np.arange(len(clips))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    groups: list[list[Clip]] = [[]]
    room = audio.WINDOW_SAMPLES
    for i in order:
        need = clips[i].samples.size + (GAP_SAMPLES if groups[-1] else 0)
        if need > room:
            groups.append([])
            room, need = audio.WINDOW_SAMPLES, clips[i].samples.size
        groups[-1].append(clips[i])
        room -= need
    return [_joined(group) for group in groups]


def _joined(clips: list[Clip]) -> Window:
    gap = np.zeros(GAP_SAMPLES, np.float32)
    parts = [part for clip in clips for part in (gap, clip.samples)][1:]
    said = [clip.said for clip in clips]
    known = None if any(x is None for x in said) else [w for x in said for w in (x or [])]
    return Window(np.concatenate(parts), known, len(clips))
