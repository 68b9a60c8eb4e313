"""Qwen3.5-MoE: stacked experts, and words that hold combining marks."""

from ktk.models.arch.names import STACKED
from ktk.models.architecture import Architecture
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.whole.tokenizer import SUFFIXES, TAIL, PreTokenizer

_WORDS = (
    rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| "
    rf"?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{TAIL}"
)

QWEN3_5_MOE = Architecture(
    ("qwen3_5_moe",),
    (STACKED,),
    gguf=GgufArchitecture("qwen35moe"),
    pre_tokenizers=(PreTokenizer(("qwen35",), (_WORDS,), normalises=True),),
)
