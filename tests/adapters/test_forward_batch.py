"""What a serving engine's attention refuses, by name: batches, calls, settings."""

import dataclasses
import functools
import types
from enum import IntEnum

import numpy as np
import pytest

import jbalance as jb
from jbalance.adapters import AttentionBackend, ForwardBatch
from jbalance.decode import AttentionSpec

H, K, D, LAYERS, PLACES, AMPLE = 4, 2, 16, 2, 4, 600_000
BACKEND = AttentionBackend((AttentionSpec(H, K, D),) * LAYERS, PLACES)


class Mode(IntEnum):
    """As engines name what they do."""

    MIXED = 3
    IDLE = 4
    TARGET_VERIFY = 5


@functools.cache
def held():
    """A pool whose first two places hold 5 and 9 tokens, as the host knows."""
    pool = BACKEND.create(AMPLE)
    return dataclasses.replace(pool, lengths=np.array([5, 9, 0, 0], np.int32))


BAD_BATCHES = {
    "forward_mode is 'mixed'": {"forward_mode": Mode.MIXED},
    "forward_mode is 'idle'": {"forward_mode": Mode.IDLE},
    "forward_mode is 'target_verify'": {"forward_mode": Mode.TARGET_VERIFY},
    r"req_pool_indices\[1\] is 4 .*in -1..3": {"req_pool_indices": [2, 4]},
    r"req_pool_indices\[1\] is 2: .*another place": {"req_pool_indices": [2, 2]},
    r"req_pool_indices must have shape": {"req_pool_indices": [[2, 3]]},
    r"extend_seq_lens has 1 entries for R = 2": {"extend_seq_lens": [4]},
    r"extend_seq_lens is None": {"extend_seq_lens": None},
    r"extend_prefix_lens is None": {"extend_prefix_lens": None},
    r"extend_seq_lens sum to 14: input_ids has 8": {
        "extend_seq_lens": [4, 10],
        "seq_lens": [4, 10],
    },
    r"extend_seq_lens\[1\] is 0: .*at least 1": {"extend_seq_lens": [4, 0], "seq_lens": [4, 0]},
    r"extend_seq_lens\[0\] is -4": {"extend_seq_lens": [-4, 3]},
    r"seq_lens\[0\] is 5: .*extend_seq_lens, 4": {"seq_lens": [5, 3]},
    r"seq_lens\[1\] is 3: .*0 for padding": {"req_pool_indices": [2, -1]},
    r"extend_prefix_lens\[0\] is 6: .*not shared, 0": {
        "extend_prefix_lens": [6, 0],
        "seq_lens": [10, 3],
    },
    r"seq_lens has dtype float": {"seq_lens": [4.0, 3.0]},
    r"input_ids must have shape": {"input_ids": 8},
    r"input_ids has 8 tokens and req_pool_indices 2": {
        "forward_mode": "decode",
        "seq_lens": [1, 1],
    },
    r"req_pool_indices\[0\] is 2: .*the place is free": {
        "forward_mode": "decode",
        "input_ids": [0, 0],
        "seq_lens": [1, 1],
    },
    r"seq_lens\[1\] is 9: .*new token, 10": {
        "forward_mode": "decode",
        "input_ids": [0, 0],
        "req_pool_indices": [0, 1],
        "seq_lens": [6, 9],
    },
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_a_batch_that_cannot_be_honored_is_refused_by_name(message):
    batch = ForwardBatch("extend", np.zeros(8, int), [2, 3], [4, 3], [0, 0], [4, 3])
    BACKEND.init_forward_metadata(held(), batch)
    with pytest.raises(ValueError, match=message):
        BACKEND.init_forward_metadata(held(), dataclasses.replace(batch, **BAD_BATCHES[message]))


def layer_of(**changes):
    return types.SimpleNamespace(**{"layer_id": 0, "attn_type": "decoder"} | changes)


BAD_CALLS = {
    "layer is 2: .*at most 1": {"layer": 2},
    "layer is -1": {"layer": layer_of(layer_id=-1)},
    "layer 0 has scaling = 0.5": {"layer": layer_of(scaling=0.5)},
    "layer 0 has kv_head_num = 4": {"layer": layer_of(kv_head_num=4)},
    "layer 0 has v_head_dim = 8": {"layer": layer_of(v_head_dim=8)},
    "layer 0 has attn_type = encoder_only": {"layer": layer_of(attn_type="encoder_only")},
    "attention_mask is given": {"attention_mask": np.ones((8, 8), bool)},
    "q has shape": {"q": np.zeros((8, 3, D), np.float32)},
    "k has shape .*queries' tokens": {"k": np.zeros((9, K, D), np.float32)},
    "v has shape": {"v": np.zeros((8, K * D + 1), np.float32)},
    "q has dtype int": {"q": np.zeros((8, H, D), int)},
    "metadata is None": {"metadata": None},
    "cache is 3": {"cache": 3},
    "cache is of L, K, D, B = .*, 1": {"cache": jb.cache.create(AMPLE, LAYERS, K, D)},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_call_that_cannot_be_honored_is_refused_by_name(message):
    batch = ForwardBatch("extend", np.zeros(8, int), [2], [4], [0], [4])
    pool, metadata = BACKEND.init_forward_metadata(held(), batch)
    q, k, v = (np.zeros((8, n, D), np.float32) for n in (H, K, K))
    given = {"q": q, "k": k, "v": v, "layer": 0, "metadata": metadata, "cache": pool.cache}
    with pytest.raises(ValueError, match=message):
        BACKEND(**given | BAD_CALLS[message])


def test_other_bad_input():
    spec = AttentionSpec(H, K, D)
    for message, arguments in {
        "attention is empty": ((), 1),
        "num_requests is 0": ((spec,), 0),
        "layer 1 has num_kv_heads = 4": ((spec, AttentionSpec(H, H, D)), 1),
        "layer 0 has window = 20000": ((AttentionSpec(H, K, D, window=20_000),), 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            AttentionBackend(*arguments)
    with pytest.raises(ValueError, match="budget_bytes is 1000: "):
        BACKEND.create(1000)
    for places, message in {
        (2,): "has 2: the place is free",
        (4,): "is 4",
        (1, 1): "has 1",
    }.items():
        pool = BACKEND.create(AMPLE)
        pool = dataclasses.replace(pool, lengths=np.array([5, 9, 0, 0], np.int32))
        with pytest.raises(ValueError, match=message):
            BACKEND.release(pool, places)
    with pytest.raises(ValueError, match="pool is 3"):
        BACKEND.release(3, [0])
    with pytest.raises(ValueError, match="cache is None"):
        held().after(None)
