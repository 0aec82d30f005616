"""Records what transformers computes with tiny random models of every family, for the tests.

Command (own environment, see requirements.txt beside this file; 1 minute on 2 cores):

    python3 -m venv experiments/peers/.venv
    experiments/peers/.venv/bin/pip install -r experiments/peers/requirements.txt
    experiments/peers/.venv/bin/python experiments/peers/record_families.py

The models are those of tests/support/family_checkpoints.py; it writes families.npz in
tests/experiments/models/golden. Given the path of
gemma-3-270m-q4_k_m.gguf (which `load("gemma3-270m")` fetches into data/), it writes
gemma3_continuations.json there instead. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from gguf import GGUFReader
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "experiments" / "models" / "golden"
SMALLEST_GAP = 2e-4  # nats between the two likeliest tokens
GEMMA_STEPS, GEMMA_GAP = 64, 2e-3
CONTROL, USER_DEFINED = 3, 4
# The last one is longer than the windows, which are 512 tokens.
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time, in a small village by the sea, there lived",
    "Zutaten: 200 g Mehl, 3 Eier,  1/4 l Milch\n\nZubereitung:",
    "\n".join(
        f"{i}. The {what} of year {1900 + 7 * i} weighed {i * i} grams."
        for i, what in enumerate(["apple", "stone", "letter", "bird", "small clock"] * 7, 1)
    ),
]
STRINGS = [
    "",
    " ",
    "a  b   c\t\td\n\n\ne",
    "Grüße, ça va? 日本語 и русский",
    "🜁 and 👩‍👩‍👧 are here",
    "<h1>title</h1><start_of_turn>user",
    "aaaaaaaaaaaaaaaa bbbbbbb      ",
    "3.14159 and 1,000,000 ▁▁ x",
    "<0x0A> is no line end",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, nargs="?", help="gemma-3-270m-q4_k_m.gguf")
    path = parser.parse_args().gguf
    if path is not None:
        record_gemma(path)
        return
    made = family_checkpoints()
    arrays: dict[str, np.ndarray] = {}
    for name in made.CASES:
        tokens, logits = record(made, name)
        arrays |= {f"{name}.tokens": tokens.astype(np.int32), f"{name}.logits": logits}
    np.savez_compressed(GOLDEN / "families.npz", allow_pickle=False, **arrays)


def family_checkpoints() -> Any:
    """The module of the tests, which needs NumPy alone."""
    where = ROOT / "tests" / "support" / "family_checkpoints.py"
    spec = importlib.util.spec_from_file_location("family_checkpoints", where)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{where} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def record(made: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompt and its greedy continuation, and logits at some positions."""
    case = made.CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(case.config) | {"torch_dtype": "float32"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(made.tensors_of(name), Path(folder) / "model.safetensors", {"format": "pt"})
        model, about = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if about[key]:
            raise RuntimeError(f"{name}: {key} {about[key]}")
    tokens = torch.tensor(made.prompt_of(name))[None]
    gaps = []
    for _ in range(0 if case.grows else made.STEPS):
        best = model.eval()(tokens, use_cache=False).logits[0, -1].double().topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        tokens = torch.cat([tokens, best.indices[None, :1]], dim=1)
    if gaps and min(gaps) < SMALLEST_GAP:
        raise RuntimeError(f"{name}: a near tie would hang on rounding: choose another seed")
    logits = model.eval()(tokens, use_cache=False).logits[0]
    print(f"{name}: closest decision {min(gaps, default=0):.4f} nats")
    return tokens[0].numpy(), logits[made.recorded_positions(name)].numpy()


@torch.no_grad()
def record_gemma(path: Path) -> None:
    """Greedy continuations by the cache of transformers, and tokens by SentencePiece's rule."""
    encode = pieces_of(path)
    where: dict[str, Any] = {"gguf_file": path.name, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where).eval()
    continuations = []
    for text in PROMPTS:
        ids = encode(text)
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=GEMMA_STEPS,
            min_new_tokens=GEMMA_STEPS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = [scores[0].topk(2).values for scores in out.scores]
        gap = min(float(two[0] - two[1]) for two in best)
        print(f"{len(ids)} tokens, closest decision {gap:.4f} nats")
        if gap < GEMMA_GAP:
            raise RuntimeError("a near tie would hang on rounding: choose another prompt")
        continuation = out.sequences[0, len(ids) :].tolist()
        continuations.append({"text": text, "tokens": ids, "continuation": continuation})
    recorded = {"prompts": continuations, "strings": {text: encode(text) for text in STRINGS}}
    (GOLDEN / "gemma3_continuations.json").write_text(json.dumps(recorded) + "\n")


def pieces_of(path: Path) -> Any:
    """text -> ids: user-defined tokens first, the longest first; then pairs by the union's score."""
    fields = GGUFReader(path).fields
    tokens, kinds, scores = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "scores")
    )
    begin = fields["tokenizer.ggml.bos_token_id"].contents()
    index = {token: i for i, token in enumerate(tokens)}
    matched = [
        token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)
    ]
    matched.sort(key=len, reverse=True)

    def merged(text: str) -> list[int]:
        pieces = list(text.replace(" ", "▁"))
        while True:
            unions = [
                (-scores[index[a + b]], at)
                for at, (a, b) in enumerate(itertools.pairwise(pieces))
                if a + b in index and kinds[index[a + b]] == 1
            ]
            if not unions:
                break
            at = min(unions)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        ids = []
        for piece in pieces:
            known = piece in index
            ids += [index[piece]] if known else [index[f"<0x{b:02X}>"] for b in piece.encode()]
        return ids

    def encode(text: str) -> list[int]:
        parts: list[Any] = [text]
        for token in matched:
            if token in text:
                parts = [piece for part in parts for piece in split_at(part, token, index[token])]
        ids = [begin]
        for part in parts:
            ids += merged(part) if isinstance(part, str) else [part]
        return ids

    return encode


def split_at(part: Any, token: str, index: int) -> list[Any]:
    """Text around a token, and the token's id between; what is no text stays."""
    if not isinstance(part, str):
        return [part]
    first, *others = part.split(token)
    pieces: list[Any] = [first]
    for other in others:
        pieces += [index, other]
    return [piece for piece in pieces if piece != ""]


if __name__ == "__main__":
    main()
