"""The baseline: the translation of the most similar English string that is known."""

from __future__ import annotations

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer


def translate(known: list[str], translations: list[str], english: list[str]) -> list[str]:
    """For each English string the translation of the known one with the largest cosine.

    Strings are vectors of character n-grams of 2 to 5 within words, TF-IDF weighted.
    """
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    memory = vectors.fit_transform(known)
    nearest = np.asarray((vectors.transform(english) @ memory.T).argmax(axis=1)).reshape(-1)
    return [translations[i] for i in nearest]
