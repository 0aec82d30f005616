"""torch's attention on the inputs of a benchmark, one call for each line that it reads.

    PYTHON experiments/peers/attention.py INPUTS.npz

INPUTS holds q, k and v [1, T, H, D], block [] and a mask [1, H, I, J] for each density under its name.
A line is "sdpa", causal scaled_dot_product_attention, or "flex NAME", compiled FlexAttention over the
causal tiles of that mask. The answer is one line, the largest difference of the result from SDPA's over
the queries of the first block, when the call is done. Uses the cores that it is given by its affinity.
"""

from __future__ import annotations

import functools
import os
import sys

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    inputs = np.load(sys.argv[1])
    q, k, v = (torch.from_numpy(inputs[x]).transpose(1, 2).contiguous() for x in "qkv")
    block = int(inputs["block"])
    sdpa = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True
    )
    flex = torch.compile(flex_attention)
    calls = {"sdpa": sdpa}
    for name in set(inputs) - {"q", "k", "v", "block"}:
        tiles = _tiles(inputs[name], block, q.shape[2])
        calls[f"flex {name}"] = functools.partial(flex, q, k, v, block_mask=tiles)
    with torch.inference_mode():
        first = sdpa()[:, :, :block]  # whatever the plan, the first block of queries sees itself
        print("ready", flush=True)
        for line in sys.stdin:
            out = calls[line.strip()]()
            print(float((out[:, :, :block] - first).abs().max()), flush=True)


def _tiles(mask: np.ndarray, block: int, size: int) -> BlockMask:
    """Tiles on the diagonal are masked by position, the others are whole."""
    own = np.eye(mask.shape[-1], dtype=bool)
    lists = [_lists(part) for part in (mask & own, mask & ~own)]
    return BlockMask.from_kv_blocks(
        *lists[0],
        *lists[1],
        BLOCK_SIZE=(block, block),
        mask_mod=lambda b, h, q, k: q >= k,
        seq_lengths=(size, size),
    )


def _lists(mask: np.ndarray) -> tuple[torch.Tensor, ...]:
    """[1, H, I] how many blocks, [1, H, I, J] which: those first, in ascending order."""
    order = np.argsort(~mask, axis=-1, kind="stable")
    return tuple(torch.from_numpy(x.astype(np.int32)) for x in (mask.sum(-1), order))


if __name__ == "__main__":
    main()
