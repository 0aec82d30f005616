"""Language models in Flax, loaded from files on disk: no hub, no network."""

from experiments.models.attention import causal_attention, decode_attention, prefill_attention
from experiments.models.chat import Chat, chat_prompt, next_turn
from experiments.models.config import TransformerConfig
from experiments.models.generate import greedy
from experiments.models.gguf import load_gguf
from experiments.models.load import Loaded, load
from experiments.models.packaged import gemma3_path, smollm2_path
from experiments.models.rotary import RopeScaling
from experiments.models.safetensors import load_hf_directory
from experiments.models.transformer import (
    Attention,
    Transformer,
    TransformerLayer,
)

__all__ = [
    "Attention",
    "Chat",
    "Loaded",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "TransformerLayer",
    "causal_attention",
    "chat_prompt",
    "decode_attention",
    "gemma3_path",
    "greedy",
    "load",
    "load_gguf",
    "load_hf_directory",
    "next_turn",
    "prefill_attention",
    "smollm2_path",
]
