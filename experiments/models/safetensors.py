"""Llama models from a Hugging Face directory on disk: one safetensors file or shards."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from experiments.models.hf_tokenizer import read_tokenizer
from experiments.models.rotary import RopeScaling
from experiments.models.settings import MOST, Settings, json_object
from experiments.models.transformer import Transformer, TransformerConfig
from experiments.models.weights import Stored, assemble

TENSOR_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "output": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
READABLE = ("F64", "F32", "F16", "BF16")  # others are no weights without a scale
# Keys of config.json that change what other models compute, and what they are where they change nothing;
# the first value is that of a file without the key.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "architectures": (["LlamaForCausalLM"],),
    "partial_rotary_factor": (1.0,),
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), (1.0,)
    ),
    **dict.fromkeys(("num_experts", "num_local_experts"), (1, 0)),
    "is_decoder": (True, False),
}
# Keys of all models' files that say nothing about what this one computes.
HARMLESS = {
    *("_name_or_path", "transformers.js_config", "is_llama_config", "name_or_path", "language"),
    *("torch_dtype", "dtype", "use_cache", "initializer_range", "pretraining_tp", "auto_map"),
    *("attention_dropout", "hidden_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("sep_token_id", "decoder_start_token_id", "return_dict", "task_specific_params", "prefix"),
    *("min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams"),
    *("num_beam_groups", "repetition_penalty", "length_penalty", "num_return_sequences"),
    *("problem_type", "chunk_size_feed_forward", "tie_encoder_decoder", "tokenizer_class"),
    *("diversity_penalty", "encoder_no_repeat_ngram_size", "no_repeat_ngram_size", "max_length"),
    *("remove_invalid_values", "output_scores", "unsloth_fixed", "early_stopping", "id2label"),
    "label2id",
}
ROPE_KINDS = ("default", "linear", "llama3")


def load_hf_directory(
    directory: str | Path, *, dtype: Any = jnp.float32
) -> tuple[TransformerConfig, Transformer, Tokenizer | None]:
    """Reads and assembles.

    Args:
      directory: holds config.json, and model.safetensors or shards with an index; tokenizer.json if
        there is one.
      dtype: of the parameters, whatever the file's.

    Returns:
      (config, model, tokenizer), the tokenizer None where the directory has no tokenizer.json.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {directory}")
    path = directory / "config.json"
    raw = Settings(str(path), json_object(path))
    config = _config(raw)
    raw.none_left(lambda key: key in HARMLESS or key.endswith("_version"))
    file_of = _files(directory)
    with contextlib.ExitStack() as stack:
        opened = {
            file: stack.enter_context(_opened(directory / file))
            for file in sorted(set(file_of.values()))
        }
        held = {file: set(handle.keys()) for file, handle in opened.items()}
        present = {name: opened[file] for name, file in file_of.items() if name in held[file]}
        # Some writers store a buffer, or a copy of the tied embedding; neither is a weight.
        tensors = {
            name: _stored(directory / file_of[name], handle, name)
            for name, handle in present.items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        head = tensors.pop(TENSOR_NAMES["head"], None) if config.tied_embeddings else None
        model = assemble(config, tensors, TENSOR_NAMES, str(directory), dtype=dtype)
        if head is not None and not np.array_equal(
            head.read(), tensors[TENSOR_NAMES["embedding"]].read()
        ):
            raise ValueError(
                f"{path} has tie_word_embeddings, but the tensor {TENSOR_NAMES['head']!r} is not the "
                f"embedding: one of both is wrong"
            )
    return config, model, read_tokenizer(directory, config.vocab_size)


def _opened(path: Path) -> Any:
    """The package holds the header against the file's size."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


def _stored(path: Path, handle: Any, name: str) -> Stored:
    about = handle.get_slice(name)
    kind = about.get_dtype()
    if kind not in READABLE:
        raise ValueError(
            f"{path}: tensor {name!r} has the type {kind}: without a scale it is no weight, "
            f"{', '.join(READABLE)} are read"
        )
    return Stored(tuple(about.get_shape()), functools.partial(handle.get_tensor, name))


def _files(directory: Path) -> dict[str, str]:
    """Tensor name -> the file that holds it."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        file_of = json_object(index).get("weight_map")
        if not isinstance(file_of, dict) or not all(type(x) is str for x in file_of.values()):
            raise ValueError(f"{index} lacks 'weight_map', an object of tensor names and files")
        for file in sorted(set(file_of.values())):
            if Path(file).name != file or not (directory / file).is_file():
                raise ValueError(
                    f"{index.name} names the shard {file!r}, which is not in {directory}"
                )
        return file_of
    if not single.is_file():
        raise FileNotFoundError(f"neither {single.name} nor {index.name} in {directory}")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single.name)


def _config(raw: Settings) -> TransformerConfig:
    raw.only("model_type", "llama")
    if not raw.has("model_type"):
        raw.get("model_type")
    for key, supported in FIXED.items():
        raw.only(key, *supported)
    heads = raw.whole("num_attention_heads", 1, MOST)
    embed_dim = raw.whole("hidden_size", 1, MOST)
    if not raw.has("head_dim") and embed_dim % heads:
        raise raw.wrong("hidden_size", f"a multiple of num_attention_heads, {heads}")
    layers = raw.whole("num_hidden_layers", 0, MOST)
    if raw.has("layer_types") and raw.get("layer_types") != ["full_attention"] * layers:
        raise raw.wrong("layer_types", "'full_attention' for every layer")
    base, scaling = _rope(raw)
    return raw.made(
        TransformerConfig,
        vocab_size=raw.whole("vocab_size", 1, MOST),
        num_layers=layers,
        embed_dim=embed_dim,
        hidden_dim=raw.whole("intermediate_size", 1, MOST),
        num_heads=heads,
        num_kv_heads=raw.whole("num_key_value_heads", 1, MOST, heads),
        head_dim=raw.whole("head_dim", 1, MOST, embed_dim // heads),
        rope_base=base,
        norm_eps=raw.positive("rms_norm_eps", 1e-6),
        tied_embeddings=raw.flag("tie_word_embeddings", False),
        max_positions=raw.whole("max_position_embeddings", 1, MOST, 2048),
        rope_scaling=scaling,
    )


def _rope(raw: Settings) -> tuple[float, RopeScaling | None]:
    """Base and scaling: newer writers gather them in rope_parameters, older ones have two keys."""
    given = {key: raw.get(key) for key in ("rope_parameters", "rope_scaling") if raw.has(key)}
    for key, value in given.items():
        if not isinstance(value, dict):
            raise raw.wrong(key, "an object")
    rope = Settings(f"{' and '.join(given)} in {raw.where}", dict(*list(given.values())[:1]))
    if any(value != rope.values for value in given.values()):
        raise raw.wrong("rope_scaling", f"the same as rope_parameters, {rope.values}")
    base = raw.positive("rope_theta", 10_000.0)
    if rope.has("rope_theta"):
        base = rope.positive("rope_theta")
    rope.only("partial_rotary_factor", 1.0)
    kinds = {
        rope.get(key) for key in ("rope_type", "type") if rope.has(key) and _is_text(rope, key)
    }
    if len(kinds) > 1:
        raise rope.wrong("rope_type", f"the same as type, {rope.values['type']!r}")
    kind = kinds.pop() if kinds else "default"
    if kind not in ROPE_KINDS:
        raise ValueError(
            f"unsupported rope_scaling rope_type={kind!r} in {raw.where}: "
            "'default', 'linear' and 'llama3' are implemented"
        )
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", rope.positive("factor"))
    elif kind == "llama3":
        scaling = rope.made(
            RopeScaling,
            kind="llama3",
            factor=rope.positive("factor"),
            low_frequency_factor=rope.positive("low_freq_factor"),
            high_frequency_factor=rope.positive("high_freq_factor"),
            original_positions=rope.whole("original_max_position_embeddings", 1, MOST),
        )
    rope.none_left(lambda key: key == "original_max_position_embeddings" and kind == "linear")
    return base, scaling


def _is_text(rope: Settings, key: str) -> bool:
    if type(rope.values[key]) is not str:
        raise rope.wrong(key, "a name")
    return True
