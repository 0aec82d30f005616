"""The runs: transcripts of recordings over memories of fewer bytes, and what is wrong in them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

from experiments.models import packaged
from experiments.models.whisper import WhisperConfig
from experiments.speech import audio, data, memories, transcribe, words
from experiments.speech.data import Window
from experiments.speech.memories import Frames
from experiments.speech.transcribe import Speech

CONDITIONS: dict[str, float | None] = {"clean": None, "10 dB": 10.0, "0 dB": 0.0}
PERCENTS = (50, 25, 10, 5)
AMPLE, FEW_RULES = 50, ("uniform bits", "subsample", "ladder")  # where rules hardly differ
NAMED, SENTENCES = 1, 2  # windows of each seed
SEEDS = 3  # which have windows of their own
CALIBRATION = (2, 6)  # windows of single words and of sentences whose queries are sampled
HEAD_DIM = WhisperConfig().head_dim
BATCH = 1 + NAMED + SENTENCES


class Material(NamedTuple):
    """What all runs share."""

    speech: Speech
    tokenizer: Tokenizer
    windows: list[list[Window]]  # of each seed: LibriVox, named words, sentences
    asked: Array  # [L, T, H, D] queries of other recordings

    def text(self, tokens: np.ndarray) -> list[str]:
        return words.normalized(self.tokenizer.decode(tokens.tolist()))


class Heard(NamedTuple):
    """A seed's recordings under one condition, by the full memory."""

    frames: Frames
    tokens: np.ndarray  # [B, T] of its own transcripts, with the prompt
    counts: np.ndarray  # [B]
    texts: list[list[str]]
    step_s: float  # of one token of all recordings


class Arm(NamedTuple):
    """A rule, and the part of the full bytes that it may take."""

    rule: str
    percent: int

    @property
    def name(self) -> str:
        return self.rule if self.rule == "full" else f"{self.rule}, {self.percent}%"


def _arms() -> dict[str, Arm]:
    found = [Arm("full", 100)]
    for percent in PERCENTS:
        for rule in memories.RULES if percent < AMPLE else FEW_RULES:
            if rule != "uniform bits" or not memories.is_too_little(HEAD_DIM, percent / 100):
                found.append(Arm(rule, percent))
    return {arm.name: arm for arm in found}


ARMS = _arms()


@functools.cache
def prepare() -> Material:
    """The model, the recordings of all seeds, and the sample queries.

    Raises:
      ValueError: packages that cannot be fetched.
    """
    model, tokenizer = packaged.whisper()
    speech = Speech.of(model)
    named, sentences = (data.windows(clips, 0) for clips in (data.named(), data.sentences()))
    novel = data.windows(data.librivox())
    seeds = [
        novel + named[NAMED * s : NAMED * (s + 1)] + sentences[SENTENCES * s : SENTENCES * (s + 1)]
        for s in range(SEEDS)
    ]
    others = named[NAMED * SEEDS :][: CALIBRATION[0]]
    others += sentences[SENTENCES * SEEDS :][: CALIBRATION[1]]
    return Material(speech, tokenizer, seeds, _sample(speech, others))


def _sample(speech: Speech, windows: list[Window]) -> Array:
    """The queries [L, T, H, D] of the full memory's transcripts of recordings."""
    found = []
    for first in range(0, len(windows), BATCH):  # as the runs do, by the same programs
        mels = np.stack([audio.log_mel(w.samples) for w in windows[first : first + BATCH]])
        memory = transcribe.listen(speech, mels)
        tokens, counts = transcribe.padded(transcribe.transcribe(speech, memory, len(mels)))
        _, queries = transcribe.read(speech, memory, tokens)
        lengths = len(transcribe.PROMPT) + counts - 1
        found += [np.asarray(queries[:, i, :number]) for i, number in enumerate(lengths)]
    return jnp.asarray(np.concatenate(found, axis=1))


@functools.lru_cache(maxsize=len(CONDITIONS))
def hear(seed: int, condition: str) -> Heard:
    """A seed's recordings; the noise is the seed's too."""
    material = prepare()
    snr, rng = CONDITIONS[condition], np.random.default_rng(seed)
    windows = material.windows[seed]
    samples = [w.samples if snr is None else audio.with_noise(w.samples, snr, rng) for w in windows]
    mels = np.stack([audio.log_mel(x) for x in samples])
    k, v = transcribe.listen(material.speech, mels)
    found, step_s = _timed(material.speech, (k, v), len(windows))
    tokens, count = transcribe.padded(found)
    texts = [material.text(x) for x in found]
    return Heard(Frames(k, v, material.asked), tokens, count, texts, step_s)


@functools.lru_cache(maxsize=1)
def _full_log_probs(seed: int) -> Array:
    heard = hear(seed, "clean")
    memory = heard.frames.k, heard.frames.v
    return transcribe.read(prepare().speech, memory, heard.tokens)[0]


def _timed(speech: Speech, memory, requests: int) -> tuple[list[np.ndarray], float]:
    """Transcripts, and the seconds of a token of the longest."""
    jax.block_until_ready(memory)
    start = time.perf_counter()
    found = transcribe.transcribe(speech, memory, requests)
    longest = min(max(len(x) for x in found) + 2, transcribe.MOST_TOKENS)
    return found, (time.perf_counter() - start) / longest


def run(name: str, seed: int, advance: Callable[[], None]) -> Mapping[str, Any]:
    """One arm over a seed's recordings under every condition."""
    arm, material = ARMS[name], prepare()
    rows: list[dict[str, Any]] = []
    times, figures = [], {}
    for condition in CONDITIONS:
        heard = hear(seed, condition)
        memory = memories.write(arm.rule, arm.percent / 100, heard.frames)
        if arm.rule == "full":
            texts, step_s = heard.texts, heard.step_s
        else:
            found, step_s = _timed(material.speech, memory, BATCH)
            texts = [material.text(x) for x in found]
        if condition != "clean":  # in which the program was compiled
            times.append(step_s / heard.step_s)
        else:
            figures["KL clean"] = _divergence(seed, memory, heard)
        for window, text, own in zip(material.windows[seed], texts, heard.texts, strict=True):
            rows.append({"condition": condition} | _errors(window, text, own))
        advance()
    wrong = {f"WER {c}": rate(rows, c, "wrong", "said") for c in CONDITIONS}
    changed = {f"changed {c}": rate(rows, c, "changed", "heard") for c in CONDITIONS}
    figures = {**wrong, **changed, **figures, "step time over full": float(np.mean(times))}
    return {"figures": figures, "details": rows}


def _divergence(seed: int, memory, heard: Heard) -> float:
    logs, _ = transcribe.read(prepare().speech, memory, heard.tokens)
    return float(np.mean(transcribe.divergence(_full_log_probs(seed), logs, heard.counts)))


def _errors(window: Window, text: list[str], own: list[str]) -> dict[str, Any]:
    """Words that were said and are wrong, and words that the full memory hears and this one does not."""
    known = {} if window.said is None else {
        "said": len(window.said), "wrong": words.edits(window.said, text)
    }  # fmt: skip
    return known | {"heard": len(own), "changed": words.edits(own, text), "clips": window.clips}


def rate(rows: list[dict[str, Any]], condition: str, wrong: str, of: str) -> float:
    """Wrong words of all words, over the recordings of a condition that have them."""
    own = [row for row in rows if row["condition"] == condition and of in row]
    return sum(row[wrong] for row in own) / sum(row[of] for row in own)
