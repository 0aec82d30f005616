"""What a function computes on the way, without running it."""

from __future__ import annotations

import jax


def intermediates(f, *args):
    """(shape, dtype) holders of every array that f(*args) makes, in loops and calls too."""
    return list(_outputs(jax.make_jaxpr(f)(*args).jaxpr))


def _outputs(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars if hasattr(v.aval, "dtype"))
        for param in equation.params.values():
            for inner in param if isinstance(param, tuple) else (param,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _outputs(inner)
