"""The tokenizer of a GGUF file, built with the ``tokenizers`` library from tokens, merges,
scores and token types.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.errors import CheckpointError
from ktk.models.arch import BY_PRE_NAME
from ktk.models.metadata import check_gguf_tokenizer
from ktk.models.whole.ends import CONTROL, end_ids
from ktk.paths import user_path

UNKNOWN, USER_DEFINED, BYTE = 2, 4, 6  # of tokenizer.ggml.token_type
MAX_TOKENS = 1 << 22
SPACE = "▁"
# transformers' name -> what comes before _token_id
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def load_gguf_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a GGUF model: a ``PreTrainedTokenizerFast`` with chat template and special
    tokens.

    path : as of ``load_gguf_model``. Knows byte-level BPE ("gpt2") with the pre-tokenizers of
    ``ktk.models.whole.tokenizer``, and SentencePiece BPE ("llama"). Raises CheckpointError.
    """
    from transformers import PreTrainedTokenizerFast

    path = user_path(path)
    fields = _Fields(GgufCheckpoint.open(path))
    model = fields.get("model", str)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {model!r}: ktk reads {', '.join(builders)}"
        )
    tokenizer, adds_bos = builders[model](fields)
    tokens, types = fields.tokens, fields.types
    for kind, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=is_special)
            for token, given in zip(tokens, types, strict=True)
            if given == kind
        ]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    special = {name: fields.token(f"{key}_token_id") for name, key in SPECIAL.items()}
    special["pad_token"] = special["pad_token"] or special["eos_token"]
    said = fields.get("add_bos_token", bool)
    bos = special["bos_token"] if (adds_bos if said is None else said) else None
    eos = special["eos_token"] if fields.get("add_eos_token", bool) else None
    tokenizer.post_processor = _template(tokenizer, bos, eos)
    length = fields.context_length()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **({} if length is None else {"model_max_length": length}),
        **{name: token for name, token in special.items() if token is not None},
    )
    made.chat_template = fields.chat_template()
    made.name_or_path = os.fspath(path)
    return made


def gguf_ends(checkpoint: GgufCheckpoint) -> list[int]:
    """Ids of the tokens that end an answer; without a tokenizer in the file,
    what the metadata names so.
    """
    if "tokenizer.ggml.tokens" not in checkpoint.metadata:
        return end_ids(checkpoint.metadata, ())
    return _Fields(checkpoint).ends


class _Fields:
    """The tokenizer's keys, checked."""

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        self.checkpoint, self.metadata = checkpoint, checkpoint.metadata
        check_gguf_tokenizer(self.metadata, str(checkpoint.path))
        self.tokens: list[str] = self.array("tokens", str)
        count = len(self.tokens)
        if len(set(self.tokens)) != count:
            twice = sorted(self.tokens)
            first = next(a for a, b in itertools.pairwise(twice) if a == b)
            raise self.error(f"tokenizer.ggml.tokens holds {first!r} twice")
        has_types = "tokenizer.ggml.token_type" in self.metadata
        self.types: list[int] = list(self.array("token_type", int)) if has_types else [1] * count
        if len(self.types) != count:
            raise self.error(
                f"tokenizer.ggml.token_type has {len(self.types)} entries, tokens {count}"
            )
        # As llama.cpp has it: what ends an answer is no part of it, whatever type the file gives
        # it.
        self.ends = [i for i in end_ids(self.metadata, self.tokens, self.types) if i < count]
        for index in self.ends:
            self.types[index] = CONTROL

    def get(self, key: str, kind: type) -> Any:
        """``tokenizer.ggml.{key}``, None if there is none."""
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and type(value) is not kind:
            raise self.error(
                f"tokenizer.ggml.{key} is {value!r:.80}: must be of type {kind.__name__}"
            )
        return value

    def array(self, key: str, kind: type) -> list[Any]:
        name = f"tokenizer.ggml.{key}"
        size = self.metadata.size(name) if name in self.metadata else None
        if size is None or not 0 < size <= MAX_TOKENS:
            raise self.error(f"{name} has {size} entries: must be a list of 1 to {MAX_TOKENS}")
        values: list[Any] = self.metadata[name]
        if type(values[0]) is not kind:
            raise self.error(f"{name} lists {type(values[0]).__name__}: must be {kind.__name__}")
        return values

    def token(self, key: str) -> str | None:
        """The token that a key numbers; None without the key,
        or for a number that stands for none.
        """
        number = self.get(key, int)
        if number is None or not 0 <= number < len(self.tokens):
            return None
        return self.tokens[number]

    def context_length(self) -> int | None:
        """Tokens the model was made for."""
        architecture = self.metadata.get("general.architecture")
        length = self.metadata.get(f"{architecture}.context_length")
        return length if type(length) is int and length > 0 else None

    def chat_template(self) -> str | dict[str, str] | None:
        """The file's template, or all of them by name if there are several."""
        plain = self.metadata.get("tokenizer.chat_template")
        start = "tokenizer.chat_template."
        found = {
            key.removeprefix(start): self.metadata[key]
            for key in self.metadata
            if key.startswith(start)
        }
        if plain is not None:
            found["default"] = plain
        if not all(isinstance(template, str) for template in found.values()):
            raise self.error("tokenizer.chat_template must be text")
        return found if len(found) > 1 else plain

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint.path}: {text}")


def _byte_level(fields: _Fields) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether it begins with the bos token unless the file says otherwise."""
    name = fields.get("pre", str) or "default"
    if name not in BY_PRE_NAME:
        raise fields.error(
            f"tokenizer.ggml.pre is {name!r}: ktk knows {', '.join(sorted(BY_PRE_NAME))}; another "
            "would cut text otherwise"
        )
    row = BY_PRE_NAME[name]
    merges = []
    for line in fields.array("merges", str):
        left, space, right = line.partition(" ")
        if not space or not left or not right:
            raise fields.error(f"tokenizer.ggml.merges holds {line!r:.80}: must be two tokens")
        merges.append((left, right))
    vocab = {token: index for index, token in enumerate(fields.tokens)}
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=row.ignores_merges)
    except Exception as error:  # tokenizers raises nothing narrower
        raise fields.error(f"tokenizer.ggml.merges do not fit the tokens: {error}") from None
    tokenizer = Tokenizer(bpe)
    if row.normalises:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in row.splits]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, row.adds_bos


def _sentencepiece(fields: _Fields) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE: pairs merge in the order of the scores of what they make."""
    scores = fields.array("scores", float)
    if len(scores) != len(fields.tokens):
        raise fields.error(
            f"tokenizer.ggml.scores has {len(scores)} entries, tokens {len(fields.tokens)}"
        )
    vocab = {token: index for index, token in enumerate(fields.tokens)}
    plain = {
        token: score
        for token, score, kind in zip(fields.tokens, scores, fields.types, strict=True)
        if kind not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    }
    unknown = fields.token("unknown_token_id")
    bpe = models.BPE(
        vocab=vocab,
        merges=_merges(plain, vocab),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=any(kind == BYTE for kind in fields.types),
        ignore_merges=False,
    )
    tokenizer = Tokenizer(bpe)
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("add_space_prefix", bool) is not False:
        spaces.insert(0, normalizers.Prepend(SPACE))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer, True


def _merges(plain: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way that two tokens make a third, the highest score first."""
    found = [
        (-score, vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token, score in plain.items()
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> Any:
    """What stands around a text."""
    special = [token for token in (bos, eos) if token is not None]

    def around(name: str) -> str:
        parts = (bos and "B:{0}", f"${name}:{{0}}", eos and "E:{0}")
        return " ".join(part for part in parts if part)

    ids = {
        name: (token, tokenizer.token_to_id(token))
        for name, token in (("B", bos), ("E", eos))
        if token
    }
    single, second = around("A").format(0), around("B").format(1)
    return (
        processors.TemplateProcessing(
            single=single,
            pair=f"{single} {second}",
            special_tokens=[
                {"id": name, "ids": [number], "tokens": [token]}
                for name, (token, number) in ids.items()
            ],
        )
        if special
        else processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    )
