"""Value types every layer of ktk shares: the activation, the MoE spec, packed experts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ktk.layout import ExpertLayout

# Order is the C enum `ktk_activation_kind`.
ACTIVATION_KINDS = ("sigmoid_glu", "gelu_tanh", "relu2")


@dataclass(frozen=True)
class Activation:
    """The elementwise function between the gate|up and the down projection.

    ``sigmoid_glu``: ``g = clamp(gate, gate_min, gate_max)``, ``u = clamp(up, up_min, up_max)``,
    result ``g * sigmoid(alpha * g) * (u + up_offset)``. It covers SiLU, clamped SiLU and the
    gpt-oss / MiniMax-M3 variants. ``gelu_tanh`` and ``relu2`` apply to the gate and multiply by up.
    Without a gate projection (``MoESpec.has_gate`` False) the function applies to up alone.
    """

    kind: str = "sigmoid_glu"
    alpha: float = 1.0
    gate_min: float = -math.inf
    gate_max: float = math.inf
    up_min: float = -math.inf
    up_max: float = math.inf
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATION_KINDS:
            raise ValueError(f"activation kind={self.kind!r}: must be one of {ACTIVATION_KINDS}")
        for name in ("alpha", "gate_min", "gate_max", "up_min", "up_max", "up_offset"):
            given = getattr(self, name)
            if isinstance(given, (str, bool)):
                raise ValueError(f"activation {name}={given!r}: must be a number")
            try:
                with np.errstate(over="ignore"):
                    value = float(np.float32(given))  # what the kernels compute with
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"activation {name}={given!r}: must be a number") from None
            infinite = {
                "gate_min": -math.inf,
                "up_min": -math.inf,
                "gate_max": math.inf,
                "up_max": math.inf,
            }
            if not math.isfinite(value) and (given != value or value != infinite.get(name)):
                raise ValueError(f"activation {name}={given}: must be finite in float32")
        if self.gate_min > self.gate_max or self.up_min > self.up_max:
            raise ValueError(f"activation {self}: a lower bound is above its upper bound")

    @classmethod
    def silu(cls, limit: float = 0.0) -> Activation:
        """SiLU(gate) * up; ``limit`` not 0 clamps gate from above and up on both sides first."""
        if limit == 0:
            return cls()
        return cls(gate_max=limit, up_min=-limit, up_max=limit)

    @classmethod
    def swigluoai(
        cls, alpha: float = 1.702, limit: float = 7.0, gate_floor: bool = False
    ) -> Activation:
        """gate * sigmoid(alpha * gate) * (up + 1) with both clamped by ``limit`` unless it is 0.

        ``gate_floor`` also clamps the gate from below: KT-Kernel's rule; gpt-oss clamps it from
        above only.
        """
        bound = math.inf if limit == 0 else limit
        return cls(
            alpha=alpha,
            gate_min=-bound if gate_floor else -math.inf,
            gate_max=bound,
            up_min=-bound,
            up_max=bound,
            up_offset=1.0,
        )

    @classmethod
    def gelu_tanh(cls) -> Activation:
        """GELU in its tanh form, times up."""
        return cls(kind="gelu_tanh")

    @classmethod
    def relu2(cls) -> Activation:
        """max(x, 0) ** 2."""
        return cls(kind="relu2")

    def to_json(self) -> dict[str, Any]:
        """JSON-able dict; infinities become None (JSON has none)."""
        fields = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Activation:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(fields) - known
        if unknown:
            raise ValueError(
                f"activation has unknown fields {sorted(unknown)}; known: {sorted(known)}"
            )
        return cls(**{k: v for k, v in fields.items() if v is not None})


@dataclass(frozen=True)
class MoESpec:
    """Shape and coding of one layer's experts.

    num_experts, hidden_size, intermediate_size : positive ints.
    weight_format : a name of ``ktk.formats.FORMATS``, or "gguf": block formats, see ``BlockExperts``.
    group_size : weights along in_features that share a scale; 0 = one scale per output channel;
        None = the format's default.
    activation_group : activations along in_features that share a scale (32, 64 or 128);
        0 for float formats, whose activations stay fp32; None = the format's default.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    weight_format: str = "int4"
    group_size: int | None = None
    activation_group: int | None = None
    has_gate: bool = True
    has_bias: bool = False
    activation: Activation = Activation()

    def __post_init__(self) -> None:
        from ktk.formats import get_format

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
        fmt.check(self)

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
        """Where an expert's panels lie; see ``ktk.layout``."""
        from ktk.layout import expert_layout

        return expert_layout(self)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "activation": self.activation.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> MoESpec:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(fields) - known
        missing = {"num_experts", "hidden_size", "intermediate_size"} - set(fields)
        if unknown or missing:
            raise ValueError(
                f"MoE spec: unknown fields {sorted(unknown)}, missing {sorted(missing)}"
            )
        fields = dict(fields)
        if "activation" in fields:
            fields["activation"] = Activation.from_json(fields["activation"])
        return cls(**fields)


@dataclass(frozen=True)
class EngineLayout:
    """How the process's threads and weights lie over the machine.

    num_threads : threads in all, the caller's counted. threadpool_count : parts they and every expert are split into.
    numa_nodes : the node of each part. cores : the CPUs each thread is pinned to, in the order of the parts; () = the
        OS decides. is_bound : weights are copied to memory of their part's node.
    """

    num_threads: int
    threadpool_count: int = 1
    numa_nodes: tuple[int, ...] = (0,)
    cores: tuple[tuple[int, ...], ...] = ()
    is_bound: bool = False


@dataclass(frozen=True)
class Packed:
    """One layer's experts in panel16 layout, ready for every kernel.

    data : uint8 (num_experts, layout.expert_bytes), C-contiguous, 64-byte aligned at least.
    """

    spec: MoESpec
    data: np.ndarray

    def __post_init__(self) -> None:
        layout = self.spec.layout
        want = (self.spec.num_experts, layout.expert_bytes)
        if self.data.dtype != np.uint8 or self.data.shape != want:
            raise ValueError(
                f"packed data is {self.data.dtype} {self.data.shape}: must be uint8 {want}"
            )
        if not self.data.flags.c_contiguous or self.data.ctypes.data % 64:
            raise ValueError("packed data must be C-contiguous and 64-byte aligned")

    @property
    def bits_per_weight(self) -> float:
        """Bits at rest per weight, scales, padding and biases included."""
        return self.spec.bits_per_weight


@dataclass(frozen=True)
class BlockMatrix:
    """One projection of all experts of a layer as a GGUF file holds it.

    type : the ggml type's name, e.g. "Q4_K".
    in_features : weights of a row. data : uint8 (num_experts, out_features, row bytes); each expert's rows lie
        one behind the other, experts at any distance (the gate half of a fused tensor is one).
    is_repacked : the same bytes in the order kernels read them, see ``ktk.backends.llamafile.repack``.
    """

    type: str
    in_features: int
    data: np.ndarray
    is_repacked: bool = False

    def __post_init__(self) -> None:
        data = self.data
        if data.dtype != np.uint8 or data.ndim != 3 or 0 in data.shape:
            raise ValueError(
                f"{self.type} blocks are {data.dtype} {data.shape}: must be uint8 (experts, rows, row bytes)"
            )
        if data.strides[1:] != (data.shape[2], 1):
            raise ValueError(f"{self.type} blocks: an expert's rows must lie one behind the other")

    @property
    def num_bytes(self) -> int:
        """Bytes of all experts."""
        return int(self.data.size)


@dataclass(frozen=True)
class BlockExperts:
    """One layer's experts in a GGUF file's blocks, each projection in its own type.

    spec : weight_format is "gguf". gate : None without a gate projection.
    Biases : float32 (num_experts, out_features) or None.
    order : int64 (num_experts,) or None: expert e is the one stored at order[e].
    """

    spec: MoESpec
    gate: BlockMatrix | None
    up: BlockMatrix
    down: BlockMatrix
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    order: np.ndarray | None = None

    def __post_init__(self) -> None:
        from ktk.layout import K_ALIGN, PANEL, round_up

        spec = self.spec
        if spec.weight_format != "gguf" or spec.has_gate != (self.gate is not None):
            raise ValueError(
                f"{spec}: weight_format must be 'gguf', has_gate must be as the blocks"
            )
        for name, matrix in self.matrices.items():
            ins, outs = spec.hidden_size, spec.intermediate_size
            if name == "down":
                ins, outs = outs, ins
            if matrix.is_repacked:  # padded to whole panels
                ins, outs = round_up(ins, K_ALIGN), round_up(outs, PANEL)
            if (matrix.in_features, *matrix.data.shape[:2]) != (ins, spec.num_experts, outs):
                raise ValueError(
                    f"{name} is ({matrix.data.shape[0]}, {matrix.data.shape[1]}, {matrix.in_features}): "
                    f"must be ({spec.num_experts}, {outs}, {ins}), experts x out x in"
                )
        for name, bias in self.biases.items():
            shape = (
                spec.num_experts,
                spec.hidden_size if name == "down" else spec.intermediate_size,
            )
            if bias.dtype != np.float32 or bias.shape != shape:
                raise ValueError(
                    f"{name} bias is {bias.dtype} {bias.shape}: must be float32 {shape}"
                )
        if spec.has_bias != bool(self.biases):
            raise ValueError(f"has_bias={spec.has_bias}, but there are {len(self.biases)} biases")
        order = self.order
        if order is None:
            return
        if order.dtype != np.int64 or order.shape != (spec.num_experts,):
            raise ValueError(
                f"order is {order.dtype} {order.shape}: must be int64 ({spec.num_experts},)"
            )
        if order.min() < 0 or order.max() >= spec.num_experts:
            raise ValueError(
                f"order goes from {order.min()} to {order.max()}: must stay in 0..{spec.num_experts - 1}"
            )

    @property
    def matrices(self) -> dict[str, BlockMatrix]:
        """The projections there are, by name."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: matrix for name, matrix in named.items() if matrix is not None}

    @property
    def biases(self) -> dict[str, np.ndarray]:
        """The biases there are, by projection."""
        named = {"gate": self.gate_bias, "up": self.up_bias, "down": self.down_bias}
        return {name: bias for name, bias in named.items() if bias is not None}

    @property
    def types(self) -> str:
        """``Q4_K``, or ``Q4_K/Q4_K/Q6_K`` where projections differ."""
        types = [matrix.type for matrix in self.matrices.values()]
        return types[0] if len(set(types)) == 1 else "/".join(types)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        num_bytes = sum(matrix.num_bytes for matrix in self.matrices.values())
        return num_bytes * 8 / (self.spec.num_weights * self.spec.num_experts)


class ExpertWeights(NamedTuple):
    """One expert's matrices as a checkpoint has them, dequantised.

    gate, up : float32, or uint16 holding bf16 bits, (intermediate_size, hidden_size); gate None without one.
    down : likewise (hidden_size, intermediate_size). Biases : float32 (out_features,) or None.
    """

    gate: np.ndarray | None
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None


@dataclass(frozen=True)
class CodedMatrix:
    """One matrix as a checkpoint's symmetric 4-bit codes; int4 panels of fitting groups take them as they are.

    codes : int8 (out_features, in_features), -8 to 7. scales : float32 (out_features, groups), groups of one size.
    """

    codes: np.ndarray
    scales: np.ndarray

    @property
    def group_size(self) -> int:
        """Weights along in_features that share a scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    def dequantised(self) -> np.ndarray:
        """float32 (out_features, in_features)."""
        return self.codes.astype(np.float32) * np.repeat(self.scales, self.group_size, axis=1)


class CodedExpert(NamedTuple):
    """One expert of ``CodedMatrix``; gate None without one. Biases : float32 (out_features,) or None."""

    gate: CodedMatrix | None
    up: CodedMatrix
    down: CodedMatrix
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None

    def dequantised(self) -> ExpertWeights:
        """The same as floats."""
        return ExpertWeights(
            None if self.gate is None else self.gate.dequantised(),
            self.up.dequantised(),
            self.down.dequantised(),
            self.gate_bias,
            self.up_bias,
            self.down_bias,
        )
