"""Decoding of many requests within the devices' memories: they join, take steps together, and leave.

A `State` has a place for each of B requests. What changes from step to step is data, so that requests
come and go without a program being compiled anew. The layers share their programs and go one after the
other, on one device, on many, and in many processes (`devices`).

    state = create(model, budgets_bytes, num_requests=8)
    state = join(model, state, request, prompt)
    tokens, state = step(model, state)
    state = leave(state, request)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.cache import _step
from jbalance.cache._price import PROTECTED
from jbalance.decode import devices as over
from jbalance.decode import extend, prefill
from jbalance.decode.context import first_prompt_codes, rules_of
from jbalance.decode.model import Functions, Model, check_numbers, token_ids
from jbalance.decode.sampling import Sampling, sample
from jbalance.decode.state import ALWAYS, State, check_request, replaced, shared
from jbalance.importance.knowledge import Knowledge


@in_32_bits
def join(
    model: Model,
    state: State,
    request: int,
    prompt: np.ndarray,
    *,
    sampling: Sampling | None = None,
    weight: float = 1.0,
    capacity: int | None = None,
    known: Knowledge | None = None,
    on_layer: Callable[[int], object] | None = None,
) -> State:
    """A prompt enters the free place of a request, which chooses its first token.

    Args:
      model: the decoder.
      state: given up: the returned one takes its place.
      request: in 0..B-1.
      prompt: [S] token ids, S >= 1.
      sampling: how its tokens are chosen; None is greedy.
      weight: its share of the memory among all requests, > 0.
      capacity: of prompts, for which the program is compiled once; None for that of S.
      known: rules about the S tokens, of `importance.knowledge`: what is measured is blended with its
        prior, what it keeps stays at the finest precision in every head until the request leaves, and
        what stays in a head brings along what it implies there. Not beside a context, which `read`
        reads by its own.
      on_layer: called with each layer that a first prompt has been through, to show progress.

    Raises:
      ValueError: a place that is taken, an empty prompt, ids outside of the vocabulary, a weight that is
        not positive, rules about another number of tokens, or that keep more than the devices hold, a
        model that gives NaN.
    """
    prompt = token_ids("prompt", prompt, model)
    weight = checks.static_float("weight", weight, checks.FLOAT32_TINY)
    request = check_request(state, request)
    if capacity is not None:
        capacity = checks.static_int("capacity", capacity, len(prompt))
    if sampling is not None:
        checks.instance("sampling", sampling, Sampling)
    if bool(state.active[request]):
        raise ValueError(f"request is {request}: its place is taken; `leave` it first")
    sampling = Sampling() if sampling is None else sampling
    if known is not None and state.contexts is not None:
        raise ValueError("known is given beside a context: give `read` rules about the context")
    room = prefill.capacity_for(len(prompt) if capacity is None else capacity)
    known = rules_of(known, len(prompt), room)
    state = dataclasses.replace(
        state,
        protected=replaced(state.protected, request, _protected(known, len(prompt))),
        active=state.active.at[request].set(True),
        weights=replaced(state.weights, request, weight),
        samplers=state.samplers.replaced(request, sampling),
    )
    state = shared(state)
    if state.contexts is None:
        caches, logits = _prefill(model, state, request, prompt, room, known, on_layer)
    else:
        caches, logits = extend.tokens_of(
            model,
            state.devices,
            state.caches,
            state.contexts,
            request,
            prompt,
            state.context_tokens,
            state.allowances,
        )
    return _chosen(state, caches, request, logits, state.context_tokens + len(prompt))


@in_32_bits
def tell(model: Model, state: State, request: int, tokens: np.ndarray) -> State:
    """More tokens for an active request, such as the next turn of a chat; it chooses the token after.

    Its latest token, which no step has read yet, goes in before them.
    """
    request = check_request(state, request)
    given = token_ids("tokens", tokens, model)
    if not bool(state.active[request]):
        raise ValueError(f"request is {request}: its place is free; `join` first")
    new = np.concatenate([[int(state.tokens[request])], given]).astype(np.int32)
    first = int(state.positions[request])
    caches, logits = extend.tokens_of(
        model, state.devices, state.caches, state.contexts, request, new, first, state.allowances
    )
    return _chosen(state, caches, request, logits, first + len(new))


def _protected(known: Knowledge | None, number: int) -> int:
    """Of a prompt's tokens, how many always stay, by rules and without."""
    if known is None:
        return ALWAYS
    codes = first_prompt_codes(jnp.zeros((1, known.keep.shape[0])), number, known)[0, :number]
    return max(ALWAYS, int(np.count_nonzero(np.asarray(codes) == PROTECTED)))


def _prefill(model, state, request, prompt, capacity, known, on_layer):
    """A request's first prompt, layer by layer."""
    caches = state.caches
    x = jnp.zeros(0)
    for layer, (x, held) in enumerate(prefill.layers_of(model, prompt, capacity)):
        caches = over.admit(
            state.devices,
            caches,
            request,
            layer,
            held,
            len(prompt),
            state.allowances,
            known=known,
        )
        if on_layer is not None:
            jax.block_until_ready(x)
            on_layer(layer)
    return caches, prefill.logits_at(model, x, len(prompt) - 1)


def _chosen(state, caches, request, logits, position) -> State:
    """The state after a request's prompt: its first token, from the logits [V] behind it."""
    tables = state.tokens, state.positions
    token, (tokens, positions) = _first_token(state.samplers, logits, position, request, tables)
    if int(token) < 0:
        check_numbers("after the prompt", logits)
    return dataclasses.replace(state, caches=caches, tokens=tokens, positions=positions)


@jax.jit
def _first_token(samplers, logits, position, request, tables):
    """The token that one request begins with, and the tables of tokens and positions with its own."""
    one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, request, 1), samplers)
    position = jnp.asarray(position, jnp.int32)
    token = sample(logits[None], one, position[None])[0]
    tokens, positions = tables
    return token, (tokens.at[request].set(token), positions.at[request].set(position))


@in_32_bits
def step(model: Model, state: State) -> tuple[jax.Array, State]:
    """Every active request reads its latest token and chooses the next one.

    Args:
      model: the decoder.
      state: given up: the returned one takes its place.

    Returns:
      [B] int32 tokens, those of inactive requests as before, -1 where the model gives NaN; and the
        state.

    Raises:
      ValueError: a model or a state that is none.
    """
    checks.instance("model", model, Model)
    checks.instance("state", state, State)
    f, layers = model.functions(0), model.layers
    active = [
        None if x is None else jax.device_put(state.active, device)
        for x, device in zip(state.caches, state.devices, strict=True)
    ]
    x, qkv = _first_layer(f, model.params, layers[0], state.tokens, state.positions)
    caches = state.caches
    for layer, weights in enumerate(layers):
        y, caches = over.attend_token(
            state.devices,
            caches,
            state.contexts,
            layer,
            qkv,
            active,
            model.functions(layer).limits,
        )
        if layer + 1 < model.num_layers:
            kinds = model.functions(layer), model.functions(layer + 1)
            x, qkv = _between(kinds, weights, layers[layer + 1], x, y, state.positions)
    requests = state.tokens, state.positions, state.active, state.samplers
    last = model.functions(model.num_layers - 1)
    tokens, positions = _last_layer(last, model.params, layers[-1], x, y, requests)
    counted = [
        (None, False) if x is None else over.counted(x, own)
        for x, own in zip(caches, active, strict=True)
    ]
    caches = tuple(
        over.settle(x, pages) if x is not None and bool(full) else x
        for (x, full), pages in zip(counted, state.allowances, strict=True)
    )
    return tokens, dataclasses.replace(state, caches=caches, tokens=tokens, positions=positions)


@functools.partial(jax.jit, static_argnums=0)
def _first_layer(model: Functions, params, weights, tokens, positions):
    x = model.embed(params, tokens[:, None], positions[:, None])
    return x, _qkv(model, weights, x, positions)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _between(kinds: tuple[Functions, Functions], weights, following, x, y, positions):
    """From a layer's attention to the following one's."""
    x = kinds[0].finish(weights, x, y[:, None].astype(x.dtype))
    return x, _qkv(kinds[1], following, x, positions)


@functools.partial(jax.jit, static_argnums=0)
def _last_layer(model: Functions, params, weights, x, y, requests):
    """The tokens after the last layer's attention, and their positions."""
    tokens, positions, active, samplers = requests
    x = model.finish(weights, x, y[:, None].astype(x.dtype))
    logits = model.logits(params, x)[:, 0].astype(jnp.float32)
    positions = positions + active
    return jnp.where(active, sample(logits, samplers, positions), tokens), positions


def _qkv(model: Functions, weights, x, positions):
    """Of one token of each request, the queries scaled."""
    q, k, v = model.qkv(weights, x, positions[:, None])
    return _step.scaled(q[:, 0], model.spec.scale), k[:, 0], v[:, 0]


@in_32_bits
def leave(state: State, request: int) -> State:
    """A request's place becomes free, and its memory the others'."""
    request = check_request(state, request)
    caches = tuple(None if x is None else over.release(x, request) for x in state.caches)
    state = dataclasses.replace(
        state,
        caches=caches,
        active=state.active.at[request].set(False),
        weights=replaced(state.weights, request, 0),
        protected=replaced(state.protected, request, ALWAYS),
        samplers=state.samplers.replaced(request, Sampling()),
    )
    return shared(state)
