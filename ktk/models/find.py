"""The experts of a checkpoint, whatever its architecture: a Hugging Face directory's,
a GGUF model's.
"""

from __future__ import annotations

import re

from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.log import logger
from ktk.models.arch import (
    ARCHITECTURES,
    BY_GGUF_NAME,
    BY_MODEL_TYPE,
    FAMILIES,
    families_of,
)
from ktk.models.config import ACTIVATION_KEYS, NUM_LAYERS_KEYS, Config
from ktk.models.experts import Experts
from ktk.models.families import Family
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.gguf.config import GgufConfig
from ktk.models.gguf.experts import GgufExperts
from ktk.models.gguf.tensors import Found, find_tensors, layer_parts
from ktk.models.layers import Layer
from ktk.models.metadata import check_gguf

MAX_NAME = 64  # characters of an architecture
# As config.json calls them.
ACTIVATIONS = {
    "silu": Activation.silu(),
    "swish": Activation.silu(),
    "gelu_pytorch_tanh": Activation.gelu_tanh(),
    "gelu_new": Activation.gelu_tanh(),
    "relu2": Activation.relu2(),
}


def find_experts(checkpoint: Checkpoint) -> Experts:
    """The experts of a checkpoint: its family from the tensor names, shapes and activation checked.

    Layers at or above the config's num_hidden_layers (multi-token prediction) are left alone.
    Raises CheckpointError if no family or several fit, experts are missing, or shapes contradict
    config.json.
    """
    config = Config.of(checkpoint)
    num_layers = config.size(NUM_LAYERS_KEYS)
    found: dict[str, dict[int, dict[str, re.Match[str]]]] = {}
    for family in families_of(config.model_type):
        pattern = family.pattern()
        for name in checkpoint.tensors:
            match = pattern.fullmatch(name)
            if match and (num_layers is None or int(match["layer"]) < num_layers):
                found.setdefault(family.name, {}).setdefault(int(match["layer"]), {})[name] = match
    if not found:
        styles = "; ".join(family.example for family in FAMILIES.values())
        raise CheckpointError(
            f"{checkpoint.path}: no tensor is named like an expert's. ktk knows: {styles}"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: holds experts of several naming styles ({', '.join(found)}); one "
            "is allowed"
        )
    ((chosen, by_layer),) = found.items()
    family = FAMILIES[chosen]
    activation = find_activation(config, family)
    bias_models = tuple(name for name, row in BY_MODEL_TYPE.items() if row.stacks_biases)
    layers: dict[int, Layer] = {}
    for index in sorted(by_layer):
        prefixes = {match["prefix"] for match in by_layer[index].values()}
        if len(prefixes) > 1:
            raise CheckpointError(
                f"{checkpoint.path}: layer {index} occurs under {' and '.join(sorted(prefixes))}; "
                "one is allowed"
            )
        layers[index] = family.layer(checkpoint, config, index, by_layer[index], bias_models)
    return Experts(family, config, layers, activation, str(checkpoint.path))


def find_activation(config: Config, family: Family) -> Activation:
    """The experts' activation, as far as config.json says it, else their architecture's.

    Raises CheckpointError.
    """
    for kind in config.model_types:  # a text part's is another than the whole model's
        if kind in BY_MODEL_TYPE and BY_MODEL_TYPE[kind].refused:
            raise CheckpointError(
                f"{config.where}: model_type {kind!r} is not supported: "
                f"{BY_MODEL_TYPE[kind].refused}"
            )
    named = next(row for row in ARCHITECTURES if family in row.families)
    implied = BY_MODEL_TYPE.get(config.model_type, named).activation
    key, name = config.get(ACTIVATION_KEYS)
    alpha, limit = config.number("swiglu_alpha", 0.0), config.number("swiglu_limit", 0.0)
    if name == "swigluoai" or alpha > 0 or implied == Activation.swigluoai():
        # gpt-oss files older than transformers 5 leave both numbers to the code: 1.702 and 7.
        return Activation.swigluoai(
            alpha if alpha > 0 else 1.702, config.number("swiglu_limit", 7.0)
        )
    if key and (not isinstance(name, str) or name not in ACTIVATIONS):
        known = ", ".join([*ACTIVATIONS, "swigluoai"])
        raise CheckpointError(
            f"{config.where}: {key}={name!r} is not an activation ktk has; it has {known}"
        )
    activation = ACTIVATIONS[name] if key else implied
    if limit <= 0:
        return activation
    if activation != Activation.silu():
        raise CheckpointError(
            f"{config.where}: swiglu_limit={limit} with {key}={name!r}: only silu is clamped"
        )
    return Activation.silu(limit)


def find_gguf_experts(checkpoint: GgufCheckpoint) -> GgufExperts:
    """The experts of a GGUF model: names, shapes and metadata checked against each other.

    Layers of multi-token prediction (the last ``nextn_predict_layers``) are left alone. An
    architecture ktk does not know runs as SiLU(gate) * up, with a warning. Raises CheckpointError.
    """
    path = checkpoint.path
    key = "general.architecture"
    is_list = key in checkpoint.metadata and checkpoint.metadata.size(key) is not None
    name = None if is_list else checkpoint.metadata.get(key)
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise CheckpointError(
            f"{path}: {key} is {name!r:.80}: must be a name of 1 to {MAX_NAME} characters"
        )
    found, extras = find_tensors(checkpoint.tensors)
    if not found:
        raise CheckpointError(
            f"{path}: no tensor is named like an expert's (blk.0.ffn_gate_exps.weight, "
            f"blk.0.ffn_gate.0.weight): is {name!r} a mixture of experts?"
        )
    row = BY_GGUF_NAME.get(name)
    implied = row.gguf if row is not None else None
    if row is None or implied is None:
        logger.warning(
            "%s: architecture %r is not known to ktk: its experts run as SiLU(gate) * up",
            path,
            name,
        )
        implied = GgufArchitecture(name, gating=None, is_normalised=None)
    if implied.refused:
        raise CheckpointError(f"{path}: architecture {name!r}: {implied.refused}")
    check_gguf(checkpoint.metadata, name, str(path))
    config = GgufConfig(checkpoint, name)
    _leave_out_prediction(config, found)
    weights = {
        layer: layer_parts(config, implied.is_gateless, layer, found[layer], extras.get(layer, {}))
        for layer in sorted(found)
    }
    if implied.weighs_input:
        logger.warning("%s: architecture %r: routing weights multiply the input", path, name)
    if any(("down", "scale") in extras.get(layer, {}) for layer in weights):
        logger.warning("%s: experts have output scales: see GgufExperts.output_scale", path)
    activation = Activation.silu() if row is None else row.activation
    return GgufExperts(config, implied, activation, weights, extras)


def _leave_out_prediction(config: GgufConfig, found: Found) -> None:
    """Drop the layers of multi-token prediction; CheckpointError for layers the model cannot
    have.
    """
    key, num_layers = config.key("block_count"), config.size("block_count")
    if num_layers is None:
        return
    if max(found) >= num_layers:
        raise config.error(f"layer {max(found)} has experts, but {key} is {num_layers}")
    predicted = config.num_predicting
    for layer in [layer for layer in found if layer >= num_layers - predicted]:
        del found[layer]
    if not found:
        raise config.error(
            f"{key} is {num_layers} and {config.key('nextn_predict_layers')} {predicted}: no "
            "layer is left"
        )
