"""Answer a question about a text with a model of yours, within the memory that each device gives.

python -m experiments.generate --text FILE --question "..." --memory 8MiB
python -m experiments.generate --model DIR --text FILE --question "..." --memory 64MiB,32MiB

The text and the question enter the model's chat template, their keys and values the cache, each token at
the precision that it is worth; the answer comes on standard output, token by token, until the model ends
its turn. With several sizes there are as many devices.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable

from experiments.harness import cli, files
from experiments.models import options as models


def job(options: argparse.Namespace) -> None:
    memory = checked_memory(options)
    if not options.question.strip():
        raise ValueError("--question is empty: ask something")

    from experiments.harness import rules, texts

    text = texts.read_file(options.text) if options.text else ""
    keep = files.json_writer(options.json)
    if options.keep is not None:
        rules.pattern_of(options.keep)
    cli.simulated_devices(len(memory))

    import numpy as np

    from experiments.harness import progress
    from experiments.harness.tokens import pieces
    from experiments.models import chat_prompt
    from experiments.models.worth import decoder_of
    from jbalance import decode
    from jbalance.decode import Sampling

    sampling = Sampling(options.temperature, seed=options.seed)
    print(f"loading {options.model}", file=sys.stderr)
    found = models.loaded(options)
    chat = found.spoken
    prompt = np.array(chat_prompt(chat, options.question, text), np.int32)
    size = len(prompt) + options.max_new_tokens
    models.check_positions(found, size, "the prompt and --max-new-tokens")
    decoder, known = decoder_of(found.model), None
    if options.keep is not None:
        known = rules.kept_by_rule(options.keep, pieces(chat.tokenizer, prompt))
    state = decode.create(decoder, memory)
    try:
        with progress.bar(f"reading {len(prompt)} tokens", decoder.num_layers) as advance:
            state = decode.join(
                decoder,
                state,
                0,
                prompt,
                sampling=sampling,
                known=known,
                on_layer=lambda layer: advance(),
            )
    except ValueError as error:
        if known is None:
            raise
        raise ValueError(str(error).replace("known.keep", "--keep", 1)) from None
    start = time.perf_counter()
    ids, state = write_answer(decoder, state, chat, options.max_new_tokens)
    rate = max(len(ids) - 1, 1) / (time.perf_counter() - start)
    held = ", ".join(f"{n:,} of {b:,}" for n, b in zip(state.nbytes, memory, strict=True))
    print(
        f"{len(prompt)} tokens read, {len(ids)} written at {rate:.1f} a second; cache: {held} bytes, "
        f"a dense one of 16 bits would take {decoder.dense_bytes(len(prompt) + len(ids)):,}",
        file=sys.stderr,
    )
    keep(
        {
            "answer": chat.tokenizer.decode(ids),
            "prompt_tokens": len(prompt),
            "answer_tokens": len(ids),
            "cache_bytes": list(state.nbytes),
            "memory_bytes": memory,
            "dense_bytes": decoder.dense_bytes(len(prompt) + len(ids)),
            "tokens_per_second": rate,
        }
    )


def write_answer(decoder, state, chat, most: int):
    """Writes what request 0 answers until its turn ends, or as many tokens; its ids and the state."""
    from jbalance import decode

    written = Written(chat.tokenizer)
    ids: list[int] = []
    while (token := int(state.tokens[0])) not in chat.end_ids:
        if token < 0:
            raise ValueError(f"the model gives NaN after {len(ids)} tokens: its type is too narrow")
        ids.append(token)
        written.show(ids)
        if len(ids) == most:
            break
        _, state = decode.step(decoder, state)
    written.end(ids)
    return ids, state


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the model, the memory and the answer."""
    models.add_options(parser)
    parser.add_argument(
        "--memory",
        metavar="SIZES",
        required=True,
        help="for the cache, one size a device: 8MiB,4MiB",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of what is sampled at a temperature")


def checked_memory(options: argparse.Namespace) -> list[int]:
    """Bytes of each device; ValueError for sizes or tokens that cannot be."""
    memory = cli.memory("--memory", options.memory)
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}: at least 1")
    return memory


class Written:
    """Text on standard output that grows with its tokens, a character at a time when it is whole."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.done = tokenizer, 0

    def show(self, ids: Iterable[int]) -> None:
        """All but a character of which bytes are missing."""
        self._write(self.tokenizer.decode(list(ids)).rstrip("\ufffd"))

    def end(self, ids: Iterable[int]) -> None:
        """All of it."""
        self._write(self.tokenizer.decode(list(ids)) + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text[self.done :])
        sys.stdout.flush()
        self.done = max(self.done, len(text))


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code."""
    parser = cli.parser("experiments.generate", __doc__)
    add_options(parser)
    parser.add_argument(
        "--text", metavar="FILE", help="a UTF-8 text file that the question is about"
    )
    parser.add_argument("--question", required=True, help="which the model answers")
    parser.add_argument(
        "--keep", metavar="REGEX", help="what it matches of the text always stays in the cache"
    )
    cli.add_json(parser)
    return cli.run(parser, job, arguments)


if __name__ == "__main__":
    sys.exit(main())
