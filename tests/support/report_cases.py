"""A made-up report for the tests of what a run shows, and a strict reader of its page."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np

POLICIES = ("full", "sinks-recent", "uniform", "proportional", "ladder")
HOSTILE = "<script>alert('x')</script> --></style> & \"q\" $\\frac{1}{0 [bold]red[/] \x1b[31m \x00 "


def made_up_report(
    num_devices: int = 2,
    policies: tuple[str, ...] = POLICIES,
    kv_heads: int = 3,
    tokens: int = 1536,
    passkey: bool = True,
) -> dict[str, Any]:
    """A report with figures of the size that a run on a small model has."""
    rng = np.random.default_rng(0)
    num_layers, head_dim = 30, 64
    entry_bytes = 4 * head_dim
    full_bytes = num_layers * kv_heads * tokens * entry_bytes
    device_of = np.arange(num_layers * kv_heads).reshape(num_layers, kv_heads) % num_devices
    start, stop = (int(0.37 * tokens), int(0.37 * tokens) + 12) if passkey else (0, 0)
    mean = rng.lognormal(-9, 0.9, tokens)
    mean[:4] += 0.3
    mean[start:stop] *= 20
    kept = np.clip(0.12 + 0.13 * (np.log(mean) + 9) + 0.03 * rng.standard_normal(tokens), 0, 1)
    kept[-32:] = 1
    budget_bytes = full_bytes // 4

    def policy(i: int, name: str) -> dict[str, Any]:
        full = name == "full"
        spread = rng.dirichlet(np.full(device_of.size, 6.0)).reshape(device_of.shape)
        entries = (spread * budget_bytes / entry_bytes).astype(int)
        for d in range(num_devices):
            mine = device_of == d
            most = budget_bytes // num_devices // entry_bytes
            entries[mine] = entries[mine] * min(1, most / max(entries[mine].sum(), 1))
        entries = np.minimum(entries, tokens)
        if full or name == "uniform":
            entries = np.full(device_of.shape, tokens // (1 if full else 4))
        kl = 0.0 if full else 0.052 * 0.88**i
        devices = [
            {
                "budget_bytes": budget_bytes // num_devices,
                "live_bytes": int(entries[device_of == d].sum()) * entry_bytes,
                "entries": int(entries[device_of == d].sum()),
                "price_per_byte": 3.1e-9 * (1 + d) if name == "ladder" else None,
            }
            for d in range(num_devices)
        ]
        return {
            "policy": name,
            "nll": 2.9131 + 0.8 * kl,
            "nll_full": 2.9131,
            "perplexity": float(np.exp(2.9131 + 0.8 * kl)),
            "kl": kl,
            "top1": 1 - 1.6 * kl,
            "passkey_exact": (full or name == "ladder") if passkey else None,
            "answer_text": " 48152." if full or name == "ladder" else " The pass key is not given.",
            "plan_s": 0.0 if full else 0.73,
            "tokens_per_s": 31.4 + i,
            "cache_bytes": int(entries.sum()) * entry_bytes,
            "budget_bytes": budget_bytes,
            "within_budget": not full,
            "entries": entries.tolist(),
            "devices": devices,
        }

    rows = [policy(i, name) for i, name in enumerate(policies)]
    return {
        "command": "python -m experiments.kv_budget run --device-memory 4MiB,2MiB",
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "num_layers": num_layers,
            "num_heads": 3 * kv_heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
        },
        "text": {
            "name": "a chapter of a public book",
            "excerpt": "It was a bright morning, and the house was still asleep.\n\n" * 12,
            "pieces": [f" w{i}" for i in range(tokens)],
        },
        "context_tokens": tokens,
        "continuation_tokens": 256,
        "full_cache_bytes": full_bytes,
        "devices": [
            {"name": f"cpu:{d}", "budget_bytes": budget_bytes // num_devices}
            for d in range(num_devices)
        ],
        "question": "What is the pass key? The pass key is",
        "passkey": {"answer": "48152", "start": start, "stop": stop} if passkey else None,
        "policies": rows,
        "importance": {
            "mean": mean.tolist(),
            "kept": kept.tolist(),
            "bits": (8 * kept).tolist(),
            "worth_per_byte": mean.tolist(),
        },
        "reasons": ["Head 0 of layer 7 keeps 31 of 1,536 tokens, because device 1 is full."],
        "curve": [
            {
                "policy": row["policy"],
                "cache_bytes": int(full_bytes * share),
                "kl": row["kl"] * (0.25 / share) ** 1.4,
            }
            for row in rows
            if row["policy"] != "full"
            for share in (0.05, 0.1, 0.25, 0.5)
        ],
        "machine": {"platform": "Linux x86_64", "cores": 2},
        "versions": {"jax": "0.10.2", "numpy": "2.4.6", "python": "3.11.7"},
    }


class Page(HTMLParser):
    """The tags of a page and its text; fails where a tag is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]
