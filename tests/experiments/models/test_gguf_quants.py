"""Quantized GGUF tensors against their formats written out, one number at a time."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from experiments.models.gguf import _stored
from experiments.models.gguf_file import read_gguf


def half(block, at):
    return float(np.frombuffer(bytes(block[at : at + 2]), np.float16)[0])


def q4_0(b):
    """32 numbers: a scale, then the first 16 numbers in low nibbles and the others in high ones."""
    nibbles = [x & 15 for x in b[2:18]] + [x >> 4 for x in b[2:18]]
    return [half(b, 0) * (x - 8) for x in nibbles]


def q5_0(b):
    """As Q4_0, with the fifth bits of all numbers in four bytes between."""
    high = int.from_bytes(bytes(b[2:6]), "little")
    nibbles = [x & 15 for x in b[6:22]] + [x >> 4 for x in b[6:22]]
    return [half(b, 0) * (x + 16 * (high >> i & 1) - 16) for i, x in enumerate(nibbles)]


def q8_0(b):
    return [half(b, 0) * (x - 256 * (x > 127)) for x in b[2:34]]


def q4_k(b):
    """256 numbers, in 8 groups of 32 with a scale and a minimum of 6 bits each."""
    scale, least, packed, out = half(b, 0), half(b, 2), b[4:16], []
    for group in range(8):
        if group < 4:
            factor, offset = packed[group] & 63, packed[group + 4] & 63
        else:
            factor = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            offset = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        part = b[16 + 32 * (group // 2) : 48 + 32 * (group // 2)]
        nibbles = [x >> 4 if group % 2 else x & 15 for x in part]
        out += [scale * factor * x - least * offset for x in nibbles]
    return out


def q6_k(b):
    """256 numbers, in 16 groups of 16 with a signed scale each; four low bits, then two high ones."""
    low, high, scales, scale = b[:128], b[128:192], b[192:208], half(b, 208)
    out = []
    for i in range(256):
        side, row, column = i // 128, i % 128 // 32, i % 32
        nibble = low[64 * side + 32 * (row % 2) + column] >> 4 * (row // 2) & 15
        bits = high[32 * side + column] >> 2 * row & 3
        factor = scales[i // 16] - 256 * (scales[i // 16] > 127)
        out.append(scale * factor * (nibble + 16 * bits - 32))
    return out


FORMATS = {"Q4_0": q4_0, "Q5_0": q5_0, "Q8_0": q8_0, "Q4_K": q4_k, "Q6_K": q6_k}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tensor_is_what_its_bytes_say(tmp_path, kind):
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, (3, 2 * size), np.uint8)
    # Scales that are no NaN: of every block's halves, wherever they stand.
    blocks = content.reshape(-1, size)
    for at in {"Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        scales = rng.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    writer = GGUFWriter(tmp_path / "it.gguf", "llama")
    writer.add_tensor("it", content, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = _stored("it", read_gguf(tmp_path / "it.gguf")[1]["it"], {})
    assert stored.shape == (3, 2 * numbers)
    want = np.reshape([FORMATS[kind](block.tolist()) for block in blocks], stored.shape)
    np.testing.assert_allclose(stored.read(), want, rtol=1e-6, atol=1e-6)
