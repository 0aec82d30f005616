"""The token scorers by definition: dense, in float64 numpy, one loop per head."""

from __future__ import annotations

import numpy as np


def attention(q, k, last=None):
    """Causal attention [K, G, T, S] with every weight written out."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    if last is not None:
        q = q[-last:]
    (t, h, d), (s, kv, _) = q.shape, k.shape
    out = np.zeros((kv, h // kv, t, s))
    for head in range(h):
        for i in range(t):
            seen = s - t + i + 1
            logits = k[:seen, head // (h // kv)] @ q[i, head] / np.sqrt(d)
            e = np.exp(logits - logits.max())
            out[head // (h // kv), head % (h // kv), i, :seen] = e / e.sum()
    return out


def attention_mass(q, k, v):
    t, s = len(q), len(k)
    can_see = np.array([sum(s - t + i >= j for i in range(t)) for j in range(s)])
    return attention(q, k).mean(1).sum(1) / can_see


def max_attention(q, k, v, *, min_distance=0):
    a, (t, s) = attention(q, k), (len(q), len(k))
    w = np.zeros((a.shape[0], s))
    for j in range(s - min_distance):
        rows = [i for i in range(t) if s - t + i - j >= min_distance]
        w[:, j] = a[:, :, rows, j].max((1, 2))
    if min_distance:
        w[:, s - min_distance :] = w.max(1, keepdims=True)
    return w


def window(q, k, v, *, window=32, kernel=5, pooling="mean"):
    s = len(k)
    w = attention(q, k, last=window).mean((1, 2))[:, : s - window]
    padded = np.pad(w, ((0, 0), (kernel // 2, kernel // 2)))
    views = np.stack([padded[:, i : i + w.shape[1]] for i in range(kernel)])
    w = views.mean(0) if pooling == "mean" else views.max(0)
    return np.pad(w, ((0, 0), (0, window)), constant_values=0) + np.where(
        np.arange(s) >= s - window, w.max(1, keepdims=True), 0
    )


def rotation(angles):
    """The matrix [D, D] that turns feature i with feature i + D/2."""
    c, s = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return np.block([[c, -s], [s, c]])


def expected_attention(
    q, k, v, *, frequencies=None, future=512, num_sinks=4, use_covariance=True, epsilon=0.0
):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (t, h, d), (s, kv, _) = q.shape, k.shape
    turn = lambda p: rotation(p * frequencies) if frequencies is not None else np.eye(d)  # noqa: E731
    mean_turn = np.mean([turn(p) for p in range(s, s + future)], axis=0)
    rows = [i for i in range(t) if s - t + i >= num_sinks]
    w = np.zeros((kv, s - num_sinks))
    for head in range(h):
        before = np.stack([turn(s - t + i).T @ q[i, head] for i in rows])
        mu = mean_turn @ before.mean(0)
        cov = mean_turn @ np.cov(before.T, bias=True) @ mean_turn.T
        keys = k[num_sinks:, head // (h // kv)]
        logits = keys @ mu / np.sqrt(d)
        if use_covariance:
            logits += np.einsum("sd,de,se->s", keys, cov, keys) / (2 * d)
        e = np.exp(logits - logits.max())
        w[head // (h // kv)] += e / e.sum() / (h // kv)
    w = (w + epsilon) * np.linalg.norm(v[num_sinks:], axis=-1).T
    return np.concatenate([np.repeat(w.max(1, keepdims=True), num_sinks, 1), w], axis=1)


def key_norm(q, k, v):
    n = np.linalg.norm(np.asarray(k, np.float64), axis=-1).T
    return n.mean(1, keepdims=True) / (n.mean(1, keepdims=True) + n)


def leverage(q, k, v, *, ridge=1e-2, frequencies=None):
    k = np.asarray(k, np.float64)
    s, kv, d = k.shape
    if frequencies is not None:
        k = np.stack([k[p] @ rotation(p * frequencies) for p in range(s)])
    rows = []
    for head in range(kv):
        x = k[:, head] - k[:, head].mean(0)
        gram = x.T @ x
        inverse = np.linalg.inv(gram + ridge * np.trace(gram) / d * np.eye(d))
        rows.append(np.diag(x @ inverse @ x.T))
    return np.stack(rows)


def sinks_recent(q, k, v, *, num_sinks=4):
    s, kv, _ = k.shape
    order = [*range(s - 1, num_sinks - 1, -1)]
    order = [*range(min(num_sinks, s)), *order]  # best first
    w = np.zeros(s)
    w[order] = np.arange(s, 0, -1) / s
    return np.tile(w, (kv, 1))
