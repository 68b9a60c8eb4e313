"""DeepSeek V2, V3 and R1, Kimi-K2: latent attention, kv_b whole in older files,
as k_b and v_b in newer ones.
"""

from __future__ import annotations

import numpy as np

from ktk.models.arch.names import MLP_EXPERTS
from ktk.models.architecture import Architecture
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole import rows
from ktk.models.whole.rope import rope_of, rope_parameters
from ktk.models.whole.rows import Fields, Key, Tensor, WholeModel
from ktk.models.whole.source import Source
from ktk.models.whole.tokenizer import LOWER, SUFFIXES, TAIL, UPPER, WORDS, PreTokenizer


def _join_kv_b(arrays: list[np.ndarray], fields: Fields) -> np.ndarray:
    k, v = arrays  # (heads, kv_lora_rank, nope), (heads, v_head_dim, kv_lora_rank)
    both = np.concatenate([k.swapaxes(1, 2), v], axis=1)
    return both.reshape(-1, both.shape[2])


def _split_kv_b(array: np.ndarray, fields: Fields) -> list[np.ndarray]:
    heads, nope = int(fields["num_attention_heads"]), int(fields["qk_nope_head_dim"])
    both = array.reshape(heads, -1, array.shape[1])
    return [
        np.ascontiguousarray(both[:, :nope].swapaxes(1, 2)),
        np.ascontiguousarray(both[:, nope:]),
    ]


def _config(source: Source) -> Fields:
    routing = source.experts.routing
    key = source.get("attention.key_length_mla") or source.required("attention.key_length")
    value = source.get("attention.value_length_mla") or source.required("attention.value_length")
    rotated = source.required("rope.dimension_count")
    if rotated >= key:
        raise source.error(f"{source.architecture}: keys of {key} rotate {rotated}: must be fewer")
    groups = routing.expert_group_count or 1
    fields: Fields = {
        "num_key_value_heads": source.required("attention.head_count"),
        "q_lora_rank": source.get("attention.q_lora_rank") or None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": value,
        "first_k_dense_replace": source.leading_dense_layers,
        "n_routed_experts": source.num_experts,
        "n_shared_experts": _shared(source),
        "moe_intermediate_size": source.expert_width,
        "routed_scaling_factor": routing.expert_weights_scale or 1.0,
        "norm_topk_prob": bool(routing.expert_weights_norm),
        "n_group": groups,
        "topk_group": routing.expert_group_used_count or groups,
        "num_mtp_layers": 0,
    }
    rope = rope_parameters(source)
    scale = source.get("rope.scaling.yarn_log_multiplier", float)
    if rope["rope_type"] == "yarn" and scale:
        # The file's is a tenth of mscale_all_dim, and says nothing of an mscale that differs.
        fields["rope_parameters"] = {**rope, "mscale": 10 * scale, "mscale_all_dim": 10 * scale}
    if routing.expert_gating_func == "sigmoid":
        return {**fields, "model_type": "deepseek_v3"}
    if routing.expert_gating_func != "softmax" or fields["norm_topk_prob"]:
        raise source.error(
            f"gating {routing.expert_gating_func}, normalised: {fields['norm_topk_prob']}: ktk "
            "can run softmax without and sigmoid with or without"
        )
    method = "group_limited_greedy" if groups > 1 else "greedy"
    return {**fields, "model_type": "deepseek_v2", "topk_method": method}


def _shared(source: Source) -> int:
    """Shared experts, by their width; the metadata's count agrees with it or is missing."""
    rows, width = source.rows("blk.{n}.ffn_up_shexp.weight"), source.expert_width
    if rows is None or rows % width:
        raise source.error(
            f"shared experts have {rows} rows: must be a multiple of the experts' {width}"
        )
    return rows // width


def _metadata(fields: Fields) -> Fields:
    rank, rotated = int(fields["kv_lora_rank"]), int(fields["qk_rope_head_dim"])
    is_sigmoid = fields["model_type"] != "deepseek_v2"
    found: Fields = {
        **rows.sizes_of_experts(fields, "n_routed_experts", "moe_intermediate_size"),
        "rope.dimension_count": rotated,
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": int(fields["qk_nope_head_dim"]) + rotated,
        "attention.value_length_mla": int(fields["v_head_dim"]),
        "expert_gating_func": 2 if is_sigmoid else 1,
        "expert_weights_norm": is_sigmoid and bool(fields.get("norm_topk_prob", True)),
    }
    if (fields.get("n_group") or 1) > 1 and fields.get("topk_method") != "greedy":
        found["expert_group_count"] = int(fields["n_group"])
        found["expert_group_used_count"] = int(fields["topk_group"])
    rope = rope_of(fields)
    if rope.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope["mscale_all_dim"])
    return found


_HAN = r"&&[^\p{Han}]"
_KIMI = (
    r"[\p{Han}]+|"
    + (WORDS % (f"{SUFFIXES}?", f"{SUFFIXES}?"))
    .replace(f"[{UPPER}]", f"[{UPPER}{_HAN}]")
    .replace(f"[{LOWER}]", f"[{LOWER}{_HAN}]")
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{TAIL}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + TAIL,
)
# Letters with a case but these: DeepSeek's list, which is long, leaves them out.
_CASELESS = (
    r"\x{0560}-\x{0588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8f}"
    r"\x{2d00}-\x{2d2d}\x{a790}-\x{a7fa}\x{ab30}-\x{ab68}"
    r"\x{10570}-\x{105bc}\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7cb}\x{1df00}-\x{1df1e}"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{_CASELESS}]]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
)
WHOLE = WholeModel(
    "deepseek_v3",
    (
        Key("attention.kv_lora_rank", "kv_lora_rank", is_required=True),
        Key("attention.q_lora_rank", "q_lora_rank"),
        Key("feed_forward_length", "intermediate_size"),
        Key("leading_dense_block_count", "first_k_dense_replace"),
        Key("expert_shared_count", "n_shared_experts"),
        Key("expert_weights_scale", "routed_scaling_factor", float),
    ),
    (
        *rows.WHOLE,
        *rows.NORMS,
        *rows.per_layer("attn_q", "self_attn.q_proj"),
        *rows.per_layer("attn_q_a", "self_attn.q_a_proj"),
        *rows.per_layer("attn_q_a_norm", "self_attn.q_a_layernorm"),
        *rows.per_layer("attn_q_b", "self_attn.q_b_proj"),
        *rows.per_layer("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
        *rows.per_layer("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
        # The first that a file has counts: some hold kv_b both ways.
        Tensor(
            ("blk.{n}.attn_k_b.weight", "blk.{n}.attn_v_b.weight"),
            "model.layers.{n}.self_attn.kv_b_proj.weight",
            _join_kv_b,
            _split_kv_b,
        ),
        *rows.per_layer("attn_kv_b", "self_attn.kv_b_proj"),
        *rows.per_layer("attn_output", "self_attn.o_proj"),
        *rows.DENSE,
        *rows.ROUTER,
        Tensor(
            "blk.{n}.exp_probs_b.bias",
            "model.layers.{n}.mlp.gate.e_score_correction_bias",
            is_optional=True,
        ),
        *rows.shared_experts("shared_experts"),
    ),
    _config,
    _metadata,
)
DEEPSEEK2 = Architecture(
    ("deepseek_v3", "deepseek_v2", "kimi_k2"),
    (MLP_EXPERTS,),
    gguf=GgufArchitecture("deepseek2", is_normalised=False),
    whole=WHOLE,
    pre_tokenizers=(
        PreTokenizer(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
        PreTokenizer(("deepseek-llm",), _DEEPSEEK_LLM),
        PreTokenizer(("deepseek-coder",), _DEEPSEEK_CODER),
        PreTokenizer(("kimi-k2",), (_KIMI,)),
    ),
)
