"""A section of docs/how_to/other_models.md, run in the environment that has its package (`make others`).

python -m tests.support.other_models SECTION
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how_to" / "other_models.md"
BLOCKS = 4  # of a section: the package's model, the decoder, training, decoding


def sections() -> dict[str, list[str]]:
    """The code blocks of each section; what all of them share is under ""."""
    found = {}
    for part in re.split(r"^## ", "\n" + PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        title = "" if part.startswith("\n") else part.splitlines()[0]
        found[title] = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    return found


def run(title: str) -> None:
    """The section's code, and what must hold of it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    if title.startswith("Tunix"):
        # Without `tunix.__init__`, which imports all of its trainers: the models need none of them.
        spec = importlib.util.find_spec("tunix")
        sys.modules["tunix"] = importlib.util.module_from_spec(spec)
    found = sections()
    names = {"__section__": title}
    for block in found[""] + found[title]:
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), names)
    model, own, ids = names["model"], names["own"], names["ids"]

    if isinstance(model, nnx.Module):
        loss, gradients = nnx.value_and_grad(names["loss_of"])(model)
    else:
        loss, gradients = jax.value_and_grad(names["loss_of"])(model)
    leaves = jax.tree.leaves(gradients)
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(x).all() for x in leaves)
    assert all(jnp.any(x != 0) for x in leaves if x.size > 1), "they reach every parameter"

    forward = names["forward"]
    decoder = decoder_of(names)
    logits = np.asarray(own(model, ids))
    got = np.asarray(forward(decoder, ids, fraction=1.0))
    np.testing.assert_allclose(got, logits, rtol=0, atol=2e-5 * np.abs(logits).max())
    half = np.asarray(forward(decoder, ids, fraction=0.5))
    assert np.abs(half - logits).max() > 1e-3 * np.abs(logits).max(), "tiles are left out"

    for prompt, tokens in zip(names["prompts"], names["tokens"], strict=True):
        text = [int(x) for x in prompt]
        for token in tokens:  # the causal logits of one call: of what came before
            text.append(int(token))
        want = np.argmax(np.asarray(own(model, jnp.asarray([text])))[0], axis=-1)
        assert tokens.tolist() == want[len(prompt) - 1 : -1].tolist(), title
    together = np.concatenate(names["tokens"])
    assert len(set(together.tolist())) > 3, "not the same token again and again"
    print(f"{title}: loss {loss:.3f}, logits differ by {np.abs(got - logits).max():.1e}")


def decoder_of(names):
    """The section's decoder, taken as `generate` takes it."""
    taken = []
    (line,) = (x for x in sections()[names["__section__"]][3].splitlines() if "generate(" in x)
    exec(line, names | {"generate": lambda decoder, *_, **__: taken.append(decoder)})
    return taken[0]


if __name__ == "__main__":
    run(sys.argv[1])
