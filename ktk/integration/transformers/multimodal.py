"""Models that also see and hear, run on text: which of transformers' classes a config stands for,
and what of it text does not need.

Such a checkpoint has a language model with experts beside towers, encoders of images, videos or
sound. Some have a class of the language model alone (``AutoModelForCausalLM`` takes it), others the
class of the whole only. What opens a model for text leaves its towers out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedModel,
    __version__,
)

from ktk.errors import CheckpointError
from ktk.integration.transformers import names as hf


class LeftOut(torch.nn.Module):
    """In place of a tower of a model that was opened for text."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        raise ValueError(
            "this model was opened for text, without its towers: "
            "ktk.integration.transformers.load_model loads all of it"
        )


def model_class(config_class: type) -> Any:
    """The class that makes text of a config's models,
    the language model alone where there is one; None if there is none.
    """
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None) or _whole_class(config_class)


def quantised_class(path: Path, config: Any) -> tuple[Any, Any]:
    """The class and the config of a checkpoint that others quantised, once its tensors are decoded:
    the language model alone, without quantization_config. Raises CheckpointError if there is none.
    """
    own_class = model_class(type(config))
    if own_class is None:
        raise CheckpointError(
            f"{path}: model_type {config.model_type!r}: transformers has no language model of its "
            "own for it, and a quantised one loads as that only: run `ktk convert` on it and load "
            "what that writes"
        )
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if own_class.config_class is not type(config):  # the language model alone, of a larger one
        config = config.get_text_config(decoder=True)
    return own_class, config


def _whole_class(config_class: type) -> Any:
    return MODEL_FOR_MULTIMODAL_LM_MAPPING.get(config_class, None)


def auto_class(config: Any) -> Any:
    """The class of transformers' whose ``from_pretrained`` makes ``model_class``."""
    config_class = type(config)
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING or _whole_class(config_class) is None:
        return AutoModelForCausalLM  # of a model that it does not know it says so
    return AutoModelForMultimodalLM


def towers(model: Any) -> dict[str, Any]:
    """The encoders in a model that are not its language model, by name, none within another."""
    text = type(model.config.get_text_config(decoder=True))
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or any(name.startswith(f"{n}.") for n in found):
            continue
        if type(module.config.get_text_config(decoder=True)) is not text:
            found[name] = module
    return found


def leave_out_towers(model: Any) -> None:
    """Before weights are read, so that a tower's stay in the checkpoint."""
    for name in towers(model):
        model.set_submodule(name, LeftOut())
        hf.ignore_unread(model, {rf"^{re.escape(name)}\."})


def run_on_text(path: str | os.PathLike[str], config: Mapping[str, Any]) -> tuple[str | None, int]:
    """Why transformers makes no text with a directory's model, or None; the weights of its
    checkpoint that are left out then.

    config : the fields of its config.json.
    """
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return f"transformers {__version__} does not know model_type {kind!r}: a newer one may", 0
    config_class = CONFIG_MAPPING[kind]
    own = model_class(config_class)
    if own is None:
        return f"transformers has no class that makes text with model_type {kind!r}", 0
    if own.generate is not GenerationMixin.generate:
        return f"{own.__name__} generates in a way of its own, not token by token", 0
    whole = _whole_class(config_class)
    if whole is None or not config_class.sub_configs:
        return None, 0
    try:
        return None, _left_out(whole, own, config_class.from_pretrained(path))
    except Exception as error:  # whatever transformers makes of the file
        return f"transformers makes no {whole.__name__} of its config.json: {error}", 0


def _left_out(whole: Any, own: Any, config: Any) -> int:
    with torch.device("meta"):
        model = whole(config)
        if own is whole:
            return sum(_elements(tower) for tower in towers(model).values())
        return _elements(model) - _elements(own(config.get_text_config(decoder=True)))


def _elements(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
