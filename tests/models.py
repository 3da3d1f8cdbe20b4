"""Tiny random models of several families, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": HYBRID},
    "gpt_oss": {
        "sliding_window": 8,
        "layer_types": HYBRID,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # Without a window in its full layers, though their modules have one; those have no rotary embedding either.
    "exaone4": {"sliding_window": 8, "layer_types": HYBRID},
    # Its layers get their cache as `layer_past`.
    "gpt_neox": {},
    "phi3": {},
    "cohere": {},
    "glm": {},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
}


def tiny(family: str = "llama", seed: int = 0, **options: Any) -> Any:
    """A random 3-layer model: 4 query heads, 2 KV heads, width 16 each, vocabulary 128."""
    base = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**base, **FAMILIES.get(family, {}), **options})
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(rows: int = 3, length: int = 64, pads: tuple[int, ...] = (20, 3, 0)) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a 2-D mask with left padding."""
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads[:rows]):
        mask[row, :count] = 0
    return torch.where(mask == 1, ids, 0), mask


GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
