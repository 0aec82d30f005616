"""Tokens of three modalities: patches of a picture, tenths of a second of sound, words of a caption."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments.multimodal.data import SIDE, Stamps
from experiments.speech import audio

MODALITIES = ("picture", "sound", "caption")
PICTURE, SOUND, CAPTION = range(3)
PATCH, SOUNDS, WORDS = 8, 24, 12  # pixels; the most tokens of a sound and of a caption
PATCHES = (SIDE // PATCH) ** 2
FIRST = np.cumsum([0, PATCHES, SOUNDS, WORDS])  # places of each modality
PLACES = int(FIRST[-1])
VALUES = 3 * PATCH**2
FRAMES = 10  # of 10 ms each, of a token of sound
GRAMS, BUCKETS = 16, 8192  # the most character n-grams of a word; hashes, 0 for none
PICTURE_NOISE, SOUND_NOISE_DB = 0.5, -5.0  # standard deviation; signal to noise

Example = Mapping[str, np.ndarray]


class Change(NamedTuple):
    """What is done to an example's modalities.

    Attributes:
      noisy: PICTURE or SOUND, which noise is added to; None for neither.
      missing: which is not there; None where all are.
      mirrored: whether the picture is.
      shift: [2] pixels that it is moved by.
    """

    noisy: int | None = None
    missing: int | None = None
    mirrored: bool = False
    shift: tuple[int, int] = (0, 0)


def augmented(rng: np.random.Generator) -> Change:
    """One of training: a sixth each has a noisy picture, a noisy sound, and lacks a modality."""
    kind = rng.integers(6)
    return Change(
        int(kind) if kind < 2 else None,
        int(rng.integers(3)) if kind == 2 else None,
        bool(rng.integers(2)),
        (int(rng.integers(-3, 4)), int(rng.integers(-3, 4))),
    )


def of_stamp(stamps: Stamps, i: int, change: Change, rng: np.random.Generator) -> Example:
    """The tokens of a stamp: values, hashes of n-grams, places, whether noisy; captions last."""
    values = [_patches(stamps.pictures[i], change, rng), _sounds(stamps.sounds[i], change, rng)]
    words = _words(stamps.captions[i])
    if change.missing is not None and change.missing != CAPTION:
        values[change.missing] = values[change.missing][:0]
    if change.missing == CAPTION:
        words = words[:0]
    counts = [*map(len, values), len(words)]
    places = [first + np.arange(n) for first, n in zip(FIRST, counts, strict=False)]
    kinds = np.repeat(np.arange(len(counts)), counts)
    return {
        "values": np.concatenate([*values, np.zeros((len(words), VALUES), np.float32)]),
        "grams": np.concatenate([np.zeros((sum(counts[:2]), GRAMS), np.int32), words]),
        "place": np.concatenate(places).astype(np.int32),
        "noisy": (kinds == (-1 if change.noisy is None else change.noisy)).astype(np.float32),
    }


def modality_of(place: np.ndarray) -> np.ndarray:
    """[N] PICTURE, SOUND or CAPTION of places."""
    return np.searchsorted(FIRST, place, side="right") - 1


def _patches(picture: np.ndarray, change: Change, rng: np.random.Generator) -> np.ndarray:
    """[PATCHES, VALUES], 0 for white."""
    x = picture[:, ::-1] if change.mirrored else picture
    if any(change.shift):
        padded = np.pad(x, ((3, 3), (3, 3), (0, 0)), constant_values=1)
        down, right = (3 + s for s in change.shift)
        x = padded[down : down + SIDE, right : right + SIDE]
    if change.noisy == PICTURE:
        x = np.clip(x + rng.normal(0, PICTURE_NOISE, x.shape), 0, 1)
    across = SIDE // PATCH
    split = (1 - x).reshape(across, PATCH, across, PATCH, 3).swapaxes(1, 2)
    return split.reshape(PATCHES, VALUES).astype(np.float32)


def _sounds(samples: np.ndarray, change: Change, rng: np.random.Generator) -> np.ndarray:
    """[n, VALUES]: log powers in 80 bands of mel, of each half of a tenth of a second."""
    if samples.size < audio.FFT + (FRAMES - 1) * audio.HOP:
        return np.zeros((0, VALUES), np.float32)
    if change.noisy == SOUND:
        samples = audio.with_noise(samples, SOUND_NOISE_DB, rng)
    windows = np.lib.stride_tricks.sliding_window_view(samples, audio.FFT)[:: audio.HOP]
    windows = windows[: min(len(windows) // FRAMES, SOUNDS) * FRAMES]
    spectrum = np.fft.rfft(windows * np.hanning(audio.FFT), axis=1)
    logs = np.log10(np.maximum(np.abs(spectrum) ** 2 @ audio.mel_bands().T, 1e-6))
    halves = ((logs + 2) / 2).reshape(-1, 2, FRAMES // 2, audio.MELS).mean(axis=2)
    halves = halves.reshape(-1, 2 * audio.MELS)
    return np.pad(halves, ((0, 0), (0, VALUES - halves.shape[1]))).astype(np.float32)


def _words(caption: str) -> np.ndarray:
    """[n, GRAMS] hashes of each word and of its n-grams of 3 to 5 characters."""
    found = re.findall(r"\w+|[^\w\s]", caption.lower())[:WORDS]
    rows = np.zeros((len(found), GRAMS), np.int32)
    for row, word in zip(rows, found, strict=True):
        marked = f"<{word}>"
        parts = [marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)]
        hashes = [1 + zlib.crc32(x.encode()) % (BUCKETS - 1) for x in [marked, *parts][:GRAMS]]
        row[: len(hashes)] = hashes
    return rows
