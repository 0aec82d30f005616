"""Tokens of texts, what each is worth by its TF-IDF feature, and which of them a budget keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from tokenizers import Tokenizer

from experiments.harness import budgets
from experiments.harness.tokens import byte_level_bpe
from experiments.text_classification import features
from jbalance import importance

VOCABULARY = 4000
MOST_TOKENS = 64  # of a text
WORD_START = "Ġ"  # what the byte-level alphabet has for the space before a word


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE in lower case, from these texts alone."""
    return byte_level_bpe(texts, VOCABULARY, lower_case=True)


def with_dropout(tokenizer: Tokenizer, part: float) -> Tokenizer:
    """The same subwords, of which merges are left out at random: the augmentation of BPE-dropout.

    Provilkov et al., BPE-Dropout (arXiv:1910.13267).
    """
    other = Tokenizer.from_str(tokenizer.to_str())
    other.model.dropout = part
    return other


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text; what is too long loses its end, and no text is empty."""
    return [
        np.asarray(found.ids[:MOST_TOKENS] or [0], np.int32)
        for found in tokenizer.encode_batch(texts)
    ]


def counts(ids: list[np.ndarray], vocabulary: int) -> sparse.csr_matrix:
    """[B, N]: how often a text holds each token."""
    rows = np.repeat(np.arange(len(ids)), [len(x) for x in ids])
    columns = np.concatenate(ids)
    shape = len(ids), vocabulary
    return sparse.coo_matrix((np.ones(columns.size), (rows, columns)), shape=shape).tocsr()


def inverse_document_frequency(found: sparse.csr_matrix) -> np.ndarray:
    """[N], as `importance.tfidf` has it."""
    return np.log((1 + found.shape[0]) / (1 + found.getnnz(axis=0))) + 1


class Worth(NamedTuple):
    """What tokens are worth, learned from the training part."""

    w: np.ndarray  # [N] importance of the TF-IDF features
    idf: np.ndarray  # [N]

    @classmethod
    def of(cls, ids: list[np.ndarray], positive: np.ndarray, vocabulary: int) -> Worth:
        found = counts(ids, vocabulary)
        idf = inverse_document_frequency(found)
        x = found.multiply(idf[None]).tocsr()
        length = np.sqrt(np.asarray(x.multiply(x).sum(axis=1))).reshape(-1, 1)
        return cls(features.scores(x.multiply(1 / length).tocsr(), positive), idf)

    def with_prior(self, tokenizer: Tokenizer, valence: Mapping[str, float], beta: float) -> Worth:
        """With a lexicon as prior: tokens that are its words, by how far from neutral they are.

        Other tokens have the prior of half a point, which is where the lexicon's words begin.
        """
        prior = np.full(self.w.shape, 0.5, np.float32)
        for token, i in tokenizer.get_vocab().items():
            word = token.removeprefix(WORD_START)
            if word != token and word in valence:
                prior[i] = max(abs(valence[word]), 0.5)
        return self._replace(w=np.asarray(importance.blend(self.w, prior, beta)))

    def of_tokens(self, ids: list[np.ndarray]) -> list[np.ndarray]:
        """w of each token times its TF-IDF in the text, shared by its repetitions."""
        scored = []
        for text in ids:
            x = self.idf[text] * np.bincount(text, minlength=self.idf.size)[text]
            once = {int(token): value for token, value in zip(text, x, strict=True)}
            length = np.sqrt(sum(value**2 for value in once.values()))
            scored.append(self.w[text] * self.idf[text] / length)
        return scored


def uniform(scored: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """The same part of every text, at places that are evenly apart."""
    lengths = np.array([len(text) for text in scored])
    amount = budgets.whole(lengths, total, lengths)
    kept = []
    for length, number in zip(lengths, amount, strict=True):
        mask = np.zeros(length, bool)
        mask[np.arange(number) * length // number] = True
        kept.append(mask)
    return kept


BUDGETS: dict[str, budgets.Budget] = {
    "full": budgets.full,
    "uniform": uniform,
    "proportional": budgets.proportional,
    "ladder": budgets.ladder,
}


class Kept(NamedTuple):
    """The tokens of a text that are computed."""

    ids: np.ndarray
    position: np.ndarray  # in the whole text


def budgeted(ids: list[np.ndarray], worth: Worth, budget: str, part: float) -> list[Kept]:
    """Of texts, the tokens that `part` of all of them pays for."""
    total = int(part * sum(len(text) for text in ids))
    masks = BUDGETS[budget](worth.of_tokens(ids), total)
    return [
        Kept(text[m], np.flatnonzero(m).astype(np.int32))
        for text, m in zip(ids, masks, strict=True)
    ]
