"""What a checkpoint's file says is honoured or refused by name; damage names the file and the field."""

import dataclasses
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors

from experiments.models import RopeScaling, load_gguf, load_hf_directory
from experiments.models.rotary import frequencies
from tests.support.checkpoint_files import (
    checkpoint_tensors,
    gguf_fields,
    gguf_tensors,
    hf_config,
    write_gguf,
    write_hf,
)


@pytest.fixture
def gguf(tmp_path, config, model):
    """Writes a file with changed keys, or changed tensors."""

    def write(tensors=None, **changes):
        fields = gguf_fields(config, **{k.replace("__", "."): x for k, x in changes.items()})
        return write_gguf(
            tmp_path / "it.gguf", fields, gguf_tensors(model) | (tensors or {}), config.head_dim
        )

    return write


@pytest.fixture
def hf(tmp_path, model):
    def write(tensors=None, **changes):
        config = hf_config(model.config, **changes)
        return write_hf(tmp_path, config, checkpoint_tensors(model) | (tensors or {}))

    return write


def refused(call, *words):
    with pytest.raises(ValueError, match=r"\S") as error:
        call()
    for word in words:
        assert word in str(error.value)


ROPE = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 1),
        ({ROPE + "factor": 4.0}, 4),  # as llama.cpp has it
        ({ROPE + "type": "linear", ROPE + "factor": 4.0}, 4),
        ({ROPE + "type": "none", ROPE + "factor": 4.0}, 1),
        ({"llama.rope.scale_linear": 2.0}, 2),
        ({ROPE + "factor": 4.0, "llama.rope.scale_linear": 2.0}, 4),
        ({ROPE + "type": "linear", ROPE + "factor": 1.0, ROPE + "attn_factor": 1.0}, 1),
    ],
)
def test_gguf_rotary_scaling(gguf, config, changes, factor):
    loaded = load_gguf(gguf(**changes))[0]
    plain = frequencies(config.head_dim, config.rope_base)
    np.testing.assert_allclose(loaded.frequencies, [plain / factor] * 3, rtol=1e-6)
    assert loaded.rope_scaling == (None if factor == 1 else RopeScaling("linear", factor))


@pytest.mark.parametrize(
    ("flags", "around"),
    [
        ((False, False), (0, 0)),
        ((True, False), (1, 0)),
        ((False, True), (0, 1)),
        ((True,) * 2, (1, 1)),
    ],
)
def test_gguf_tokens_around_every_text(gguf, flags, around):
    changes = {"add_bos_token": flags[0], "add_eos_token": flags[1]}
    changes |= {"bos_token_id": 0, "eos_token_id": 22}
    tokenizer = load_gguf(gguf(**{f"tokenizer.ggml.{k}": x for k, x in changes.items()}))[2]
    assert tokenizer.encode("ab1").ids == [0] * around[0] + [21, 12] + [22] * around[1]
    assert tokenizer.encode("a", "b").ids.count(0) == 2 * around[0]
    assert tokenizer.encode("ab1", add_special_tokens=False).ids == [21, 12]


GGUF_REFUSED = {
    ROPE + "type": ("su", "'su'"),
    ROPE + "factor": (-1.0, "above 0"),
    ROPE + "attn_factor": (0.5, "0.5"),
    ROPE + "yarn_log_multiplier": (0.1, "0.1"),
    "llama.attention.sliding_window": (512, "512"),
    "llama.attention.scale": (0.5, "0.5"),
    "llama.attention.causal": (False, "False"),
    "llama.attention.clamp_kqv": (8.0, "8.0"),
    "llama.logit_scale": (0.25, "0.25"),
    "llama.residual_scale": (0.5, "0.5"),
    "llama.embedding_scale": (12.0, "12.0"),
    "llama.final_logit_softcapping": (30.0, "30.0"),
    "llama.expert_used_count": (2, "2"),
    "llama.vocab_size": (9, "61"),
    "llama.rope.freq_base": (float("nan"), "nan"),
    "llama.attention.layer_norm_rms_epsilon": (float("inf"), "inf"),
    "llama.context_length": (0, "1.."),
    "llama.attention.head_count_kv": ([2, 2, 2], "[2, 2, 2]"),
    "llama.block_count": (1_000_000_000, "0..10000"),
    "llama.embedding_length": ("20", "'20'"),
    "general.type": ("adapter", "'adapter'"),
    "split.count": (2, "2"),
    "adapter.lora.alpha": (16.0, "16.0"),
    "tokenizer.ggml.add_space_prefix": (True, "True"),
    "tokenizer.ggml.add_bos_token": (1, "true or false"),
    "tokenizer.ggml.remove_extra_whitespaces": (True, "True"),
    "tokenizer.ggml.token_type": ([3, 1], "2 entries for 61 tokens"),
    "tokenizer.ggml.merges": (["a b c"], "merges[0]='a b c'"),
    "tokenizer.ggml.tokens": (["a"] * 61, "tokens[1]='a'"),
}


@pytest.mark.parametrize("key", GGUF_REFUSED)
def test_gguf_refuses_by_name(gguf, key):
    value, word = GGUF_REFUSED[key]
    path = gguf(**{key: value})
    refused(lambda: load_gguf(path), str(path), key, word)


MORE_TOKENIZERS = {
    "a merge into no token": ({"merges": ["a c"]}, "merges[0]='a c'"),
    "the same merge twice": ({"merges": ["a b", "a b"]}, "merges[1]='a b'"),
    "merges of numbers": ({"merges": [1, 2]}, "merges=[1, 2]"),
    "an unknown type": ({"token_type": [3, 9] + [1] * 59}, "token_type[1]=9"),
    "no byte's character": ({"tokens": ["<e>", "a b", *map(str, range(59))]}, "tokens[1]='a b'"),
    "no token": ({"tokens": ["<e>", "", *map(str, range(59))]}, "tokens[1]=''"),
    "begins with no token": ({"add_bos_token": True, "bos_token_id": 61}, "bos_token_id=61"),
    "begins with nothing": ({"add_bos_token": True}, "lacks 'tokenizer.ggml.bos_token_id'"),
}


@pytest.mark.parametrize("case", MORE_TOKENIZERS)
def test_gguf_refuses_a_tokenizer(gguf, case):
    changes, words = MORE_TOKENIZERS[case]
    path = gguf(**{f"tokenizer.ggml.{key}": x for key, x in changes.items()})
    refused(lambda: load_gguf(path), str(path), words)


def test_gguf_settings_that_change_nothing_are_accepted(gguf, config):
    about = {"general.name": "It", "tokenizer.chat_template": "{{ x }}", "any.thing": 3}
    neutral = {
        "llama.attention.sliding_window": 0,
        "llama.logit_scale": 1.0,
        "llama.vocab_size": 61,
    }
    loaded = load_gguf(gguf(**about, **neutral))[0]
    assert dataclasses.replace(loaded, norm_eps=config.norm_eps) == config


HF_REFUSED = {
    "architectures": (["LlamaForSequenceClassification"], "Classification"),
    "sliding_window": (4096, "4096"),
    "layer_types": (["sliding_attention"] * 3, "sliding_attention"),
    "logits_scaling": (8.0, "8.0"),
    "logit_scale": (0.25, "0.25"),
    "final_logit_softcapping": (30.0, "30.0"),
    "attention_multiplier": (0.5, "0.5"),
    "embedding_multiplier": (12.0, "12.0"),
    "partial_rotary_factor": (0.5, "0.5"),
    "use_qk_norm": (True, "True"),
    "qkv_bias": (True, "True"),
    "rope_interleaved": (True, "True"),
    "num_local_experts": (8, "8"),
    "no_rope_layers": ([1, 0], "[1, 0]"),
    "clip_qkv": (8.0, "8.0"),
    "mlp_bias": (1, "1"),
    "compression_config": ({"bits": 8}, "bits"),
    "tie_word_embeddings": ("yes", "'yes'"),
    "num_hidden_layers": (2.0, "2.0"),
    "hidden_size": (True, "True"),
    "rms_norm_eps": (-1e-5, "above 0"),
    "rope_theta": ("1e4", "'1e4'"),
    "head_dim": (2**40, "in 1.."),
    "vocab_size": (None, "lacks"),
}


@pytest.mark.parametrize("key", HF_REFUSED)
def test_hf_refuses_by_name(hf, key):
    value, word = HF_REFUSED[key]
    path = hf(**{key: value})
    refused(lambda: load_hf_directory(path), str(path / "config.json"), key, word)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HF_ROPE_REFUSED = {
    "a factor alone": ({"factor": 4.0}, ["factor=4.0"]),
    "default with a factor": ({"rope_type": "default", "factor": 4.0}, ["factor=4.0"]),
    "dynamic": ({"type": "dynamic", "factor": 0.0}, ["factor=0.0"]),
    "longrope": ({"type": "longrope", "short_factor": [1.0], "factor": 2}, ["lacks 'long_factor'"]),
    "another": ({"type": "ntk", "factor": 2.0}, ["'ntk'", "'dynamic', 'yarn'"]),
    "two types": ({"type": "linear", "rope_type": "llama3", "factor": 2.0}, ["rope_type='llama3'"]),
    "no factor": ({"type": "linear"}, ["lacks 'factor'"]),
    "a zero factor": ({"type": "linear", "factor": 0}, ["factor=0", "above 0"]),
    "an infinite factor": ({"type": "linear", "factor": float("inf")}, ["factor=inf"]),
    "a part of llama3": (LLAMA3, ["lacks 'original_max_position_embeddings'"]),
    "crossed ends": (
        LLAMA3 | {"low_freq_factor": 4.0, "original_max_position_embeddings": 16},
        ["low_frequency_factor=4.0"],
    ),
    "attention factor": ({"type": "linear", "factor": 2.0, "attention_factor": 0.5}, ["0.5"]),
    "no object": ([4.0], ["an object"]),
    "no name": ({"type": 3, "factor": 2.0}, ["type=3"]),
    "by layer": ({"full_attention": {"rope_type": "default"}}, ["full_attention"]),
}


@pytest.mark.parametrize("case", HF_ROPE_REFUSED)
def test_hf_refuses_a_rotary_scaling(hf, case):
    scaling, words = HF_ROPE_REFUSED[case]
    path = hf(rope_scaling=scaling)
    refused(lambda: load_hf_directory(path), str(path / "config.json"), *words)


def test_hf_two_rotary_scalings_that_differ_are_refused(hf):
    linear = {"rope_type": "linear", "factor": 2.0}
    path = hf(rope_scaling=linear, rope_parameters=linear | {"factor": 4.0})
    refused(lambda: load_hf_directory(path), "rope_scaling", "'factor': 4.0")
    same = hf(rope_scaling=linear, rope_parameters=linear)
    assert load_hf_directory(same)[0].rope_scaling == RopeScaling("linear", 2.0)


def test_hf_settings_that_change_nothing_are_accepted(hf, config):
    about = {
        "transformers_version": "5.0",
        "torch_dtype": "bfloat16",
        "_x": None,
        "use_cache": True,
    }
    neutral = {
        "sliding_window": None,
        "logit_scale": 1,
        "hidden_act": "swish",
        "use_qk_norm": False,
    }
    lists = {"architectures": ["LlamaForCausalLM"], "layer_types": ["full_attention"] * 3}
    assert load_hf_directory(hf(**about, **neutral, **lists))[0] == config


def test_a_stored_head_beside_tied_embeddings_must_be_the_embedding(hf, model):
    head = np.array(model.embedding[...])
    head[3, 4] += 1
    path = hf({"lm_head.weight": head})
    refused(lambda: load_hf_directory(path), str(path), "tie_word_embeddings", "lm_head.weight")


def with_value(array, value):
    array = np.array(array)
    array.flat[7] = value
    return array


UP = {"gguf": "blk.1.ffn_up.weight", "hf": "model.layers.1.mlp.up_proj.weight"}


@pytest.mark.parametrize("form", UP)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(request, form, value, model):
    write, load = request.getfixturevalue(form), {"gguf": load_gguf, "hf": load_hf_directory}[form]
    name = UP[form]
    own = (gguf_tensors if form == "gguf" else checkpoint_tensors)(model)[name]
    path = write({name: with_value(own, value)})
    refused(lambda: load(path), str(path), name, "holds 1 numbers that are not finite", "[0, 7]")


@pytest.mark.parametrize("form", UP)
def test_weights_beyond_the_dtype_are_named(request, form, model):
    write, load = request.getfixturevalue(form), {"gguf": load_gguf, "hf": load_hf_directory}[form]
    name = UP[form]
    own = (gguf_tensors if form == "gguf" else checkpoint_tensors)(model)[name]
    path = write({name: with_value(own, -7e4)})
    refused(lambda: load(path, dtype=np.float16), name, "reaches 70000, beyond float16", "65504")
    loaded = load(path, dtype=ml_dtypes.bfloat16)[1]
    assert float(np.min(loaded.layers.up[...].astype(np.float32))) == -70144.0  # rounded
    refused(lambda: load(path, dtype=np.int8), "dtype is", "floating")


@pytest.mark.parametrize(("dtype", "kind"), [(np.int8, "I8"), (np.uint8, "U8"), ("fp8", "F8_E4M3")])
def test_hf_numbers_without_a_scale_are_named(hf, model, dtype, kind):
    name = UP["hf"]
    dtype = ml_dtypes.float8_e4m3fn if dtype == "fp8" else dtype
    own = checkpoint_tensors(model)[name].astype(dtype)
    path = hf({name: own})
    refused(lambda: load_hf_directory(path), "model.safetensors", name, f"type {kind}", "scale")


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float64])
def test_gguf_numbers_without_a_scale_are_named(gguf, model, dtype):
    name = UP["gguf"]
    path = gguf({name: gguf_tensors(model)[name].astype(dtype)})
    kind = {np.int8: "I8", np.int32: "I32", np.float64: "F64"}[dtype]
    refused(lambda: load_gguf(path), str(path), name, f"type {kind}")


def test_a_gguf_cut_anywhere_names_the_file_and_what_is_missing(gguf):
    path = gguf()
    whole = path.read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(whole), 997), len(whole) - 32]:
        path.write_bytes(whole[:size])
        refused(lambda: load_gguf(path), str(path))


def patched(path, at, letter, value):
    content = bytearray(path.read_bytes())
    struct.pack_into(f"<{letter}", content, at, value)
    path.write_bytes(content)


def test_gguf_counts_are_held_against_the_files_size(gguf):
    path = gguf()
    whole = path.read_bytes()
    tensor = whole.index(b"token_embd.weight") + len("token_embd.weight")
    for at, letter, value, words in (
        (4, "I", 9, "version 9"),
        (8, "Q", 2**62, "the number of tensors is 4611686018427387904"),
        (16, "Q", 2**62, "the number of keys is 4611686018427387904"),
        (24, "Q", 2**63, "the length of key 0"),
        (whole.index(b"tokenizer.ggml.tokens") + 29, "Q", 2**61, "length of tokenizer.ggml.tokens"),
        (tensor, "I", 5, "'token_embd.weight' has 5 axes"),
        (tensor + 4, "Q", 2**63, "'token_embd.weight', "),
        (tensor + 12, "Q", 0, "'token_embd.weight' has shape [0, 20]"),
        (tensor + 20, "I", 77, "'token_embd.weight' has the type 77"),
        (tensor + 24, "Q", 2**40, "'token_embd.weight', "),
        (tensor + 24, "Q", 64, "lie upon each other"),
    ):
        path.write_bytes(whole)
        patched(path, at, letter, value)
        refused(lambda: load_gguf(path), str(path), words)


def test_hf_sizes_are_held_against_the_tensors_before_anything_is_built(hf):
    for key in ("num_hidden_layers", "vocab_size", "intermediate_size", "head_dim"):
        path = hf(**{key: 1_000_000_000 - 2})
        words = "999999998" if key != "head_dim" else str(999999998 * 2)
        refused(lambda path=path, words=words: load_hf_directory(path), str(path), words)


HF_DAMAGED = {
    "an empty config": ("config.json", b"", "cannot be read as JSON"),
    "a list": ("config.json", b"[]", "must be an object"),
    "a key twice": ("config.json", b'{"a": 1, "a": 2}', "'a' is there twice"),
    "no weights": ("model.safetensors", b"", "cannot be read as safetensors"),
    "a header beyond the file": (
        "model.safetensors",
        b"\xff" * 64,
        "cannot be read as safetensors",
    ),
    "no index": ("model.safetensors.index.json", b"{}", "lacks 'weight_map'"),
    "a shard elsewhere": (
        "model.safetensors.index.json",
        b'{"weight_map": {"a": "../model.safetensors"}}',
        "'../model.safetensors', which is not in",
    ),
    "no tokenizer": ("tokenizer.json", b"{}", "is no tokenizer"),
    "a cut tokenizer": ("tokenizer.json", b'{"version": "1.0", "model"', "cannot be read as JSON"),
}


@pytest.mark.parametrize("case", HF_DAMAGED)
def test_hf_damage_names_the_file(hf, case):
    file, content, words = HF_DAMAGED[case]
    path = hf()
    (path / file).write_bytes(content)
    refused(lambda: load_hf_directory(path), file, words)


def saved_tokenizer(folder, vocabulary, **changes):
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [("a", "b")])
    )
    tokenizer.add_special_tokens(["a"])
    raw = json.loads(tokenizer.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def test_hf_a_callers_truncation_is_not_kept(hf):
    path = hf()
    cut = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    saved_tokenizer(path, ["a", "b", "ab"], truncation=cut)
    assert load_hf_directory(path)[2].encode("bb").ids == [1, 1]


VOCAB = {"a": 0, "b": 1, "ab": 2}
HF_TOKENIZERS = {
    "a merge into no token": ({"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}, "merges[0]"),
    "a merge of nothing": ({"vocab": VOCAB, "merges": ["ab"]}, "model.merges[0] is 'ab'"),
    "merges of numbers": ({"vocab": VOCAB, "merges": [1]}, "model.merges[0] is 1"),
    "an id beyond the model": ({"vocab": VOCAB | {"c": 61}}, "'c' with the id 61: it must be text"),
    "a negative id": ({"vocab": VOCAB | {"c": -1}}, "'c' with the id -1"),
    "one id twice": ({"vocab": VOCAB | {"c": 1}}, "one id to several tokens"),
    "no vocabulary": ({"vocab": None}, "model.vocab must be"),
    "another kind": ({"vocab": VOCAB, "type": "Best"}, "is no tokenizer"),
}


@pytest.mark.parametrize("case", HF_TOKENIZERS)
def test_hf_tokenizers_are_checked(hf, case, capfd):
    changes, words = HF_TOKENIZERS[case]
    path = hf()
    saved_tokenizer(path, ["a", "b", "ab"], model={"type": "BPE", "merges": []} | changes)
    refused(lambda: load_hf_directory(path), "tokenizer.json", words)
    assert capfd.readouterr().err == ""  # no panic of the package


def test_hf_beginnings_that_the_tokenizer_does_not_add_are_refused(hf):
    path = hf()
    saved_tokenizer(path, ["a", "b", "ab"])
    config = path / "tokenizer_config.json"
    config.write_text('{"add_bos_token": true, "bos_token": "a"}')
    refused(lambda: load_hf_directory(path), "add_bos_token=True", "tokenizer.json does not add")
    config.write_text('{"add_bos_token": false, "bos_token": {"content": "a"}}')
    load_hf_directory(path)
    begin = processors.TemplateProcessing(single="a $A", special_tokens=[("a", 0)])
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = begin
    tokenizer.save(str(path / "tokenizer.json"))
    refused(lambda: load_hf_directory(path), "add_bos_token=False", "tokenizer.json adds")
    config.write_text('{"add_bos_token": true, "bos_token": {"content": "a"}}')
    assert load_hf_directory(path)[2].encode("b").ids == [0, 1]
