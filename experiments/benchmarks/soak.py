"""Mixed requests on one arena for minutes: what grows, is compiled, becomes slower, or fails.

    python -m experiments.benchmarks.soak [--minutes N] [--json OUT] [--quick]

A model with random weights; eight places for requests of random lengths, weights and ways of sampling,
which join, are told more, take steps together, leave, and are saved and restored. Once each of these has
happened three times, in some hundred steps, everything is compiled, and the minutes begin: from then on
bytes, programs and milliseconds a step stay what they are. The latency of steps is that of the first and
of the last quarter of the minutes.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from experiments.benchmarks import _report
from experiments.benchmarks._report import Bar, Row
from experiments.models import Transformer, TransformerConfig
from experiments.models.worth import decoder_of
from jbalance import decode

PLACES, BUDGET = 8, 4 << 20
WARM_STEPS, WARM_EACH, SLOWER = 400, 3, 1.05
_COMPILED = "/jax/core/compile/backend_compile_duration"
CONFIG = TransformerConfig(
    vocab_size=512,
    num_layers=4,
    embed_dim=128,
    hidden_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    max_positions=4096,
)


def main() -> None:
    _report.main("benchmarks.soak", __doc__, measure_all, _add_options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=5.0, help="how long it runs")


class _Requests:
    """One arena, and what happens to it next."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.model = decoder_of(Transformer(CONFIG, rngs=nnx.Rngs(0)))
        self.state = decode.create(self.model, [BUDGET], num_requests=PLACES)
        self.left = [0] * PLACES  # tokens that each request still wants; 0 where there is none
        self.counts = dict.fromkeys(("join", "tell", "leave", "restore", "step", "tokens"), 0)

    def _tokens(self, most: int) -> np.ndarray:
        size = int(self.rng.integers(1, most + 1))
        return self.rng.integers(0, CONFIG.vocab_size, size)

    def act(self) -> float:
        """Joins, turns or leaves, then a step of all: its seconds."""
        for place, left in enumerate(self.left):
            if left == 0 and self.rng.random() < 0.5:
                self._join(place)
            elif left > 0 and self.rng.random() < 0.02:
                self.state = decode.tell(self.model, self.state, place, self._tokens(60))
                self.counts["tell"] += 1
        if self.rng.random() < 0.005:
            self._save_and_restore()
        start = time.perf_counter()
        tokens, self.state = decode.step(self.model, self.state)
        jax.block_until_ready(tokens)
        taken = time.perf_counter() - start
        self.counts["step"] += 1
        for place, left in enumerate(self.left):
            if left > 0:
                self.counts["tokens"] += 1
                self.left[place] = left - 1
                if left == 1:
                    self.state = decode.leave(self.state, place)
                    self.counts["leave"] += 1
        return taken

    def _join(self, place: int) -> None:
        warm = bool(self.rng.random() < 0.5)
        sampling = decode.Sampling(0.8 * warm, top_k=20, top_p=0.9, seed=self.counts["join"])
        weight = float(self.rng.choice([0.3, 1.0, 4.0]))
        prompt = self._tokens(500)
        self.state = decode.join(
            self.model, self.state, place, prompt, sampling=sampling, weight=weight, capacity=512
        )
        self.left[place] = int(self.rng.integers(1, 200))
        self.counts["join"] += 1

    def _save_and_restore(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            decode.save(Path(folder) / "state", self.model, self.state)
            self.state = decode.restore(Path(folder) / "state", self.model, [BUDGET])
        self.counts["restore"] += 1


def measure_all(quick: bool, minutes: float) -> Iterator[Row]:
    seconds = 20.0 if quick else 60 * minutes
    compiled: list[float] = []  # when

    def heard(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == _COMPILED:
            compiled.append(time.perf_counter())

    jax.monitoring.register_event_duration_secs_listener(heard)
    requests, held = _Requests(0), set()
    while requests.counts["step"] < WARM_STEPS or min(requests.counts.values()) < WARM_EACH:
        requests.act()
        held.add(tuple(requests.state.nbytes))
    first_kib, begun, errors = _peak_kib(), time.perf_counter(), 0
    steps: list[float] = []
    while time.perf_counter() < begun + seconds:
        try:
            steps.append(requests.act())
        except Exception as error:
            errors += 1
            print(f"{type(error).__name__}: {error}")
            break  # the state was given up
        held.add(tuple(requests.state.nbytes))
    yield from (Row("requests", name, float(n)) for name, n in requests.counts.items())
    yield Row("soak", "errors", float(errors), Bar(0))
    yield Row("soak", "sizes_of_the_arena", float(len(held)), Bar(1))
    late = sum(when > begun for when in compiled)
    yield Row("soak", "programs_compiled_while_warm", float(len(compiled) - late))
    yield Row("soak", "programs_compiled_later", float(late), Bar(0))
    yield Row("soak", "peak_memory_growth_mib", (_peak_kib() - first_kib) / 1024)
    if len(steps) < 4:
        raise ValueError(f"--minutes is {minutes:g}: that is {len(steps)} steps, give more")
    quarter = len(steps) // 4
    ends = {"first": steps[:quarter], "last": steps[-quarter:]}
    for percent in (50, 90, 99):
        ms = {name: 1e3 * float(np.percentile(part, percent)) for name, part in ends.items()}
        yield from (Row(f"{name}_quarter", f"step_ms_p{percent}", x) for name, x in ms.items())
        bar = Bar(SLOWER) if percent == 50 else None
        yield Row("soak", f"last_over_first_p{percent}", ms["last"] / ms["first"], bar)


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
