"""Tiny random models of every architecture that loads whole from GGUF, as Hugging Face directories
with a tokenizer.

``PYTHONPATH=tests python -m make.whole_models DIR qwen3moe`` writes one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ktk.models.arch import BY_PRE_NAME

Made = Callable[..., tuple[Any, Path]]  # the fixture of tests/models/conftest.py
VOCAB = 384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT = (
    "the quick brown fox jumps over the lazy dog and runs away; 1234 times it did, it's said. " * 4
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
H, LAYERS, E, K, WIDTH = 256, 3, 8, 2, 256  # rows that every block type fits
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "max_position_embeddings": 512,
    "intermediate_size": WIDTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": E,
    "first_k_dense_replace": 1,
    "intermediate_size": 2 * WIDTH,
}
# name -> (model_type, general.architecture, what differs from COMMON)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3moe": (
        "qwen3_moe",
        "qwen3moe",
        {"head_dim": 32, "num_experts": E, "moe_intermediate_size": WIDTH, "norm_topk_prob": True},
    ),
    "qwen2moe": (
        "qwen2_moe",
        "qwen2moe",
        {
            "num_experts": E,
            "moe_intermediate_size": WIDTH,
            "shared_expert_intermediate_size": 2 * WIDTH,
        },
    ),
    "mixtral": ("mixtral", "llama", {"num_local_experts": E, "tie_word_embeddings": True}),
    "deepseek2-lite": (
        "deepseek_v2",
        "deepseek2",
        {
            **LATENT,
            "num_hidden_layers": 27,  # by which llama.cpp knows the models without a low rank of q
            "hidden_size": 128,
            "kv_lora_rank": 128,
            "moe_intermediate_size": 64,
            "intermediate_size": 128,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "topk_method": "greedy",
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek2-v2": (
        "deepseek_v2",
        "deepseek2",
        {
            **LATENT,
            "q_lora_rank": 256,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "deepseek2-v3": (
        "deepseek_v3",
        "deepseek2",
        {
            **LATENT,
            "q_lora_rank": 256,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        "gpt-oss",
        {
            "head_dim": 64,
            "num_local_experts": E,
            "sliding_window": 16,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "glm4moe": (
        "glm4_moe",
        "glm4moe",
        {
            "head_dim": 64,
            "n_routed_experts": E,
            "n_shared_experts": 1,
            "moe_intermediate_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 2.0,
        },
    ),
    "minimax-m2": (
        "minimax_m2",
        "minimax-m2",
        {
            "head_dim": 64,
            "num_local_experts": E,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "olmoe": ("olmoe", "olmoe", {"num_experts": E, "num_key_value_heads": 4}),
    "granitemoe": (
        "granitemoe",
        "granitemoe",
        {
            "num_local_experts": E,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
}


def tokenizer(pre: str = "qwen2") -> PreTrainedTokenizerFast:
    """A byte-level BPE of some hundred tokens, cutting text as ``pre`` does."""
    made = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in BY_PRE_NAME[pre].splits]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 16,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=TEMPLATE,
    )


def model(name: str, seed: int = 0) -> Any:
    """A random float32 model: weights wide enough that every part of it shows in the logits."""
    model_type, _, changes = MODELS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**COMMON, **changes})
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            if key.endswith(("norm.weight", "layernorm.weight")):
                tensor.uniform_(0.5, 1.5)
            elif "correction_bias" in key:
                tensor.uniform_(-0.1, 0.1)
            elif tensor.ndim == 1:
                tensor.normal_(0, 0.3)
            elif ".gate.weight" in key or ".router.weight" in key:
                tensor.normal_(0, 0.3)  # experts far apart: rounding changes none that is taken
            elif "embed_tokens" in key:
                tensor.normal_(0, 1)
            else:
                tensor.normal_(0, 0.06)
    return made


def write(directory: Path, name: str, seed: int = 0) -> Any:
    """The model and a tokenizer, as ``from_pretrained`` and ``ktk convert`` read them;
    returns the model.
    """
    made = model(name, seed)
    made.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == MODELS[name][0]
    return made


IDS = torch.tensor([[1, *np.random.default_rng(0).integers(3, VOCAB - 20, 63).tolist()]])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits[0].float()


def usual_agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """The median cosine: where rounding takes a random router to another expert, nothing agrees."""
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).median())


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """The smallest cosine over positions."""
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min())


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
