"""Recordings: read, resampled, with noise, and as Whisper's log-mel spectrograms."""

from __future__ import annotations

import io
import math
import struct

import numpy as np
from scipy import signal
from scipy.io import wavfile

RATE = 16_000  # samples a second
WINDOW_SAMPLES = 30 * RATE
FFT, HOP, MELS = 400, 160, 80
_LINEAR_HZ, _MEL_HZ, _LOG_STEP = 1000.0, 200.0 / 3, math.log(6.4) / 27  # of Slaney's scale
_RANGE, _LEAST = 8.0, 1e-10


def read_wav(content: bytes, where: str) -> np.ndarray:
    """[samples] float32 in -1..1 at 16 kHz.

    Raises:
      ValueError: no WAV file, one that is cut or empty, or of other samples than one channel of 16 bits.
    """
    try:
        _check_whole(content)
        rate, samples = wavfile.read(io.BytesIO(content))
    except (ValueError, EOFError, OSError, struct.error) as error:
        raise ValueError(f"{where} is no WAV file that can be read: {error}") from None
    if samples.ndim != 1 or samples.dtype != np.int16 or rate < 1:
        raise ValueError(
            f"{where} has samples {samples.dtype} {list(samples.shape)} at {rate} Hz: it must be one "
            f"channel of 16 bits"
        )
    if not samples.size:
        raise ValueError(f"{where} holds no samples")
    x = samples.astype(np.float32) / 32768
    if rate == RATE:
        return x
    common = math.gcd(rate, RATE)
    return signal.resample_poly(x, RATE // common, rate // common).astype(np.float32)


def _check_whole(content: bytes) -> None:
    """ValueError for a chunk that says it is longer than the file; SciPy reads what there is."""
    at = 12
    while at + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, at)
        if at + 8 + size > len(content):
            raise ValueError(
                f"the chunk {name!r} at {at} says {size} bytes, and {len(content) - at - 8} are left"
            )
        at += 8 + size + size % 2


def with_noise(samples: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """White noise added, its power so many decibels below the mean power of what is not silent."""
    heard = samples[samples != 0]
    power = float(np.mean(np.square(heard, dtype=np.float64))) if heard.size else 0.0
    noise = rng.normal(size=samples.shape) * math.sqrt(power / 10 ** (snr_db / 10))
    return (samples + noise).astype(np.float32)


def log_mel(samples: np.ndarray) -> np.ndarray:
    """[3000, 80] float32 of at most 30 s of samples, silence behind them.

    The power of windows of 25 ms every 10 ms in 80 bands of mel, log10, at most 8 below the largest,
    plus 4, over 4.

    Raises:
      ValueError: more than 30 s.
    """
    if samples.ndim != 1 or samples.size > WINDOW_SAMPLES:
        raise ValueError(
            f"samples has shape {samples.shape}: it must be [samples], at most {WINDOW_SAMPLES}"
        )
    padded = np.pad(samples.astype(np.float32), (0, WINDOW_SAMPLES - samples.size))
    padded = np.pad(padded, FFT // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP][:-1]
    spectrum = np.fft.rfft(windows * signal.get_window("hann", FFT).astype(np.float32), axis=1)
    power = np.square(np.abs(spectrum)).astype(np.float32)
    logs = np.log10(np.maximum(power @ mel_bands().T, _LEAST))
    return ((np.maximum(logs, logs.max() - _RANGE) + 4) / 4).astype(np.float32)


def mel_bands() -> np.ndarray:
    """[80, 201] float32: triangles of equal area, evenly spaced on Slaney's mel scale up to 8 kHz."""
    edges = _hertz(np.linspace(0, _mels(RATE / 2), MELS + 2))
    bins = np.fft.rfftfreq(FFT, 1 / RATE)
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    area = (edges[2:] - edges[:-2])[:, None] / 2
    return (np.maximum(np.minimum(rise, fall), 0) / area).astype(np.float32)


def _mels(hertz: float) -> float:
    """Linear below 1 kHz, logarithmic above."""
    if hertz < _LINEAR_HZ:
        return hertz / _MEL_HZ
    return _LINEAR_HZ / _MEL_HZ + math.log(hertz / _LINEAR_HZ) / _LOG_STEP


def _hertz(mels: np.ndarray) -> np.ndarray:
    """The inverse of `_mels`."""
    corner = _LINEAR_HZ / _MEL_HZ
    return np.where(mels < corner, _MEL_HZ * mels, _LINEAR_HZ * np.exp(_LOG_STEP * (mels - corner)))
