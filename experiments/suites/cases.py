"""Cases: a context of an exact number of tokens, and questions that nobody asks before it is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from experiments.harness import texts

QUESTION_TOKENS = 144  # of a length, for a question and its answer; the others are the context's
NOISE = (
    "The river is cold. The road is long. Rain falls on the hills. We walk and we rest. "
    "Then the day ends."
)


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and what a good answer holds."""

    ids: np.ndarray  # [Q], with the fixed beginning of the answer
    answer: np.ndarray  # [A], the right one, for its likelihood
    references: tuple[str, ...]  # strings that the model's own answer should hold


@dataclasses.dataclass(frozen=True)
class Case:
    """A context that is compressed alone, and its questions, each asked of the context by itself."""

    context: np.ndarray  # [S]
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Writer:
    """Texts as a model's tokens.

    Attributes:
      tokenizer: of the model.
      length: L, tokens of a context, the longest question and its answer.
    """

    tokenizer: Tokenizer
    length: int

    @property
    def size(self) -> int:
        """S, of the context."""
        return self.length - QUESTION_TOKENS

    @property
    def begin(self) -> np.ndarray:
        """What the tokenizer puts before every text: with some models, attention leans on it."""
        return np.asarray(self.tokenizer.encode("").ids, np.int32)

    def ids(self, text: str) -> np.ndarray:
        """[N] of a part of a text."""
        return texts.encode(self.tokenizer, text)

    def lines(self, lines: Iterable[str]) -> Iterator[np.ndarray]:
        """Of each line, with its end."""
        return (self.ids(line + "\n") for line in lines)

    def room(self, intro: str) -> int:
        """Tokens that are left for the pieces of `context`."""
        return self.size - len(self.begin) - len(self.ids("\n" + intro))

    def context(self, intro: str, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """[S]: the beginning of the model's texts, an introduction and the pieces.

        What they leave is noise at the very front, cut where the length is reached.

        Raises:
          ValueError: there are too many.
        """
        rest = self.room(intro) - sum(map(len, pieces))
        if rest < 0:
            raise ValueError(
                f"--length is {self.length}: the task needs at least {self.length - rest} tokens"
            )
        noise = np.resize(self.ids(NOISE + " "), rest)
        return np.concatenate([self.begin, noise, self.ids("\n" + intro), *pieces])

    def question(self, text: str, answer: str, references: Sequence[str] | None = None) -> Question:
        """A question that ends with the beginning of its answer.

        Args:
          text: of the question.
          answer: the right one, as it goes on from there.
          references: strings that it should hold; the answer itself if left out.

        Raises:
          ValueError: it is longer than `QUESTION_TOKENS`.
        """
        found = Question(
            self.ids(text), self.ids(answer), tuple(references or (answer.strip(" ."),))
        )
        number = len(found.ids) + len(found.answer)
        if number > QUESTION_TOKENS:
            raise ValueError(
                f"a question and its answer take {number} of this tokenizer's tokens: at most "
                f"{QUESTION_TOKENS} are set aside"
            )
        return found


def fitting(pieces: Iterable[np.ndarray], room: int) -> list[np.ndarray]:
    """The first pieces, as many as there is room for."""
    found: list[np.ndarray] = []
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        found.append(piece)
    return found
