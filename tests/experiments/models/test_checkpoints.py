"""Checkpoints written by the test and read back, and those that must be refused."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from experiments.models import (
    RopeScaling,
    Transformer,
    TransformerConfig,
    load_gguf,
    load_hf_directory,
    smollm2_path,
)
from tests.support.checkpoint_files import (
    checkpoint_tensors,
    gguf_fields,
    gguf_tensors,
    hf_config,
    write_gguf,
    write_hf,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def untied(config):
    return Transformer(dataclasses.replace(config, tied_embeddings=False), rngs=nnx.Rngs(3))


def assert_same(loaded, model):
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(loaded)), nnx.to_flat_state(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))


@pytest.mark.parametrize("shards", [1, 3])
def test_hf_directory(tmp_path, model, tokens, logits, shards):
    directory = write_hf(tmp_path, hf_config(model.config), checkpoint_tensors(model), shards)
    config, loaded, tokenizer = load_hf_directory(directory)
    assert (config, tokenizer) == (model.config, None)
    np.testing.assert_array_equal(nnx.jit(lambda m, t: m(t))(loaded, tokens), logits)


def test_hf_untied_head(tmp_path, config):
    model = untied(config)
    write_hf(tmp_path, hf_config(model.config), checkpoint_tensors(model))
    loaded_config, loaded, _ = load_hf_directory(tmp_path)
    assert not loaded_config.tied_embeddings
    assert_same(loaded, model)


def test_hf_stored_copies_and_buffers_are_ignored(tmp_path, model):
    tensors = checkpoint_tensors(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert_same(load_hf_directory(write_hf(tmp_path, hf_config(model.config), tensors))[1], model)


def test_hf_bfloat16_file(tmp_path, model):
    tensors = {
        name: array.astype(jnp.bfloat16) for name, array in checkpoint_tensors(model).items()
    }
    write_hf(tmp_path, hf_config(model.config), tensors)
    embedding = load_hf_directory(tmp_path)[1].embedding[...]
    assert embedding.dtype == jnp.float32
    np.testing.assert_array_equal(embedding, model.embedding[...].astype(jnp.bfloat16))
    assert load_hf_directory(tmp_path, dtype=jnp.bfloat16)[1].embedding[...].dtype == jnp.bfloat16


def test_hf_tokenizer(tmp_path, model):
    write_hf(tmp_path, hf_config(model.config), checkpoint_tensors(model))
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="b")).save(str(tmp_path / "tokenizer.json"))
    assert load_hf_directory(tmp_path)[2].encode("a").ids == [0]


@pytest.mark.parametrize(
    ("changes", "base", "scaling"),
    [
        ({"rope_scaling": None}, 10_000.0, None),
        ({"rope_scaling": {"rope_type": "default"}}, 10_000.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10_000.0, RopeScaling("linear", 2.0)),
        ({"rope_scaling": LLAMA3}, 10_000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 16)),
        (
            {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
            5e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
        ),
    ],
)
def test_hf_rotary_settings(tmp_path, model, changes, base, scaling):
    write_hf(tmp_path, hf_config(model.config, **changes), checkpoint_tensors(model))
    config, _, _ = load_hf_directory(tmp_path)
    assert (config.rope_base, config.rope_scaling) == (base, scaling)


def test_hf_defaults(tmp_path, config):
    """Older files leave out head_dim, num_key_value_heads and rope_theta."""
    model = Transformer(
        dataclasses.replace(config, embed_dim=24, num_heads=3, num_kv_heads=3), rngs=nnx.Rngs(0)
    )
    raw = hf_config(model.config)
    for key in ("head_dim", "num_key_value_heads", "rope_theta"):
        del raw[key]
    assert load_hf_directory(write_hf(tmp_path, raw, checkpoint_tensors(model)))[0] == model.config


@pytest.mark.parametrize("tied", [True, False])
def test_gguf(tmp_path, config, model, tied):
    model = model if tied else untied(config)
    path = write_gguf(
        tmp_path / "small.gguf", gguf_fields(config), gguf_tensors(model), model.config.head_dim
    )
    loaded_config, loaded, tokenizer = load_gguf(path)
    exact = dataclasses.replace(loaded_config, norm_eps=config.norm_eps)  # float32 in the file
    assert exact == model.config
    assert_same(loaded, model)
    assert tokenizer.encode("ab12<|end|>").ids == [21, 12, 13, 0]


HF_REFUSED = {
    "other model": ({"model_type": "gpt_neox"}, ["model_type", "'gpt_neox'", "llama, mistral"]),
    "attention bias": ({"attention_bias": True}, ["attention_bias", "True", "False"]),
    "mlp bias": ({"mlp_bias": True}, ["mlp_bias", "True"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
    "rope kind": ({"rope_scaling": {"rope_type": "ntk"}}, ["rope_type", "'ntk'", "'llama3'"]),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, ["'factor'"]),
    "odd head": ({"head_dim": 7}, ["head_dim=7", "even"]),
    "heads do not divide": ({"num_key_value_heads": 4}, ["num_heads=6", "num_kv_heads=4"]),
    "no layers": ({"num_hidden_layers": 0}, ["num_layers", "0"]),
    "more layers": ({"num_hidden_layers": 4}, ["lacks 9 tensors", "model.layers.3."]),
    "fewer layers": ({"num_hidden_layers": 2}, ["has 9 tensors", "model.layers.2."]),
    "other width": ({"hidden_size": 24}, ["embed_tokens.weight", "[61, 24]", "[61, 20]"]),
    "other vocabulary": ({"vocab_size": 60}, ["embed_tokens.weight", "[60, 20]"]),
    "untied without a head": ({"tie_word_embeddings": False}, ["lm_head.weight"]),
}


@pytest.mark.parametrize("case", HF_REFUSED)
def test_hf_refuses(tmp_path, model, case):
    changes, expected = HF_REFUSED[case]
    write_hf(tmp_path, hf_config(model.config, **changes), checkpoint_tensors(model))
    with pytest.raises(ValueError, match=r"\S") as error:
        load_hf_directory(tmp_path)
    for words in expected:
        assert words in str(error.value)


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_attention_heads", "vocab_size"])
def test_hf_refuses_a_missing_key(tmp_path, model, key):
    raw = hf_config(model.config)
    del raw[key]
    with pytest.raises(ValueError, match=key):
        load_hf_directory(write_hf(tmp_path, raw, checkpoint_tensors(model)))


def test_hf_refuses_a_tensor_of_another_shape(tmp_path, model):
    tensors = checkpoint_tensors(model)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj.*\[20, 48\].*\[48, 20\]"):
        load_hf_directory(write_hf(tmp_path, hf_config(model.config), tensors))


def test_hf_refuses_a_bias(tmp_path, model):
    tensors = checkpoint_tensors(model) | {"model.layers.0.mlp.up_proj.bias": np.ones(28, "f4")}
    with pytest.raises(ValueError, match=r"up_proj\.bias.*biases"):
        load_hf_directory(write_hf(tmp_path, hf_config(model.config), tensors))


def test_hf_refuses_a_lost_shard(tmp_path, model):
    write_hf(tmp_path, hf_config(model.config), checkpoint_tensors(model), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003"):
        load_hf_directory(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_hf_names_the_missing_file(tmp_path, model, missing):
    write_hf(tmp_path, hf_config(model.config), checkpoint_tensors(model))
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        load_hf_directory(tmp_path)


GGUF_REFUSED = {
    "no layer count": ({"llama.block_count": None}, ["llama.block_count"]),
    "rope scaling": ({"llama.rope.scaling.type": "su"}, ["scaling.type", "'su'", "'none'"]),
    "experts": ({"llama.expert_count": 8}, ["llama.expert_count", "8"]),
    "partial rotary": ({"llama.rope.dimension_count": 4}, ["dimension_count", "4", "8"]),
    "value size": ({"llama.attention.value_length": 16}, ["value_length", "16", "8"]),
    "tokenizer kind": ({"tokenizer.ggml.model": "bert"}, ["ggml.model", "'bert'", "'gpt2'"]),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "tekken"}, ["ggml.pre", "'tekken'", "'smollm'"]),
    "more heads": (
        {"llama.attention.head_count": 8},
        ["attn_output.weight", "[20, 64]", "[20, 48]"],
    ),
    "fewer layers": ({"llama.block_count": 2}, ["has 9 tensors", "blk.2."]),
}


@pytest.mark.parametrize("case", GGUF_REFUSED)
def test_gguf_refuses(tmp_path, config, model, case):
    changes, expected = GGUF_REFUSED[case]
    fields = gguf_fields(config, **changes)
    path = write_gguf(tmp_path / "bad.gguf", fields, gguf_tensors(model), config.head_dim)
    with pytest.raises(ValueError, match=r"\S") as error:
        load_gguf(path)
    for words in expected:
        assert words in str(error.value)


def test_gguf_refuses_another_architecture(tmp_path, config, model):
    path = tmp_path / "bad.gguf"
    write_gguf(path, gguf_fields(config), gguf_tensors(model), None, architecture="mamba")
    with pytest.raises(ValueError, match=r"general\.architecture='mamba'.*'llama'"):
        load_gguf(path)


def test_gguf_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_gguf(tmp_path / "none.gguf")


def test_gguf_refuses_another_file_format(tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("not weights, but long enough to hold a header")
    with pytest.raises(ValueError, match="GGUF"):
        load_gguf(path)


def test_smollm2_path_names_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="make venv"):
        smollm2_path()


def test_config_is_hashable(config):
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("field", ["vocab_size", "num_layers", "num_kv_heads", "head_dim"])
def test_config_refuses_zero(config, field):
    with pytest.raises(ValueError, match=field):
        TransformerConfig(**{**dataclasses.asdict(config), field: 0})
