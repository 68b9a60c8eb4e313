"""Architectures: one file each, one line here; those of which a line says all stand here."""

from __future__ import annotations

from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.models.arch.deepseek2 import DEEPSEEK2
from ktk.models.arch.deepseek4 import DEEPSEEK4
from ktk.models.arch.glm4_moe import GLM4_MOE
from ktk.models.arch.gpt_oss import GPT_OSS
from ktk.models.arch.granitemoe import GRANITE_MOE
from ktk.models.arch.jamba import JAMBA
from ktk.models.arch.lfm2_moe import LFM2_MOE
from ktk.models.arch.minimax_m2 import MINIMAX_M2
from ktk.models.arch.minimax_m3 import MINIMAX_M3
from ktk.models.arch.mistral3 import MISTRAL3
from ktk.models.arch.mixtral import MIXTRAL
from ktk.models.arch.names import BLOCK_SPARSE_MOE, MLP_EXPERTS, STACKED
from ktk.models.arch.nemotron_h import NEMOTRON_H
from ktk.models.arch.olmoe import OLMOE
from ktk.models.arch.qwen2_moe import QWEN2_MOE
from ktk.models.arch.qwen3_5_moe import QWEN3_5_MOE
from ktk.models.arch.qwen3_moe import QWEN3_MOE
from ktk.models.architecture import Architecture
from ktk.models.families import Family
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole.rows import WholeModel
from ktk.models.whole.tokenizer import SHARED, PreTokenizer

_GELU = Activation.gelu_tanh()
# Commonest first: so messages list them, families of tensor names are tried, and a family's
# activation is found.
# Grok-1 and -2's files both say grok.
ARCHITECTURES: tuple[Architecture, ...] = (
    QWEN3_MOE,
    DEEPSEEK2,
    MIXTRAL,
    GPT_OSS,
    GLM4_MOE,
    Architecture(("qwen3_next",), (MLP_EXPERTS,), gguf=GgufArchitecture("qwen3next")),
    QWEN2_MOE,
    MINIMAX_M2,
    Architecture(
        ("llama4", "llama4_text"),
        refused="routing weights multiply the experts' input",
        gguf=GgufArchitecture("llama4", "sigmoid", is_normalised=False, weighs_input=True),
    ),
    OLMOE,
    GRANITE_MOE,
    Architecture(gguf=GgufArchitecture("granitehybrid")),
    Architecture(("qwen3_vl_moe",), (STACKED,), gguf=GgufArchitecture("qwen3vlmoe")),
    QWEN3_5_MOE,
    Architecture((), (STACKED,), _GELU, gguf=GgufArchitecture("gemma4")),
    Architecture(activation=_GELU, gguf=GgufArchitecture("grok")),
    NEMOTRON_H,
    Architecture(
        activation=_GELU,
        gguf=GgufArchitecture("nomic-bert-moe", is_normalised=False, is_gateless=True),
    ),
    MINIMAX_M3,
    DEEPSEEK4,
    Architecture(gguf=GgufArchitecture("deepseek32", None, None)),
    Architecture(("deepseek",), gguf=GgufArchitecture("deepseek", is_normalised=False)),
    Architecture(gguf=GgufArchitecture("deepseek2-ocr", is_normalised=None)),
    Architecture(gguf=GgufArchitecture("glm-dsa", None, None)),
    Architecture((), (BLOCK_SPARSE_MOE,), gguf=GgufArchitecture("kimi-linear", None, None)),
    Architecture(("dots1",), gguf=GgufArchitecture("dots1", None, None)),
    Architecture(("bailing_moe",), gguf=GgufArchitecture("bailingmoe", is_normalised=None)),
    Architecture(("bailing_moe_v2",), gguf=GgufArchitecture("bailingmoe2", None, None)),
    Architecture(("ernie4_5_moe",), gguf=GgufArchitecture("ernie4_5-moe")),
    Architecture(("hunyuan_v1_moe",), gguf=GgufArchitecture("hunyuan-moe")),
    LFM2_MOE,
    Architecture(("exaone_moe",), gguf=GgufArchitecture("exaone-moe", None, None)),
    Architecture(gguf=GgufArchitecture("afmoe", None, None)),
    Architecture(gguf=GgufArchitecture("mimo2", "sigmoid")),
    MISTRAL3,
    Architecture(gguf=GgufArchitecture("mistral4", None, None)),
    Architecture(gguf=GgufArchitecture("cohere2moe", None, None)),
    Architecture(("phimoe",), (BLOCK_SPARSE_MOE,), gguf=GgufArchitecture("phimoe")),
    Architecture(gguf=GgufArchitecture("dbrx")),
    Architecture(gguf=GgufArchitecture("arctic")),
    JAMBA,
    Architecture(gguf=GgufArchitecture("llada-moe", is_normalised=False)),
    Architecture(gguf=GgufArchitecture("rnd1")),
    Architecture(gguf=GgufArchitecture("minicpm", is_normalised=None)),
    Architecture(
        ("openai_privacy_filter",), (STACKED,), Activation.swigluoai(), stacks_biases=True
    ),
    # Those that do not run, in directories or in GGUF files.
    Architecture(
        ("muse_spark",), refused="the experts' output is normalised before it is weighted"
    ),
    Architecture(("longcat_flash",), refused="some experts are the identity"),
    Architecture(("inkling2", "inkling2_loop"), refused="its gate is soft-capped"),
    Architecture(
        ("ernie4_5_vl_moe",), refused="text and images have experts of their own in a layer"
    ),
    Architecture(("step3p7",), refused="its clamp differs by layer and follows the SiLU"),
    Architecture(
        gguf=GgufArchitecture("step35", refused="its clamp differs by layer and follows the SiLU")
    ),
    Architecture(
        gguf=GgufArchitecture(
            "smallthinker", refused="its experts use ReLU, which ktk has no kernel for"
        )
    ),
    Architecture(
        gguf=GgufArchitecture("grovemoe", refused="its chunk experts add to each expert's output")
    ),
)


# By the names of ``ARCHITECTURES``, of which no two rows have one.
BY_MODEL_TYPE = {name: row for row in ARCHITECTURES for name in row.model_types}
BY_GGUF_NAME = {row.gguf.name: row for row in ARCHITECTURES if row.gguf}
WHOLE_MODELS: dict[str, WholeModel] = {
    name: row.whole for name, row in BY_GGUF_NAME.items() if row.whole
}
FAMILIES: dict[str, Family] = {
    family.name: family for row in ARCHITECTURES for family in row.families
}
# The first whose expressions a tokenizer.json has is what is written.
PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    *SHARED,
    *(pre for row in ARCHITECTURES for pre in row.pre_tokenizers),
)
BY_PRE_NAME = {name: row for row in PRE_TOKENIZERS for name in row.names}


def families_of(model_type: str) -> list[Family]:
    """The families that a model's tensors may be named in; all of an unknown model's,
    except those that are one architecture's alone.
    """
    row = BY_MODEL_TYPE.get(model_type, Architecture())
    replaced = {family.instead_of for family in row.families}
    return [
        family
        for family in FAMILIES.values()
        if family.name not in replaced and (not family.instead_of or family in row.families)
    ]


def whole_model(architecture: str, where: str) -> WholeModel:
    """The rows of ``general.architecture``; CheckpointError lists the known ones."""
    if architecture not in WHOLE_MODELS:
        raise CheckpointError(
            f"{where}: architecture {architecture!r}: ktk runs whole models of "
            f"{', '.join(WHOLE_MODELS)}; of others the "
            "experts alone (ktk.load_gguf), or with the rest from a Hugging Face directory "
            "(load_model(directory, gguf=file))"
        )
    return WHOLE_MODELS[architecture]
