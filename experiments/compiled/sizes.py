"""Of the programs for pods: those of Llama 8B, and what is asked of it."""

from __future__ import annotations

MODEL = 8  # chips that share a layer
LAYERS, WIDTH, INNER, VOCABULARY = 32, 4096, 14336, 128256
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
REQUESTS, CONTEXT, SHARE = 32, 131_072, 0.1  # of each group of 8 chips; of a full cache's bytes
PROMPT, EXAMPLE = 32_768, 32_768  # tokens
BLOCK, DENSITY = 512, 0.5
UNITS = 1 << 18  # of each chip: of 4,096 together 2^30, as int32 counts
LOSS_TOKENS = 512  # of a chip, whose logits are held at once
