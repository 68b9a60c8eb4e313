"""What every family of experts shares: finding the tensors by name, checking shapes, reading one expert.

A family file says only how its tensors are called and how they lie; the two ways in use are ``PerExpert``
(three tensors per expert) and ``Fused`` (one tensor stacks all experts of a layer).
"""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint, TensorInfo
from ktk.errors import CheckpointError
from ktk.experts.activation import Activation
from ktk.experts.formats.floats import bf16_to_f32
from ktk.experts.spec import MoESpec
from ktk.experts.stored import BlockExperts, BlockMatrix, CodedExpert, ExpertWeights
from ktk.models.coding import (
    INT4_CODINGS,
    SCALE_SUFFIXES,
    Coding,
    decode,
    infer_coding,
    read_scale,
    scale_matrix,
)
from ktk.models.int4 import Int4Matrix, Int4Settings
from ktk.models.metadata import EXPERT_COUNTS, TOP_KS, check_config
from ktk.models.mxfp4 import mxfp4_blocks

# What may stand before the layer's index.
LAYER_PREFIX = r"(?:(?:model|language_model\.model|model\.language_model|backbone)\.)?layers"
INDEX = r"(?:0|[1-9]\d{0,4})"
NUM_EXPERTS_KEYS = EXPERT_COUNTS
NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
TOP_K_KEYS = TOP_KS
HIDDEN_KEYS = (
    "moe_latent_size",
    "hidden_size",
)  # Nemotron-H may route a projection of the hidden state
INTERMEDIATE_KEYS = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "intermediate_size",
)
ACTIVATION_KEYS = ("mlp_hidden_act", "hidden_activation", "hidden_act")
NESTED_KEYS = ("text_config", "language_config", "llm_config", "thinker_config")
DEFAULT_BLOCK = (128, 128)
# Names that only formats ktk does not read use; the text says which.
FOREIGN_SUFFIXES = {
    "weight_scale_2": "NVFP4",
    "absmax": "bitsandbytes",
    "quant_state": "bitsandbytes",
}
# model_type -> why its experts are not what their names say.
UNSUPPORTED_MODELS = {
    "llama4": "routing weights multiply the experts' input",
    "llama4_text": "routing weights multiply the experts' input",
    "muse_spark": "the experts' output is normalised before it is weighted",
    "longcat_flash": "some experts are the identity",
    "inkling2": "its gate is soft-capped",
    "inkling2_loop": "its gate is soft-capped",
    "ernie4_5_vl_moe": "text and images have experts of their own in a layer",
    "step3p7": "its clamp differs by layer and follows the SiLU",
}
SWIGLUOAI_MODELS = (
    "gpt_oss",
    "minimax_m3",
    "minimax_m3_vl",
    "minimax_m3_vl_text",
    "openai_privacy_filter",
)
ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "silu": Activation.silu,
    "swish": Activation.silu,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_new": Activation.gelu_tanh,
    "relu2": Activation.relu2,
}


@dataclass
class Config:
    """config.json of a checkpoint, its text part looked at first; every value is checked when asked for."""

    fields: dict[str, Any]
    where: str

    def __post_init__(self) -> None:
        self.parts = [self.fields]
        for _ in range(2):  # thinker_config.text_config
            for key in NESTED_KEYS:
                nested = self.parts[0].get(key)
                if isinstance(nested, dict):
                    self.parts.insert(0, nested)
                    break
                if nested is not None:
                    raise CheckpointError(
                        f"{self.where}: {key} is a {type(nested).__name__}: must be an object"
                    )
        check_config(self.parts, self.where)

    def get(self, keys: Iterable[str]) -> tuple[str, Any]:
        """The first of ``keys`` that is there and not null, and its value; ("", None) if none is."""
        for part in self.parts:
            for key in keys:
                if part.get(key) is not None:
                    return key, part[key]
        return "", None

    def size(self, keys: Iterable[str], layer: int = 0) -> int | None:
        """A positive int, or the layer's entry of a list of them; None if there is no such key."""
        key, value = self.get(keys)
        if not key:
            return None
        if isinstance(value, list):
            if layer >= len(value):
                raise CheckpointError(
                    f"{self.where}: {key} lists {len(value)} layers: layer {layer} is missing"
                )
            value = value[layer]
        if type(value) is not int or not 0 < value <= 1 << 24:
            raise CheckpointError(
                f"{self.where}: {key}={value!r}: must be an int of 1 to {1 << 24}"
            )
        return value

    def number(self, key: str, default: float) -> float:
        found, value = self.get((key,))
        if not found:
            return default
        if type(value) not in (int, float) or not abs(value) < 1e30:  # NaN is not either
            raise CheckpointError(f"{self.where}: {key}={value!r}: must be a number below 1e30")
        return float(value)

    @property
    def model_type(self) -> str:
        value = self.get(("model_type",))[1]
        return value if isinstance(value, str) else ""

    @property
    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns of an fp8 block; (128, 128) unless quantization_config says otherwise."""
        said = self.get(("quantization_config",))[1]
        block = said.get("weight_block_size") if isinstance(said, dict) else None
        if block is None:
            return DEFAULT_BLOCK
        if (
            not isinstance(block, list)
            or len(block) != 2
            or not all(type(b) is int and b > 0 for b in block)
        ):
            raise CheckpointError(
                f"{self.where}: quantization_config.weight_block_size={block!r}: must be two positive ints"
            )
        return block[0], block[1]

    @property
    def int4(self) -> Int4Settings:
        """What quantization_config says of 4-bit weights."""
        said = self.get(("quantization_config",))[1]
        said = said if isinstance(said, dict) else {}
        bits = said.get("bits", 4)
        if type(bits) is not int:
            raise CheckpointError(
                f"{self.where}: quantization_config.bits={bits!r}: must be an int"
            )
        return Int4Settings(
            str(said.get("quant_method", "")), bits, str(said.get("checkpoint_format", "gptq"))
        )

    def activation(self, default: str) -> Activation:
        """The experts' activation; ``default`` names it where the config does not."""
        for part in self.parts:  # a text part's is another than the whole model's
            kind = part.get("model_type")
            if isinstance(kind, str) and kind in UNSUPPORTED_MODELS:
                raise CheckpointError(
                    f"{self.where}: model_type {kind!r} is not supported: {UNSUPPORTED_MODELS[kind]}"
                )
        key, name = self.get(ACTIVATION_KEYS)
        name = name if key else default
        alpha, limit = self.number("swiglu_alpha", 0.0), self.number("swiglu_limit", 0.0)
        if name == "swigluoai" or alpha > 0 or self.model_type in SWIGLUOAI_MODELS:
            # gpt-oss files older than transformers 5 leave both numbers to the code: 1.702 and 7.
            return Activation.swigluoai(
                alpha if alpha > 0 else 1.702, self.number("swiglu_limit", 7.0)
            )
        if not isinstance(name, str) or name not in ACTIVATIONS:
            known = ", ".join([*ACTIVATIONS, "swigluoai"])
            raise CheckpointError(
                f"{self.where}: {key}={name!r} is not an activation ktk has; it has {known}"
            )
        if limit > 0:
            if ACTIVATIONS[name]() != Activation.silu():
                raise CheckpointError(
                    f"{self.where}: swiglu_limit={limit} with {key}={name!r}: only silu is clamped"
                )
            return Activation.silu(limit)
        return ACTIVATIONS[name]()


@dataclass(frozen=True)
class Stored:
    """One matrix as it lies in the checkpoint, perhaps stacked over experts."""

    name: str
    scale: str | None
    coding: Coding

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        """The whole of an unstacked matrix, decoded: (out_features, in_features)."""
        raw = checkpoint.read(self.name)
        return self._decode(
            checkpoint, raw, None if self.scale is None else checkpoint.read(self.scale)
        )

    def read_expert(self, checkpoint: Checkpoint, expert: int) -> np.ndarray:
        """One expert of a stacked matrix, decoded."""
        rows = (expert, expert + 1)
        raw = checkpoint.read(self.name, rows)[0]
        scale = None if self.scale is None else checkpoint.read(self.scale, rows)[0]
        # mxfp4 of gpt-oss: (rows, blocks, 16 bytes)
        return self._decode(checkpoint, raw.reshape(raw.shape[0], -1), scale)

    def _decode(
        self, checkpoint: Checkpoint, raw: np.ndarray, scale: np.ndarray | None
    ) -> np.ndarray:
        if self.scale is None or scale is None:
            return decode(self.coding, raw, None)
        values = read_scale(np.asarray(scale), checkpoint.info(self.scale), self.scale)
        return decode(self.coding, raw, scale_matrix(values))

    def read_mxfp4(self, checkpoint: Checkpoint, expert: int | None = None) -> np.ndarray:
        """The MXFP4 blocks of a matrix, or of one of a stacked one: uint8 (out_features, row bytes), as GGUF has them."""
        rows = None if expert is None else (expert, expert + 1)
        assert self.scale is not None
        raw, scale = checkpoint.read(self.name, rows), checkpoint.read(self.scale, rows)
        out, ins = self.coding.shape
        try:
            return mxfp4_blocks(raw.reshape(out, ins // 2), scale.reshape(out, -1))
        except ValueError as error:
            info = checkpoint.info(self.scale)
            raise CheckpointError(f"{info.file}: tensor {self.scale!r}: {error}") from None


@dataclass(frozen=True)
class StoredInt4:
    """One matrix of 4-bit codes in the checkpoint."""

    name: str
    matrix: Int4Matrix

    @property
    def coding(self) -> Coding:
        return Coding("int4", self.matrix.shape)

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        """Decoded: (out_features, in_features)."""
        return self.matrix.read(checkpoint)


class Layer(ABC):
    """One layer's experts: their ids, tensors and shapes. int4_groups : group sizes of those that are 4-bit codes."""

    names: set[str]  # every tensor that packing replaces
    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    source_dtypes: set[str]
    int4_groups: frozenset[int] = frozenset()

    @abstractmethod
    def read(self, expert: int) -> ExpertWeights:
        """One expert, decoded."""

    def read_coded(self, expert: int) -> CodedExpert | None:
        """One expert's symmetric 4-bit codes; None if it has others, or none."""
        return None

    def read_mxfp4(self, expert: int) -> dict[str, np.ndarray]:
        """One expert's MXFP4 blocks by projection, where all its matrices are MXFP4."""
        raise NotImplementedError

    def read_biases(self, expert: int) -> dict[str, np.ndarray]:
        """One expert's biases by projection, float32."""
        return {}


class Family(ABC):
    """One style of tensor names. name : as error messages and packed directories call it."""

    name: str
    example: str  # one tensor name, for error messages
    default_activation: str = "silu"

    @abstractmethod
    def pattern(self) -> re.Pattern[str]:
        """Matches every expert tensor; groups: layer, part, and expert where names hold one."""

    @abstractmethod
    def layer(
        self, checkpoint: Checkpoint, config: Config, layer: int, names: dict[str, re.Match[str]]
    ) -> Layer:
        """Check one layer's tensors and return it."""

    def accepts(self, model_type: str) -> bool:
        """Whether these names mean this family in a model of that type."""
        return True

    def compile(self, rest: str) -> re.Pattern[str]:
        return re.compile(rf"(?P<prefix>{LAYER_PREFIX})\.(?P<layer>{INDEX})\.{rest}")


class PerExpert(Family):
    """``{layer}.{module}.{expert}.{gate|up|down}.weight``, with scales and biases beside the weight.

    gate None : experts without a gate projection.
    """

    def __init__(
        self,
        name: str,
        module: str,
        gate: str | None,
        up: str,
        down: str,
        default_activation: str = "silu",
    ) -> None:
        self.name = name
        self.parts = {"gate": gate, "up": up, "down": down}
        self.default_activation = default_activation
        stored = "|".join(part for part in self.parts.values() if part)
        self.example = f"model.layers.L.{_plain(module)}.E.{{{stored.replace('|', ',')}}}.weight"
        self._pattern = self.compile(
            rf"{module}\.(?P<expert>{INDEX})\.(?P<part>{stored})\.(?P<suffix>.+)"
        )

    def pattern(self) -> re.Pattern[str]:
        return self._pattern

    def layer(
        self, checkpoint: Checkpoint, config: Config, layer: int, names: dict[str, re.Match[str]]
    ) -> Layer:
        return _PerExpertLayer(self, checkpoint, config, layer, names)


class _PerExpertLayer(Layer):
    def __init__(
        self,
        family: PerExpert,
        checkpoint: Checkpoint,
        config: Config,
        layer: int,
        names: dict[str, re.Match[str]],
    ) -> None:
        self.checkpoint, self.family = checkpoint, family
        self.names = set(names)
        by_expert: dict[int, dict[tuple[str, str], str]] = {}
        for name, match in names.items():
            by_expert.setdefault(int(match["expert"]), {})[match["part"], match["suffix"]] = name
        where = f"{checkpoint.path}: layer {layer}"
        self.num_experts = expected_experts(config, layer, set(by_expert), where)
        self.has_gate = family.parts["gate"] is not None
        self._stored: list[dict[str, Stored | StoredInt4]] = []
        self._biases: list[dict[str, str]] = []
        for expert in range(self.num_experts):
            stored, biases = self._expert(by_expert[expert], config, f"{where} expert {expert}")
            self._stored.append(stored)
            self._biases.append(biases)
        self.int4_groups = frozenset(
            s.matrix.group_size if s.matrix.num_groups > 1 else 0
            for stored in self._stored
            for s in stored.values()
            if isinstance(s, StoredInt4)
        )
        self.has_bias = bool(self._biases[0])
        self.intermediate_size, self.hidden_size = self._stored[0]["up"].coding.shape
        self.source_dtypes = {s.coding.name for stored in self._stored for s in stored.values()}
        self._check_shapes(where)
        check_sizes(config, layer, self.hidden_size, self.intermediate_size, where)

    def _expert(
        self, tensors: dict[tuple[str, str], str], config: Config, where: str
    ) -> tuple[dict[str, Stored | StoredInt4], dict[str, str]]:
        stored: dict[str, Stored | StoredInt4] = {}
        biases: dict[str, str] = {}
        for role, part in self.family.parts.items():
            if part is None:
                continue
            found = {suffix: name for (p, suffix), name in tensors.items() if p == part}
            for suffix in found:
                foreign = FOREIGN_SUFFIXES.get(suffix.rsplit(".", 1)[-1])
                if foreign:
                    raise CheckpointError(
                        f"{where}: {found[suffix]!r}: {foreign} is not read; convert from bf16 or fp8"
                    )
            int4 = next((c for c in INT4_CODINGS if c.weight in found), None)
            if "weight" not in found and int4 is None:
                raise CheckpointError(
                    f"{where}: tensor {part}.weight is missing; has {sorted(found) or 'nothing'}"
                )
            known = {"weight", "bias", "input_scale", "activation_scale", *SCALE_SUFFIXES}
            if int4 is not None:
                known = {"bias", *int4.suffixes}
                parts = {suffix: found[suffix] for suffix in found if suffix in int4.suffixes}
                matrix = int4.open(self.checkpoint, parts, config.int4)
                stored[role] = StoredInt4(found[int4.weight], matrix)
            if set(found) - known:
                unknown = found[sorted(set(found) - known)[0]]
                raise CheckpointError(f"{where}: {unknown!r}: ktk does not know what this is")
            if "bias" in found:
                biases[role] = found["bias"]
            if int4 is not None:
                continue
            scale = next((found[s] for s in SCALE_SUFFIXES if s in found), None)
            info = self.checkpoint.tensors
            coding = infer_coding(
                found["weight"],
                info[found["weight"]],
                scale,
                None if scale is None else info[scale],
                config.fp8_block,
            )
            stored[role] = Stored(found["weight"], scale, coding)
        return stored, biases

    def _check_shapes(self, where: str) -> None:
        i, h = self.intermediate_size, self.hidden_size
        wanted = {"gate": (i, h), "up": (i, h), "down": (h, i)}
        for expert, (stored, biases) in enumerate(zip(self._stored, self._biases, strict=True)):
            for role, matrix in stored.items():
                if matrix.coding.shape != wanted[role]:
                    info = self.checkpoint.tensors[matrix.name]
                    raise CheckpointError(
                        f"{info.file}: tensor {matrix.name!r} (bytes {info.begin} to {info.end}) is "
                        f"{matrix.coding.shape}: must be {wanted[role]}, by expert 0's up projection"
                    )
            if set(biases) != (set(stored) if self.has_bias else set()):
                raise CheckpointError(
                    f"{where} expert {expert}: biases of {', '.join(sorted(biases)) or 'none'}: must be of all or none"
                )
            for role, name in biases.items():
                check_shape(name, self.checkpoint.tensors[name], (wanted[role][0],))

    def read(self, expert: int) -> ExpertWeights:
        matrices = {
            role: stored.read(self.checkpoint) for role, stored in self._stored[expert].items()
        }
        biases = self.read_biases(expert)
        return ExpertWeights(
            matrices.get("gate"), matrices["up"], matrices["down"],
            biases.get("gate"), biases.get("up"), biases.get("down"),
        )  # fmt: skip

    def read_coded(self, expert: int) -> CodedExpert | None:
        matrices = {}
        for role, stored in self._stored[expert].items():
            coded = (
                stored.matrix.read_coded(self.checkpoint)
                if isinstance(stored, StoredInt4)
                else None
            )
            if coded is None:
                return None
            matrices[role] = coded
        biases = self.read_biases(expert)
        return CodedExpert(
            matrices.get("gate"), matrices["up"], matrices["down"],
            biases.get("gate"), biases.get("up"), biases.get("down"),
        )  # fmt: skip

    def read_mxfp4(self, expert: int) -> dict[str, np.ndarray]:
        stored = self._stored[expert]
        return {
            role: matrix.read_mxfp4(self.checkpoint)
            for role, matrix in stored.items()
            if isinstance(matrix, Stored)
        }

    def read_biases(self, expert: int) -> dict[str, np.ndarray]:
        return {
            role: as_f32(self.checkpoint.read(name), self.checkpoint.info(name), name)
            for role, name in self._biases[expert].items()
        }


class Fused(Family):
    """One tensor per layer stacks gate and up of all experts, another their down projections.

    Two orientations are in use: (experts, 2 * intermediate, hidden) with (experts, hidden, intermediate),
    as a linear layer has them, and both transposed. Which one follows from the two shapes together:
    to fit both ways, a matrix would have to have no rows. ``is_interleaved``: gate and up alternate.
    parts : tensor name after the module -> gate_up or down, or one of them with _bias or _scale.
    only_for, not_for : model types. bias_models : those whose biases lie as this family's rows do.
    """

    def __init__(
        self,
        name: str,
        module: str,
        parts: dict[str, str],
        is_interleaved: bool = False,
        only_for: tuple[str, ...] = (),
        not_for: tuple[str, ...] = (),
        bias_models: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.is_interleaved = is_interleaved
        self.parts = parts
        self.only_for, self.not_for, self.bias_models = only_for, not_for, bias_models
        stored = "|".join(re.escape(s) for s in sorted(parts, key=len, reverse=True))
        self.example = f"model.layers.L.{_plain(module)}.{{{','.join(s for s in parts if parts[s] in ('gate_up', 'down'))}}}"
        self._pattern = self.compile(rf"{module}\.(?P<part>{stored})")

    def accepts(self, model_type: str) -> bool:
        return (not self.only_for or model_type in self.only_for) and model_type not in self.not_for

    def pattern(self) -> re.Pattern[str]:
        return self._pattern

    def layer(
        self, checkpoint: Checkpoint, config: Config, layer: int, names: dict[str, re.Match[str]]
    ) -> Layer:
        parts: dict[str, str] = {}
        for name, match in names.items():
            part = self.parts[match["part"]]
            if part in parts:
                raise CheckpointError(
                    f"{checkpoint.path}: {name!r} and {parts[part]!r} are the same weights"
                )
            parts[part] = name
        return _FusedLayer(self, checkpoint, config, layer, parts)


class _FusedLayer(Layer):
    has_gate = True

    def __init__(
        self,
        family: Fused,
        checkpoint: Checkpoint,
        config: Config,
        layer: int,
        parts: dict[str, str],
    ) -> None:
        self.checkpoint, self.family, self.parts = checkpoint, family, parts
        self.names = set(parts.values())
        where = f"{checkpoint.path}: layer {layer}"
        for part in ("gate_up", "down"):
            if part not in parts:
                stored = " or ".join(s for s, p in family.parts.items() if p == part)
                raise CheckpointError(
                    f"{where}: tensor {stored} is missing; has {sorted(self.names)}"
                )
        info = checkpoint.tensors
        gate_up_info, down_info = info[parts["gate_up"]], info[parts["down"]]
        count = gate_up_info.shape[0] if gate_up_info.shape else 0
        self.num_experts = expected_experts(config, layer, set(range(min(count, 1 << 17))), where)
        self._gate_up = self._stored("gate_up", gate_up_info, config.fp8_block)
        self._down = self._stored("down", down_info, config.fp8_block)
        self.source_dtypes = {self._gate_up.coding.name, self._down.coding.name}
        (a, b), (c, d) = self._gate_up.coding.shape, self._down.coding.shape
        if b == c and a == 2 * d:
            self.is_transposed, (self.hidden_size, self.intermediate_size) = False, (c, d)
        elif a == d and b == 2 * c:
            self.is_transposed, (self.hidden_size, self.intermediate_size) = True, (d, c)
        else:
            raise CheckpointError(
                f"{where}: {parts['gate_up']!r} {gate_up_info.shape} and {parts['down']!r} {down_info.shape} do not "
                "fit: must be (E, 2*I, H) with (E, H, I), or (E, H, 2*I) with (E, I, H)"
            )
        check_sizes(config, layer, self.hidden_size, self.intermediate_size, where)
        self.has_bias = "gate_up_bias" in parts
        if self.has_bias != ("down_bias" in parts):
            raise CheckpointError(
                f"{where}: one of the two bias tensors is missing; has {sorted(self.names)}"
            )
        if self.has_bias and config.model_type not in family.bias_models:
            raise CheckpointError(
                f"{where}: {parts['gate_up_bias']!r}: for model_type {config.model_type!r} ktk does not know "
                f"whether gate and up alternate; known with biases: {', '.join(family.bias_models) or 'none'}"
            )
        if self.has_bias:
            experts, i, h = self.num_experts, self.intermediate_size, self.hidden_size
            check_shape(parts["gate_up_bias"], info[parts["gate_up_bias"]], (experts, 2 * i))
            check_shape(parts["down_bias"], info[parts["down_bias"]], (experts, h))

    def _stored(self, part: str, weight: TensorInfo, block: tuple[int, int]) -> Stored:
        name, scale = self.parts[part], self.parts.get(f"{part}_scale")
        if weight.dtype == "U8" and len(weight.shape) == 4:  # mxfp4 blocks (E, rows, K/32, 16)
            e, rows, blocks, width = weight.shape
            if width != 16:
                raise CheckpointError(
                    f"{weight.file}: tensor {name!r} is {weight.shape}: blocks must hold 16 bytes"
                )
            weight = TensorInfo(
                "U8", (e, rows, blocks * width), weight.file, weight.begin, weight.end
            )
        info = None if scale is None else self.checkpoint.tensors[scale]
        return Stored(name, scale, infer_coding(name, weight, scale, info, block, self.num_experts))

    def read(self, expert: int) -> ExpertWeights:
        gate_up = self._gate_up.read_expert(self.checkpoint, expert)
        down = self._down.read_expert(self.checkpoint, expert)
        if self.is_transposed:
            gate_up, down = gate_up.T, np.ascontiguousarray(down.T)
        gate, up = self._halves(gate_up)
        biases = self.read_biases(expert)
        return ExpertWeights(
            gate, up, down, biases.get("gate"), biases.get("up"), biases.get("down")
        )

    def read_mxfp4(self, expert: int) -> dict[str, np.ndarray]:
        if self.is_transposed:
            raise NotImplementedError("blocks of transposed matrices lie across their rows")
        gate, up = self._halves(self._gate_up.read_mxfp4(self.checkpoint, expert))
        return {"gate": gate, "up": up, "down": self._down.read_mxfp4(self.checkpoint, expert)}

    def read_biases(self, expert: int) -> dict[str, np.ndarray]:
        if not self.has_bias:
            return {}
        gate, up = self._halves(self._bias("gate_up_bias", expert))
        return {"gate": gate, "up": up, "down": self._bias("down_bias", expert)}

    def _halves(self, both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gate and up, each contiguous, out of rows that hold both."""
        i = self.intermediate_size
        gate, up = (both[0::2], both[1::2]) if self.family.is_interleaved else (both[:i], both[i:])
        return np.ascontiguousarray(gate), np.ascontiguousarray(up)

    def _bias(self, part: str, expert: int) -> np.ndarray:
        name = self.parts[part]
        return as_f32(
            self.checkpoint.read(name, (expert, expert + 1))[0], self.checkpoint.info(name), name
        )


def _plain(module: str) -> str:
    """A module's pattern as people read it."""
    return module.replace("\\", "").replace("(?:", "[").replace(")?", "]")


class Experts:
    """The experts of a checkpoint, whatever its names; ``ktk.models.find_experts`` makes one.

    family : the naming style. layers : indices of the MoE layers, ascending. source_dtype : how the weights
    are stored, one of SOURCE_DTYPES, or several joined by "+".
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
                f"{self._config.where}: num_experts_per_tok={top_k}: must be an int of 1 to {fewest}, the number of experts"
            )
        return top_k

    def spec_fields(self, layer: int) -> dict[str, Any]:
        """num_experts, hidden_size, intermediate_size, has_gate, has_bias and activation of one layer."""
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
        """One expert, decoded; safe to call from several threads. Raises CheckpointError, ValueError."""
        return self._checked(layer, expert).read(expert)

    def read_stored(self, layer: int, expert: int) -> ExpertWeights | CodedExpert:
        """The same, but symmetric 4-bit codes as they are."""
        found = self._checked(layer, expert)
        return found.read_coded(expert) or found.read(expert)

    @property
    def int4_group(self) -> int | None:
        """The group size of int4 panels that keep the experts' 4-bit codes and least bytes; None if there is none."""
        groups: set[int] = set().union(*(layer.int4_groups for layer in self._layers.values()))
        if not groups or self.source_dtype != "int4":
            return None
        if groups == {0}:
            return 0
        sizes = [group for group in groups if group]
        return next((g for g in (128, 64, 32) if all(size % g == 0 for size in sizes)), None)

    def mxfp4_experts(self, layer: int) -> BlockExperts | None:
        """A layer's MXFP4 experts in the blocks of GGUF, the same numbers; None if they are not MXFP4."""
        found = self._layer(layer)
        if found.source_dtypes != {"mxfp4"} or getattr(found, "is_transposed", False):
            return None
        spec = MoESpec(**self.spec_fields(layer), weight_format="gguf")
        names = ("gate", "up", "down") if spec.has_gate else ("up", "down")
        data: dict[str, list[np.ndarray]] = {name: [] for name in names}
        biases: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for expert in range(spec.num_experts):
            for name, blocks in found.read_mxfp4(expert).items():
                data[name].append(blocks)
            for name, bias in found.read_biases(expert).items():
                biases[name].append(bias)
        matrices = {
            name: BlockMatrix(
                "MXFP4",
                spec.intermediate_size if name == "down" else spec.hidden_size,
                np.stack(rows),
            )
            for name, rows in data.items()
        }
        stacked = {name: np.stack(rows) for name, rows in biases.items() if rows}
        return BlockExperts(
            spec, matrices.get("gate"), matrices["up"], matrices["down"],
            stacked.get("gate"), stacked.get("up"), stacked.get("down"),
        )  # fmt: skip

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
                f"{self._where}: layer {layer} has no experts; MoE layers: {', '.join(map(str, self.layers))}"
            ) from None


def expected_experts(config: Config, layer: int, found: set[int], where: str) -> int:
    """The layer's number of experts, by config and tensors; CheckpointError if they differ."""
    key, _ = config.get(NUM_EXPERTS_KEYS)
    count = config.size(NUM_EXPERTS_KEYS, layer)
    if count is None:
        raise CheckpointError(
            f"{config.where}: the number of experts is missing; must be in one of {', '.join(NUM_EXPERTS_KEYS)}"
        )
    missing = list(itertools.islice((e for e in range(count) if e not in found), 9))
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(
            f"{where}: of {count} experts ({config.where}: {key}) these are missing: {shown}"
        )
    if len(found) > count:
        raise CheckpointError(
            f"{where}: holds expert {max(found)}, but {config.where} says {key}={count}"
        )
    return count


def check_sizes(config: Config, layer: int, hidden: int, intermediate: int, where: str) -> None:
    """CheckpointError unless the config agrees with the tensors, as far as it speaks."""
    for keys, have in ((HIDDEN_KEYS, hidden), (INTERMEDIATE_KEYS, intermediate)):
        key, _ = config.get(keys)
        said = config.size(keys, layer)
        if said is not None and said != have:
            raise CheckpointError(
                f"{where}: the experts' tensors have {key} {have}, {config.where} says {said}; "
                "are config.json and the weights of the same model?"
            )


def check_shape(name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.file}: tensor {name!r} (bytes {info.begin} to {info.end}) is {info.shape}: must be {shape}"
        )


def as_f32(raw: np.ndarray, info: TensorInfo, name: str) -> np.ndarray:
    """Raw bits of a plain float tensor as float32."""
    if info.dtype == "BF16":
        return bf16_to_f32(raw)
    if info.dtype in ("F16", "F32"):
        return raw.astype(np.float32, copy=False)
    raise CheckpointError(f"{info.file}: tensor {name!r} is {info.dtype}: must be BF16, F16 or F32")
