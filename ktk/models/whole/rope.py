"""Rotary embeddings: transformers' rope_parameters and the keys of a GGUF file."""

from __future__ import annotations

from typing import Any

import numpy as np

from ktk.errors import CheckpointError
from ktk.models.whole.source import Source

Fields = dict[str, Any]  # of a config.json


def rope_parameters(source: Source) -> Fields:
    """transformers' rope_parameters; scaling by "linear" or "yarn".

    Raises CheckpointError for others.
    """
    theta = source.get("rope.freq_base", float)
    fields: Fields = {"rope_type": "default", "rope_theta": 10000.0 if theta is None else theta}
    kind = source.get("rope.scaling.type", str)
    factor = source.get("rope.scaling.factor", float) or source.get("rope.scale_linear", float)
    if kind in (None, "none") and factor in (None, 1.0):
        return fields
    if kind in (None, "linear"):
        return {**fields, "rope_type": "linear", "factor": factor or 1.0}
    if kind != "yarn":
        raise source.error(
            f"{source.architecture}.rope.scaling.type is {kind!r}: ktk knows none, linear and yarn"
        )
    if factor is None:
        raise source.error(f"{source.architecture}.rope.scaling.factor is missing: yarn needs it")
    fields.update(rope_type="yarn", factor=factor)
    fields["original_max_position_embeddings"] = source.get(
        "rope.scaling.original_context_length"
    ) or int(source.required("context_length") / factor)
    for key, field in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        value = source.get(f"rope.scaling.{key}", float)
        if value is not None:
            fields[field] = value
    attention = source.get("rope.scaling.attn_factor", float)
    if attention is None:
        attention = source.get("rope.scaling.yarn_attn_factor", float)
    if attention not in (
        None,
        1.0,
    ):  # llama.cpp multiplies it by what transformers takes without one
        fields["attention_factor"] = attention * (0.1 * np.log(max(factor, 1.0)) + 1.0)
    return fields


def rope_metadata(fields: Fields) -> Fields:
    """The inverse of ``rope_parameters``, of config.json's present or older form."""
    rope = rope_of(fields)
    found: Fields = {
        "rope.freq_base": float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return found
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"rope scaling of type {kind!r}: a GGUF file can say linear and yarn")
    found["rope.scaling.type"], found["rope.scaling.factor"] = kind, float(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings")
        found["rope.scaling.original_context_length"] = int(
            original or fields["max_position_embeddings"] / rope["factor"]
        )
        for field, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if rope.get(field) is not None:
                found[f"rope.scaling.{key}"] = float(rope[field])
        if rope.get("attention_factor") is not None:
            usual = 0.1 * np.log(max(rope["factor"], 1.0)) + 1.0
            found["rope.scaling.attn_factor"] = float(rope["attention_factor"] / usual)
    return found


def rope_of(fields: Fields) -> Fields:
    """rope_parameters of a config.json, called rope_scaling in older ones."""
    found: Fields = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    return found
