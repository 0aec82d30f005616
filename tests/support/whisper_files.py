"""A small Whisper of random weights as CTranslate2's bytes, written from the format's description."""

from __future__ import annotations

import struct

import numpy as np

WIDTH, HEADS, MELS, FRAMES, POSITIONS, VOCAB, LAYERS = 32, 4, 80, 12, 40, 50_400, 2
FLAGS = {
    "decoder/activation": 3,
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}


def tensors(seed=0):
    """By the file's names, in float32."""
    rng = np.random.default_rng(seed)

    def linear(name, rows, columns):
        return {
            f"{name}/weight": rng.normal(size=(rows, columns)) / np.sqrt(columns),
            f"{name}/bias": 0.1 * rng.normal(size=rows),
        }

    def norm(name):
        return {
            f"{name}/gamma": 1 + 0.1 * rng.normal(size=WIDTH),
            f"{name}/beta": 0.1 * rng.normal(size=WIDTH),
        }

    found = {}
    for name, inner in (("conv1", MELS), ("conv2", WIDTH)):
        found[f"encoder/{name}/weight"] = rng.normal(size=(WIDTH, inner, 3)) / np.sqrt(3 * inner)
        found[f"encoder/{name}/bias"] = 0.1 * rng.normal(size=WIDTH)
    for side, places in (("encoder", FRAMES), ("decoder", POSITIONS)):
        found[f"{side}/position_encodings/encodings"] = 0.1 * rng.normal(size=(places, WIDTH))
        found |= norm(f"{side}/layer_norm")
        for i in range(LAYERS):
            layer = f"{side}/layer_{i}"
            found |= norm(f"{layer}/self_attention/layer_norm") | norm(f"{layer}/ffn/layer_norm")
            found |= linear(f"{layer}/self_attention/linear_0", 3 * WIDTH, WIDTH)
            found |= linear(f"{layer}/self_attention/linear_1", WIDTH, WIDTH)
            found |= linear(f"{layer}/ffn/linear_0", 4 * WIDTH, WIDTH)
            found |= linear(f"{layer}/ffn/linear_1", WIDTH, 4 * WIDTH)
            if side == "decoder":
                found |= norm(f"{layer}/attention/layer_norm")
                found |= linear(f"{layer}/attention/linear_0", WIDTH, WIDTH)
                found |= linear(f"{layer}/attention/linear_1", 2 * WIDTH, WIDTH)
                found |= linear(f"{layer}/attention/linear_2", WIDTH, WIDTH)
    found["decoder/embeddings/weight"] = rng.normal(size=(VOCAB, WIDTH))
    found = {name: x.astype(np.float32) for name, x in found.items()}
    found |= {name: np.array(x, np.int8) for name, x in FLAGS.items()}
    return found | {f"{s}/num_heads": np.array(HEADS, np.int16) for s in ("encoder", "decoder")}


def written(arrays, aliases=(("decoder/projection/weight", "decoder/embeddings/weight"),)):
    """The bytes of a file."""

    def text(x):
        return struct.pack("<H", len(x) + 1) + x.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(arrays))]
    for name, x in arrays.items():
        out += [text(name), struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)]
        out += [struct.pack("<BI", kinds[x.dtype.name], x.nbytes), x.tobytes()]
    out += [struct.pack("<I", len(aliases)), *(text(x) for pair in aliases for x in pair)]
    return b"".join(out)
