"""Experts of a GGUF model: views of the mapped file in place of copies."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.checkpoint.safetensors import strict_json
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.formats import GGUF, Format, activation_group_of, block_format
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.log import logger
from ktk.models.gguf.architecture import GgufArchitecture
from ktk.models.gguf.config import GgufConfig
from ktk.models.gguf.routing import find_routing
from ktk.models.gguf.tensors import Extras, Part

BIAS_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ExpertRows:
    """Where one projection of a layer lies. places : of each expert, its file and first byte."""

    format: Format
    in_features: int
    out_features: int
    num_bytes: int  # of an expert
    places: tuple[tuple[Path, int], ...]


class GgufExperts:
    """The experts of a GGUF model; ``ktk.models.find`` makes one.

    architecture : ``general.architecture``. layers : indices of the MoE layers, ascending. routing
        : see ``Routing``.
    """

    def __init__(
        self,
        config: GgufConfig,
        implied: GgufArchitecture,
        activation: Activation,
        weights: dict[int, dict[str, Part]],
        extras: dict[int, Extras],
    ) -> None:
        self.checkpoint, self.architecture = config.checkpoint, config.architecture
        self.layers = tuple(sorted(weights))
        self.routing = find_routing(config, implied)
        self._config, self._implied, self._activation = config, implied, activation
        self._weights, self._extras = weights, extras
        self._specs: dict[int, MoESpec] = {}

    @property
    def num_layers(self) -> int | None:
        """Layers of the model, those of multi-token prediction left out;
        None if the metadata does not say.
        """
        count = self._config.size("block_count")
        return count and count - self._config.num_predicting

    @property
    def num_experts_per_tok(self) -> int:
        """Experts a token goes to; CheckpointError if the metadata does not say."""
        key = self._config.key("expert_used_count")
        top_k = self._config.size("expert_used_count", self.layers[0])
        fewest = min(parts["down"].num_experts for parts in self._weights.values())
        if top_k is None or top_k > fewest:
            raise self._config.error(
                f"{key} is {top_k}: must be an int of 1 to {fewest}, the number of experts"
            )
        return top_k

    def spec(self, layer: int) -> MoESpec:
        """Shape and activation of one layer; activation_group by the projection of most bits."""
        if layer not in self._specs:
            parts = self._layer(layer)
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
                activation=self._activation_of(layer),
            )
        return self._specs[layer]

    def experts(self, layer: int) -> StoredExperts:
        """One layer's blocks: views of the mapped file;
        a copy where experts' own tensors lie at uneven distances.
        """
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
        biases = self.biases(layer)
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

        Not part of ``experts``: a caller multiplies topk_weights by
        ``output_scale(layer)[topk_ids]``.
        """
        self._layer(layer)
        name = self._extras.get(layer, {}).get(("down", "scale"))
        return None if name is None else self._floats(name).reshape(-1)

    def prefetch(self, layer: int) -> None:
        """Ask the OS to read a layer's weights ahead, unless they are in memory already;
        returns at once.
        """
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

    def _layer(self, layer: int) -> dict[str, Part]:
        try:
            return self._weights[layer]
        except KeyError:
            raise CheckpointError(
                f"{self.checkpoint.path}: layer {layer} has no experts; MoE layers: "
                f"{', '.join(map(str, self.layers))}"
            ) from None

    def _format(self, part: Part) -> Format:
        first = self.checkpoint.info(part.names[0])
        for name in part.names[1:]:
            other = self.checkpoint.info(name)
            if other.type != first.type:
                raise CheckpointError(
                    f"{other.file}: tensor {name!r} is {other.type}, {first.name!r} is "
                    f"{first.type}: experts of one "
                    "projection must have one type"
                )
        try:
            return block_format(first.type)
        except ValueError as error:
            raise CheckpointError(f"{first.file}: tensor {first.name!r}: {error}") from None

    def _blocks(self, layer: int, name: str, part: Part) -> np.ndarray:
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
            "%s: layer %d: %s of %d experts copied (%.0f MB): their tensors lie at uneven "
            "distances",
            self.checkpoint.path,
            layer,
            name,
            part.num_experts,
            np.prod(shape) / 1e6,
        )
        stacked = np.empty(shape, np.uint8)
        for expert, tensor in enumerate(tensors):
            stacked[expert] = self.checkpoint.blocks(tensor.name)
        return stacked

    def rows(self, layer: int) -> dict[str, ExpertRows]:
        """Where the bytes of ``experts(layer)`` lie, by projection, biases left out."""
        found = {}
        for name, part in self._layer(layer).items():
            tensors = [self.checkpoint.info(tensor) for tensor in part.names]
            row_bytes = tensors[0].row_bytes
            first = part.first_row * row_bytes
            if len(tensors) == 1:
                step = tensors[0].num_bytes // part.num_experts
                starts = [
                    (tensors[0].file, tensors[0].begin + e * step) for e in range(part.num_experts)
                ]
            else:
                starts = [(tensor.file, tensor.begin) for tensor in tensors]
            found[name] = ExpertRows(
                self._format(part),
                part.in_features,
                part.out_features,
                part.out_features * row_bytes,
                tuple((file, begin + first) for file, begin in starts),
            )
        return found

    def biases(self, layer: int) -> dict[str, np.ndarray]:
        """float32 (num_experts, out_features) of each projection that has one."""
        spec = self.spec(layer)
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

    def _activation_of(self, layer: int) -> Activation:
        """As ``ktk convert`` wrote it, else the architecture's, with the layer's bound;
        CheckpointError if it bounds in a way not known.
        """
        written = _written_activation(self.checkpoint)
        limit = self._config.number("swiglu_clamp_exp", layer) or 0.0
        if limit < 0 or (limit > 0 and not self._implied.clamps_swiglu):
            raise self._config.error(
                f"layer {layer}: {self._config.key('swiglu_clamp_exp')} is {limit}: ktk does not "
                "know how this architecture clamps"
            )
        return written or (Activation.silu(limit) if limit else self._activation)


def _written_activation(checkpoint: GgufCheckpoint) -> Activation | None:
    """What ``ktk convert`` wrote as ``ktk.activation``:
    architectures do not say it of every model.
    """
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
