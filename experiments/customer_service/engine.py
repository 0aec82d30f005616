"""The executor that is the model: requests join, step and leave in `jbalance.decode`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments.customer_service import data
from experiments.customer_service.data import Lines
from experiments.customer_service.schedule import Request
from experiments.models import Transformer, load_gguf, smollm2_path
from experiments.models.worth import decoder_of
from jbalance import decode
from jbalance.decode import Model
from jbalance.decode.prefill import CHUNK_TOKENS

PLACE_BYTES = 4_000_000  # so that a request has as much as it can use, whoever is beside it


class Loaded(NamedTuple):
    """SmolLM2-135M, its tokenizer, the model as the library decodes it, and what customers say."""

    model: Transformer
    tokenizer: Tokenizer
    decoder: Model
    lines: Lines


@functools.cache
def loaded() -> Loaded:
    """All of it, loaded once."""
    _, model, tokenizer = load_gguf(smollm2_path())
    return Loaded(model, tokenizer, decoder_of(model), data.read(tokenizer))


class Engine:
    """Requests in the places of a `decode.State`.

    Attributes:
      answers: tokens by customer and arrival, of the requests that are done.
    """

    def __init__(self, model: Model, places: int, weights: np.ndarray) -> None:
        self.model, self.weights = model, weights
        self.state = decode.create(model, [places * PLACE_BYTES], num_requests=places)
        self.in_place: dict[int, tuple[Request, list[int]]] = {}
        self.answers: dict[tuple[int, int], list[int]] = {}

    def join(self, place: int, request: Request) -> bool:
        self.state = decode.join(
            self.model,
            self.state,
            place,
            request.prompt,
            weight=float(self.weights[request.customer]),
            capacity=CHUNK_TOKENS,
        )
        self.in_place[place] = request, [int(self.state.tokens[place])]
        return self._done(place)

    def step(self) -> list[int]:
        new, self.state = decode.step(self.model, self.state)
        for place, (_, tokens) in self.in_place.items():
            tokens.append(int(new[place]))
        return [place for place in self.in_place if self._done(place)]

    def leave(self, place: int) -> None:
        request, tokens = self.in_place[place]
        if self._done(place):
            self.answers[request.customer, request.arrival] = tokens
        del self.in_place[place]
        self.state = decode.leave(self.state, place)

    def _done(self, place: int) -> bool:
        request, tokens = self.in_place[place]
        return len(tokens) >= request.new_tokens
