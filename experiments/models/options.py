"""Which model a command uses: its options, and the model that they name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # JAX is imported by the jobs
    from experiments.models.load import Loaded


def add_options(parser: argparse.ArgumentParser) -> None:
    """--model, --tokenizer and --max-positions."""
    parser.add_argument(
        "--model",
        default="smollm2",
        help="a GGUF file, a Hugging Face directory, or smollm2 or gemma3-270m",
    )
    parser.add_argument(
        "--tokenizer", help="a tokenizer.json, or a directory with one; default: the model's own"
    )
    parser.add_argument("--max-positions", type=int, help="if more than the model was trained for")


def smollm2() -> Loaded:
    """The model that `make venv` installs."""
    from experiments.models.load import load

    return load("smollm2")


def loaded(options: argparse.Namespace) -> Loaded:
    """The model of `add_options`; ValueError: those of `load`."""
    from experiments.models.load import load

    return load(options.model, tokenizer=options.tokenizer, max_positions=options.max_positions)


def check_positions(model: Loaded, number: int, what: str) -> None:
    """ValueError for more positions than the model has."""
    most = model.config.max_positions
    if number > most:
        raise ValueError(
            f"{what} take {number} positions: {model.where.name} was trained for {most}; give less, or "
            f"ask for more with --max-positions {number}"
        )
