"""One layer's experts in a checkpoint: every tensor accounted for, shapes checked against each
other and config.json, experts read.

A family (``ktk.models.families``) has sorted the tensors by what they are before.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from abc import ABC, abstractmethod

import numpy as np

from ktk.checkpoint.safetensors import Checkpoint, TensorInfo
from ktk.errors import CheckpointError
from ktk.experts.formats.floats import bf16_to_f32
from ktk.experts.stored import CodedExpert, ExpertWeights
from ktk.models.codings import FOREIGN_SUFFIXES, infer_coding, module_coding
from ktk.models.codings.fp8 import fp8_block
from ktk.models.codings.module import ModuleMatrix, QuantSettings
from ktk.models.codings.scaled import SCALE_SUFFIXES
from ktk.models.codings.stored import Stored
from ktk.models.config import HIDDEN_KEYS, INTERMEDIATE_KEYS, NUM_EXPERTS_KEYS, Config


class Layer(ABC):
    """One layer's experts: their ids, tensors and shapes."""

    names: set[str]  # every tensor that packing replaces
    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    source_dtypes: set[str]

    @property
    def is_mxfp4(self) -> bool:
        """Whether ``read_mxfp4`` reads it."""
        return self.source_dtypes == {"mxfp4"}

    @abstractmethod
    def read(self, expert: int) -> ExpertWeights:
        """One expert, decoded."""

    def read_coded(self, expert: int) -> CodedExpert | None:
        """One expert's codes that panels may take as they are; None if it has others, or none."""
        return None

    def panel_formats(self) -> set[tuple[str, int] | None]:
        """Formats of panels, and group sizes, that keep the codes of the first expert's matrices;
        None among them for one that none keeps.
        """
        return {None}

    def read_mxfp4(self, expert: int) -> dict[str, np.ndarray]:
        """One expert's MXFP4 blocks by projection, if ``is_mxfp4``."""
        raise NotImplementedError

    def read_biases(self, expert: int) -> dict[str, np.ndarray]:
        """One expert's biases by projection, float32."""
        return {}


class PerExpertLayer(Layer):
    """Each expert has tensors of its own.

    parts : projection -> its module within an expert; gate None without one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        layer: int,
        names: dict[str, re.Match[str]],
        parts: dict[str, str | None],
    ) -> None:
        self.checkpoint, self.parts = checkpoint, parts
        self.names = set(names)
        by_expert: dict[int, dict[tuple[str, str], str]] = {}
        for name, match in names.items():
            by_expert.setdefault(int(match["expert"]), {})[match["part"], match["suffix"]] = name
        where = f"{checkpoint.path}: layer {layer}"
        self.num_experts = expected_experts(config, layer, set(by_expert), where)
        self.has_gate = parts["gate"] is not None
        self._stored: list[dict[str, Stored | ModuleMatrix]] = []
        self._biases: list[dict[str, str]] = []
        for expert in range(self.num_experts):
            stored, biases = self._expert(by_expert[expert], config, f"{where} expert {expert}")
            self._stored.append(stored)
            self._biases.append(biases)
        self.has_bias = bool(self._biases[0])
        self.intermediate_size, self.hidden_size = self._stored[0]["up"].shape
        self.source_dtypes = {matrix.dtype for stored in self._stored for matrix in stored.values()}
        self._check_shapes(where)
        check_sizes(config, layer, self.hidden_size, self.intermediate_size, where)

    def _expert(
        self, tensors: dict[tuple[str, str], str], config: Config, where: str
    ) -> tuple[dict[str, Stored | ModuleMatrix], dict[str, str]]:
        stored: dict[str, Stored | ModuleMatrix] = {}
        biases: dict[str, str] = {}
        settings = QuantSettings.of(config)
        for role, part in self.parts.items():
            if part is None:
                continue
            found = {suffix: name for (p, suffix), name in tensors.items() if p == part}
            for suffix in found:
                foreign = FOREIGN_SUFFIXES.get(suffix.rsplit(".", 1)[-1])
                if foreign:
                    raise CheckpointError(
                        f"{where}: {found[suffix]!r}: {foreign} is not read; convert from bf16 or "
                        "fp8"
                    )
            row = module_coding(found, settings)
            if "weight" not in found and row is None:
                raise CheckpointError(
                    f"{where}: tensor {part}.weight is missing; has {sorted(found) or 'nothing'}"
                )
            known = {"weight", "bias", "input_scale", "activation_scale", *SCALE_SUFFIXES}
            if row is not None:
                known = {"bias", *row.suffixes}
                parts = {suffix: found[suffix] for suffix in found if suffix in row.suffixes}
                stored[role] = row.open(self.checkpoint, parts, settings)
            if set(found) - known:
                unknown = found[sorted(set(found) - known)[0]]
                raise CheckpointError(f"{where}: {unknown!r}: ktk does not know what this is")
            if "bias" in found:
                biases[role] = found["bias"]
            if row is not None:
                continue
            scale = next((found[s] for s in SCALE_SUFFIXES if s in found), None)
            info = self.checkpoint.tensors
            coding = infer_coding(
                found["weight"],
                info[found["weight"]],
                scale,
                None if scale is None else info[scale],
                fp8_block(config),
            )
            stored[role] = Stored(found["weight"], scale, coding)
        return stored, biases

    def _check_shapes(self, where: str) -> None:
        i, h = self.intermediate_size, self.hidden_size
        wanted = {"gate": (i, h), "up": (i, h), "down": (h, i)}
        for expert, (stored, biases) in enumerate(zip(self._stored, self._biases, strict=True)):
            for role, matrix in stored.items():
                if matrix.shape != wanted[role]:
                    info = self.checkpoint.tensors[matrix.name]
                    raise CheckpointError(
                        f"{info.file}: tensor {matrix.name!r} (bytes {info.begin} to {info.end}) "
                        f"is {matrix.shape}: must be {wanted[role]}, by expert 0's up projection"
                    )
            if set(biases) != (set(stored) if self.has_bias else set()):
                raise CheckpointError(
                    f"{where} expert {expert}: biases of {', '.join(sorted(biases)) or 'none'}: "
                    "must be of all or none"
                )
            for role, name in biases.items():
                check_shape(name, self.checkpoint.tensors[name], (wanted[role][0],))

    def read(self, expert: int) -> ExpertWeights:
        matrices = {
            role: stored.read(self.checkpoint) for role, stored in self._stored[expert].items()
        }
        biases = self.read_biases(expert)
        return ExpertWeights(
            matrices.get("gate"),
            matrices["up"],
            matrices["down"],
            biases.get("gate"),
            biases.get("up"),
            biases.get("down"),
        )

    def read_coded(self, expert: int) -> CodedExpert | None:
        matrices = {}
        for role, stored in self._stored[expert].items():
            coded = stored.read_coded(self.checkpoint)
            if coded is None:
                return None
            matrices[role] = coded
        biases = self.read_biases(expert)
        return CodedExpert(
            matrices.get("gate"),
            matrices["up"],
            matrices["down"],
            biases.get("gate"),
            biases.get("up"),
            biases.get("down"),
        )

    def panel_formats(self) -> set[tuple[str, int] | None]:
        return {stored.panel_format(self.checkpoint) for stored in self._stored[0].values()}

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


class StackedLayer(Layer):
    """One tensor holds gate and up of all experts, another their down projections.

    parts : gate_up, down, or one of them with _bias or _scale -> the tensor. called : how tensors
        may be called -> which part it is.
    is_interleaved : rows of gate and up alternate, else gate's come first.
    """

    has_gate = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        layer: int,
        parts: dict[str, str],
        called: dict[str, str],
        is_interleaved: bool,
    ) -> None:
        self.checkpoint, self.parts, self.is_interleaved = checkpoint, parts, is_interleaved
        self.names = set(parts.values())
        where = f"{checkpoint.path}: layer {layer}"
        for part in ("gate_up", "down"):
            if part not in parts:
                stored = " or ".join(s for s, p in called.items() if p == part)
                raise CheckpointError(
                    f"{where}: tensor {stored} is missing; has {sorted(self.names)}"
                )
        info = checkpoint.tensors
        gate_up_info, down_info = info[parts["gate_up"]], info[parts["down"]]
        count = gate_up_info.shape[0] if gate_up_info.shape else 0
        self.num_experts = expected_experts(config, layer, set(range(min(count, 1 << 17))), where)
        block = fp8_block(config)
        self._gate_up = self._stored("gate_up", gate_up_info, block)
        self._down = self._stored("down", down_info, block)
        self.source_dtypes = {self._gate_up.dtype, self._down.dtype}
        (a, b), (c, d) = self._gate_up.shape, self._down.shape
        if b == c and a == 2 * d:
            self.is_transposed, (self.hidden_size, self.intermediate_size) = False, (c, d)
        elif a == d and b == 2 * c:
            self.is_transposed, (self.hidden_size, self.intermediate_size) = True, (d, c)
        else:
            raise CheckpointError(
                f"{where}: {parts['gate_up']!r} {gate_up_info.shape} and {parts['down']!r} "
                f"{down_info.shape} do not "
                "fit: must be (E, 2*I, H) with (E, H, I), or (E, H, 2*I) with (E, I, H)"
            )
        check_sizes(config, layer, self.hidden_size, self.intermediate_size, where)
        self.has_bias = "gate_up_bias" in parts
        if self.has_bias != ("down_bias" in parts):
            raise CheckpointError(
                f"{where}: one of the two bias tensors is missing; has {sorted(self.names)}"
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

    def read_coded(self, expert: int) -> CodedExpert | None:
        if not self._has_halves:
            return None
        gate_up = self._gate_up.read_coded_expert(self.checkpoint, expert)
        down = self._down.read_coded_expert(self.checkpoint, expert)
        if gate_up is None or down is None:
            return None
        high = min(gate_up.block[0], self.intermediate_size)
        halves = zip(self._halves(gate_up.codes), self._halves(gate_up.scales, high), strict=True)
        gate, up = (
            dataclasses.replace(gate_up, codes=codes, scales=scales, block=(high, gate_up.block[1]))
            for codes, scales in halves
        )
        biases = self.read_biases(expert)
        return CodedExpert(gate, up, down, biases.get("gate"), biases.get("up"), biases.get("down"))

    @property
    def _has_halves(self) -> bool:
        """Whether no scale is of rows of both gate and up, nor of columns."""
        high = self._gate_up.coding.block[0]
        is_apart = self.intermediate_size % max(high, 1) == 0 and not self.is_interleaved
        return not self.is_transposed and (high == 1 or is_apart)

    def panel_formats(self) -> set[tuple[str, int] | None]:
        if not self._has_halves:
            return {None}
        return {m.panel_format(self.checkpoint) for m in (self._gate_up, self._down)}

    @property
    def is_mxfp4(self) -> bool:
        return super().is_mxfp4 and not self.is_transposed  # blocks would lie across rows

    def read_mxfp4(self, expert: int) -> dict[str, np.ndarray]:
        gate, up = self._halves(self._gate_up.read_mxfp4(self.checkpoint, expert))
        return {"gate": gate, "up": up, "down": self._down.read_mxfp4(self.checkpoint, expert)}

    def read_biases(self, expert: int) -> dict[str, np.ndarray]:
        if not self.has_bias:
            return {}
        gate, up = self._halves(self._bias("gate_up_bias", expert))
        return {"gate": gate, "up": up, "down": self._bias("down_bias", expert)}

    def _halves(self, both: np.ndarray, high: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Gate and up, each contiguous, out of rows that hold both. high : rows that one is of."""
        i = self.intermediate_size // high
        gate, up = (both[0::2], both[1::2]) if self.is_interleaved else (both[:i], both[i:])
        return np.ascontiguousarray(gate), np.ascontiguousarray(up)

    def _bias(self, part: str, expert: int) -> np.ndarray:
        name = self.parts[part]
        return as_f32(
            self.checkpoint.read(name, (expert, expert + 1))[0], self.checkpoint.info(name), name
        )


def expected_experts(config: Config, layer: int, found: set[int], where: str) -> int:
    """The layer's number of experts, by config and tensors; CheckpointError if they differ."""
    key, _ = config.get(NUM_EXPERTS_KEYS)
    count = config.size(NUM_EXPERTS_KEYS, layer)
    if count is None:
        raise CheckpointError(
            f"{config.where}: the number of experts is missing; must be in one of "
            f"{', '.join(NUM_EXPERTS_KEYS)}"
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
            f"{info.file}: tensor {name!r} (bytes {info.begin} to {info.end}) is {info.shape}: "
            f"must be {shape}"
        )


def as_f32(raw: np.ndarray, info: TensorInfo, name: str) -> np.ndarray:
    """Raw bits of a plain float tensor as float32."""
    if info.dtype == "BF16":
        return bf16_to_f32(raw)
    if info.dtype in ("F16", "F32"):
        return raw.astype(np.float32, copy=False)
    raise CheckpointError(f"{info.file}: tensor {name!r} is {info.dtype}: must be BF16, F16 or F32")
