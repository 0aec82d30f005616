"""Prompts in, tokens out: requests of any number share the devices' memories, as places become free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.decode import engine
from jbalance.decode import state as states
from jbalance.decode.context import Context
from jbalance.decode.model import Model, check_model, token_ids
from jbalance.decode.prefill import capacity_for
from jbalance.decode.sampling import Sampling


@in_32_bits
def generate(
    model: Model,
    prompts: Sequence[Any],
    budgets_bytes: Sequence[int],
    *,
    max_new_tokens: int | Sequence[int],
    num_requests: int | None = None,
    context: Context | None = None,
    devices: Sequence[jax.Device] | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop_tokens: Sequence[int] = (),
    on_token: Callable[[int, int], object] | None = None,
) -> list[np.ndarray]:
    """Continuous batching within fixed memories.

    Args:
      model: the decoder.
      prompts: token ids of each, of any lengths.
      budgets_bytes: of each device, for all caches, never exceeded.
      max_new_tokens: of every prompt, or of each.
      num_requests: places: how many prompts are decoded at once; None for all.
      context: that all of them read first, as `read` gives it; the prompts go on from it.
      devices: None for the first ones.
      sampling: of all or of each; None is greedy.
      stop_tokens: after which a request is done; they are part of its tokens.
      on_token: called with (prompt, token) for each new token as it comes.

    Returns:
      The new tokens of each prompt.

    Raises:
      ValueError: no prompts or an empty one, ids outside of the vocabulary, fewer than one new token,
        budgets too small, a model that gives NaN.
    """
    check_model(model)
    given = checks.items("prompts", prompts, "token ids of each prompt")
    prompts = [token_ids(f"prompts[{i}]", p, model) for i, p in enumerate(given)]
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    checks.rank("max_new_tokens", max_new_tokens, (0, 1), "[] or one for each prompt")
    if np.ndim(max_new_tokens):
        checks.length("max_new_tokens", max_new_tokens, len(prompts), "the number of prompts")
    counts = np.atleast_1d(checks.int_in_range("max_new_tokens", max_new_tokens, 1))
    most = np.broadcast_to(counts, len(prompts)).tolist()
    same = sampling is None or isinstance(sampling, Sampling)
    each: list[Any] = (
        [sampling] * len(prompts) if same else checks.items("sampling", sampling, "Sampling")
    )
    if len(each) != len(prompts):
        raise ValueError(f"sampling has {len(each)} entries for {len(prompts)} prompts")
    for i, x in enumerate(each):
        if x is not None:
            checks.instance(f"sampling[{i}]", x, Sampling)
    places = len(prompts)
    if num_requests is not None:
        places = checks.static_int("num_requests", num_requests, 1)
    stop_tokens = [
        checks.static_int(f"stop_tokens[{i}]", x)
        for i, x in enumerate(checks.items("stop_tokens", stop_tokens, "token ids"))
    ]
    state = states.create(
        model, budgets_bytes, num_requests=places, context=context, devices=devices
    )
    capacity = capacity_for(max(map(len, prompts)))
    found: list[list[int]] = [[] for _ in prompts]
    waiting, of_place = list(range(len(prompts)))[::-1], [-1] * places

    def heard(state, place, token):
        """A token of the request of a place, which leaves if it is done with it."""
        prompt = of_place[place]
        found[prompt].append(token)
        if on_token is not None:
            on_token(prompt, token)
        if token not in stop_tokens and len(found[prompt]) < most[prompt]:
            return state
        of_place[place] = -1
        return engine.leave(state, place)

    while waiting or any(p >= 0 for p in of_place):
        for place in range(places):
            while of_place[place] < 0 and waiting:
                prompt = of_place[place] = waiting.pop()
                state = engine.join(
                    model, state, place, prompts[prompt], sampling=each[prompt], capacity=capacity
                )
                state = heard(state, place, int(state.tokens[place]))
        busy = [place for place, prompt in enumerate(of_place) if prompt >= 0]
        if busy:
            new, state = engine.step(model, state)
            tokens = np.asarray(new).tolist()
            for place in busy:
                if tokens[place] < 0:
                    raise ValueError(
                        f"model gives NaN after {len(found[of_place[place]])} new tokens of "
                        f"prompts[{of_place[place]}]: its type is too narrow for what it computes"
                    )
                state = heard(state, place, tokens[place])
    return [np.array(tokens, np.int32) for tokens in found]
