"""Gradients of tasks that conflict, and what aggregators are held against."""

import itertools

import numpy as np


def conflicting(tasks, size, condition, seed=0, lengths=10.0):
    """[K, size] float32 gradients of which some positive sum is nearly zero; G has that condition number
    before the rows are stretched by up to `lengths` either way."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(tasks, tasks))
    mixing[:, 0] = rng.uniform(0.3, 1, size=tasks)  # all of one sign: what all but cancels
    left, _ = np.linalg.qr(mixing)
    right, _ = np.linalg.qr(rng.normal(size=(size, tasks)))
    scale = np.sqrt(np.append(1 / condition, np.ones(tasks - 1)))
    stretch = np.exp(rng.uniform(-1, 1, size=(tasks, 1)) * np.log(lengths))
    return ((left * scale) @ right.T * stretch).astype(np.float32)


def least_cosine(gradients, weights):
    """min_k cos(g_k, v) of v = sum_k w_k g_k, in float64."""
    rows = np.asarray(gradients, float)
    v = np.asarray(weights, float) @ rows
    return (rows @ v / np.linalg.norm(rows, axis=1) / np.linalg.norm(v)).min()


def bounded_minimiser(gram, lower):
    """argmin w G w over w >= lower, by trying all sets of bounds that hold with equality."""
    best, found = np.inf, None
    size = len(gram)
    for at_bound in itertools.product([False, True], repeat=size):
        free = ~np.array(at_bound)
        w = np.array(lower, float)
        if free.any():
            rest = gram[np.ix_(free, ~free)] @ w[~free]
            w[free] = np.linalg.lstsq(gram[np.ix_(free, free)], -rest, rcond=None)[0]
        if (w >= lower - 1e-9).all() and w @ gram @ w < best:
            best, found = w @ gram @ w, w
    return found
