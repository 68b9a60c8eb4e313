"""How the tokenizers of GGUF files cut text before they merge: ``tokenizer.ggml.pre`` -> regular expressions.

Each expression cuts what the ones before it left. They are those of the models' own tokenizer.json, in Oniguruma's syntax;
llama.cpp has approximations of some (upper and lower case of gpt-4o: any letter but a-z and A-Z).
"""

from __future__ import annotations

from dataclasses import dataclass

_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*%s"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_TAIL}"
_GPT4O = (
    _WORDS % (f"{_SUFFIXES}?", f"{_SUFFIXES}?")
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"
)
_TEKKEN = _WORDS % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_TAIL}"
_HAN = r"&&[^\p{Han}]"
_KIMI = (
    r"[\p{Han}]+|"
    + (_WORDS % (f"{_SUFFIXES}?", f"{_SUFFIXES}?"))
    .replace(f"[{_UPPER}]", f"[{_UPPER}{_HAN}]")
    .replace(f"[{_LOWER}]", f"[{_LOWER}{_HAN}]")
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_TAIL}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _TAIL,
)
# Letters with a case but these: DeepSeek's list, which is long, leaves them out.
_CASELESS = (
    r"\x{0560}-\x{0588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8f}\x{2d00}-\x{2d2d}\x{a790}-\x{a7fa}\x{ab30}-\x{ab68}"
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
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text. names : what ``tokenizer.ggml.pre`` calls it, the one to write first.

    ignores_merges : a piece that is a token is not merged anew. adds_bos : unless the file says otherwise.
    normalises : text is brought to NFC first, as the models' own tokenizers do; llama.cpp does not.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    normalises: bool = False


# The first whose expressions a tokenizer.json has is what is written.
PRE_TOKENIZERS = (
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo"),
        (_QWEN2,),
        normalises=True,
    ),
    PreTokenizer(("qwen35",), (_QWEN35,), normalises=True),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (_LLAMA3,),
        ignores_merges=True,
        adds_bos=True,
    ),
    PreTokenizer(("glm4", "chatglm-bpe", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    PreTokenizer(("gpt-4o", "llama4", "kanana2"), (_GPT4O,)),
    PreTokenizer(("minimax-m2",), (_GPT4O,)),
    PreTokenizer(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    PreTokenizer(("deepseek-llm",), _DEEPSEEK_LLM),
    PreTokenizer(("deepseek-coder",), _DEEPSEEK_CODER),
    PreTokenizer(("kimi-k2",), (_KIMI,)),
    PreTokenizer(("tekken",), (_TEKKEN,), ignores_merges=True, adds_bos=True),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)
    ),
    PreTokenizer(
        ("gpt-2", "phi-2", "olmo", "jais", "mpt", "gigachat", "jina-es", "jina-de", "roberta-bpe"),
        (_GPT2,),
    ),
    PreTokenizer(("default",), _DEFAULT),
)
BY_NAME = {name: row for row in PRE_TOKENIZERS for name in row.names}
