"""Decoders from a Hugging Face directory on disk: one safetensors file or shards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from experiments.models.config import TransformerConfig
from experiments.models.families import Family, read_config
from experiments.models.hf_names import TENSOR_NAMES
from experiments.models.hf_tokenizer import read_tokenizer
from experiments.models.settings import Settings, json_object
from experiments.models.transformer import Transformer
from experiments.models.weights import Stored, assemble, split_fused

READABLE = ("F64", "F32", "F16", "BF16")  # others are no weights without a scale


def load_hf_directory(
    directory: str | Path, *, dtype: Any = jnp.float32, max_positions: int | None = None
) -> tuple[TransformerConfig, Transformer, Tokenizer | None]:
    """Reads and assembles.

    Args:
      directory: holds config.json, and model.safetensors or shards with an index; tokenizer.json if
        there is one.
      dtype: of the parameters, whatever the file's.
      max_positions: the longest context; None for that of training. Rotary embeddings of the kinds
        "dynamic" and "longrope" choose their frequencies by it.

    Returns:
      (config, model, tokenizer), the tokenizer None where the directory has no tokenizer.json.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {directory}")
    path = directory / "config.json"
    family, config = read_config(Settings(str(path), json_object(path)), max_positions)
    file_of = _files(directory)
    with contextlib.ExitStack() as stack:
        held = {
            file: stack.enter_context(opened(directory / file))
            for file in sorted(set(file_of.values()))
        }
        _check_index(directory, file_of, held)
        # Some writers store a buffer, or a copy of the tied embedding; neither is a weight.
        tensors = {
            name: _stored(directory / file, held[file], name)
            for name, file in file_of.items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        model = _assembled(directory, family, config, tensors, dtype)
    return config, model, read_tokenizer(directory, config.vocab_size)


def _assembled(
    directory: Path,
    family: Family,
    config: TransformerConfig,
    tensors: dict[str, Stored],
    dtype: Any,
) -> Transformer:
    names = TENSOR_NAMES | dict(family.names)
    head = tensors.pop(names["head"], None) if config.tied_embeddings else None
    where = str(directory)
    own = split_fused(config, tensors, names, family.fused, where)
    offset = family.norm_offset
    model = assemble(config, own, names, where, dtype=dtype, norm_offset=offset)
    if head is not None and not np.array_equal(head.read(), tensors[names["embedding"]].read()):
        raise ValueError(
            f"{directory / 'config.json'} has tie_word_embeddings, but the tensor {names['head']!r} is "
            f"not the embedding: one of both is wrong"
        )
    return model


def _check_index(directory: Path, file_of: dict[str, str], opened: Mapping[str, Any]) -> None:
    """Every tensor is in the file that the index names, and in no other one."""
    held = {file: set(handle.keys()) for file, handle in opened.items()}
    for name, file in sorted(file_of.items()):
        if name not in held[file]:
            raise ValueError(
                f"{directory / file} lacks the tensor {name!r}, which the index puts there"
            )
    for file, names in held.items():
        for name in sorted(names):
            if file_of.get(name) != file:
                raise ValueError(
                    f"{directory / file} holds the tensor {name!r}, which the index puts in "
                    f"{file_of.get(name)!r}: every tensor must be in one file, as the index says"
                )


def opened(path: Path) -> Any:
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
    with opened(single) as file:
        return dict.fromkeys(file.keys(), single.name)
