"""What a whole model's GGUF file holds beside the experts: metadata, tokenizer, the other tensors, as llama.cpp wants them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint, read_json_object
from ktk.errors import CheckpointError
from ktk.experts.formats import BLOCKS
from ktk.experts.formats.floats import f32_to_bf16, to_f32
from ktk.log import logger
from ktk.models import check_directory
from ktk.models.metadata import read_generation
from ktk.models.prediction import predicts
from ktk.models.whole import WHOLE_MODELS, Tensor, WholeModel
from ktk.models.whole.ends import end_keys
from ktk.models.whole.tokenizer import PRE_TOKENIZERS
from ktk.quantise import blocks
from ktk.quantise.blocks import BLOCK_TYPES, quantise_rows

FLOAT_BYTES = {row.name: row.block_bytes for row in BLOCKS.values() if row.block == 1}
FALLBACK = "Q8_0"  # where rows are not whole blocks of 256
CHUNK_WEIGHTS = 4 << 20  # quantised at a time
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"
FLOAT_DTYPES = ("F32", "F16", "BF16")


def row_bytes(kind: str, in_features: int) -> int:
    """Bytes of a row in a block or float type; ValueError unless it holds whole blocks."""
    return blocks.row_bytes(BLOCKS[kind], in_features)


def encode_rows(values: np.ndarray, kind: str) -> np.ndarray:
    """(rows, in_features) float32, or uint16 bf16 bits, to what a file holds, C-contiguous. Raises ValueError."""
    if kind in BLOCK_TYPES:
        return quantise_rows(values, kind)
    floats = to_f32(values)
    if not np.isfinite(floats).all():
        raise ValueError("holds NaN or inf")
    if kind == "BF16":
        return values if values.dtype == np.uint16 else f32_to_bf16(floats)
    if kind == "F16":
        if np.abs(floats).max(initial=0) > 65504:
            raise ValueError(f"weights reach {np.abs(floats).max():.3g}: F16 takes at most 65504")
        return np.ascontiguousarray(floats, "<f2")
    return np.ascontiguousarray(floats, "<f4")


@dataclass(frozen=True)
class RestTensor:
    """One tensor of the file that is no expert's. source : its name in the Hugging Face directory. piece : which of split's."""

    name: str
    type: str
    shape: tuple[int, ...]
    source: str
    row: Tensor
    piece: int
    offset: int = 0  # from the beginning of the file

    @property
    def num_bytes(self) -> int:
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return rows * row_bytes(self.type, self.shape[-1])


class RestOfModel:
    """All but the experts of a Hugging Face directory. Raises CheckpointError for models that no row describes."""

    def __init__(self, checkpoint: Checkpoint, expert_tensors: set[str], kind: str) -> None:
        self.checkpoint, self.kind = checkpoint, kind
        self.fields = checkpoint.config
        model_type = self.fields.get("model_type")
        rows = {name: row for row in WHOLE_MODELS.values() for name in row.model_types}
        if model_type not in rows:
            raise CheckpointError(
                f"{checkpoint.path}: model_type {model_type!r}: a whole GGUF file is written of {', '.join(rows)}; leave "
                "--whole out for the experts alone"
            )
        self.model: WholeModel = rows[model_type]
        self.tensors = list(self._plan(expert_tensors))

    def _plan(self, expert_tensors: set[str]) -> Iterator[RestTensor]:
        tensors, num_layers = self.checkpoint.tensors, int(self.fields["num_hidden_layers"])
        used = set(expert_tensors)
        is_tied = bool(self.fields.get("tie_word_embeddings"))
        for row, layer in self.model.layer_tensors(num_layers):
            names = [name.format(n=layer) for name in (row.checkpoint, row.hf) if name]
            source = next((name for name in names if name in tensors), None)
            if source is None or source in used:
                continue
            used.add(source)
            if row.hf == "lm_head.weight" and is_tied:
                continue
            info = tensors[source]
            if info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{self.checkpoint.path}: {source} is {info.dtype}: must be one of {', '.join(FLOAT_DTYPES)} for a whole "
                    "GGUF file"
                )
            shapes = [tuple(info.shape)]
            if row.split is not None:
                shapes = [a.shape for a in row.split(np.empty(info.shape, np.int8), self.fields)]
            for piece, (name, shape) in enumerate(zip(row.pieces, shapes, strict=True)):
                shape = tuple(s for s in shape if s > 1) or (1,)
                kind = self._type(name, shape)
                yield RestTensor(name.format(n=layer), kind, shape, source, row, piece)
        unused = [
            name
            for name in tensors
            if name not in used and not name.endswith("inv_freq") and not predicts(name, num_layers)
        ]
        if unused:
            raise CheckpointError(
                f"{self.checkpoint.path}: {len(unused)} tensors have no place in a GGUF file of {self.model.architecture}: "
                + ", ".join(unused[:8])
            )

    def _type(self, name: str, shape: tuple[int, ...]) -> str:
        """Vectors and routers stay exact; whatever is wide enough for blocks gets them."""
        if len(shape) < 2 or "ffn_gate_inp" in name:
            return "F32"
        for kind in (self.kind, FALLBACK):
            if shape[-1] % BLOCKS[kind].block == 0:
                return kind
        return "F16"

    def source_bytes(self, tensor: RestTensor) -> int:
        """Bytes of the input that a tensor is made of, a share where several are."""
        return self.checkpoint.tensors[tensor.source].nbytes // len(tensor.row.pieces)

    def metadata(self) -> dict[str, Any]:
        """Key-values of the model, by key after the architecture."""
        return {**self.model.written(self.fields), "vocab_size": int(self.fields["vocab_size"])}

    def tokenizer(self) -> dict[str, Any]:
        """Key-values of the tokenizer, by whole key."""
        return tokenizer_metadata(self.checkpoint.directory, int(self.fields["vocab_size"]))

    def parts(self, tensor: RestTensor) -> list[tuple[int, int] | None]:
        """The source's rows, start to stop, that are encoded at a time; [None] for a tensor that goes as a whole."""
        shape = self.checkpoint.tensors[tensor.source].shape
        if tensor.row.split is not None or len(shape) != 2:
            return [None]
        step = max(1, CHUNK_WEIGHTS // shape[1])
        return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]

    def encoded(self, tensor: RestTensor, rows: tuple[int, int] | None) -> np.ndarray:
        """One of a tensor's ``parts``, as the file holds it. Raises CheckpointError."""
        try:
            values = self.checkpoint.read(tensor.source, rows)
            if values.dtype == np.float16:
                values = values.astype(np.float32)
            if tensor.row.split is not None:
                values = tensor.row.split(to_f32(values), self.fields)[tensor.piece]
            return encode_rows(values.reshape(-1, tensor.shape[-1]), tensor.type)
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {tensor.source}: {error}") from None


def tokenizer_metadata(directory: Path, vocab_size: int) -> dict[str, Any]:
    """``tokenizer.*`` of a directory's tokenizer.json, tokenizer_config.json and templates; CheckpointError if GGUF cannot say it.

    vocab_size : rows of the embedding; tokens beyond the tokenizer's are filled up.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no tokenizer.json: a whole GGUF file needs it; leave --whole out for the experts alone"
        )
    described = read_json_object(path)
    config = directory / "tokenizer_config.json"
    settings = read_json_object(config) if config.is_file() else {}
    model = described.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{path}: the model is {model.get('type')!r}: must be BPE")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    is_bytes = not model.get("byte_fallback")

    def put(token: str, index: int, kind: int) -> None:
        if not 0 <= index < vocab_size:
            raise CheckpointError(
                f"{path}: token {token!r} has id {index}: the embedding has {vocab_size} rows"
            )
        tokens[index], types[index] = token, kind

    for token, index in model["vocab"].items():
        put(token, index, BYTE if not is_bytes and BYTE_TOKEN.fullmatch(token) else NORMAL)
    for added in described.get("added_tokens", ()):
        put(added["content"], added["id"], CONTROL if added.get("special") else USER_DEFINED)
    ids = {token: index for index, token in enumerate(tokens)}
    ends = _end_ids(directory, vocab_size)
    special = {ids[text] for text in _special_texts(settings) if text in ids}
    for index in special.union(ends):
        types[index] = CONTROL
    if not is_bytes and model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = UNKNOWN
    found: dict[str, Any] = {"tokenizer.ggml.model": "gpt2" if is_bytes else "llama"}
    if is_bytes:
        found["tokenizer.ggml.pre"] = _pre_name(path, described.get("pre_tokenizer"))
        found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    else:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        scores = [-float(ranks.get(token, len(merges))) for token in tokens]
        found["tokenizer.ggml.scores"] = scores
        normalizer = json.dumps(described.get("normalizer")) + json.dumps(
            described.get("pre_tokenizer")
        )
        found["tokenizer.ggml.add_space_prefix"] = (
            '"Prepend"' in normalizer
            or '"prepend_scheme": "' in normalizer.replace('"prepend_scheme": "never"', "")
        )
    found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"] = tokens, types
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = _text_of(settings.get(f"{name}_token"))
        if token in ids:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    keys, unsaid = end_keys(ends, found.get("tokenizer.ggml.eos_token_id"), tokens)
    found.update(keys)
    if unsaid:
        logger.warning(
            "%s: %s end an answer: a GGUF file can name three such tokens, so only ktk will end there",
            directory, ", ".join(repr(tokens[i]) for i in unsaid),
        )  # fmt: skip
    found["tokenizer.ggml.add_bos_token"] = _begins_with(described, settings.get("bos_token"))
    template = directory / "chat_template.jinja"
    text = (
        template.read_text(encoding="utf-8")
        if template.is_file()
        else settings.get("chat_template")
    )
    if isinstance(text, str):
        found["tokenizer.chat_template"] = text
    return found


def _text_of(token: Any) -> str | None:
    """A token's text, as tokenizer_config.json has it in either of two forms."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_texts(settings: dict[str, Any]) -> set[str]:
    """Tokens that tokenizer_config.json calls special, which tokenizer.json need not repeat."""
    found = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or ()
        found += more.values() if isinstance(more, dict) else more
    decoder = settings.get("added_tokens_decoder") or {}
    found += [token for token in decoder.values() if token.get("special")]
    return {text for token in found if (text := _text_of(token)) is not None}


def _end_ids(directory: Path, vocab_size: int) -> list[int]:
    """What ends an answer: generation_config.json's list, else config.json's."""
    given = read_generation(directory).get("eos_token_id")
    if given in (None, []) and (directory / "config.json").is_file():
        given = check_directory(directory).get("eos_token_id")
    ends = given if isinstance(given, list) else [given]
    return [i for i in ends if i is not None and 0 <= i < vocab_size]


def _begins_with(described: dict[str, Any], bos: Any) -> bool:
    """Whether the post-processor puts the bos token before a text."""
    token = _text_of(bos)
    return token is not None and json.dumps(token) in json.dumps(described.get("post_processor"))


def _pre_name(path: Path, described: Any) -> str:
    """``tokenizer.ggml.pre`` of a tokenizer.json's pre_tokenizer; CheckpointError if its expressions are not known."""
    steps = (described or {}).get("pretokenizers", [described])
    patterns = []
    for step in steps:
        kind = (step or {}).get("type")
        if kind == "Split":
            pattern = step["pattern"]
            patterns.append(pattern.get("Regex") or re.escape(pattern.get("String", "")))
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "ByteLevel" and step.get("use_regex", True):
            patterns.append(_gpt2())
        elif kind != "ByteLevel":
            raise CheckpointError(f"{path}: pre_tokenizer {kind!r}: ktk has no GGUF name for it")
    for row in PRE_TOKENIZERS:
        if list(row.splits) == patterns:
            return row.names[0]
    raise CheckpointError(
        f"{path}: its pre_tokenizer cuts by {patterns}: ktk has no GGUF name for that"
    )


def _gpt2() -> str:
    """The expression that ByteLevel has built in."""
    return next(row for row in PRE_TOKENIZERS if "gpt-2" in row.names).splits[0]
