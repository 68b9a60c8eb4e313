"""MiniMax M2: q and k normalised over all heads at once, a part of each head rotated,
sigmoid routing with a correction.
"""

from __future__ import annotations

from ktk.models.arch.names import BLOCK_SPARSE_MOE
from ktk.models.architecture import Architecture
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole import rows
from ktk.models.whole.rope import rope_of, rope_parameters
from ktk.models.whole.rows import Fields, Tensor, WholeModel
from ktk.models.whole.source import Source
from ktk.models.whole.tokenizer import GPT4O, PreTokenizer


def _config(source: Source) -> Fields:
    source.check_all_have_experts("MiniMax M2")
    rope = rope_parameters(source)
    size = source.required("attention.key_length")
    rope["partial_rotary_factor"] = source.required("rope.dimension_count") / size
    return {
        "rope_parameters": rope,
        "num_local_experts": source.num_experts,
        "intermediate_size": source.expert_width,
    }


def _metadata(fields: Fields) -> Fields:
    part = rope_of(fields).get("partial_rotary_factor")
    rotated = fields.get("rotary_dim") or int(rows.head_dim(fields) * (part or 1.0))
    found = rows.sizes_of_experts(fields, "num_local_experts", "intermediate_size")
    return {
        **found,
        "feed_forward_length": found["expert_feed_forward_length"],
        "rope.dimension_count": int(rotated),
        "expert_gating_func": 2,
    }


WHOLE = WholeModel(
    "minimax_m2",
    rows.GROUPED_KEYS,
    (
        *rows.WHOLE,
        *rows.NORMS,
        *(row for row in rows.ATTENTION if row.hf.endswith(".weight")),
        *rows.QK_NORMS,
        *rows.per_layer(
            "ffn_gate_inp", "mlp.gate", checkpoint="model.layers.{n}.block_sparse_moe.gate.weight"
        ),
        Tensor(
            "blk.{n}.exp_probs_b.bias",
            "model.layers.{n}.mlp.e_score_correction_bias",
            checkpoint="model.layers.{n}.block_sparse_moe.e_score_correction_bias",
            is_optional=True,
        ),
    ),
    _config,
    _metadata,
)
MINIMAX_M2 = Architecture(
    ("minimax_m2",),
    (BLOCK_SPARSE_MOE,),
    gguf=GgufArchitecture("minimax-m2", gating="sigmoid"),
    whole=WHOLE,
    pre_tokenizers=(PreTokenizer(("minimax-m2",), (GPT4O,)),),
)
