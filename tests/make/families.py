"""Tiny configurations of every family with experts that transformers has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5")

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODELS = Path(transformers.__file__).parent / "models"


def experts_classes() -> Iterator[tuple[str, str]]:
    """(module, class) of every class called ...Experts, by the source text:
    nothing is imported to collect tests.
    """
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        for match in re.finditer(r"^class (\w*Experts)\(", file.read_text(encoding="utf-8"), re.M):
            yield f"transformers.models.{file.parent.name}.{file.stem}", match[1]


CLASSES = list(experts_classes())


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_topk": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "experts_per_token": 2,
    "decoder_sparse_step": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "attn_layer_period": 2,
    "attn_layer_offset": 0,
    "num_dense_layers": 0,
    "ffn_hidden_size": 48,
    "o_lora_rank": 16,
    "o_groups": 2,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "moe_latent_size": None,
    "moe_shared_expert_overlap": False,
    "unpadded_vocab_size": 64,
}


SPECIAL: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "flint": {"mlp_only_layers": []},
    "kimi_linear": {
        "mlp_layer_types": ["sparse", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 64,
        "global_head_dim": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 2, "expert_ffn_hidden_size": 32, "zero_expert_num": 1},
    "zaya": {"num_experts_per_tok": 1},
}


# Their text model has a row of its own; alone they come with a vision tower.
COMPOSITE = {"dots3_note", "gemma4", "llama4", "qwen3_5_moe", "qwen4_exp"}


NOT_BUILT = {"dbrx": "its nested configs take no small values; its experts stay eager anyway"}


def causal_families() -> list[str]:
    """Model types with experts that AutoModelForCausalLM knows."""
    folders = {module.split(".")[2] for module, _ in CLASSES}
    return [
        kind
        for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if kind in CONFIG_MAPPING
        and CONFIG_MAPPING[kind].__module__.split(".")[2] in folders
        and kind not in COMPOSITE
    ]


def small_config(kind: str) -> Any:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config_class = CONFIG_MAPPING[kind]
    known: set[str] = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    values = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known or kind == "dots3_note_text":  # a latent for all heads
        values["num_key_value_heads"] = SMALL["num_attention_heads"]
    return config_class(**{**values, **SPECIAL.get(kind, {})})
