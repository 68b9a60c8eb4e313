"""How the tokenizers of GGUF files cut text before they merge: ``tokenizer.ggml.pre`` -> regular
expressions.

Each expression cuts what the ones before it left. They are those of the models' own tokenizer.json,
in Oniguruma's syntax;
llama.cpp has approximations of some (upper and lower case of gpt-4o: any letter but a-z and A-Z).
Here stand those of several makers' models; an architecture's own stand in its file.
"""

from __future__ import annotations

from dataclasses import dataclass

SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*%s"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{TAIL}"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT4O = (
    WORDS % (f"{SUFFIXES}?", f"{SUFFIXES}?")
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{TAIL}"
)
TEKKEN = WORDS % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{TAIL}"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text. names : what ``tokenizer.ggml.pre`` calls it, the one to write first.

    ignores_merges : a piece that is a token is not merged anew. adds_bos : unless the file says
        otherwise.
    normalises : text is brought to NFC first, as the models' own tokenizers do; llama.cpp does not.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    normalises: bool = False


SHARED = (
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo"),
        (QWEN2,),
        normalises=True,
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (LLAMA3,),
        ignores_merges=True,
        adds_bos=True,
    ),
    PreTokenizer(("glm4", "chatglm-bpe", "dbrx", "smaug-bpe"), (LLAMA3,)),
    PreTokenizer(("gpt-4o", "llama4", "kanana2"), (GPT4O,)),
    PreTokenizer(("tekken",), (TEKKEN,), ignores_merges=True, adds_bos=True),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", GPT2)
    ),
    PreTokenizer(
        ("gpt-2", "phi-2", "olmo", "jais", "mpt", "gigachat", "jina-es", "jina-de", "roberta-bpe"),
        (GPT2,),
    ),
    PreTokenizer(("default",), _DEFAULT),
)
