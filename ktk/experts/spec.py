"""MoESpec: the shapes and formats of one layer's experts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ktk.experts.activation import Activation
from ktk.experts.formats import Format, get_format
from ktk.experts.layout import ExpertLayout, expert_layout
from ktk.experts.rotation import Rotation


@dataclass(frozen=True)
class MoESpec:
    """Shape and coding of one layer's experts.

    num_experts, hidden_size, intermediate_size : positive ints.
    weight_format : a name of ``ktk.experts.formats.PANELS``, or "gguf": block formats, see
        ``StoredExperts``.
    group_size : weights along in_features that share a scale or multiplier; 0 = one scale per
        output channel; None = the format's default.
    activation_group : activations along in_features that share a scale (32, 64, 128 or 256);
        0 for float formats, whose activations stay fp32; None = the format's default.
    rotation : of activations and weights, of integer formats in panels: a ``Rotation``, its width
        (64 or 256), or 0 for none; None = the format's default.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    weight_format: str = "int4"
    group_size: int | None = None
    activation_group: int | None = None
    has_gate: bool = True
    has_bias: bool = False
    activation: Activation = dataclasses.field(default_factory=Activation)
    rotation: Rotation | int | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name}={value!r}: must be a positive int")
            if value > 2**24:
                raise ValueError(f"{name}={value}: must be at most {2**24}")
        if not isinstance(self.activation, Activation):
            raise TypeError(f"activation={self.activation!r}: must be a ktk.Activation")
        fmt = get_format(self.weight_format)
        if self.group_size is None:
            object.__setattr__(self, "group_size", fmt.default_group)
        if self.activation_group is None:
            object.__setattr__(self, "activation_group", fmt.default_activation_group)
        fmt.check_groups(self.group_size, self.activation_group)
        given = fmt.default_rotation if self.rotation is None else self.rotation
        object.__setattr__(self, "rotation", Rotation.of(given))
        if self.turns.width and not (fmt.is_packed and fmt.is_integer):
            raise ValueError(
                f"rotation={self.turns.width}: {fmt.name} takes 0, its activations "
                "are not rounded in panels; leave it out"
            )

    @property
    def format(self) -> Format:
        """The row that ``weight_format`` names."""
        return get_format(self.weight_format)

    @property
    def turns(self) -> Rotation:
        """``rotation``, filled in."""
        assert isinstance(self.rotation, Rotation)
        return self.rotation

    @property
    def is_packed(self) -> bool:
        """Whether the experts lie in panels; else in a GGUF file's blocks,
        each matrix in its own format.
        """
        return self.format.is_packed

    @property
    def num_weights(self) -> int:
        """Weights of one expert (biases not counted)."""
        return (3 if self.has_gate else 2) * self.hidden_size * self.intermediate_size

    @property
    def bits_per_weight(self) -> float:
        """Bits at rest per weight, scales, padding and biases included; of packed formats."""
        return self.layout.expert_bytes * 8 / self.num_weights

    @property
    def layout(self) -> ExpertLayout:
        """Where an expert's panels lie; see ``ktk.experts.layout``."""
        assert self.group_size is not None and self.activation_group is not None  # filled in
        return expert_layout(
            self.format,
            self.hidden_size,
            self.intermediate_size,
            self.group_size,
            self.activation_group,
            self.turns,
            self.has_gate,
            self.has_bias,
        )

    def to_json(self) -> dict[str, Any]:
        fields = {**dataclasses.asdict(self), "activation": self.activation.to_json()}
        if not self.turns.width:
            del fields["rotation"]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> MoESpec:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(fields) - known
        missing = {"num_experts", "hidden_size", "intermediate_size"} - set(fields)
        if unknown or missing:
            raise ValueError(
                f"MoE spec: unknown fields {sorted(unknown)}, missing {sorted(missing)}"
            )
        fields = {**fields, "rotation": Rotation.of(fields.get("rotation", 0))}
        if "activation" in fields:
            fields["activation"] = Activation.from_json(fields["activation"])
        return cls(**fields)
