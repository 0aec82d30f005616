"""Long tail: what each arm draws, and that importance follows what is scarce and hard."""

import numpy as np
import pytest

from experiments.long_tail import experiment
from experiments.long_tail.experiment import ARMS, BATCH, CAP, FLOOR, Drawing
from experiments.vision.data import CLASSES

LABELS = np.repeat(np.arange(CLASSES), 200 // np.arange(1, CLASSES + 1)).astype(np.int32)


def drawn(arm, steps=40, loss=None):
    drawing = Drawing(arm, LABELS, 0)
    rows = []
    for row, _ in zip(drawing, range(steps), strict=False):
        rows.append(np.bincount(LABELS[row], minlength=CLASSES))
        if loss is not None:
            drawing.heard((loss * rows[-1], rows[-1]))
    return np.array(rows)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_learns_from_as_many(arm):
    assert np.all(drawn(arm, 5).sum(axis=1) == BATCH)


def test_baselines_draw_by_frequency_or_alike():
    natural, resampled = drawn("natural").mean(axis=0), drawn("resampled").mean(axis=0)
    share = np.bincount(LABELS) / len(LABELS)
    np.testing.assert_allclose(natural / BATCH, share, atol=0.04)
    np.testing.assert_allclose(resampled / BATCH, 1 / CLASSES, atol=0.04)


def test_importance_is_scarcity_and_difficulty_with_floors_and_caps():
    loss = np.where(np.arange(CLASSES) == 4, 2.0, 0.1)
    rows = drawn("importance, floors", loss=loss)
    assert rows.min() >= FLOOR
    assert rows.max() <= CAP
    counts = np.bincount(LABELS)
    w = 0.5 * (1 - counts / counts.max()) + 0.5 * loss / loss.max()
    free = drawn("importance", loss=loss)[-1]
    np.testing.assert_allclose(
        free, BATCH * w / w.sum(), atol=1.6
    )  # averages lag, amounts are whole
    assert free.argmax() == 4


def test_a_class_without_examples_in_a_step_keeps_its_loss():
    drawing = Drawing("importance", LABELS, 0)
    drawing.heard((np.full(CLASSES, 3.0), np.r_[np.zeros(1), np.full(CLASSES - 1, 2.0)]))
    np.testing.assert_allclose(drawing.loss, np.r_[np.log(CLASSES), np.full(CLASSES - 1, 1.5)])


def test_sizes_follow_zipf(monkeypatch):
    pictures = experiment.data.Pictures(
        np.zeros((5000, 32, 32), np.float32), np.arange(5000, dtype=np.int32) % CLASSES
    )
    monkeypatch.setattr(experiment.data, "read", lambda part: pictures)
    material = experiment.prepare.__wrapped__(experiment.Sizes(1, 400, 50))
    ranks = np.arange(1, CLASSES + 1)
    assert material.counts.tolist() == [int(400 / r**experiment.EXPONENT) for r in ranks]
    assert len(material.test) == 50
    assert material.train[0]["pixels"].shape == (16, 16)
