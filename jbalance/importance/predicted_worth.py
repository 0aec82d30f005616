"""What later queries will ask of a token, by log-linear regression on what is known when it is read.

A token's hidden state says what it is, the attention of the last queries what is being talked of, its
position how far away it will be. A log-linear map of these predicts the amplitude of the attention that
it receives later better than a repetition of the context, which knows nothing of what follows, and costs
a product with a small matrix. The map is a model's own: `decode.fit_worth` fits it on texts.

    w = exp(x̂ A + f B + b),   x̂ = x / rms(x),   f the features of `worth_features`
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

FUTURE_WEIGHT = 0.4  # of squared attention of the tokens that follow, so that worth keeps its scale
REPEATED_WEIGHT = 0.02  # of that of a repetition: what is not asked for soon may be asked for later
LEAST_ENERGY = 1e-8  # of the last queries' attention, where its logarithm ends
MOST_LOG = 5.0  # of a prediction: no worth is above some e^3
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 2500, 2048, 2e-3, 1e-2


class WorthWeights(NamedTuple):
    """The map of one layer with K key/value heads, E the width of the residual stream."""

    hidden: jax.Array  # [E, K] A, of the normalized residual stream before the layer
    features: jax.Array  # [5 + 2 K, K] B, of `worth_features`
    bias: jax.Array  # [K] b


def predicted_worth(
    x: jax.Array,
    later: jax.Array,
    weights: WorthWeights,
    *,
    start: jax.Array | int = 0,
    num_tokens: jax.Array | int | None = None,
) -> jax.Array:
    """Log-linear prediction of the root of the squared attention that tokens will receive.

    Args:
      x: [T, E] the residual stream before the layer, of the tokens from `start` on.
      later: [K, T] `importance.attention_energy` that they receive from the prompt's last 64 queries at
        distances of at least 8.
      weights: of the layer, of `decode.fit_worth`.
      start: [] int32 position of the first of the tokens.
      num_tokens: [] int32, how many tokens the prompt has; None for start + T.

    Returns:
      w [K, T] float32 >= 0, in the currency of `token_worth`; 0 for padding.
    """
    features = worth_features(later, start, num_tokens)
    w = jnp.exp(_log_worth(weights, normalized(x), features)).T
    if num_tokens is None:
        return w
    return jnp.where(jnp.asarray(start) + jnp.arange(x.shape[0]) < num_tokens, w, 0)


def _log_worth(weights: WorthWeights, x: jax.Array, features: jax.Array) -> jax.Array:
    """[T, K] of `normalized` x and `worth_features`."""
    return jnp.minimum(x @ weights.hidden + features @ weights.features + weights.bias, MOST_LOG)


def normalized(x: jax.Array) -> jax.Array:
    """x [T, E] over its root mean square, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def worth_features(
    later: jax.Array, start: jax.Array | int = 0, num_tokens: jax.Array | int | None = None
) -> jax.Array:
    """[T, 5 + 2 K] float32: the logarithm of each head's recent attention, and where a token stands.

    Distances from the end are logarithms, as attention falls with them; the first token and the next
    three, on which attention rests that has nowhere to go, have a feature each.

    Args:
      later: of `predicted_worth`.
      start: of `predicted_worth`.
      num_tokens: of `predicted_worth`.
    """
    size = later.shape[1]
    position = jnp.asarray(start) + jnp.arange(size)
    number = jnp.asarray(start) + size if num_tokens is None else jnp.asarray(num_tokens)
    away = jnp.log(jnp.maximum(number - position, 1).astype(jnp.float32))
    asked = jnp.log(later.astype(jnp.float32).T + LEAST_ENERGY)
    own = [away, away**2 / 5, jnp.log1p(position.astype(jnp.float32))]
    sinks = [position == 0, (position > 0) & (position < 4)]
    columns = jnp.stack([*own, *(3.0 * sink for sink in sinks)], axis=1)
    return jnp.concatenate([columns, asked, asked**2 / 10], axis=1)


def followed_worth(future: jax.Array, repeated: jax.Array) -> jax.Array:
    """The worth that is to be predicted, from the energies that were really received."""
    return jnp.sqrt(FUTURE_WEIGHT * future + REPEATED_WEIGHT * repeated)


def fit_predicted_worth(x: jax.Array, features: jax.Array, worth: jax.Array) -> WorthWeights:
    """Poisson regression of worth, by Adam on batches that a fixed seed draws.

    The likelihood of a Poisson variable is a proper score of the mean of any that is not negative, and
    weighs errors by the worth itself: what nobody asks for may be predicted badly.

    Args:
      x: [N, E] of `normalized`, any float dtype.
      features: [N, C] of `worth_features`.
      worth: [N, K] of `followed_worth`.

    Returns:
      The weights.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-3
    fitted = _poisson(x, (features - mean) / scale, worth)
    own = fitted.features / scale[:, None]
    return WorthWeights(fitted.hidden, own, fitted.bias - mean @ own)


@jax.jit
def _poisson(x: jax.Array, features: jax.Array, worth: jax.Array) -> WorthWeights:
    """`fit_predicted_worth` of features of mean 0 and deviation 1."""
    import optax  # when a model learns: to decode takes jax and numpy alone

    average = worth.mean(axis=0) + 1e-6
    zero = jnp.zeros
    first = WorthWeights(
        zero((x.shape[1], worth.shape[1])),
        zero((features.shape[1], worth.shape[1])),
        jnp.log(average),
    )
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, STEPS)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    def loss(weights, rows):
        log = _log_worth(weights, x[rows].astype(jnp.float32), features[rows])
        return jnp.mean((jnp.exp(log) - worth[rows] * log) / average)

    def step(carry, key):
        weights, state = carry
        gradient = jax.grad(loss)(weights, jax.random.randint(key, (BATCH,), 0, len(x)))
        update, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, update), state), None

    keys = jax.random.split(jax.random.key(0), STEPS)
    (weights, _), _ = jax.lax.scan(step, (first, optimizer.init(first)), keys)
    return weights
