"""Talk with a model of yours, all that was said within the memory that each device gives.

python -m experiments.chat --memory 8MiB
python -m experiments.chat --model DIR --text FILE --memory 64MiB,32MiB

A line on standard input is what you say; with --text the first is about that text. Answers come on
standard output, token by token. However long the chat, its keys and values stay within the memory: each
token is kept at the precision that it is worth. `/memory` shows what is held; `/quit` or the end of the
input ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from experiments.generate import add_options, checked_memory, write_answer
from experiments.harness import cli
from experiments.models import options as models


def job(options: argparse.Namespace) -> None:
    memory = checked_memory(options)

    from experiments.harness import progress, texts

    text = texts.read_file(options.text) if options.text else ""
    cli.simulated_devices(len(memory))

    import numpy as np

    from experiments.models import chat_prompt, next_turn
    from experiments.models.worth import decoder_of
    from jbalance import decode
    from jbalance.decode import Sampling

    print(f"loading {options.model}", file=sys.stderr)
    found = models.loaded(options)
    chat = found.spoken
    decoder = decoder_of(found.model)
    state = decode.create(decoder, memory)
    sampling, position = Sampling(options.temperature, seed=options.seed), 0
    for line in said():
        if line == "/memory":
            print(held(state, memory, position), file=sys.stderr)
            continue
        if line == "/quit":
            break
        ids = next_turn(chat, line) if position else chat_prompt(chat, line, text)
        if position and ids[0] == int(state.tokens[0]):
            ids = ids[1:]  # the model ended its turn itself
        size = position + len(ids) + options.max_new_tokens
        models.check_positions(found, size, "what was said and --max-new-tokens")
        tokens = np.array(ids, np.int32)
        if position:
            state = decode.tell(decoder, state, 0, tokens)
        else:
            with progress.bar(f"reading {len(ids)} tokens", decoder.num_layers) as advance:
                state = decode.join(
                    decoder, state, 0, tokens, sampling=sampling, on_layer=lambda layer: advance()
                )
        _, state = write_answer(decoder, state, chat, options.max_new_tokens)
        position = int(state.positions[0])


def said() -> Iterator[str]:
    """Lines of standard input that say something."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        line = line.lstrip("\ufeff").strip()  # of a file that begins with a byte-order mark
        if line:
            yield line


def held(state, memory, position: int) -> str:
    """What each device holds, and at which precision all heads hold the tokens that were read."""
    lines = []
    for d, (cache, budget) in enumerate(zip(state.caches, memory, strict=True)):
        counts = cache.arena.count.sum(axis=0).tolist()
        levels = ", ".join(
            f"{n:,} at {bits} bits" for n, bits in zip(counts, cache.arena.bits, strict=True)
        )
        heads = cache.units_per_request
        left = heads * position - sum(counts) - heads * int(cache.recent_count[0])
        lines.append(
            f"device {d}: {cache.nbytes:,} of {budget:,} bytes; of {position} tokens in {heads} heads "
            f"{levels}, {heads * int(cache.recent_count[0]):,} recent, {left:,} in centroids"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code."""
    parser = cli.parser("experiments.chat", __doc__)
    add_options(parser)
    parser.add_argument(
        "--text", metavar="FILE", help="a UTF-8 text file that the first question is about"
    )
    return cli.run(parser, job, arguments)


if __name__ == "__main__":
    sys.exit(main())
