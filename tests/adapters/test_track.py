"""What trackers are told: TensorBoard's files read back record by record, and the rows of a run."""

import dataclasses
import io
import struct
import sys
import types
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event

from jbalance import adapters, allocate

COUNTS = np.array([[1, 5, 2], [0, 9, 4]])
VALUES = {"loss": jnp.float32(0.25), "balance": {"tiles": [COUNTS[0], COUNTS[1]]}}
MAPS = {"attention": jnp.asarray([[0.5, 1.0], [0.75, 0.5]], jnp.bfloat16)}


def events(folder):
    """Of the one file: records of a length, a checksum, the event and its checksum."""
    (path,) = folder.iterdir()
    content, found, at = path.read_bytes(), [], 0
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        found.append(Event.FromString(content[at + 12 : at + 12 + size]))
        at += 12 + size + 4
    return [(e.step, v) for e in found if e.HasField("summary") for v in e.summary.value]


def test_tensorboard_is_told_scalars_histograms_and_images(tmp_path):
    with SummaryWriter(str(tmp_path)) as log:
        adapters.track(log, 3, VALUES, maps=MAPS)
        adapters.track(log, 4, {"loss": 0.125})
    found = {(v.tag, step): v for step, v in events(tmp_path)}
    assert set(found) == {
        *((name, 3) for name in ("loss", "balance/tiles/0", "balance/tiles/1", "attention")),
        ("loss", 4),
    }
    assert [found["loss", step].simple_value for step in (3, 4)] == [0.25, 0.125]
    for row in (0, 1):
        histogram = found[f"balance/tiles/{row}", 3].histo
        assert (histogram.num, histogram.sum) == (3, COUNTS[row].sum())
        assert (histogram.min, histogram.max) == (COUNTS[row].min(), COUNTS[row].max())
    image = found["attention", 3].image
    assert (image.height, image.width) == (2, 2)
    assert pixels(image.encoded_image_string) == [[0, 255], [128, 0]]


def pixels(png):
    """The first channel of an 8-bit PNG."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("L")).tolist()


def test_a_run_of_wandb_gets_one_row(monkeypatch):
    made = types.SimpleNamespace(
        Histogram=lambda np_histogram: ("histogram", np_histogram[0].sum()),
        Image=lambda x: ("image", x.tolist()),
    )
    monkeypatch.setitem(sys.modules, "wandb", made)
    rows = []
    run = types.SimpleNamespace(log=lambda row, step: rows.append((step, row)))
    adapters.track(run, 7, VALUES, maps=MAPS)
    want = {
        "loss": 0.25,
        "balance/tiles/0": ("histogram", 3),
        "balance/tiles/1": ("histogram", 3),
        "attention": ("image", [[0, 255], [128, 0]]),
    }
    assert rows == [(7, want)]


def test_an_allocation_is_told_by_its_fields(tmp_path):
    values = jnp.array([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])
    out = allocate.ladder(values, jnp.array([0, 4]), jnp.array([8]))
    with SummaryWriter(str(tmp_path)) as log:
        adapters.track(log, 0, {"units": out})
    found = {v.tag: v for _, v in events(tmp_path)}
    assert set(found) == {f"units/{field.name}" for field in dataclasses.fields(out)}
    assert found["units/level"].histo.sum == 2  # two units were raised
    assert found["units/spent"].simple_value == 8


@pytest.mark.parametrize(
    ("writer", "values", "maps", "message"),
    [
        (object(), {}, {}, "writer is a object: it must have add_scalar"),
        (mock.Mock(), {"x": np.zeros(0)}, {}, "values 'x' is empty"),
        (mock.Mock(), {"x": "a"}, {}, "values 'x'"),
        (mock.Mock(), {"x": [1.0, np.nan]}, {}, "values 'x/1'"),
        (mock.Mock(), {"x": 1.0}, {"x": np.zeros((2, 2))}, "maps has 'x', which values has too"),
        (mock.Mock(), {}, {"y": np.zeros(3)}, "maps 'y'"),
        (mock.Mock(), {}, {"y": np.zeros((0, 3))}, "maps 'y' is empty"),
    ],
)
def test_what_cannot_be_told_is_refused(writer, values, maps, message):
    with pytest.raises(ValueError, match=message):
        adapters.track(writer, 0, values, maps=maps)
