"""The runs: data for them, one run of an arm and a seed, and what is measured at its end."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sacrebleu
from flax import nnx
from tokenizers import Tokenizer

from experiments.harness import files, logs, optimisers
from experiments.translation import data, decode, memory, tiles, training
from experiments.translation.data import LANGUAGES, MOST_TOKENS, Batch, Sizes, Split
from experiments.translation.model import Config, Translator
from jbalance import adapters, multitask

EXPERIMENT = "translation"
MODELS = Path("out/translation")  # parameters of the runs, for pictures
CHECKED = 200  # steps between looks at the validation pairs
BASE_STEPS, BASE_RATE = 3500, 2.5e-3
PEAK_RATE = 2e-3  # of an arm
B2 = 0.98
_PRODUCTS = 7  # of a tile, forward and backward


class Arm(NamedTuple):
    """What a run computes, and how it weighs its tasks."""

    tiles: str
    weighing: Callable[[], multitask.TaskWeighting] = multitask.mean


ARMS = {
    **{name: Arm(name) for name in tiles.ARMS},
    "full, upgrad": Arm("full", multitask.upgrad),
    "full, importance": Arm(
        "full", lambda: multitask.by_importance(jnp.eye(len(LANGUAGES)), floor=0.25)
    ),
    "full, dwa": Arm("full", multitask.dwa),
    "full, uncertainty": Arm("full", multitask.uncertainty),
    "full, gradnorm": Arm("full", multitask.gradnorm),
    "full, famo": Arm("full", multitask.famo),
    "full, random": Arm("full", lambda: multitask.random(jax.random.key(0))),
}


class Material(NamedTuple):
    """What all runs share."""

    split: Split
    tokenizer: Tokenizer
    config: Config
    sizes: Sizes
    validation: list[Batch]  # stacked over the languages
    test: list[Batch]


def prepare() -> Material:
    """The strings, their subwords and the held-out batches.

    Raises:
      ValueError: packages that cannot be fetched.
    """
    split = data.split(data.all_pairs())
    tokenizer = data.train_tokenizer(split.train)
    config = Config(tokenizer.get_vocab_size(), positions=MOST_TOKENS)
    sizes = Sizes()
    held = (_stacked(tokenizer, part, sizes) for part in (split.validation, split.test))
    return Material(split, tokenizer, config, sizes, *held)


def _stacked(tokenizer: Tokenizer, pairs: list[data.Pair], sizes: Sizes) -> list[Batch]:
    """Batches of all languages, as many as each of them fills."""
    rounds = [
        _once(data.encode_pairs(tokenizer, pairs, language), language, sizes)
        for language in LANGUAGES
    ]
    return [training.stacked(list(parts)) for parts in zip(*rounds, strict=False)]


def _once(pairs: list[data.Encoded], language: str, sizes: Sizes) -> list[Batch]:
    """Batches until all pairs were there once, but for a rest that fills none."""
    stream, seen = data.batches(pairs, language, np.random.default_rng(0), sizes), 0
    out: list[Batch] = []
    while True:
        batch = next(stream)
        seen += int((batch.target.row[:, 0] < sizes.target).sum())
        if seen > len(pairs):
            return out
        out.append(batch)


def baselines(material: Material, pairs: list[data.Pair]) -> dict[str, dict[str, float]]:
    """The translation memory and the copied source: on the test strings, and on 500 of any length."""
    parts = {"": material.split, " (any length)": _any_length(pairs)}
    rows: dict[str, dict[str, float]] = {}
    for name, part in parts.items():
        english = [pair.english for pair in part.test]
        known = [pair.english for pair in part.train]
        for at, language in enumerate(LANGUAGES):
            said = memory.translate(known, [pair.translations[at] for pair in part.train], english)
            for row, texts in (("translation memory", said), ("copy of the source", english)):
                rows.setdefault(row + name, {}).update(scores(texts, part.test, language))
    return rows


def _any_length(pairs: list[data.Pair]) -> Split:
    """500 of all strings held out, as DATA has it."""
    drawn = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    return Split(drawn[data.TEST :], [], drawn[: data.TEST])


def scores(texts: list[str], pairs: list[data.Pair], language: str) -> dict[str, float]:
    """chrF and BLEU, as sacrebleu has them."""
    wanted = [[pair.translations[LANGUAGES.index(language)] for pair in pairs]]
    return {
        f"chrF {language}": sacrebleu.corpus_chrf(texts, wanted).score,
        f"BLEU {language}": sacrebleu.corpus_bleu(texts, wanted).score,
    }


class Start(NamedTuple):
    """Where all arms begin."""

    parameters: Any
    steps: int


def start(material: Material, steps: int, advance: Callable[[], None]) -> Start:
    """A model trained with all tiles, which every arm goes on from; kept in `out/translation`."""
    graph, parameters = nnx.split(Translator(material.config, nnx.Rngs(0)))
    name = f"base of {steps} steps"
    if (MODELS / f"{name}-0.npz").exists():
        return Start(load(name, 0, parameters), steps)
    batches = train_batches(material, 1000, steps)
    most = training.most_tiles([*batches, *material.validation], material.config.heads, 1.0)
    optimiser = optimisers.adamw(steps, BASE_RATE, b2=B2)
    step = training.make_step(graph, "full", most, multitask.mean(), optimiser)
    state = step.init(parameters)
    with logs.writer(EXPERIMENT, "base", 0) as log:
        for i, batch in enumerate(batches):
            parameters, state, losses, _, _ = step.train(parameters, state, batch)
            if i % CHECKED == 0:
                held = held_out(step, parameters, material.validation)[0]
                for at, language in enumerate(LANGUAGES):
                    log.add_scalar(f"loss/{language}", float(losses[at]), i)
                    log.add_scalar(f"validation nll {language}", held[f"nll {language}"], i)
                log.flush()
            advance()
    save(name, 0, parameters)
    return Start(parameters, steps)


def run(
    material: Material,
    begin: Start,
    arm: str,
    seed: int,
    steps: int,
    advance: Callable[[], None],
) -> Mapping[str, Any]:
    """One run: trained on, then translated with the attention it was trained with."""
    of_arm = ARMS[arm]
    batches = train_batches(material, seed, steps)
    held = [*material.validation, *material.test]
    most = training.most_tiles(
        [*batches, *held], material.config.heads, tiles.part_of(of_arm.tiles)
    )
    graph, _ = nnx.split(Translator(material.config, nnx.Rngs(0)))
    step = _step(arm, material.config, tuple(most.items()), steps)
    parameters = jax.tree.map(jnp.copy, begin.parameters)  # the step takes its buffers
    state, reports, losses, weights, seconds = step.init(parameters), [], [], [], []
    with logs.writer(EXPERIMENT, arm, seed) as log:
        for i, batch in enumerate(batches):
            started = time.perf_counter()
            parameters, state, loss, weight, report = step.train(parameters, state, batch)
            losses.append(np.asarray(loss))
            seconds.append(time.perf_counter() - started)
            weights.append(np.asarray(weight))
            reports.append(jax.tree.map(np.asarray, report))
            told = {"loss": losses[-1], "weight": weights[-1]}
            named = {name: dict(zip(LANGUAGES, x, strict=True)) for name, x in told.items()}
            adapters.track(log, i, named, maps={"tiles": reports[-1].tiles})
            advance()
    computed = np.stack([report.tiles for report in reports])  # [steps, tasks, attentions]
    candidates = np.stack([report.candidates for report in reports])
    for (kind, _), number in zip(notes_of(material.config), computed.max((0, 1)), strict=True):
        if number > most[kind]:
            raise ValueError(f"most is {most[kind]}: {arm} chose {number} tiles ({kind})")
    save(arm, seed, parameters)
    _, level = held_out(step, parameters, material.validation)
    figures, part = test_figures(
        material, graph, parameters, of_arm.tiles, prices(material.config, level)
    )
    return {
        "figures": figures | held_out(step, parameters, material.test)[0],
        "attention": attention_of(material, of_arm.tiles, computed, candidates)
        | {"decoding_part": part},
        "weights": np.mean(weights, axis=0).round(4).tolist(),
        "losses": np.stack(losses)[:: max(1, steps // 50)].round(3).tolist(),
        "median_step_seconds": float(np.median(seconds[1:])),
        "traces": len(step.traces),
    }


@functools.cache  # seeds share a program
def _step(arm: str, config: Config, most: tuple[tuple[str, int], ...], steps: int) -> training.Step:
    graph, _ = nnx.split(Translator(config, nnx.Rngs(0)))
    optimiser = optimisers.adamw(steps, PEAK_RATE, b2=B2)
    return training.make_step(graph, ARMS[arm].tiles, dict(most), ARMS[arm].weighing(), optimiser)


def train_batches(material: Material, seed: int, steps: int) -> list[Batch]:
    """The same ones for all arms of a seed."""
    streams = [
        data.batches(
            data.encode_pairs(material.tokenizer, material.split.train, language),
            language,
            np.random.default_rng((seed, at)),
            material.sizes,
        )
        for at, language in enumerate(LANGUAGES)
    ]
    return [training.stacked([next(stream) for stream in streams]) for _ in range(steps)]


def held_out(
    step: training.Step, parameters: Any, batches: list[Batch]
) -> tuple[dict[str, float], np.ndarray]:
    """Negative log-likelihood per token of the right beginnings, and prices [tasks, attentions]."""
    nll, level = {}, []
    for at, language in enumerate(LANGUAGES):
        found = [
            step.loss(parameters, jax.tree.map(lambda x, at=at: x[at], batch)) for batch in batches
        ]
        nll[f"nll {language}"] = float(np.mean([x for x, _ in found]))
        level.append(np.mean([report.level for _, report in found], axis=0))
    return nll, np.stack(level)


def untrained(material: Material, begin: Start, arm: str, part: float) -> dict[str, float]:
    """Validation loss of the model that all arms go on from, with a part of its tiles at once."""
    graph, _ = nnx.split(Translator(material.config, nnx.Rngs(0)))
    most = training.most_tiles(material.validation, material.config.heads, part)

    @jax.jit
    def loss(batch: Batch) -> jax.Array:
        return training.loss_of(graph, begin.parameters, batch, arm, most, part)[1][0]

    return {
        f"nll {language}": float(
            np.mean([loss(jax.tree.map(lambda x, at=at: x[at], b)) for b in material.validation])
        )
        for at, language in enumerate(LANGUAGES)
    }


def notes_of(config: Config) -> list[tuple[str, int]]:
    """Kind and layer of each attention, in the order of a report."""
    notes = [("encoder", i) for i in range(config.encoder_layers)]
    for i in range(config.decoder_layers):
        notes += [("decoder", i), ("cross", i)]
    return notes


def prices(config: Config, level: np.ndarray) -> list[dict[str, jax.Array]]:
    """For each language the prices of the decoder's attentions, from those of all of them."""
    notes = notes_of(config)
    return [
        {
            kind: jnp.asarray([own[i] for i, note in enumerate(notes) if note[0] == kind])
            for kind in ("decoder", "cross")
        }
        for own in level
    ]


def test_figures(
    material: Material,
    graph: nnx.GraphDef[Translator],
    parameters: Any,
    arm: str,
    levels: list[dict[str, jax.Array]],
) -> tuple[dict[str, float], float]:
    """Scores of the test strings, and the part of the decoder's full budget that they took."""
    english = [pair.english for pair in material.split.test]
    figures: dict[str, float] = {}
    parts = []
    for language, own in zip(LANGUAGES, levels, strict=True):
        out = decode.translate(graph, parameters, arm, own, material.tokenizer, english, language)
        figures |= scores(out.texts, material.split.test, language)
        parts.append(out.part)
    return figures, float(np.mean(parts))


def attention_of(
    material: Material, arm: str, computed: np.ndarray, candidates: np.ndarray
) -> dict[str, Any]:
    """Tiles and floating-point operations of a step, all tasks, layers and heads together."""
    config = material.config
    head_dim = config.width // config.heads
    products = 2 * tiles.BLOCK**2 * head_dim
    a_step = float(computed.sum(axis=(1, 2)).mean())
    # What is looked at to choose: one query of each block against the keys, and means of the values.
    # Rows are padded for it, so that short sentences cost as much as long ones.
    lists = material.sizes.rows * config.heads * MOST_TOKENS // tiles.BLOCK
    looked = lists * head_dim * (2 * MOST_TOKENS + 4 * MOST_TOKENS // tiles.BLOCK)
    chosen = computed.shape[1] * computed.shape[2] if arm in ("proportional", "ladder") else 0
    return {
        "tiles_a_step": a_step,
        "part_of_full": float(computed.sum() / candidates.sum()),
        "mflop_a_step": a_step * _PRODUCTS * products / 1e6,
        "mflop_choosing": chosen * looked / 1e6,
    }


def save(arm: str, seed: int, parameters: Any) -> None:
    """Parameters, as a flat list of arrays."""
    leaves = {f"arr_{i}": x for i, x in enumerate(jax.tree.leaves(parameters))}
    files.write_npz(MODELS / f"{arm}-{seed}.npz", leaves)


def load(arm: str, seed: int, like: Any) -> Any:
    """What `save` wrote, in the structure of `like`.

    Raises:
      ValueError: there is no such run on this machine, or its file is damaged or of another model.
    """
    path = MODELS / f"{arm}-{seed}.npz"
    if not path.exists():
        raise ValueError(f"{path} is not there: train that arm first")
    stored, leaves = files.read_npz(path), jax.tree.leaves(like)
    if len(stored) != len(leaves):
        raise ValueError(f"{path} holds {len(stored)} arrays: the model has {len(leaves)}")
    for (name, x), leaf in zip(stored.items(), leaves, strict=True):
        if (x.shape, x.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{path}: {name} has shape {list(x.shape)} and dtype {x.dtype}: the model's is "
                f"{list(leaf.shape)}, {leaf.dtype}"
            )
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    return jax.tree.unflatten(jax.tree.structure(like), map(jnp.asarray, stored.values()))
