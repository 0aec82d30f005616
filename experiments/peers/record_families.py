"""Records what transformers computes with tiny random models of every family, for the tests.

Command (own environment, see requirements.txt beside this file; 1 minute on 2 cores):

    python3 -m venv experiments/peers/.venv
    experiments/peers/.venv/bin/pip install -r experiments/peers/requirements.txt
    experiments/peers/.venv/bin/python experiments/peers/record_families.py

The models are those of tests/support/family_checkpoints.py; it writes families.npz in
tests/experiments/models/golden. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "experiments" / "models" / "golden"
SMALLEST_GAP = 2e-4  # nats between the two likeliest tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
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


if __name__ == "__main__":
    main()
