"""What a whole model's rows say: config.json's fields and module tensors, as a GGUF file of its
architecture has them.

Rows go both ways: ``load_gguf_model`` reads a file by them, ``ktk convert --whole`` writes one. A
row names tensors after transformers' modules; ``Tensor.checkpoint`` where the files of the Hugging
Face directory call one otherwise.
Source: the names of gguf.constants, the tensors llama.cpp's graphs ask for, transformers 5.23's
configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktk.errors import CheckpointError
from ktk.models.whole.rope import Fields, rope_metadata, rope_parameters
from ktk.models.whole.source import Source


@dataclass(frozen=True)
class Key:
    """A number or bool of the metadata, without the architecture before it,
    and config.json's field of the same meaning.
    """

    key: str
    field: str
    kind: type = int
    is_required: bool = False


@dataclass(frozen=True)
class Tensor:
    """One module tensor and the file's; ``{n}`` is the layer's index.

    gguf : the file's name; several where a file holds it in pieces. hf : the module's name.
    join : the file's arrays, float32, and the config's fields -> the module's array. split : the
        inverse. None: they are equal.
    moves_rows : join puts the rows of one matrix into another order, of floats or of blocks, uint8
        (rows, row bytes), alike.
    checkpoint : the name in a Hugging Face directory, if not ``hf``. is_optional : a module without
        it keeps its zeros.
    """

    gguf: str | tuple[str, ...]
    hf: str
    join: Callable[[list[np.ndarray], Fields], np.ndarray] | None = None
    split: Callable[[np.ndarray, Fields], list[np.ndarray]] | None = None
    moves_rows: bool = False
    checkpoint: str = ""
    is_optional: bool = False

    @property
    def pieces(self) -> tuple[str, ...]:
        return (self.gguf,) if isinstance(self.gguf, str) else self.gguf


@dataclass(frozen=True)
class WholeModel:
    """Everything of a model except its experts.

    model_type : transformers' name for a file's model, where ``config`` gives no other.
    keys : metadata and fields that are the same thing. tensors : all but the experts', of whole
        model and layer.
    config : the fields that ``keys`` do not give. metadata : the other way, keys without the
        architecture.
    """

    model_type: str
    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    config: Callable[[Source], Fields]
    metadata: Callable[[Fields], Fields]

    def fields(self, source: Source) -> Fields:
        """config.json of a file's model, ``model_type`` included. Raises CheckpointError."""
        found: Fields = {"model_type": self.model_type, **common_fields(source)}
        for row in (*COMMON_KEYS, *self.keys):
            value = (source.required if row.is_required else source.get)(row.key, row.kind)
            if value is not None:
                found[row.field] = value
        found["num_hidden_layers"] = source.num_layers
        return {**found, **self.config(source)}

    def written(self, fields: Fields) -> Fields:
        """The metadata that a file says of a config.json. Raises CheckpointError."""
        found: Fields = {}
        for row in (*COMMON_KEYS, *self.keys):
            value = fields.get(row.field)
            if value is None and row.is_required:
                raise CheckpointError(f"config.json has no {row.field}: {row.key} needs it")
            if value is not None:
                found[row.key] = row.kind(value)
        return {**found, **rope_metadata(fields), **self.metadata(fields)}

    def layer_tensors(self, num_layers: int) -> Iterator[tuple[Tensor, int | None]]:
        """Every tensor that a model can have: (row, layer),
        layer None for those of the whole model.
        """
        for row in self.tensors:
            if "{n}" in row.hf:
                yield from ((row, n) for n in range(num_layers))
            else:
                yield row, None


COMMON_KEYS = (
    Key("block_count", "num_hidden_layers", is_required=True),
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size", is_required=True),
    Key("attention.head_count", "num_attention_heads", is_required=True),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
    Key("expert_used_count", "num_experts_per_tok", is_required=True),
)
GROUPED_KEYS = (
    Key("attention.head_count_kv", "num_key_value_heads"),
    Key("attention.key_length", "head_dim"),
)


def common_fields(source: Source) -> Fields:
    """What every config says alike: vocabulary, tied embeddings, special tokens,
    rotary embeddings.
    """
    embedding = source.checkpoint.info("token_embd.weight")
    fields: Fields = {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in source.checkpoint.tensors,
        "rope_parameters": rope_parameters(source),
    }
    for key, field in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        value = source.get(f"tokenizer.ggml.{key}_token_id")
        fields[f"{field}_token_id"] = (
            value if value is not None and value < embedding.shape[0] else None
        )
    return fields


def per_layer(gguf: str, hf: str, *kinds: str, **more: Any) -> tuple[Tensor, ...]:
    """Rows of one module of each layer: its ``weight`` and what else ``kinds`` name."""
    return tuple(
        Tensor(f"blk.{{n}}.{gguf}.{kind}", f"model.layers.{{n}}.{hf}.{kind}", **more)
        for kind in kinds or ("weight",)
    )


WHOLE = (
    Tensor("token_embd.weight", "model.embed_tokens.weight"),
    Tensor("output_norm.weight", "model.norm.weight"),
    Tensor("output.weight", "lm_head.weight"),
)
NORMS = (
    *per_layer("attn_norm", "input_layernorm"),
    *per_layer("ffn_norm", "post_attention_layernorm"),
)
ATTENTION = (
    *per_layer("attn_q", "self_attn.q_proj", "weight", "bias"),
    *per_layer("attn_k", "self_attn.k_proj", "weight", "bias"),
    *per_layer("attn_v", "self_attn.v_proj", "weight", "bias"),
    *per_layer("attn_output", "self_attn.o_proj", "weight", "bias"),
)
QK_NORMS = (
    *per_layer("attn_q_norm", "self_attn.q_norm"),
    *per_layer("attn_k_norm", "self_attn.k_norm"),
)
DENSE = (
    *per_layer("ffn_gate", "mlp.gate_proj"),
    *per_layer("ffn_up", "mlp.up_proj"),
    *per_layer("ffn_down", "mlp.down_proj"),
)
ROUTER = per_layer("ffn_gate_inp", "mlp.gate")


def shared_experts(module: str) -> tuple[Tensor, ...]:
    """The shared experts of each layer, as one wide one."""
    return tuple(
        row
        for part in ("gate", "up", "down")
        for row in per_layer(f"ffn_{part}_shexp", f"mlp.{module}.{part}_proj")
    )


def permuted_attention() -> tuple[Tensor, ...]:
    """q, k, v and o where llama.cpp rotates neighbours:
    rows of q and k lie pairwise in the file, half by half in the module.
    """
    plain = {row.hf: row for row in ATTENTION}

    def row(letter: str, heads: str) -> Tensor:
        def halves(arrays: list[np.ndarray], fields: Fields) -> np.ndarray:
            return _swap_rows(arrays[0], _heads(fields, heads), to_pairs=False)

        def pairs(array: np.ndarray, fields: Fields) -> list[np.ndarray]:
            return [_swap_rows(array, _heads(fields, heads), to_pairs=True)]

        name = f"model.layers.{{n}}.self_attn.{letter}_proj.weight"
        return Tensor(plain.pop(name).gguf, name, halves, pairs, moves_rows=True)

    permuted = (row("q", "num_attention_heads"), row("k", "num_key_value_heads"))
    return (*permuted, *(r for r in plain.values() if r.hf.endswith(".weight")))


def _heads(fields: Fields, name: str) -> int:
    return int(fields.get(name) or fields["num_attention_heads"])


def _swap_rows(w: np.ndarray, heads: int, to_pairs: bool) -> np.ndarray:
    """(out, in): each head's rows from two halves to pairs,
    whose rows are i of one and i of the other; or back.
    """
    if w.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{w.shape[0]} rows of q or k: must be an even number for each of {heads} heads"
        )
    half = w.shape[0] // heads // 2
    parts = (2, half) if to_pairs else (half, 2)
    return w.reshape(heads, *parts, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def head_dim(fields: Fields) -> int:
    """Of config.json, or as models without the field have it."""
    return int(fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"])


def sizes_of_experts(fields: Fields, count: str, width: str) -> Fields:
    """Metadata that every mixture has: how many experts, how wide; and how wide a head is."""
    size = head_dim(fields)
    return {
        "expert_count": int(fields[count]),
        "expert_feed_forward_length": int(fields[width]),
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
    }
