"""Speech: spectrograms by definition, words, rules within their bytes, another engine's transcripts."""

import json
import wave
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import ctranslate2, packaged
from experiments.models.whisper import assemble
from experiments.speech import audio, data, memories, transcribe, words
from experiments.speech.data import Clip
from experiments.speech.memories import Frames
from jbalance import cache
from tests.support.whisper_files import FRAMES, MELS, tensors, written

GOLDEN = json.loads((Path(__file__).parent / "golden" / "transcripts.json").read_text())


def test_a_spectrogram_is_the_definition():
    """A discrete Fourier transform written out in float64, of some windows of 25 ms."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=5000) * np.linspace(0, 1, 5000) ** 2).astype(np.float32)
    found = audio.log_mel(x)
    assert found.shape == (3000, 80)
    padded = np.concatenate([x[200:0:-1], x, np.zeros(400)]).astype(np.float64)
    n, k = np.arange(400), np.arange(201)
    transform = np.exp(-2j * np.pi * np.outer(k, n) / 400)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / 400)
    bands = slaney()
    logs = []
    for frame in range(32):
        power = np.abs(transform @ (hann * padded[160 * frame :][:400])) ** 2
        logs.append(np.log10(np.maximum(bands @ power, 1e-10)))
    logs = np.stack(logs)
    want = (np.maximum(logs, logs.max() - 8) + 4) / 4
    np.testing.assert_allclose(found[:32], want, atol=1e-4)
    np.testing.assert_allclose(found[100:], (max(-10, logs.max() - 8) + 4) / 4, atol=1e-5)


def slaney():
    """[80, 201] triangles of area 1 in Hz, by loops."""

    def hertz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * np.log(8) / np.log(6.4)
    edges = [hertz(top * i / 81) for i in range(82)]
    out = np.zeros((80, 201))
    for band in range(80):
        low, middle, high = edges[band : band + 3]
        for i in range(201):
            f = 40.0 * i
            side = (f - low) / (middle - low) if f < middle else (high - f) / (high - middle)
            out[band, i] = max(side, 0) * 2 / (high - low)
    return out


def wav_of(path, rate, samples, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, "<i2").tobytes())
    return path.read_bytes()


def test_recordings_are_resampled_and_what_cannot_be_read_is_named(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    found = audio.read_wav(wav_of(tmp_path / "a.wav", 8000, 16384 * tone), "a.wav")
    want = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    np.testing.assert_allclose(found[200:-200], want[200:-200], atol=2e-3)
    with pytest.raises(ValueError, match=r"b.wav has samples int16 \[10, 2\]"):
        audio.read_wav(wav_of(tmp_path / "b.wav", 8000, np.zeros(20), 2), "b.wav")
    with pytest.raises(ValueError, match=r"c\.wav is no WAV file"):
        audio.read_wav(b"RIFF", "c.wav")
    whole = wav_of(tmp_path / "d.wav", 8000, np.arange(100))
    longer = whole[:40] + (2**31 - 1).to_bytes(4, "little") + whole[44:]
    for content, said in ((whole[:100], "56 are left"), (longer, "says 2147483647 bytes")):
        with pytest.raises(ValueError, match=f"d.wav is no WAV file.*chunk b'data' at 36.*{said}"):
            audio.read_wav(content, "d.wav")
    with pytest.raises(ValueError, match=r"e\.wav holds no samples"):
        audio.read_wav(wav_of(tmp_path / "e.wav", 8000, []), "e.wav")
    with pytest.raises(ValueError, match="at most 480000"):
        audio.log_mel(np.zeros(480_001))


def test_noise_has_the_power_that_was_asked_for():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.sin(np.arange(100_000)), np.zeros(100_000)]).astype(np.float32)
    noise = audio.with_noise(x, 10, rng) - x
    assert 10 * np.log10(0.5 / np.mean(noise**2)) == pytest.approx(10, abs=0.1)


def test_words_are_counted_as_by_recursion():
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        same = distance(a[1:], b[1:]) + (a[0] != b[0])
        return min(same, distance(a[1:], b) + 1, distance(a, b[1:]) + 1)

    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = (list(rng.integers(0, 3, rng.integers(0, 6))) for _ in range(2))
        assert words.edits(a, b) == distance(a, b)
    assert words.edits(list("abcd"), list("acde")) == 2


def test_transcripts_become_words():
    said = "Mr. Dashwood's x-ray, 21 men: 3rd, 20th, 1,000 and 40!"
    want = "mister dashwoods x ray twenty one men third twentieth 1000 and forty"
    assert words.normalized(said) == want.split()
    ordinals = [words.normalized(f"{i}th")[-1] for i in (5, 8, 9, 12, 13, 30)]
    assert ordinals == ["fifth", "eighth", "ninth", "twelfth", "thirteenth", "thirtieth"]


def test_windows_are_full_of_whole_clips():
    clips = [Clip(str(i), np.full(16_000 * (3 + i), i + 1.0), [str(i)]) for i in range(9)]
    found = data.windows(clips, 3)
    assert sum(w.clips for w in found) == 9
    assert sorted(x for w in found for x in w.said) == [str(i) for i in range(9)]
    for window in found:
        assert window.samples.size <= 480_000
        assert (window.samples == 0).sum() == (window.clips - 1) * data.GAP_SAMPLES
    assert data.windows(clips[:1])[0].samples.size == 48_000


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 2, 2, 120, 3, 16)).astype(np.float32)
    asked = 2 * rng.normal(size=(2, 40, 3, 16)).astype(np.float32)
    return Frames(*map(jnp.asarray, (k, v, asked)))


@pytest.mark.parametrize("rule", memories.RULES)
def test_a_rule_keeps_to_its_bytes(rule, frames):
    budget = 2 * memories.full_bytes(frames) * 0.6
    held = memories.write(rule, 0.6, frames)
    assert held.nbytes <= budget
    count = np.asarray(held.arena.count).reshape(2, 6, -1).sum(axis=-1)  # by request and unit
    if rule in ("uniform bits", "subsample"):
        assert (count == count[0, 0]).all()
    if rule == "uniform bits":
        assert (count == 120).all()
        assert held.arena.bits == (
            4,
        )  # of 16, where 8 take 0.52 and centroids and tables are small
    if rule in ("subsample", "proportional"):
        assert held.arena.bits == (16,)
        assert (count > 0).all()
        assert not held.centroids.count.any()
    if rule == "subsample":
        assert count[0, 0] > 24
    if rule.startswith("ladder"):
        assert (held.centroids.count.sum() + count.sum()) == 2 * 6 * 120


def test_units_share_pages_in_proportion_to_their_worth(frames):
    held = memories.write("proportional", 0.6, frames)
    w = np.asarray(memories.sampled_worth(frames)).sum(axis=-1)
    count = np.asarray(held.arena.count).reshape(2, 2, 3).swapaxes(0, 1)
    for b in range(2):
        want = w[:, b] / w[:, b].sum() * count[:, b].sum()
        assert np.abs(want - count[:, b]).max() <= memories.WIDE_PAGE_TOKENS


def test_bits_that_do_not_fit_are_refused(frames):
    assert [memories.is_too_little(64, x) for x in (0.05, 0.1)] == [True, False]
    with pytest.raises(ValueError, match="one bit for every frame takes more"):
        memories.write("uniform bits", 0.05, frames)
    with pytest.raises(ValueError, match="rule is 'best'"):
        memories.write("best", 0.5, frames)


@pytest.fixture(scope="module")
def small():
    model = assemble(ctranslate2.read(written(tensors()), "it").tensors, "it")
    mel = np.random.default_rng(1).normal(size=(2, 2 * FRAMES, MELS)).astype(np.float32)
    speech = transcribe.Speech.of(model)
    return speech, transcribe.listen(speech, mel)


def test_a_transcript_is_the_likeliest_token_after_token(small, monkeypatch):
    monkeypatch.setattr(transcribe, "MOST_TOKENS", 6)
    speech, memory = small
    found = transcribe.transcribe(speech, memory, 2)
    for row, own in enumerate(found):
        said = list(transcribe.PROMPT)
        while len(said) < 8:
            logs, _ = transcribe.read(speech, memory, np.tile(said, (2, 1)))
            last = np.array(logs[row, -1])
            if len(said) == 2:
                last[[transcribe.SPACE, transcribe.END]] = -np.inf
            said.append(int(last.argmax()))
            if said[-1] == transcribe.END:
                break
        assert [x for x in said[2:] if x != transcribe.END] == own.tolist()
    assert len(found[0]) > 1


def test_a_cache_of_all_frames_reads_as_dense_ones_do(small):
    speech, (k, v) = small
    held = cache.create(60_000, 2, 4, 8, num_requests=2, bits=(16,), recent_tokens=0)
    held = cache.write(held, k, v, jnp.ones((2, 2, 4, FRAMES)))
    tokens, count = transcribe.padded([np.array([5, 9, 1]), np.array([7])])
    tokens = tokens[:, :8]
    full, queries = transcribe.read(speech, (k, v), tokens)
    other, _ = transcribe.read(speech, held, tokens)
    kl = transcribe.divergence(full, other, count)
    assert kl.shape == (2,)
    assert (kl < 1e-3).all()
    assert (kl > 0).all()
    assert queries.shape == (2, 2, 8, 4, 8)
    p = np.asarray(jnp.exp(full), np.float64)[1, 1:3]
    want = (p * (np.asarray(full)[1, 1:3] - np.asarray(other)[1, 1:3])).sum() / 2
    assert kl[1] == pytest.approx(want, rel=0.02)


@pytest.mark.slow
def test_transcripts_are_those_of_faster_whisper():
    """experiments/peers/record_transcripts.py recorded them, and a spectrogram of its own."""
    model, tokenizer = packaged.whisper()
    clips = data.librivox()
    mel = audio.log_mel(clips[0].samples)[0:720:45]
    np.testing.assert_allclose(mel, GOLDEN["mel"], atol=2e-3)
    speech = transcribe.Speech.of(model)
    samples = {c.name: c.samples for c in clips}
    samples["all"] = np.concatenate([c.samples for c in clips])
    mels = np.stack([audio.log_mel(x) for x in samples.values()])
    memory = transcribe.listen(speech, mels)
    found = transcribe.transcribe(speech, memory, len(samples))
    assert {n: x.tolist() for n, x in zip(samples, found, strict=True)} == GOLDEN["tokens"]
    wrong = words.edits(
        [w for c in clips for w in c.said], words.normalized(tokenizer.decode(found[-1].tolist()))
    )
    assert wrong <= 4  # of 71
