"""Models that cannot be run as their files say: each is refused by what is wrong and what would fit."""

from __future__ import annotations

import copy
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from experiments.models import load
from tests.support.family_checkpoints import CASES
from tests.support.family_files import write_family, write_family_gguf

SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.25, 4.0]}
# Case of family_checkpoints, changes of its config.json (`...` takes a key away), words of the message.
CONFIGS = {
    "an encoder": (
        "llama2",
        {"model_type": "bert"},
        ["'bert'", "causal decoder", "llama, mistral"],
    ),
    "an encoder and a decoder": ("llama2", {"model_type": "t5"}, ["model_type='t5'", "causal"]),
    "speech": ("llama2", {"model_type": "whisper"}, ["model_type='whisper'", "causal"]),
    "images too": ("gemma3", {"model_type": "gemma3"}, ["'gemma3'", "gemma3_text"]),
    "a list of types": ("llama2", {"model_type": ["llama"]}, ["model_type=['llama']"]),
    "no type": ("llama2", {"model_type": ...}, ["lacks 'model_type'"]),
    "it crosses": ("llama2", {"is_encoder_decoder": True}, ["is_encoder_decoder=True"]),
    "another head": (
        "qwen2",
        {"architectures": ["Qwen2ForTokenClassification"]},
        ["Qwen2ForCausalLM"],
    ),
    "sees both ways": ("gemma3", {"use_bidirectional_attention": True}, ["use_bidirectional"]),
    "quantized": ("qwen3", {"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
    "no window": ("mistral", {"sliding_window": 0}, ["sliding_window=0", "in 1.."]),
    "half a window": ("mistral", {"sliding_window": 5.5}, ["sliding_window=5.5"]),
    "a window of a Llama": ("llama2", {"sliding_window": 5}, ["sliding_window=5", "None"]),
    "layers of one Mistral": ("mistral", {"layer_types": [FULL] * 4}, ["layer_types", SLIDING]),
    "unknown layers": ("gemma2", {"layer_types": ["linear_attention"] * 4}, ["layer_types", FULL]),
    "layers of another number": ("gemma3", {"layer_types": [FULL]}, ["layer_types", "4 layers"]),
    "windows that are not used": (
        "qwen2",
        {"layer_types": [SLIDING] * 4},
        ["layer_types", f"{FULL!r} for every layer"],
    ),
    "a window without a size": (
        "smollm3 windows",
        {"sliding_window": None},
        ["layer_types", f"{FULL!r}"],
    ),
    "windows from a negative layer": ("qwen2 windows", {"max_window_layers": -1}, ["-1", "in 0.."]),
    "windows of experts": ("qwen3 experts", {"use_sliding_window": True}, ["use_sliding_window"]),
    "biases": ("qwen3", {"attention_bias": True}, ["attention_bias=True", "False"]),
    "biases of the MLP": ("smollm3", {"mlp_bias": True}, ["mlp_bias=True", "False"]),
    "another gate": ("gemma2", {"hidden_activation": "gelu"}, ["'gelu'", "gelu_pytorch_tanh"]),
    "a Gemma of the first kind's gate": ("gemma3", {"hidden_act": "silu"}, ["hidden_act='silu'"]),
    "a negative cap": ("gemma2", {"attn_logit_softcapping": -1.0}, ["softcapping=-1.0", "above 0"]),
    "a cap of Gemma 3": (
        "gemma3",
        {"attn_logit_softcapping": 50.0},
        ["attn_logit_softcapping=50.0"],
    ),
    "no scale": ("gemma3", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar=0", "above 0"]),
    "no pattern": ("gemma3", {"sliding_window_pattern": 0}, ["sliding_window_pattern=0"]),
    "local base": ("gemma3", {"rope_local_base_freq": -1.0}, ["rope_local_base_freq=-1.0"]),
    "an odd part rotates": (
        "phi3 long",
        {"partial_rotary_factor": 0.4},
        ["partial_rotary_factor=0.4"],
    ),
    "more than all rotates": ("phi3", {"partial_rotary_factor": 1.5}, ["at most 1"]),
    "a part of a Qwen": (
        "qwen2",
        {"partial_rotary_factor": 0.5},
        ["partial_rotary_factor=0.5", "1.0"],
    ),
    "factors of other heads": (
        "phi3 long",
        {"partial_rotary_factor": 1.0},
        ["short_factors and long_factors have 2 entries", "4 pairs"],
    ),
    "no long factors": (
        "phi3 long",
        {"rope_scaling": LONG | {"long_factor": ...}},
        ["'long_factor'"],
    ),
    "a factor of zero": (
        "phi3 long",
        {"rope_scaling": LONG | {"short_factor": [1.0, 0.0]}},
        ["short_factor=[1.0, 0.0]", "above 0"],
    ),
    "one position": ("phi3 long", {"original_max_position_embeddings": 1}, ["=1 ", "in 2.."]),
    "yarn without a factor": (
        "qwen2 windows",
        {"rope_scaling": {"type": "yarn"}},
        ["lacks 'factor'"],
    ),
    "crossed yarn": (
        "smollm3",
        {"rope_scaling": YARN | {"beta_fast": 0.5}},
        ["beta_slow=1.0 must be below beta_fast=0.5"],
    ),
    "yarn of base 1": ("smollm3", {"rope_scaling": YARN, "rope_theta": 1.0}, ["rope_base=1.0"]),
    "yarn and more": ("smollm3", {"rope_scaling": YARN | {"alpha": 2.0}}, ["alpha=2.0"]),
    "unknown scaling": (
        "qwen3",
        {"rope_scaling": {"rope_type": "ntk"}},
        ["rope_type='ntk'", "'yarn'"],
    ),
    "half of the layers' rotations": (
        "gemma3",
        {"rope_scaling": None, "rope_parameters": {FULL: {"rope_type": "default"}}},
        [f"lacks '{SLIDING}'"],
    ),
    "layers that rotate": ("smollm3", {"no_rope_layers": [1, 0]}, ["no_rope_layers", "4 layers"]),
    "half rotations": ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, ["no_rope_layers", "1 or 0"]),
    "never an unrotated layer": ("smollm3", {"no_rope_layer_interval": 0}, ["interval=0"]),
    "more experts of a token": (
        "mixtral",
        {"num_experts_per_tok": 5},
        ["experts_per_token=5", "num_experts=4"],
    ),
    "experts that are not there": (
        "mixtral",
        {"num_local_experts": 5},
        ["lacks 12 tensors", "experts.4"],
    ),
    "experts of nobody": ("mixtral", {"num_local_experts": 10**9}, ["1000000000 experts"]),
    "some layers without experts": (
        "qwen3 experts",
        {"mlp_only_layers": [0]},
        ["mlp_only_layers=[0]"],
    ),
    "experts in every other layer": (
        "qwen3 experts",
        {"decoder_sparse_step": 2},
        ["sparse_step=2"],
    ),
    "experts of a dense model": ("qwen3", {"num_experts": 4}, ["num_experts=4"]),
    "layers without end": (
        "gemma2",
        {"num_hidden_layers": 10**9},
        ["num_hidden_layers", "0..10000"],
    ),
    "other fused sizes": ("phi3", {"num_key_value_heads": 2}, ["qkv_proj", "[64, 32]", "[96, 32]"]),
    "other heads": ("gemma3", {"num_key_value_heads": 4}, ["k_proj", "[32, 32]", "[16, 32]"]),
    "heads that do not divide": (
        "qwen3",
        {"num_key_value_heads": 3},
        ["num_heads=4", "num_kv_heads=3"],
    ),
    "an odd head": ("mistral", {"head_dim": 7}, ["head_dim=7", "even"]),
    "no positions": ("qwen2", {"max_position_embeddings": 0}, ["max_position_embeddings=0"]),
    "an end that is no token": ("qwen2", {"eos_token_id": 99}, ["eos_token_id=99", "0..66"]),
}


def refused(call, *words):
    with pytest.raises(ValueError, match=r"\S") as error:
        call()
    for word in words:
        assert word in str(error.value)


def without_gaps(value):
    """What `...` stands for is taken away, at any depth."""
    if isinstance(value, dict):
        return {key: without_gaps(x) for key, x in value.items() if x is not ...}
    return value


def with_tokenizer(folder, size=3):
    vocabulary = {chr(97 + i): i for i in range(size)}
    Tokenizer(models.BPE(vocabulary, [])).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config_is_named(tmp_path, case):
    name, changes, words = CONFIGS[case]
    path = with_tokenizer(write_family(tmp_path, name)) / "config.json"
    config = copy.deepcopy(CASES[name].config) | changes
    path.write_text(json.dumps(without_gaps(config)))
    refused(lambda: load(tmp_path), str(tmp_path), *words)


# Case, tensor, what becomes of it (None takes it away), words of the message.
TENSORS = {
    "no fused tensor": (
        "phi3",
        "model.layers.1.self_attn.qkv_proj.weight",
        None,
        ["lacks 1 tensors"],
    ),
    "no router": (
        "mixtral",
        "model.layers.2.block_sparse_moe.gate.weight",
        None,
        ["lacks 1 tensors"],
    ),
    "no bias": ("qwen2", "model.layers.0.self_attn.k_proj.bias", None, ["lacks 1 tensors"]),
    "no norm": ("gemma2", "model.layers.3.pre_feedforward_layernorm.weight", None, ["lacks 1"]),
    "a norm too many": (
        "llama2",
        "model.layers.0.self_attn.q_norm.weight",
        np.ones(6),
        ["no use for"],
    ),
    "a bias too many": (
        "qwen3",
        "model.layers.0.self_attn.q_proj.bias",
        np.ones(48),
        ["no use for"],
    ),
    "an adapter": (
        "mistral",
        "model.layers.0.self_attn.q_proj.lora_A",
        np.ones((2, 24)),
        ["adapters"],
    ),
    "a norm of another size": (
        "qwen3",
        "model.layers.0.self_attn.q_norm.weight",
        np.ones(8),
        ["[16]"],
    ),
    "a norm that is no number": (
        "gemma3",
        "model.norm.weight",
        np.full(32, np.nan),
        ["not finite"],
    ),
    "experts transposed": (
        "mixtral",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight",
        np.ones((40, 32)),
        ["[32, 40]", "[40, 32]"],
    ),
    "weights of eight bits": (
        "qwen2",
        "model.layers.0.mlp.up_proj.weight",
        np.ones((40, 32), ml_dtypes.float8_e4m3fn),
        ["F8_E4M3", "scale"],
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_bad_tensor_is_named(tmp_path, case):
    name, tensor, array, words = TENSORS[case]
    file = write_family(tmp_path, name) / "model.safetensors"
    tensors = load_file(file)
    if array is None:
        del tensors[tensor]
    else:
        tensors[tensor] = array if array.dtype.itemsize == 1 else array.astype(np.float32)
    save_file(tensors, file)
    refused(lambda: load(tmp_path), str(tmp_path), tensor, *words)


def test_shards_that_lack_or_repeat_tensors_are_named(tmp_path):
    write_family(tmp_path, "llama3")
    first, second = (tmp_path / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    tensors, others = load_file(first), load_file(second)
    name, lost = sorted(tensors)[0], sorted(others)[0]
    save_file(tensors | {lost: others[lost]}, first)
    refused(lambda: load(tmp_path), first.name, lost, "the index puts in", second.name)
    save_file({key: array for key, array in tensors.items() if key != name}, first)
    refused(lambda: load(tmp_path), first.name, name, "lacks the tensor")


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path):
    with_tokenizer(write_family(tmp_path, "qwen3"), size=68)
    refused(lambda: load(tmp_path), "tokenizer.json", "id 67", "0..66")


def test_a_generation_config_is_read_too(tmp_path):
    with_tokenizer(write_family(tmp_path, "qwen3"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 65]}')
    assert load(tmp_path).chat.end_ids == (2, 65)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, "65"]}')
    refused(lambda: load(tmp_path), "generation_config.json", "eos_token_id=[2, '65']")


# Case, changes of the keys (None takes one away), words of the message.
GGUF = {
    "another architecture": (
        "llama2",
        {"general.architecture": "mamba"},
        ["general.architecture='mamba'", "'gemma3'"],
    ),
    "experts": ("qwen3", {"qwen3.expert_count": 8}, ["qwen3.expert_count=8"]),
    "no window of a Gemma": (
        "gemma3",
        {"gemma3.attention.sliding_window": None},
        ["sliding_window"],
    ),
    "a Gemma's window of 0": ("gemma2", {"gemma2.attention.sliding_window": 0}, ["=0", "in 1.."]),
    "no cap": ("gemma2", {"gemma2.attn_logit_softcapping": 0.0}, ["softcapping=0.0", "above 0"]),
    "a scale of its own": (
        "gemma3",
        {"gemma3.attention.scale": 0.5},
        ["gemma3.attention.scale=0.5"],
    ),
    "a window of a Qwen": ("qwen2", {"qwen2.attention.sliding_window": 4}, ["sliding_window=4"]),
    "a part of a Qwen": ("qwen3", {"qwen3.rope.dimension_count": 4}, ["dimension_count=4", "16"]),
    "an odd part of a Phi": ("phi3", {"phi3.rope.dimension_count": 3}, ["rotated_features=3"]),
    "factors of other heads": (
        "phi3 long",
        {"phi3.rope.dimension_count": 6},
        ["rope_factors_long.weight", "2 numbers", "3 pairs"],
    ),
    "no original length": (
        "phi3 long",
        {"phi3.rope.scaling.original_context_length": None},
        ["lacks 'phi3.rope.scaling.original_context_length'"],
    ),
    "two ways to scale": (
        "llama3",
        {"llama.rope.scaling.type": "linear"},
        ["type='linear'", "'none'"],
    ),
    "yarn without a factor": ("qwen2", {"qwen2.rope.scaling.type": "yarn"}, ["scaling.factor"]),
    "a tokenizer of words": ("qwen2", {"tokenizer.ggml.model": "bert"}, ["'bert'", "'llama'"]),
    "cuts that are not known": ("qwen2", {"tokenizer.ggml.pre": "tekken"}, ["'tekken'", "'qwen2'"]),
    "pieces without bytes": ("gemma3", {"tokenizer.ggml.model": "llama"}, ["token_type", "<0x00>"]),
    "an end beyond": ("gemma3", {"tokenizer.ggml.eos_token_id": 67}, ["eos_token_id=67", "0..66"]),
    "a template that is a number": ("gemma3", {"tokenizer.chat_template": 3}, ["chat_template=3"]),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_bad_gguf_is_named(tmp_path, case):
    name, changes, words = GGUF[case]
    path = write_family_gguf(tmp_path / "it.gguf", name, **changes)
    refused(lambda: load(path), str(path), *words)


def test_there_are_enough():
    assert len(CONFIGS) + len(TENSORS) + len(GGUF) >= 80
