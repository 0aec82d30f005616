"""Every family against what transformers recorded of the same random checkpoints.

experiments/peers/record_families.py recorded it; the checkpoints are written here again.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from flax import nnx

from experiments.models import greedy, load_gguf, load_hf_directory
from tests.experiments.models.conftest import GOLDEN
from tests.support.family_checkpoints import CASES, LLAMA3, LONG, STEPS, recorded_positions
from tests.support.family_files import ARCHITECTURES, write_family, write_family_gguf

MOST_KL = 1e-9


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN / "families.npz") as file:
        return dict(file)


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def logits_of(model, tokens):
    return np.asarray(forward(model, tokens[None])[0], np.float64)


def worst_kl(one, other):
    """The largest over the positions, in nats."""
    one, other = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (one, other))
    return float((np.exp(one) * (one - other)).sum(-1).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(tmp_path, recorded, name):
    case, tokens = CASES[name], recorded[f"{name}.tokens"]
    _, model, _ = load_hf_directory(write_family(tmp_path, name), max_positions=case.max_positions)
    logits = logits_of(model, tokens)
    want = recorded[f"{name}.logits"].astype(np.float64)
    assert worst_kl(want, logits[recorded_positions(name)]) <= MOST_KL
    continuation = tokens[case.prompt :]
    assert len(continuation) == (0 if case.grows else STEPS)
    np.testing.assert_array_equal(logits[case.prompt - 1 : -1].argmax(-1), continuation)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf_logits_are_those_of_transformers(tmp_path, recorded, name):
    path = write_family_gguf(tmp_path / "it.gguf", name)
    _, model, _ = load_gguf(path, max_positions=CASES[name].max_positions)
    logits = logits_of(model, recorded[f"{name}.tokens"])[recorded_positions(name)]
    assert worst_kl(recorded[f"{name}.logits"].astype(np.float64), logits) <= MOST_KL


@pytest.mark.parametrize("name", ["gemma3", "phi3 long", "smollm3 windows", "mixtral window"])
def test_greedy_continuation_is_that_of_transformers(tmp_path, recorded, name):
    _, model, _ = load_hf_directory(write_family(tmp_path, name))
    tokens, size = recorded[f"{name}.tokens"], CASES[name].prompt
    np.testing.assert_array_equal(greedy(model, tokens[None, :size], STEPS)[0], tokens[size:])


CHANGED = {
    "llama3": {"rope_scaling": None},
    "llama yarn": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"sliding_window": 6},
    "qwen2 windows": {"max_window_layers": 3},
    "qwen3 windows": {"rms_norm_eps": 1e-3},
    "gemma2": {"attn_logit_softcapping": 4.1},
    "gemma2 without caps": {"query_pre_attn_scalar": 8.1},
    "gemma3": {"rope_local_base_freq": 101.0},
    "gemma3 types": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "phi3 long": {"original_max_position_embeddings": 17},
    "smollm3": {"no_rope_layer_interval": 3},
    "smollm3 windows": {"use_sliding_window": False, "layer_types": None},
    "mixtral": {"num_experts_per_tok": 1},
    "qwen3 experts": {"norm_topk_prob": False},
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_that_is_not_honored_would_be_seen(tmp_path, recorded, name):
    path = write_family(tmp_path, name) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | CHANGED[name]))
    _, model, _ = load_hf_directory(tmp_path)
    logits = logits_of(model, recorded[f"{name}.tokens"])[recorded_positions(name)]
    assert worst_kl(recorded[f"{name}.logits"].astype(np.float64), logits) > 30 * MOST_KL


FULL, LOCAL = "full_attention", "sliding_attention"
# What newer writers put into one object, and older ones beside it.
NEWER = {
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 1000.0}},
    "gemma3": {
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 50_000.0},
            LOCAL: {"rope_type": "default", "rope_theta": 100.0},
        },
        "layer_types": [LOCAL, LOCAL, FULL, LOCAL],
        "rope_local_base_freq": ...,
        "sliding_window_pattern": ...,
    },
    "phi3 long": {
        "rope_parameters": LONG
        | {
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 16,
        },
        "partial_rotary_factor": ...,
        "original_max_position_embeddings": ...,
    },
    "mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
}


@pytest.mark.parametrize("name", NEWER)
def test_newer_writers_say_the_same(tmp_path, name):
    path = write_family(tmp_path, name) / "config.json"
    older = load_hf_directory(tmp_path)[0]
    changed = CASES[name].config | {"rope_theta": ..., "rope_scaling": ...} | NEWER[name]
    path.write_text(json.dumps({key: x for key, x in changed.items() if x is not ...}))
    assert load_hf_directory(tmp_path)[0] == older


# Keys of the files that these families' makers publish, beside those of the checkpoints here.
PUBLISHED = {
    "llama3": {"pretraining_tp": 1, "mlp_bias": False, "attention_bias": False},
    "mistral without window": {"attention_dropout": 0.0, "torch_dtype": "bfloat16"},
    "qwen2": {"sliding_window": 131072, "max_window_layers": 70, "use_mrope": False},
    "qwen3": {"sliding_window": None, "max_window_layers": 28, "use_sliding_window": False},
    "gemma2": {
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "_sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "phi3 long": {
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "resid_pdrop": 0.0,
    },
    "smollm3": {"max_window_layers": 28, "pretraining_tp": 2, "use_sliding_window": False},
    "mixtral": {"output_router_logits": False, "router_aux_loss_coef": 0.02},
    "qwen3 experts": {
        "decoder_sparse_step": 1,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "sliding_window": None,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_published_files_are_known(tmp_path, name):
    path = write_family(tmp_path, name) / "config.json"
    config = load_hf_directory(tmp_path)[0]
    path.write_text(json.dumps(CASES[name].config | PUBLISHED[name]))
    assert load_hf_directory(tmp_path)[0] == config
