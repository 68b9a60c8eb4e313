"""save_pretrained of a model with packed experts: the packed directory that ``ktk convert`` writes.

The experts go into ``ktk-experts-LLLLL.safetensors``, transformers writes the rest. They are
written in the course of save_pretrained, so that what it does with new files, such as
``push_to_hub``, happens to them too.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import Any

from ktk.checkpoint.packed import CODING, layer_path, list_layers, write_layer
from ktk.experts.layout import LAYOUT_VERSION
from ktk.experts.stored import StoredExperts
from ktk.integration.choices import PACKED_LINEAR
from ktk.integration.transformers.adapters import adapter_of
from ktk.integration.transformers.experts import find_experts, handle_of
from ktk.integration.transformers.linear import KtkLinear
from ktk.integration.transformers.multimodal import LeftOut
from ktk.integration.transformers.sources import layer_of
from ktk.integration.transformers.trained_experts import trained_of
from ktk.paths import user_path


class SavePretrained:
    """``model.save_pretrained`` of a packed model: transformers' own, with the experts told where
    to go.

    It must not keep the model alive: gigabytes would wait for the garbage collector.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()

    def __call__(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        model = self._model()
        if model is None:
            raise RuntimeError(
                "the model is gone already: keep it in a variable, then call its save_pretrained"
            )
        save_directory = user_path(save_directory)  # transformers would make a directory called ~
        quantizer = model.hf_quantizer
        with self._lock:
            quantizer.save_directory = save_directory if is_main_process else None
            try:
                type(model).save_pretrained(model, save_directory, is_main_process, **kwargs)
            finally:
                quantizer.save_directory = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        return SavePretrained(memo[id(self._model())])


def write_experts(model: Any, directory: Path) -> None:
    """Write the experts' files into a directory and tell the model's config of them.

    Raises ValueError for linear layers or experts that have no packed form or are not packed, for
    towers that were left out, and for two modules of one layer number.
    """
    said = model.hf_quantizer.quantization_config
    if said.linear in PACKED_LINEAR:
        raise ValueError(
            f"its linear layers are packed as {said.linear}, which a packed directory does not "
            "hold: load the model without linear=, save that, and ask for linear= when the saved "
            "one is loaded"
        )
    for name, module in model.named_modules():
        if isinstance(module, LeftOut):
            raise ValueError(
                f"{name} was left out, because the model was opened for text: save what "
                "load_model loads"
            )
        if isinstance(module, KtkLinear):
            raise ValueError(
                f"{name} is run by {module.kernel}, which a packed directory does not hold: load "
                "the model with "
                'linear="none", and save that'
            )
    layers: dict[int, StoredExperts] = {}
    names: dict[int, str] = {}
    for name, module in find_experts(model):
        handle, layer = handle_of(module), layer_of(name)
        if handle is None or handle.sources is not None:
            raise ValueError(f"{name} is not packed: use_ktk(model) packs it")
        if adapter_of(module) is not None:
            raise ValueError(
                f"{name} has an adapter, which a packed directory does not hold: "
                "ktk.train.save_expert_lora saves it, remove_expert_lora takes it away"
            )
        if trained_of(module) is not None:
            raise ValueError(f"{name} has trained experts: ktk.train.write_back packs them first")
        packed = handle.moe.packed
        if not packed.is_packed:
            raise ValueError(
                f"{name} runs the {packed.types} blocks of its file, which a packed directory "
                "does not hold: copy the "
                'file, or load it with a method that packs, such as "INT8" or "INT4"'
            )
        if packed.order is not None:
            raise ValueError(
                f"{name} has not all experts in the CPU's memory: load the model with "
                "load_gpu_experts=True, and save that"
            )
        if layer in layers:
            raise ValueError(
                f"{name} and {names[layer]} are both layer {layer}: a packed directory holds one "
                "of them"
            )
        layers[layer], names[layer] = packed, name
    for layer, packed in layers.items():
        write_layer(directory, packed.spec, layer, packed.data)
    for layer in set(list_layers(directory)) - set(layers):  # of an earlier save
        layer_path(directory, layer).unlink()
    said.gguf = None
    said.layers, said.layout_version = sorted(layers), LAYOUT_VERSION
    specs = [packed.spec for packed in layers.values()]
    for field in CODING:
        values = {getattr(spec, field) for spec in specs}
        setattr(said, field, values.pop() if len(values) == 1 else None)
    said.state_rotation({spec.turns for spec in specs})
    model.config.quantization_config = said
