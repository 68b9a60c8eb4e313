"""Experts of GGUF models: one row per architecture, three ways to name tensors, views in place of copies.

Stacked ``blk.N.ffn_{gate,up,down}_exps.weight``, fused ``blk.N.ffn_gate_up_exps.weight`` (gate's rows first), and
one tensor per expert ``blk.N.ffn_{gate,up,down}.E.weight`` (Mixtral files from before April 2024). Shared experts
(``ffn_*_shexp``) and the router stay with the caller.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktk.checkpoint.gguf import GgufCheckpoint, GgufTensor
from ktk.checkpoint.safetensors import strict_json
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.formats import GGUF, Format, activation_group_of, block_format
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.log import logger
from ktk.models.gguf_architectures import ARCHITECTURES, Architecture
from ktk.models.metadata import check_gguf

INDEX = r"(?:0|[1-9][0-9]{0,4})"
STACKED = re.compile(
    rf"blk\.(?P<layer>{INDEX})\.ffn_(?P<part>gate_up|gate|up|down)_exps\.(?P<kind>weight|bias|scale)"
)
SINGLE = re.compile(
    rf"blk\.(?P<layer>{INDEX})\.ffn_(?P<part>gate|up|down)\.(?P<expert>{INDEX})\.weight"
)
BIAS_TYPES = ("F32", "F16", "BF16")
MAX_SIZE = 1 << 24  # of a dimension, as MoESpec has it
MAX_NAME = 64  # characters of an architecture
MAX_LIST = 1 << 16  # entries of a per-layer list in the metadata
# {arch}.expert_gating_func: how router logits become weights.
GATING = {1: "softmax", 2: "sigmoid", 3: "softmax_of_top_k", 4: "sqrt_softplus"}


@dataclass(frozen=True)
class Routing:
    """How a caller turns router logits into topk_weights; None where neither file nor architecture says.

    expert_gating_func : "softmax", "sigmoid", "softmax_of_top_k" or "sqrt_softplus".
    expert_weights_norm : the chosen weights are divided by their sum. expert_weights_scale : then multiplied by it.
    weighs_input : the weights multiply the experts' *input* (Llama 4): call MoE with rows multiplied beforehand, one
        for each token and slot, and topk_weights of 1. Weighting the output gives other numbers.
    """

    expert_gating_func: str | None
    expert_weights_norm: bool | None = None
    expert_weights_scale: float | None = None
    expert_group_count: int | None = None
    expert_group_used_count: int | None = None
    weighs_input: bool = False


@dataclass(frozen=True)
class _Part:
    """One projection of a layer: a stacked tensor, rows of one, or a tensor per expert."""

    names: tuple[str, ...]
    num_experts: int
    out_features: int
    in_features: int
    first_row: int = 0  # within the tensor: up's rows of a fused one follow gate's


class GgufExperts:
    """The experts of a GGUF model; ``find_gguf_experts`` makes one.

    architecture : ``general.architecture``. layers : indices of the MoE layers, ascending. routing : see ``Routing``.
    """

    def __init__(
        self,
        checkpoint: GgufCheckpoint,
        architecture: Architecture,
        weights: dict[int, dict[str, _Part]],
        extras: dict[int, dict[tuple[str, str], str]],
        routing: Routing,
    ) -> None:
        self.checkpoint, self.architecture = checkpoint, architecture.name
        self.layers = tuple(sorted(weights))
        self.routing = routing
        self._row, self._weights, self._extras = architecture, weights, extras
        self._specs: dict[int, MoESpec] = {}

    @property
    def num_layers(self) -> int | None:
        """Layers of the model, those of multi-token prediction left out; None if the metadata does not say."""
        count = _size(self.checkpoint, f"{self.architecture}.block_count")
        return count and count - _num_predicting(self.checkpoint, self.architecture)

    @property
    def num_experts_per_tok(self) -> int:
        """Experts a token goes to; CheckpointError if the metadata does not say."""
        key = f"{self.architecture}.expert_used_count"
        top_k = _size(self.checkpoint, key, self.layers[0])
        fewest = min(parts["down"].num_experts for parts in self._weights.values())
        if top_k is None or top_k > fewest:
            raise CheckpointError(
                f"{self.checkpoint.path}: {key} is {top_k}: must be an int of 1 to {fewest}, the number of experts"
            )
        return top_k

    def spec(self, layer: int) -> MoESpec:
        """Shape and activation of one layer; activation_group by the projection of most bits."""
        if layer not in self._specs:
            parts = self._layer(layer)
            clamp = _clamp(self.checkpoint, self._row, layer)
            finest = max(self._format(part).bits_per_weight for part in parts.values())
            down = parts["down"]
            self._specs[layer] = MoESpec(
                down.num_experts,
                down.out_features,
                down.in_features,
                GGUF.name,
                activation_group=activation_group_of(finest),
                has_gate="gate" in parts,
                has_bias=any(kind == "bias" for _, kind in self._extras.get(layer, {})),
                activation=_written_activation(self.checkpoint)
                or (Activation.silu(clamp) if clamp else self._row.activation),
            )
        return self._specs[layer]

    def experts(self, layer: int) -> StoredExperts:
        """One layer's blocks: views of the mapped file; a copy where experts' own tensors lie at uneven distances."""
        spec, parts = self.spec(layer), self._layer(layer)
        matrices = {
            name: StoredMatrix(
                self._format(part),
                part.in_features,
                part.out_features,
                self._blocks(layer, name, part),
            )
            for name, part in parts.items()
        }
        biases = self._biases(layer, spec)
        return StoredExperts(
            spec,
            matrices.get("gate"),
            matrices["up"],
            matrices["down"],
            biases.get("gate"),
            biases.get("up"),
            biases.get("down"),
        )

    def output_scale(self, layer: int) -> np.ndarray | None:
        """float32 (num_experts,) that multiplies each expert's output (Gemma 4), or None.

        Not part of ``experts``: a caller multiplies topk_weights by ``output_scale(layer)[topk_ids]``.
        """
        self._layer(layer)
        name = self._extras.get(layer, {}).get(("down", "scale"))
        return None if name is None else self._floats(name).reshape(-1)

    def prefetch(self, layer: int) -> None:
        """Ask the OS to read a layer's weights ahead, unless they are in memory already; returns at once."""
        for name in self._weight_names(layer):
            if not self.checkpoint.is_resident(name):
                self.checkpoint.will_need(name)

    def is_resident(self, layer: int) -> bool:
        """Whether samples of a layer's pages are in memory; True where the OS does not tell."""
        return all(map(self.checkpoint.is_resident, self._weight_names(layer)))

    def tensor_names(self, layer: int) -> set[str]:
        """The checkpoint's tensors that the experts of one layer are made of."""
        return {*self._weight_names(layer), *self._extras.get(layer, {}).values()}

    def _weight_names(self, layer: int) -> list[str]:
        parts = self._layer(layer).values()
        return list(dict.fromkeys(name for part in parts for name in part.names))

    def _layer(self, layer: int) -> dict[str, _Part]:
        try:
            return self._weights[layer]
        except KeyError:
            raise CheckpointError(
                f"{self.checkpoint.path}: layer {layer} has no experts; MoE layers: {', '.join(map(str, self.layers))}"
            ) from None

    def _format(self, part: _Part) -> Format:
        first = self.checkpoint.info(part.names[0])
        for name in part.names[1:]:
            other = self.checkpoint.info(name)
            if other.type != first.type:
                raise CheckpointError(
                    f"{other.file}: tensor {name!r} is {other.type}, {first.name!r} is {first.type}: experts of one "
                    "projection must have one type"
                )
        try:
            return block_format(first.type)
        except ValueError as error:
            raise CheckpointError(f"{first.file}: tensor {first.name!r}: {error}") from None

    def _blocks(self, layer: int, name: str, part: _Part) -> np.ndarray:
        """uint8 (num_experts, out_features, row bytes)."""
        if len(part.names) == 1:
            blocks = self.checkpoint.blocks(part.names[0])
            blocks = blocks.reshape(part.num_experts, -1, blocks.shape[-1])
            return blocks[:, part.first_row : part.first_row + part.out_features]
        tensors = [self.checkpoint.info(expert) for expert in part.names]
        shape = (part.num_experts, part.out_features, tensors[0].row_bytes)
        distances = {b.begin - a.begin for a, b in itertools.pairwise(tensors)}
        if len({tensor.file for tensor in tensors}) == 1 and len(distances) == 1:
            (distance,) = distances
            if distance > 0:
                return np.lib.stride_tricks.as_strided(
                    self.checkpoint.file_bytes(tensors[0].file)[tensors[0].begin :],
                    shape,
                    (distance, shape[2], 1),
                    writeable=False,
                )
        logger.info(
            "%s: layer %d: %s of %d experts copied (%.0f MB): their tensors lie at uneven distances",
            self.checkpoint.path, layer, name, part.num_experts, np.prod(shape) / 1e6,
        )  # fmt: skip
        stacked = np.empty(shape, np.uint8)
        for expert, tensor in enumerate(tensors):
            stacked[expert] = self.checkpoint.blocks(tensor.name)
        return stacked

    def _biases(self, layer: int, spec: MoESpec) -> dict[str, np.ndarray]:
        biases: dict[str, np.ndarray] = {}
        for (part, kind), name in self._extras.get(layer, {}).items():
            if kind != "bias":
                continue
            bias = self._floats(name).reshape(spec.num_experts, -1)
            if part == "gate_up":
                half = spec.intermediate_size
                biases["gate"] = np.ascontiguousarray(bias[:, :half])
                biases["up"] = np.ascontiguousarray(bias[:, half:])
            else:
                biases[part] = bias
        return biases

    def _floats(self, name: str) -> np.ndarray:
        tensor = self.checkpoint.info(name)
        if tensor.type not in BIAS_TYPES:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} is {tensor.type}: must be {', '.join(BIAS_TYPES)}"
            )
        return self.checkpoint.read(name)


def _written_activation(checkpoint: GgufCheckpoint) -> Activation | None:
    """What ``ktk convert`` wrote as ``ktk.activation``: architectures do not say it of every model."""
    said = checkpoint.metadata.get("ktk.activation")
    if said is None:
        return None
    try:
        if not isinstance(said, str):
            raise ValueError(f"is a {type(said).__name__}")
        fields = strict_json(said.encode("utf-8", "surrogatepass"))
        if not isinstance(fields, dict):
            raise ValueError(f"holds a {type(fields).__name__}")
        return Activation.from_json(fields)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: ktk.activation must be JSON of an activation: {error}"
        ) from None


def find_gguf_experts(checkpoint: GgufCheckpoint) -> GgufExperts:
    """The experts of a GGUF model: names, shapes and metadata checked against each other.

    Layers of multi-token prediction (the last ``nextn_predict_layers``) are left alone. An architecture ktk does not
    know runs as SiLU(gate) * up, with a warning. Raises CheckpointError.
    """
    path = checkpoint.path
    key = "general.architecture"
    is_list = key in checkpoint.metadata and checkpoint.metadata.size(key) is not None
    name = None if is_list else checkpoint.metadata.get(key)
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise CheckpointError(
            f"{path}: {key} is {name!r:.80}: must be a name of 1 to {MAX_NAME} characters"
        )
    found: dict[int, dict[str, Any]] = {}
    extras: dict[int, dict[tuple[str, str], str]] = {}
    for tensor in checkpoint.tensors:
        if match := STACKED.fullmatch(tensor):
            layer = int(match["layer"])
            if match["kind"] == "weight":
                found.setdefault(layer, {})[match["part"]] = tensor
            else:
                extras.setdefault(layer, {})[match["part"], match["kind"]] = tensor
        elif match := SINGLE.fullmatch(tensor):
            singles = found.setdefault(int(match["layer"]), {}).setdefault(f"{match['part']}.", {})
            singles[int(match["expert"])] = tensor
    if not found:
        raise CheckpointError(
            f"{path}: no tensor is named like an expert's (blk.0.ffn_gate_exps.weight, blk.0.ffn_gate.0.weight): "
            f"is {name!r} a mixture of experts?"
        )
    row = ARCHITECTURES.get(name)
    if row is None:
        logger.warning(
            "%s: architecture %r is not known to ktk: its experts run as SiLU(gate) * up",
            path,
            name,
        )
        row = Architecture(name, gating=None, is_normalised=None)
    if row.refused:
        raise CheckpointError(f"{path}: architecture {name!r}: {row.refused}")
    check_gguf(checkpoint.metadata, name, str(path))
    _leave_out_prediction(checkpoint, name, found)
    weights = {
        layer: _layer_parts(checkpoint, row, layer, found[layer], extras.get(layer, {}))
        for layer in sorted(found)
    }
    if row.weighs_input:
        logger.warning("%s: architecture %r: routing weights multiply the input", path, name)
    if any(("down", "scale") in extras.get(layer, {}) for layer in weights):
        logger.warning("%s: experts have output scales: see GgufExperts.output_scale", path)
    return GgufExperts(checkpoint, row, weights, extras, _routing(checkpoint, row))


def _leave_out_prediction(checkpoint: GgufCheckpoint, name: str, found: dict[int, Any]) -> None:
    """Drop the layers of multi-token prediction; CheckpointError for layers the model cannot have."""
    key = f"{name}.block_count"
    num_layers = _size(checkpoint, key)
    if num_layers is None:
        return
    if max(found) >= num_layers:
        raise CheckpointError(
            f"{checkpoint.path}: layer {max(found)} has experts, but {key} is {num_layers}"
        )
    predicted = _num_predicting(checkpoint, name)
    for layer in [layer for layer in found if layer >= num_layers - predicted]:
        del found[layer]
    if not found:
        raise CheckpointError(
            f"{checkpoint.path}: {key} is {num_layers} and {name}.nextn_predict_layers {predicted}: no layer is left"
        )


def _num_predicting(checkpoint: GgufCheckpoint, name: str) -> int:
    return _size(checkpoint, f"{name}.nextn_predict_layers") or 0


def _layer_parts(
    checkpoint: GgufCheckpoint,
    row: Architecture,
    layer: int,
    found: dict[str, Any],
    extras: dict[tuple[str, str], str],
) -> dict[str, _Part]:
    """A layer's projections, in the order gate, up, down; every shape agrees with the others and the metadata."""
    where = f"{checkpoint.path}: layer {layer}"
    styles = {
        "per expert" if part.endswith(".") else "fused" if part == "gate_up" else "stacked"
        for part in found
        if part != "down"
    }
    if (
        any(f"{part}." in found for part in ("gate", "up", "down") if part in found)
        or len(styles) > 1
    ):
        raise CheckpointError(f"{where}: holds experts under several names: {sorted(found)}")
    count_key = f"{row.name}.expert_count"
    count = _size(checkpoint, count_key, layer)
    parts: dict[str, _Part] = {}
    for part in ("gate_up", "gate", "up", "down"):
        if part in found:
            parts[part] = _stacked(checkpoint.tensors[found[part]])
        elif f"{part}." in found:
            parts[part] = _singles(checkpoint, where, part, found[f"{part}."], count, count_key)
    if fused := parts.pop("gate_up", None):
        if fused.out_features % 2:
            raise CheckpointError(
                f"{where}: {fused.names[0]!r} has {fused.out_features} rows: must be even, gate's and up's"
            )
        half = fused.out_features // 2
        for i, part in enumerate(("gate", "up")):
            parts[part] = _Part(
                fused.names, fused.num_experts, half, fused.in_features, first_row=i * half
            )
    needed = ("up", "down") if row.is_gateless else ("gate", "up", "down")
    if absent := [part for part in needed if part not in parts]:
        raise CheckpointError(
            f"{where}: no tensor for {' and '.join(absent)}; has {sorted(found)}: is a part of the model missing?"
        )
    parts = {part: parts[part] for part in ("gate", "up", "down") if part in parts}
    up, down = parts["up"], parts["down"]
    hidden, intermediate = up.in_features, up.out_features
    for part, has in parts.items():
        ins, outs = (intermediate, hidden) if part == "down" else (hidden, intermediate)
        if (has.num_experts, has.out_features, has.in_features) != (up.num_experts, outs, ins):
            raise CheckpointError(
                f"{where}: {has.names[0]!r} is {has.num_experts} x {has.out_features} x {has.in_features}, "
                f"{up.names[0]!r} {up.num_experts} x {intermediate} x {hidden} (experts, out, in): they do not fit"
            )
    if max(down.num_experts, hidden, intermediate) > MAX_SIZE:
        raise CheckpointError(
            f"{where}: {down.num_experts} experts of {hidden} x {intermediate}: at most {MAX_SIZE} each"
        )
    arch = row.name
    _agree(checkpoint, where, (count_key,), layer, "experts", down.num_experts)
    _agree(
        checkpoint,
        where,
        (f"{arch}.expert_feed_forward_length",),
        layer,
        "a width of",
        intermediate,
    )
    keys = (f"{arch}.moe_latent_size", f"{arch}.embedding_length")
    _agree(checkpoint, where, keys, layer, "a hidden size of", hidden)
    _check_extras(checkpoint, where, parts, extras)
    return parts


def _stacked(tensor: GgufTensor) -> _Part:
    # ggml drops trailing dimensions of 1, and with them the only expert.
    shape = (1, *tensor.shape) if len(tensor.shape) == 2 else tensor.shape
    if len(shape) != 3:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} (byte {tensor.begin}) is {tensor.shape}: must be (experts, out, in)"
        )
    return _Part((tensor.name,), *shape)


def _singles(
    checkpoint: GgufCheckpoint,
    where: str,
    part: str,
    found: dict[int, str],
    count: int | None,
    count_key: str,
) -> _Part:
    """A projection of tensors of its experts' own."""
    count = max(found) + 1 if count is None else count
    missing = list(itertools.islice((e for e in range(count) if e not in found), 9))
    if missing or len(found) != count:
        text = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(
            f"{where}: {part} holds {len(found)} experts, the highest {max(found)}, {count_key} is {count}"
            + (f"; missing: {text}" if missing else "")
        )
    names = tuple(found[expert] for expert in range(count))
    first = checkpoint.tensors[names[0]]
    for name in names:
        tensor = checkpoint.tensors[name]
        if len(tensor.shape) != 2 or tensor.shape != first.shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} (byte {tensor.begin}) is {tensor.shape}, {first.name!r} is "
                f"{first.shape}: must be alike, (out, in)"
            )
    return _Part(names, count, *first.shape)


def _check_extras(
    checkpoint: GgufCheckpoint,
    where: str,
    parts: dict[str, _Part],
    extras: dict[tuple[str, str], str],
) -> None:
    """Biases and scales have their projection's shape; scales that ktk cannot apply are refused."""
    widths = {part: has.out_features for part, has in parts.items()}
    widths["gate_up"] = 2 * widths["up"]
    experts = parts["down"].num_experts
    for (part, kind), name in extras.items():
        tensor = checkpoint.tensors[name]
        if kind == "scale" and part != "down":
            raise CheckpointError(
                f"{where}: {name!r}: scales of gate and up projections are not supported"
            )
        if part not in widths or (part == "gate_up" and ("up", kind) in extras):
            raise CheckpointError(f"{where}: {name!r} has no projection of its own")
        wanted = (experts,) if kind == "scale" else (experts, widths[part])
        if tensor.shape != wanted and (experts > 1 or tensor.shape != wanted[1:]):
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} (byte {tensor.begin}) is {tensor.shape}: must be {wanted}"
            )


def _routing(checkpoint: GgufCheckpoint, row: Architecture) -> Routing:
    arch = row.name
    code = _number(checkpoint, f"{arch}.expert_gating_func")
    if code is not None and code != 0 and code not in GATING:
        raise CheckpointError(
            f"{checkpoint.path}: {arch}.expert_gating_func is {code}: ktk knows {GATING}"
        )
    norm = _entry(checkpoint, f"{arch}.expert_weights_norm", 0)
    return Routing(
        GATING[int(code)] if code else row.gating,
        row.is_normalised if norm is None else norm,
        _number(checkpoint, f"{arch}.expert_weights_scale") or None,
        _size(checkpoint, f"{arch}.expert_group_count"),
        _size(checkpoint, f"{arch}.expert_group_used_count"),
        row.weighs_input,
    )


def _entry(checkpoint: GgufCheckpoint, key: str, layer: int) -> Any:
    """A value of the metadata, or the layer's entry of a list; None if there is no such key."""
    metadata = checkpoint.metadata
    if key not in metadata:
        return None
    length = metadata.size(key)
    if length is None:
        return metadata[key]
    if length > MAX_LIST or layer >= length:
        raise CheckpointError(
            f"{checkpoint.path}: {key} lists {length} layers: must be more than {layer}, at most {MAX_LIST}"
        )
    return metadata[key][layer]


def _number(checkpoint: GgufCheckpoint, key: str, layer: int = 0) -> float | None:
    """A finite number of the metadata; None if there is no such key."""
    value = _entry(checkpoint, key, layer)
    if value is None:
        return None
    if type(value) not in (int, float) or not abs(value) < 1e30:  # NaN is not either
        raise CheckpointError(f"{checkpoint.path}: {key} is {value!r:.80}: must be a number")
    return float(value)


def _size(checkpoint: GgufCheckpoint, key: str, layer: int = 0) -> int | None:
    """A positive int, or the layer's entry of a list of them; None if there is no such key or it is 0."""
    value = _entry(checkpoint, key, layer)
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_SIZE):
        raise CheckpointError(
            f"{checkpoint.path}: {key} is {value!r:.80}: must be an int of 0 to {MAX_SIZE}"
        )
    return value or None


def _agree(
    checkpoint: GgufCheckpoint, where: str, keys: Iterable[str], layer: int, what: str, have: int
) -> None:
    """CheckpointError unless the first of ``keys`` that is there says what the tensors have."""
    for key in keys:
        said = _size(checkpoint, key, layer)
        if said is not None:
            if said != have:
                raise CheckpointError(
                    f"{where}: the tensors have {what} {have}, the metadata's {key} is {said}: "
                    "the file contradicts itself; convert it again"
                )
            return


def _clamp(checkpoint: GgufCheckpoint, row: Architecture, layer: int) -> float:
    """The bound of this layer's SwiGLU, 0 for none; CheckpointError if the architecture's way is not known."""
    key = f"{row.name}.swiglu_clamp_exp"
    limit = _number(checkpoint, key, layer) or 0.0
    if limit < 0 or (limit > 0 and not row.clamps_swiglu):
        raise CheckpointError(
            f"{checkpoint.path}: layer {layer}: {key} is {limit}: ktk does not know how this architecture clamps"
        )
    return limit


__all__ = ["ARCHITECTURES", "Architecture", "GgufExperts", "Routing", "find_gguf_experts"]
