"""What cross-attention looks at, and the method's example on it: two directions as two tasks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import sacrebleu
from flax import nnx
from jax import Array
from matplotlib.figure import Figure

from experiments.harness import files, palette
from experiments.translation import data, decode, experiment, tiles
from experiments.translation.data import END, FIRST_LANGUAGE, LANGUAGES
from experiments.translation.experiment import Material
from experiments.translation.model import Translator
from jbalance import importance, rescale, shares

LEAST_WORDS = 7  # of the string that is drawn
_COLOURS = dict(zip(("de", "fr"), palette.SERIES, strict=False))


class Looked(NamedTuple):
    """Attention of one sentence, as a whole; for pictures only."""

    cross: np.ndarray  # [H, T, S] weights
    tiles: np.ndarray  # [H, I, J] bool, those that were computed
    encoder: np.ndarray  # [S] what each source token gets from all of them


class _Looking:
    """Attention of one sentence that keeps its weights."""

    def __init__(self, arm: str):
        self.arm = arm
        self.weights: dict[str, list[Array]] = {"encoder": [], "decoder": [], "cross": []}
        self.tiles: dict[str, list[Array]] = {"encoder": [], "decoder": [], "cross": []}

    def __call__(self, kind: str, layer: int, q: Array, k: Array, v: Array) -> Array:
        sizes = [x.shape[0] for x in (q, k)]
        q, k, v = (_whole_blocks(x) for x in (q, k, v))
        lengths = jnp.array(sizes[:1]), jnp.array(sizes[1:])
        causal = kind == "decoder"
        seen = tiles.seen_by(lengths[0], lengths[1], q.shape[0], k.shape[0], causal)
        values = tiles.tile_values(q[None, :: tiles.BLOCK], k[None], v[None], seen.keys)
        total = tiles.part_of(self.arm) * q.shape[1] * jnp.sum(seen.tiles)
        chosen = tiles.ARMS[self.arm](values, seen, jnp.floor(total).astype(jnp.int32)).tiles[0]
        shown = jnp.repeat(jnp.repeat(chosen, tiles.BLOCK, axis=1), tiles.BLOCK, axis=2)
        at = [jnp.arange(x.shape[0]) for x in (q, k)]
        shown &= at[1] < sizes[1]
        if kind == "decoder":
            shown &= at[1] <= at[0][:, None]
        logits = jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        weight = jnp.exp(jnp.where(shown, logits, -jnp.inf) - jnp.max(logits, -1, keepdims=True))
        weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-30)
        self.weights[kind].append(weight[:, : sizes[0], : sizes[1]])
        self.tiles[kind].append(chosen)
        return jnp.einsum("hqk,khd->qhd", weight, v)[: sizes[0]]


def _whole_blocks(x: Array) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % tiles.BLOCK), (0, 0), (0, 0)))


def look(model: Translator, arm: str, pair: data.Encoded, language: str) -> Looked:
    """Attention of the last layer's cross-attention and of the encoder, over the right beginnings."""
    attend = _Looking(arm)
    source = jnp.asarray(pair.source)
    begin = FIRST_LANGUAGE + LANGUAGES.index(language)
    target = jnp.concatenate([jnp.array([begin]), jnp.asarray(pair.target[:-1])])
    memory = model.encode(source, jnp.arange(source.size), attend)
    model.decode(target, jnp.arange(target.size), memory, attend)
    got = jnp.mean(jnp.stack(attend.weights["encoder"]), axis=(0, 1, 2))
    weights, computed = (x["cross"][-1] for x in (attend.weights, attend.tiles))
    return Looked(np.asarray(weights), np.asarray(computed), np.asarray(got))


class Example(NamedTuple):
    """The method's quantities of one sentence: tasks i are the directions, keys k source tokens."""

    association: np.ndarray  # a [N, K], what cross-attention of each task looks at; rows sum to 1
    complexity: np.ndarray  # [K], information of the tokens in nats
    w: np.ndarray  # [N]
    alpha: np.ndarray  # [N]
    attention: np.ndarray  # A [K], the encoder's own attention to each token; sums to 1
    rescaled: np.ndarray  # A~ [N, K] by the rule "split"; columns sum to A


def example(looked: list[Looked], source: np.ndarray, known: np.ndarray) -> Example:
    """w, alpha and A~ of a sentence (METHOD section 3).

    Args:
      looked: of each language.
      source: [K] token ids.
      known: [V] how often tokens occur in training.
    """
    association = np.stack([x.cross.mean(axis=(0, 1)) for x in looked])
    complexity = np.log((known.sum() + 1) / (known[source] + 1))
    w = importance.weighted(association, complexity)
    alpha = shares.proportional(w)
    attention = looked[0].encoder
    rescaled = rescale.weights(alpha, association, attention, rule="split")
    return Example(
        association, complexity, *(np.asarray(x) for x in (w, alpha, attention, rescaled))
    )


def draw(out: Path) -> Example:
    """The picture, of the test string that the full model translates best.

    Raises:
      ValueError: packages that cannot be fetched, arms that were not trained on this machine.
    """
    files.check_writable(out)
    material = experiment.prepare()
    models = {arm: _trained(material, arm) for arm in ("full", "ladder")}
    pair = _best(material, models["full"])
    encoded = {x: data.encode_pairs(material.tokenizer, [pair], x)[0] for x in LANGUAGES}
    looked = {
        arm: [look(model, arm, encoded[x], x) for x in LANGUAGES] for arm, model in models.items()
    }
    known = np.zeros(material.config.vocabulary)
    for text in material.split.train:
        np.add.at(known, data.encode(material.tokenizer, text.english), 1)
    found = example(looked["full"], encoded["de"].source, known)
    figure = Figure(figsize=(11, 10.5), layout="constrained", dpi=110)
    grid = figure.add_gridspec(3, 3, height_ratios=[1, 1, 0.75])
    for row, language in enumerate(LANGUAGES):
        names = [_names(material, x) for x in (encoded[language].source, encoded[language].target)]
        for column, arm in enumerate(looked):
            own = looked[arm][row].cross.mean(axis=0)
            panel = figure.add_subplot(grid[row, column])
            panel.imshow(own, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            _label(panel, names, f"{arm}, en-{language}: mean of the heads")
        computed = looked["ladder"][row].tiles.sum(axis=0)
        computed = np.kron(computed, np.ones((tiles.BLOCK, tiles.BLOCK)))
        panel = figure.add_subplot(grid[row, 2])
        image = panel.imshow(
            computed[: len(names[1]), : len(names[0])],
            cmap="Greens",
            vmin=0,
            vmax=material.config.heads,
            aspect="auto",
        )
        _label(panel, names, f"ladder, en-{language}: heads that compute the tile")
        figure.colorbar(image, ax=panel, ticks=range(material.config.heads + 1))
    _draw_example(figure.add_subplot(grid[2, :]), found, _names(material, encoded["de"].source))
    picture = io.BytesIO()
    figure.savefig(picture)
    files.write_bytes(out, picture.getvalue())
    return found


def _trained(material: Material, arm: str) -> Translator:
    graph, like = nnx.split(Translator(material.config, nnx.Rngs(0)))
    return nnx.merge(graph, experiment.load(arm, 0, like))


def _best(material: Material, model: Translator) -> data.Pair:
    """By the mean chrF of both translations."""
    long = [
        pair
        for pair in material.split.test
        if len(pair.english.split()) >= LEAST_WORDS
        and all(data.encode_pairs(material.tokenizer, [pair], x) for x in LANGUAGES)
    ]
    graph, parameters = nnx.split(model)
    none = {kind: jnp.zeros(material.config.decoder_layers) for kind in ("decoder", "cross")}
    found = np.zeros(len(long))
    for at, language in enumerate(LANGUAGES):
        english = [pair.english for pair in long]
        out = decode.translate(
            graph, parameters, "full", none, material.tokenizer, english, language
        )
        for i, (text, pair) in enumerate(zip(out.texts, long, strict=True)):
            found[i] += sacrebleu.sentence_chrf(text, [pair.translations[at]]).score
    return long[int(np.argmax(found))]


def _names(material: Material, ids: np.ndarray) -> list[str]:
    return [material.tokenizer.decode([int(x)]).strip() or "·" if x != END else "end" for x in ids]


def _label(panel: Any, names: list[list[str]], title: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xticks(range(len(names[0])), names[0], rotation=60, ha="right", fontsize=7)
    panel.set_yticks(range(len(names[1])), names[1], fontsize=7)


def _draw_example(panel: Any, found: Example, names: list[str]) -> None:
    """A~ of both tasks stacked: together they are A."""
    at, below = np.arange(len(names)), np.zeros(len(names))
    for i, language in enumerate(LANGUAGES):
        label = f"Ã of en-{language}: w = {found.w[i]:.2f}, α = {found.alpha[i]:.3f}"
        panel.bar(at, found.rescaled[i], bottom=below, color=_COLOURS[language], label=label)
        below = below + found.rescaled[i]
    panel.plot(at, found.attention, "_", color=palette.INK, markersize=18, label="A, the encoder's")
    panel.set_xticks(at, names, rotation=60, ha="right", fontsize=8)
    panel.set_title("each source token's attention, divided among the two directions", fontsize=9)
    panel.set_ylim(0, 1.25 * found.attention.max())
    panel.legend(fontsize=8, ncols=3, loc="upper center")
    panel.spines[["top", "right"]].set_visible(False)
