"""Stamps of a drawing program: picture, caption, and caption spoken in French, of a Debian package."""

from __future__ import annotations

import functools
import hashlib
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from PIL import Image
from scipy import signal

from experiments.harness import files, packages
from experiments.speech import audio

PACKAGE, FOLDER = "tuxpaint-stamps-default", "usr/share/tuxpaint/stamps"
SHA256 = "710e8b7a5e893cd4ef3b08b255f521c1cf8db6db7d3cb435123a2a28203ebac2"
SIDE = 48  # pixels
CAPTIONS, TEST = 674, 134
CATEGORIES = 16


class Stamps(NamedTuple):
    """Of each stamp what it shows, says and sounds like; no two have the same caption.

    Attributes:
      pictures: [B, SIDE, SIDE, 3] float32 in 0..1, on white.
      captions: English.
      sounds: [samples] float32 at 16 kHz of each, silence at the ends cut off; empty for none.
      labels: [B] int32 category, by the folder.
    """

    pictures: np.ndarray
    captions: list[str]
    sounds: list[np.ndarray]
    labels: np.ndarray

    def part(self, index: np.ndarray) -> Stamps:
        """Some of them."""
        captions, sounds = ([x[i] for i in index] for x in (self.captions, self.sounds))
        return Stamps(self.pictures[index], captions, sounds, self.labels[index])


@functools.cache
def read() -> Stamps:
    """All stamps with a picture in pixels, the first one of each caption, in the order of their paths.

    Raises:
      ValueError: a package that cannot be fetched, or holds other files than those that were meant.
    """
    folder = packages.debian_tree(PACKAGE) / FOLDER
    first: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        if text.exists():
            first.setdefault(text.read_text("utf-8").splitlines()[0].strip(), path)
    spoken = [x.with_name(f"{x.stem}_desc_fr.ogg") for x in first.values()]
    content = {x: files.read_bytes(x) for x in [*first.values(), *spoken] if x.exists()}
    _check(list(first), content, folder)
    names = [x.relative_to(folder).parts[0] for x in first.values()]
    return Stamps(
        np.stack([_picture(content[x]) for x in first.values()]),
        list(first),
        [_sound(content[x]) if x in content else np.zeros(0, np.float32) for x in spoken],
        np.unique(names, return_inverse=True)[1].astype(np.int32),
    )


def split(stamps: Stamps) -> tuple[Stamps, Stamps]:
    """Those for training and the `TEST` held-out ones, the same for all runs."""
    order = np.random.default_rng(0).permutation(len(stamps.labels))
    return stamps.part(np.sort(order[TEST:])), stamps.part(np.sort(order[:TEST]))


def _check(captions: list[str], content: dict[Path, bytes], folder: Path) -> None:
    found = hashlib.sha256("\n".join(captions).encode())
    for path in sorted(content):
        found.update(f"{path.relative_to(folder)} {files.digest(content[path])}\n".encode())
    if found.hexdigest() != SHA256:
        raise ValueError(
            f"the files of {PACKAGE} below {FOLDER} are not what was meant: their SHA-256 is "
            f"{found.hexdigest()}, not {SHA256}"
        )


def _picture(content: bytes) -> np.ndarray:
    """[SIDE, SIDE, 3], the picture in the middle of a white square."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    across = max(picture.size)
    square = Image.new("RGBA", (across, across), "white")
    corner = tuple((across - x) // 2 for x in picture.size)
    square.alpha_composite(picture, (corner[0], corner[1]))
    small = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32) / 255


def _sound(content: bytes) -> np.ndarray:
    """[samples] at 16 kHz, from the first to the last that is louder than a fiftieth of the loudest."""
    x, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    common = math.gcd(rate, audio.RATE)
    x = signal.resample_poly(x.mean(axis=1), audio.RATE // common, rate // common)
    loud = np.flatnonzero(np.abs(x) > np.abs(x).max() / 50)
    x = x[loud[0] : loud[-1] + 1] if loud.size else x[:0]
    return (x / max(np.abs(x).max(initial=0), 1e-6)).astype(np.float32)
