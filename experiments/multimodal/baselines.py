"""Linear models of what the stamps show and say, over whole pictures, sounds and captions."""

from __future__ import annotations

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from experiments.multimodal import experiment, tokens
from experiments.multimodal.data import Stamps
from experiments.multimodal.tokens import PICTURE, SOUND, Change

QUARTERS = 4  # of a sound
RIDGE, CAPTION_C, PICTURE_C = 100.0, 100.0, 0.1


def of_parts(known: Stamps, held: Stamps) -> dict[str, dict[str, float]]:
    """Figures by the name of a baseline."""
    captions = experiment.spaces(known.captions, held.captions)
    pictures, sounds = ([_features(x, m) for x in (known, held)] for m in (PICTURE, SOUND))
    mean, deviation = sounds[0].mean(axis=0), sounds[0].std(axis=0) + 1e-6
    sounds = [(x - mean) / deviation for x in sounds]
    both = [np.hstack(x) for x in zip(pictures, sounds, strict=True)]
    found = {}
    for name, x in (("pictures", pictures), ("pictures and sounds", both)):
        at = Ridge(alpha=RIDGE).fit(x[0], captions[0]).predict(x[1])
        rank = experiment.ranks(at, captions[1])
        hits = {"R@1": float((rank < 1).mean()), "R@10": float((rank < 10).mean())}
        found[f"ridge regression, {name}"] = hits
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    texts = [words.fit_transform(known.captions), words.transform(held.captions)]
    for name, x, weak in (("captions", texts, CAPTION_C), ("pictures", pictures, PICTURE_C)):
        model = LogisticRegression(C=weak, max_iter=1000).fit(x[0], known.labels)
        found[f"logistic regression, {name}"] = {"accuracy": float(model.score(x[1], held.labels))}
    most = np.bincount(known.labels).argmax()
    found["the most frequent category"] = {"accuracy": float((held.labels == most).mean())}
    return found


def _features(stamps: Stamps, modality: int) -> np.ndarray:
    """[B, F]: pixels, or means and deviations of a sound and means of its quarters."""
    rng, rows = np.random.default_rng(0), []
    for i in range(len(stamps.labels)):
        example = tokens.of_stamp(stamps, i, Change(), rng)
        x = example["values"][tokens.modality_of(example["place"]) == modality]
        if modality == PICTURE:
            rows.append(x.ravel())
            continue
        parts = [
            y.mean(axis=0) if len(y) else x[:1].sum(axis=0) for y in np.array_split(x, QUARTERS)
        ]
        whole = [x.mean(axis=0), x.std(axis=0)] if len(x) else [np.zeros(tokens.VALUES)] * 2
        rows.append(np.concatenate([*whole, *parts]))
    return np.array(rows)
