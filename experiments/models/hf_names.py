"""What families call their tensors in Hugging Face checkpoints."""

from __future__ import annotations

LAYER = "model.layers.{}."
TENSOR_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": LAYER + "input_layernorm.weight",
    "query": LAYER + "self_attn.q_proj.weight",
    "key": LAYER + "self_attn.k_proj.weight",
    "value": LAYER + "self_attn.v_proj.weight",
    "query_bias": LAYER + "self_attn.q_proj.bias",
    "key_bias": LAYER + "self_attn.k_proj.bias",
    "value_bias": LAYER + "self_attn.v_proj.bias",
    "query_norm": LAYER + "self_attn.q_norm.weight",
    "key_norm": LAYER + "self_attn.k_norm.weight",
    "output": LAYER + "self_attn.o_proj.weight",
    "mlp_norm": LAYER + "post_attention_layernorm.weight",
    "gate": LAYER + "mlp.gate_proj.weight",
    "up": LAYER + "mlp.up_proj.weight",
    "down": LAYER + "mlp.down_proj.weight",
}
GEMMA_NAMES = {
    "post_attention_norm": LAYER + "post_attention_layernorm.weight",
    "mlp_norm": LAYER + "pre_feedforward_layernorm.weight",
    "post_mlp_norm": LAYER + "post_feedforward_layernorm.weight",
}
MIXTRAL_NAMES = {
    "router": LAYER + "block_sparse_moe.gate.weight",
    "gate": LAYER + "block_sparse_moe.experts.{}.w1.weight",
    "up": LAYER + "block_sparse_moe.experts.{}.w3.weight",
    "down": LAYER + "block_sparse_moe.experts.{}.w2.weight",
}
QWEN_EXPERT_NAMES = {
    "router": LAYER + "mlp.gate.weight",
    "gate": LAYER + "mlp.experts.{}.gate_proj.weight",
    "up": LAYER + "mlp.experts.{}.up_proj.weight",
    "down": LAYER + "mlp.experts.{}.down_proj.weight",
}
# Fused along their rows, in this order.
PHI_FUSED = {
    LAYER + "self_attn.qkv_proj.weight": ("query", "key", "value"),
    LAYER + "mlp.gate_up_proj.weight": ("gate", "up"),
}
