"""The checkpoints of `family_checkpoints` as files."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from tests.support import family_checkpoints
from tests.support.checkpoint_files import write_hf

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_family(directory: Path, name: str) -> Path:
    """A Hugging Face directory, in the case's shards and type."""
    made = family_checkpoints.CASES[name]
    tensors = family_checkpoints.tensors_of(name)
    stored = {key: array.astype(STORED[made.stored]) for key, array in tensors.items()}
    for key, array in stored.items():
        np.testing.assert_array_equal(array.astype(np.float32), tensors[key], err_msg=key)
    return write_hf(directory, made.config, stored, made.shards)
