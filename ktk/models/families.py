"""Families of tensor names: how a checkpoint calls the tensors of experts, and how they lie.

Two ways are in use, ``PerExpert`` (three tensors per expert) and ``Fused`` (one tensor stacks all
experts of a layer). The families themselves stand with the architectures that have them
(``ktk.models.arch``).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.models.config import Config
from ktk.models.layers import Layer, PerExpertLayer, StackedLayer

# What may stand before the layer's index.
LAYER_PREFIX = r"(?:(?:model|language_model\.model|model\.language_model|backbone)\.)?layers"
INDEX = r"(?:0|[1-9]\d{0,4})"


class Family(ABC):
    """One style of tensor names. name : as error messages and packed directories call it."""

    name: str
    example: str  # one tensor name, for error messages
    # Another family whose names these may be, too: the architectures that list this one read it
    # instead, no other does.
    instead_of: str = ""

    @abstractmethod
    def pattern(self) -> re.Pattern[str]:
        """Matches every expert tensor; groups: layer, part, and expert where names hold one."""

    @abstractmethod
    def layer(
        self,
        checkpoint: Checkpoint,
        config: Config,
        layer: int,
        names: dict[str, re.Match[str]],
        bias_models: tuple[str, ...],
    ) -> Layer:
        """Check one layer's tensors and return it.

        bias_models : model types of ``Architecture.stacks_biases``.
        """

    def compile(self, rest: str) -> re.Pattern[str]:
        return re.compile(rf"(?P<prefix>{LAYER_PREFIX})\.(?P<layer>{INDEX})\.{rest}")


class PerExpert(Family):
    """``{layer}.{module}.{expert}.{gate|up|down}.weight``, with scales and biases beside the
    weight.

    gate None : experts without a gate projection.
    """

    def __init__(self, name: str, module: str, gate: str | None, up: str, down: str) -> None:
        self.name = name
        self.parts = {"gate": gate, "up": up, "down": down}
        stored = "|".join(part for part in self.parts.values() if part)
        self.example = f"model.layers.L.{_plain(module)}.E.{{{stored.replace('|', ',')}}}.weight"
        self._pattern = self.compile(
            rf"{module}\.(?P<expert>{INDEX})\.(?P<part>{stored})\.(?P<suffix>.+)"
        )

    def pattern(self) -> re.Pattern[str]:
        return self._pattern

    def layer(
        self,
        checkpoint: Checkpoint,
        config: Config,
        layer: int,
        names: dict[str, re.Match[str]],
        bias_models: tuple[str, ...],
    ) -> Layer:
        return PerExpertLayer(checkpoint, config, layer, names, self.parts)


class Fused(Family):
    """One tensor per layer stacks gate and up of all experts, another their down projections.

    Two orientations are in use: (experts, 2 * intermediate, hidden) with (experts, hidden,
    intermediate), as a linear layer has them, and both transposed. Which one follows from the two
    shapes together:
    to fit both ways, a matrix would have to have no rows. ``is_interleaved``: gate and up
    alternate.
    parts : tensor name after the module -> gate_up or down, or one of them with _bias or _scale.
    """

    def __init__(
        self,
        name: str,
        module: str,
        parts: dict[str, str],
        is_interleaved: bool = False,
        instead_of: str = "",
    ) -> None:
        self.name = name
        self.is_interleaved, self.instead_of = is_interleaved, instead_of
        self.parts = parts
        stored = "|".join(re.escape(s) for s in sorted(parts, key=len, reverse=True))
        shown = ",".join(s for s in parts if parts[s] in ("gate_up", "down"))
        self.example = f"model.layers.L.{_plain(module)}.{{{shown}}}"
        self._pattern = self.compile(rf"{module}\.(?P<part>{stored})")

    def pattern(self) -> re.Pattern[str]:
        return self._pattern

    def layer(
        self,
        checkpoint: Checkpoint,
        config: Config,
        layer: int,
        names: dict[str, re.Match[str]],
        bias_models: tuple[str, ...],
    ) -> Layer:
        parts: dict[str, str] = {}
        for name, match in names.items():
            part = self.parts[match["part"]]
            if part in parts:
                raise CheckpointError(
                    f"{checkpoint.path}: {name!r} and {parts[part]!r} are the same weights"
                )
            parts[part] = name
        found = StackedLayer(checkpoint, config, layer, parts, self.parts, self.is_interleaved)
        if found.has_bias and config.model_type not in bias_models:
            raise CheckpointError(
                f"{checkpoint.path}: layer {layer}: {parts['gate_up_bias']!r}: for model_type "
                f"{config.model_type!r} ktk does not know whether gate and up alternate; known "
                f"with biases: {', '.join(bias_models)}"
            )
        return found


def _plain(module: str) -> str:
    """A module's pattern as people read it."""
    return module.replace("\\", "").replace("(?:", "[").replace(")?", "]")
