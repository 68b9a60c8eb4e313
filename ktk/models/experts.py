"""The experts of a Hugging Face checkpoint, whatever their tensors are called."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.formats import GGUF
from ktk.experts.spec import MoESpec
from ktk.experts.stored import CodedExpert, ExpertWeights, StoredExperts, StoredMatrix
from ktk.models.config import TOP_K_KEYS, Config
from ktk.models.families import Family
from ktk.models.layers import Layer


def own_group(weight_format: str | None, found: tuple[str, int] | None) -> int | None:
    """The group size of ``Experts.panel_format`` if that is of this format; else None.

    Those of 4-bit integers hold for one another.
    """
    if found is None or weight_format is None:
        return None
    is_own = found[0] == weight_format or {found[0], weight_format} <= {"int4", "int4_asym"}
    return found[1] if is_own else None


class Experts:
    """The experts of a checkpoint, whatever its names; ``ktk.models.find`` makes one.

    family : the naming style. layers : indices of the MoE layers, ascending. source_dtype : how the
    weights are stored, one of SOURCE_DTYPES, or several joined by "+".
    """

    def __init__(
        self,
        family: Family,
        config: Config,
        layers: dict[int, Layer],
        activation: Activation,
        where: str,
    ) -> None:
        self.family = family.name
        self._layers = layers
        self._activation = activation
        self.layers = tuple(sorted(layers))
        self.source_dtype = "+".join(
            sorted(set().union(*(layer.source_dtypes for layer in layers.values())))
        )
        self._config, self._where = config, where

    @property
    def num_experts_per_tok(self) -> int:
        """Experts a token goes to; CheckpointError if the config does not say."""
        top_k = self._config.size(TOP_K_KEYS, self.layers[0])
        fewest = min(layer.num_experts for layer in self._layers.values())
        if top_k is None or top_k > fewest:
            raise CheckpointError(
                f"{self._config.where}: num_experts_per_tok={top_k}: must be an int of 1 to "
                f"{fewest}, the number of experts"
            )
        return top_k

    def spec_fields(self, layer: int) -> dict[str, Any]:
        """num_experts, hidden_size, intermediate_size, has_gate,
        has_bias and activation of one layer.
        """
        found = self._layer(layer)
        return {
            "num_experts": found.num_experts,
            "hidden_size": found.hidden_size,
            "intermediate_size": found.intermediate_size,
            "has_gate": found.has_gate,
            "has_bias": found.has_bias,
            "activation": self._activation,
        }

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """One expert, decoded; safe to call from several threads.

        Raises CheckpointError, ValueError.
        """
        return self._checked(layer, expert).read(expert)

    def read_stored(self, layer: int, expert: int) -> ExpertWeights | CodedExpert:
        """The same, but codes that panels may take as they are."""
        found = self._checked(layer, expert)
        return found.read_coded(expert) or found.read(expert)

    @cached_property
    def panel_format(self) -> tuple[str, int] | None:
        """The format of panels, and the group size, that keep all experts' codes, by the first
        expert of each layer; None if there is none.

        Of symmetric and asymmetric 4-bit codes that are mixed int4_asym keeps both. Raises
        CheckpointError.
        """
        found: set[tuple[str, int] | None] = set()
        for layer in self._layers.values():
            found |= layer.panel_formats()
        kept = {each for each in found if each is not None}
        names = {name for name, _ in kept}
        if len(kept) < len(found) or not (len(names) == 1 or names == {"int4", "int4_asym"}):
            return None
        # Smaller groups repeat the scale of a larger one, or of a channel.
        groups = {group for _, group in kept}
        return max(names, key=len), min(groups - {0}, default=0)

    def mxfp4_experts(self, layer: int) -> StoredExperts | None:
        """A layer's MXFP4 experts in the blocks of GGUF, the same numbers;
        None if they are not MXFP4.
        """
        found = self._layer(layer)
        if not found.is_mxfp4:
            return None
        spec = MoESpec(**self.spec_fields(layer), weight_format=GGUF.name)
        names = ("gate", "up", "down") if spec.has_gate else ("up", "down")
        data: dict[str, list[np.ndarray]] = {name: [] for name in names}
        biases: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for expert in range(spec.num_experts):
            for name, blocks in found.read_mxfp4(expert).items():
                data[name].append(blocks)
            for name, bias in found.read_biases(expert).items():
                biases[name].append(bias)
        matrices = {
            name: StoredMatrix.of_rows(
                "MXFP4",
                spec.intermediate_size if name == "down" else spec.hidden_size,
                np.stack(rows),
            )
            for name, rows in data.items()
        }
        stacked = {name: np.stack(rows) for name, rows in biases.items() if rows}
        return StoredExperts(
            spec,
            matrices.get("gate"),
            matrices["up"],
            matrices["down"],
            stacked.get("gate"),
            stacked.get("up"),
            stacked.get("down"),
        )

    def tensor_names(self, layer: int) -> set[str]:
        """The checkpoint's tensors that the experts of one layer are made of."""
        return set(self._layer(layer).names)

    def _checked(self, layer: int, expert: int) -> Layer:
        found = self._layer(layer)
        if not 0 <= expert < found.num_experts:
            raise ValueError(
                f"expert {expert} of layer {layer}: must be 0 to {found.num_experts - 1}"
            )
        return found

    def _layer(self, layer: int) -> Layer:
        try:
            return self._layers[layer]
        except KeyError:
            raise CheckpointError(
                f"{self._where}: layer {layer} has no experts; MoE layers: "
                f"{', '.join(map(str, self.layers))}"
            ) from None
