"""Picture, sound and caption: what tokens show, what budgets keep, and what a task must not see."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.models.packed_encoder import pack
from experiments.multimodal import arms, experiment, report, tokens
from experiments.multimodal.arms import Scored
from experiments.multimodal.data import SIDE, Stamps
from experiments.multimodal.model import CATEGORY, RETRIEVAL, Reader, Scorer
from experiments.multimodal.tokens import CAPTION, FIRST, PICTURE, SOUND, Change
from experiments.speech import audio

NUMBER = 6
TENTH = audio.RATE // 10


def some():
    rng = np.random.default_rng(0)
    captions = ["A red dog.", "A dog!", "Two trees", "The letter A", "A green apple", "One"]
    sounds = [rng.normal(0, 0.1, TENTH * (3 + i)).astype(np.float32) for i in range(NUMBER)]
    sounds[5] = np.zeros(0, np.float32)
    pictures = rng.random((NUMBER, SIDE, SIDE, 3)).astype(np.float32)
    return Stamps(pictures, captions, sounds, np.arange(NUMBER, dtype=np.int32) % 3)


def tokens_of(stamps, i, change=Change()):  # noqa: B008  (a tuple)
    return tokens.of_stamp(stamps, i, change, np.random.default_rng(1))


def some_scored():
    rng, stamps = np.random.default_rng(2), some()
    examples = [tokens_of(stamps, i) for i in range(NUMBER)]
    return Scored(examples, [rng.random(len(x["place"])) for x in examples])


def test_tokens_show_their_patch_tenth_and_word():
    stamps = some()
    x = tokens_of(stamps, 0)
    kinds = [sum(p >= f for f in FIRST[1:]) for p in x["place"].tolist()]
    assert (
        kinds
        == tokens.modality_of(x["place"]).tolist()
        == [PICTURE] * 36 + [SOUND] * 2 + [CAPTION] * 4
    )
    patch = 6 * 2 + 5  # the third row of patches, the last in it
    np.testing.assert_allclose(
        x["values"][patch].reshape(8, 8, 3), 1 - stamps.pictures[0, 16:24, 40:48], rtol=1e-6
    )
    mirrored = tokens_of(stamps, 0, Change(mirrored=True))["values"][6 * 2]
    np.testing.assert_allclose(
        mirrored.reshape(8, 8, 3), 1 - stamps.pictures[0, 16:24, 40:48][:, ::-1], rtol=1e-6
    )
    # "dog" is the same word in two captions, and the hashes of no words are none.
    other = tokens_of(stamps, 1)
    np.testing.assert_array_equal(x["grams"][-2], other["grams"][-2])
    assert x["grams"][:-4].sum() == 0
    assert len(set(x["grams"][-2].tolist()) - {0}) == 1 + 3 + 2  # <dog>, of 3 and of 4 letters


@pytest.mark.parametrize("modality", [PICTURE, SOUND, CAPTION])
def test_what_is_missing_or_noisy_is_one_modality(modality):
    stamps = some()
    whole, lacking = tokens_of(stamps, 1), tokens_of(stamps, 1, Change(missing=modality))
    own = tokens.modality_of(whole["place"]) == modality
    for name, x in lacking.items():
        np.testing.assert_array_equal(x, whole[name][~own])
    if modality != CAPTION:
        noisy = tokens_of(stamps, 1, Change(noisy=modality))
        changed = np.any(noisy["values"] != whole["values"], axis=1)
        np.testing.assert_array_equal(changed, own)
        np.testing.assert_array_equal(noisy["noisy"], own)
        assert not whole["noisy"].any()


def test_a_third_lack_something_and_two_thirds_are_noisy():
    lacking, noised = ([of(i) for i in range(90)] for of in (experiment.missing, experiment.noisy))
    assert [sum(x.missing == m for x in lacking) for m in (0, 1, 2, None)] == [10, 10, 10, 60]
    assert [sum(x.noisy == m for x in noised) for m in (0, 1, None)] == [30, 30, 30]
    assert all(experiment.clean(i) == Change() for i in range(3))


@pytest.mark.parametrize("part", [0.5, 0.25])
@pytest.mark.parametrize("arm", list(arms.ARMS))
def test_a_budget_is_spent_and_every_stamp_has_a_token(arm, part):
    scored = some_scored()
    kept = arms.budgeted(scored, arm, part)
    every = sum(map(len, scored.worth))
    assert sum(len(x["place"]) for x in kept) == (every if arm == "full" else int(part * every))
    found, whole = arms.counts(kept), arms.counts(scored.examples)
    if arm == "ladder":
        assert found.sum(axis=1).min() >= 1
    else:
        assert np.all((found >= 1) == (whole >= 1))  # each modality that is there
    for x, example in zip(kept, scored.examples, strict=True):
        at = [example["place"].tolist().index(p) for p in x["place"]]
        np.testing.assert_array_equal(x["values"], example["values"][at])
        np.testing.assert_array_equal(x["grams"], example["grams"][at])


def test_the_ladder_leaves_a_worthless_modality_alone():
    scored = some_scored()
    worth = [
        np.where(tokens.modality_of(x["place"]) == SOUND, 1e-6, w)
        for x, w in zip(scored.examples, scored.worth, strict=True)
    ]
    found = arms.counts(arms.budgeted(Scored(scored.examples, worth), "ladder", 0.5)).sum(axis=0)
    assert found[SOUND] == 0 < found[CAPTION] < found[PICTURE]


def test_prices_are_those_of_the_first_token_that_is_left():
    scored = some_scored()
    w = np.concatenate(scored.worth)
    owner = np.concatenate([tokens.modality_of(x["place"]) for x in scored.examples])
    one, each = arms.prices(scored, 0.5)
    for price, own in zip([one, *each], [w, *(w[owner == m] for m in range(3))], strict=True):
        falling, number = sorted(own.tolist(), reverse=True), int(0.5 * own.size)
        assert falling[number] * (1 - 1e-6) <= price <= falling[number - 1] * (1 + 1e-6)


def batch_of(stamps):
    examples = [tokens_of(stamps, i) for i in range(4)]
    examples[3] = tokens_of(stamps, 3, Change(missing=PICTURE))
    return pack(examples, np.zeros((4, 2), np.int32), 192, 4)


@pytest.mark.parametrize("one_read", [True, False])
def test_what_tells_captions_apart_sees_none_and_the_category_does(one_read):
    stamps = some()
    other = stamps._replace(captions=["An umlaut", "Bees", "A green apple, and a pear", "B"])
    shares = np.array([[0.7, 0.6, 0], [0.3, 0.4, 1]], np.float32) if one_read else None
    model = Reader(8, shares, nnx.Rngs(0))
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))
    category, caption = run(state, batch_of(stamps))
    other_category, other_caption = run(state, batch_of(other))
    np.testing.assert_allclose(caption, other_caption, atol=2e-4)
    assert np.abs(category - other_category).max(axis=1).min() > 0.05
    unheard = stamps._replace(sounds=[stamps.sounds[0][::-1], *stamps.sounds[1:]])
    again_category, again = run(state, batch_of(unheard))
    np.testing.assert_allclose(again[1:], caption[1:], atol=1e-5)  # of others nothing is seen
    np.testing.assert_allclose(again_category[1:], category[1:], atol=1e-5)
    assert np.abs(again[0] - caption[0]).max() > 0.01


def test_a_scorer_looks_at_what_each_task_may_see():
    stamps = some()
    alone = tokens_of(stamps, 0)
    words = tokens.modality_of(alone["place"]) == CAPTION
    examples = [
        tokens_of(stamps, 1, Change(noisy=SOUND)),
        {name: x[words] for name, x in alone.items()},
    ]
    batch = pack(examples, np.zeros((2, 2), np.int32), 64, 2)
    scorer = Scorer(8, nnx.Rngs(0))
    mass = np.asarray(scorer.mass(scorer.embed(batch), batch))
    first = batch.example == 0
    captions = tokens.modality_of(batch.fields["place"]) == CAPTION
    np.testing.assert_allclose(mass[first].sum(axis=0), [1, 1], rtol=1e-5)
    assert np.all(mass[captions, RETRIEVAL] == 0)
    np.testing.assert_allclose(mass[batch.example == 1].sum(axis=0)[CATEGORY], 1, rtol=1e-5)
    assert np.isfinite(np.concatenate([np.ravel(x) for x in scorer(batch)])).all()
    sounds = tokens.modality_of(batch.fields["place"]) == SOUND
    np.testing.assert_allclose(scorer.misled(batch), mass[sounds].sum() / 4, rtol=1e-5)


def test_ranks_by_brute_force():
    rng = np.random.default_rng(3)
    at, captions = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    captions[3] = captions[2]
    wanted = []
    for i in range(5):
        own, nearer, same = at[i] @ captions[i], 0, 0
        for j in range(5):
            nearer += at[i] @ captions[j] > own
            same += j != i and at[i] @ captions[j] == own
        wanted.append(nearer + same / 2)
    np.testing.assert_allclose(experiment.ranks(at, captions), wanted)


def test_figures_of_a_budget_by_hand():
    scored = some_scored()
    changes = [Change(noisy=x) for x in (PICTURE, SOUND, None) * 2]
    whole = list(scored.examples)
    fewer = [
        {name: x[tokens.modality_of(e["place"]) != c.noisy] for name, x in e.items()}
        for e, c in zip(whole, changes, strict=True)
    ]
    found = experiment.budget_figures({"clean": whole, "noisy": fewer}, changes)
    assert found["noisy pictures keep"] == found["noisy sounds keep"] == 0
    assert found["tokens"] == np.mean([len(x["place"]) for x in whole])
    parts = [found[f"{name}s' part"] for name in tokens.MODALITIES]
    assert sum(parts) == pytest.approx(1)
    assert parts[0] == pytest.approx(36 * NUMBER / sum(len(x["place"]) for x in whole))


def test_the_picture_of_a_report_is_drawn():
    parts = {"clean": [0.5, 0.3, 0.2], "noisy": [0.6, 0.2, 0.2]}
    runs = [
        {"arm": arm, "seed": seed, "details": {"parts": parts, "prices": prices}}
        for (arm, prices), seed in itertools.product(
            (("full", None), ("ladder, half", {"one": 1.0, **dict.fromkeys(tokens.MODALITIES, 1)})),
            range(2),
        )
    ]
    assert report.draw({"runs": runs}).startswith(b"\x89PNG")
