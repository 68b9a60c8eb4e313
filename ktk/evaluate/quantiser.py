"""A model's float experts in one variant after the other."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ktk.convert.importance import ImportanceFile, layer_importance
from ktk.convert.recipe import Coding, one_coding, projections_of
from ktk.evaluate.variants import Variant
from ktk.experts.dequantise import dequantise
from ktk.experts.formats import BLOCKS, GGUF, PANELS, activation_group_of
from ktk.experts.formats.floats import to_f32
from ktk.experts.layout import round_up
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights, StoredExperts, StoredMatrix
from ktk.integration.transformers.calibration import run_layers
from ktk.integration.transformers.experts import (
    ExpertsHandle,
    drop_weights,
    find_experts,
    hang,
    select_ktk,
)
from ktk.integration.transformers.packing import float_expert, module_spec
from ktk.integration.transformers.sources import layer_of
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.ops.moe import MoE
from ktk.quantise.feedback import (
    Encode,
    Factor,
    LayerCalibration,
    LayerInputs,
    calibrated,
    lay_expert,
    packed_encoder,
    rows_alike,
)
from ktk.quantise.ggml_library import GgmlLibrary
from ktk.quantise.importance import LayerImportance
from ktk.quantise.pack import pack_expert

F = np.float32


class PaddedMoE:
    """Experts whose rows were filled up with zero columns to whole blocks:
    the real columns' errors are the format's own.
    """

    def __init__(self, moe: MoE, hidden_size: int) -> None:
        self._moe, self._hidden_size = moe, hidden_size
        self.spec, self.kernel, self.bits_per_weight = moe.spec, moe.kernel, moe.bits_per_weight

    def forward(self, hidden: torch.Tensor, ids: Any, weights: Any) -> torch.Tensor:
        more = self.spec.hidden_size - self._hidden_size
        out = self._moe.forward(torch.nn.functional.pad(hidden, (0, more)), ids, weights)
        return torch.as_tensor(out)[:, : self._hidden_size]


class Quantiser:
    """Makes one layer's experts of float weights, as a variant says."""

    def __init__(
        self,
        variant: Variant,
        ggml: GgmlLibrary | None,
        method: str,
        activation_group: int | None,
        rotation: int | None = None,
        importance: ImportanceFile | None = None,
    ) -> None:
        self.variant, self._ggml, self._method = variant, ggml, method
        self._importance = importance
        self._imatrix = None if importance is None else importance.read()
        self._activation_group, self._rotation = activation_group, rotation
        if variant.by == "ggml" and ggml is None:
            raise ValueError(f"{variant.label}: llama.cpp's quantisers need --ggml FOLDER")
        self.is_packed = variant.is_packed

    def codings(self, layer: int, has_gate: bool) -> dict[str, Coding]:
        """Of a layer's matrices, by projection."""
        v = self.variant
        if v.recipe is not None:
            return v.recipe.of_layer(layer, has_gate)
        fmt = PANELS[v.format] if self.is_packed else BLOCKS[v.format]
        return dict.fromkeys(projections_of(has_gate), Coding(fmt, v.group_size))

    def spec(self, module: Any, layer: int) -> tuple[MoESpec, MoESpec]:
        """The module's own spec, and the one its experts are coded with: padded to whole blocks."""
        spec, activation = module_spec(module, None, None, None)
        codings = self.codings(layer, spec.has_gate)
        block = 1
        if self.is_packed:
            coding = one_coding(layer, codings)
            fields = coding.format.name, coding.group_size, self._activation_group, self._rotation
            spec, activation = module_spec(module, *fields)
        else:
            block = max(coding.format.block for coding in codings.values())
            bits = max(coding.format.bits_per_weight for coding in codings.values())
            group = activation_group_of(bits)
            spec = dataclasses.replace(
                spec,
                weight_format=GGUF.name,
                group_size=None,
                activation_group=self._activation_group or group,
            )
        if activation is None or getattr(module, "has_post_expert_norm", False):
            raise ValueError(
                f"{type(module).__name__}: ktk eval takes experts whose activation ktk runs itself"
            )
        sizes = (round_up(size, block) for size in (spec.hidden_size, spec.intermediate_size))
        hidden, intermediate = sizes
        return spec, dataclasses.replace(spec, hidden_size=hidden, intermediate_size=intermediate)

    def encoder(self, codings: dict[str, Coding]) -> Encode:
        """To blocks of GGUF types, by projection."""

        def encode(name: str, w: np.ndarray, factor: Factor) -> tuple[np.ndarray, np.ndarray]:
            fmt = codings[name].format
            if self.variant.by == "ktk":
                return calibrated(w, fmt, factor)
            assert self._ggml is not None
            blocks = self._ggml.quantise(fmt.name, to_f32(w), factor.mean_squares)
            return blocks, dequantise(StoredMatrix.of_rows(fmt.name, w.shape[1], blocks[None]), 0)

        return encode

    def moe(self, module: Any, layer: int, inputs: LayerInputs | None) -> Any:
        """The layer's experts, ready to run.

        inputs : those of the calibration text, if the variant is calibrated on one.
        """
        own, spec = self.spec(module, layer)
        codings = self.codings(layer, spec.has_gate)
        calibration: LayerCalibration | LayerImportance | None = None
        if self._importance is not None and self._imatrix is not None:
            found = layer_importance(self._imatrix, self._importance.path, layer, own)
            calibration = found.filled_up(spec)
        if inputs is not None:
            more = spec.hidden_size - own.hidden_size
            hidden = np.pad(inputs.hidden, ((0, 0), (0, more)))
            calibration = LayerCalibration(spec, dataclasses.replace(inputs, hidden=hidden))
        with ThreadPoolExecutor(cpu.default_threads()) as pool:
            made = list(
                pool.map(
                    lambda e: self._expert(module, e, spec, codings, calibration),
                    range(spec.num_experts),
                )
            )
        moe = MoE(
            self._assemble(spec, codings, made),
            method=self._method if self.is_packed else "LLAMAFILE",
        )
        return moe if spec == own else PaddedMoE(moe, own.hidden_size)

    def _expert(
        self,
        module: Any,
        expert: int,
        spec: MoESpec,
        codings: dict[str, Coding],
        calibration: LayerCalibration | LayerImportance | None,
    ) -> tuple[ExpertWeights, dict[str, np.ndarray]]:
        weights = _padded(float_expert(module, expert), spec)
        v = self.variant
        if calibration is not None:
            encode = packed_encoder(spec) if self.is_packed else self.encoder(codings)
            return weights, calibration.expert(expert, weights, encode)
        if self.is_packed:
            span = np.empty(spec.layout.expert_bytes, np.uint8)
            pack_expert(spec, weights, span)
            return weights, {"span": span}
        named = {
            n: to_f32(w) for n in ("gate", "up", "down") if (w := getattr(weights, n)) is not None
        }
        if v.by == "ggml":
            assert self._ggml is not None
            return weights, {n: self._ggml.quantise(v.format, w) for n, w in named.items()}
        return weights, {n: rows_alike(w, codings[n].format.name) for n, w in named.items()}

    def _assemble(
        self,
        spec: MoESpec,
        codings: dict[str, Coding],
        made: list[tuple[ExpertWeights, dict[str, np.ndarray]]],
    ) -> StoredExperts:
        if self.is_packed:
            data = aligned_buffer(spec.num_experts * spec.layout.expert_bytes)
            data = data.reshape(spec.num_experts, -1)
            for (weights, stored), span in zip(made, data, strict=True):
                if "span" in stored:
                    span[:] = stored["span"]
                else:
                    lay_expert(spec, weights, stored, span)
            return StoredExperts.of_panels(spec, data)

        def matrix(name: str, in_features: int) -> StoredMatrix | None:
            if name == "gate" and not spec.has_gate:
                return None
            return StoredMatrix.of_rows(
                codings[name].format.name,
                in_features,
                np.stack([stored[name] for _, stored in made]),
            )

        def bias(name: str) -> np.ndarray | None:
            rows = [getattr(weights, f"{name}_bias") for weights, _ in made]
            return None if rows[0] is None else np.stack(rows)

        gate, up = matrix("gate", spec.hidden_size), matrix("up", spec.hidden_size)
        down = matrix("down", spec.intermediate_size)
        assert up is not None
        assert down is not None
        return StoredExperts(spec, gate, up, down, bias("gate"), bias("up"), bias("down"))


def _padded(weights: ExpertWeights, spec: MoESpec) -> ExpertWeights:
    """Zero rows and columns up to the spec's sizes."""
    hidden, intermediate = spec.hidden_size, spec.intermediate_size

    def fill(w: np.ndarray | None, rows: int, columns: int | None = None) -> np.ndarray | None:
        if w is None:
            return None
        wanted = (rows,) if columns is None else (rows, columns)
        if w.shape == wanted:
            return w
        return np.pad(w, [(0, want - have) for want, have in zip(wanted, w.shape, strict=True)])

    up, down = fill(weights.up, intermediate, hidden), fill(weights.down, hidden, intermediate)
    assert up is not None
    assert down is not None
    return ExpertWeights(
        fill(weights.gate, intermediate, hidden),
        up,
        down,
        fill(weights.gate_bias, intermediate),
        fill(weights.up_bias, intermediate),
        fill(weights.down_bias, hidden),
    )


def quantise_model(
    model: Any, quantiser: Quantiser, calibration_ids: torch.Tensor | None = None
) -> None:
    """Put a float model's experts on ktk in place, coded as the quantiser says.

    calibration_ids : int64 (windows, length); each layer is calibrated on what the layers before
        it, quantised, make of them.
    """
    modules = {layer_of(name): module for name, module in find_experts(model)}
    if not modules:
        raise ValueError(f"{type(model).__name__} has no experts that ktk can run")
    made: dict[int, Any] = {}

    def on_layer(layer: int, inputs: LayerInputs) -> np.ndarray:
        made[layer] = quantiser.moe(modules[layer], layer, inputs)
        given = inputs.hidden, inputs.topk_ids, inputs.topk_weights
        out = made[layer].forward(*map(torch.from_numpy, given))
        return np.asarray(out)

    if calibration_ids is None:
        made.update(
            {layer: quantiser.moe(module, layer, None) for layer, module in modules.items()}
        )
    else:
        run_layers(model, calibration_ids, on_layer)
    for layer, module in modules.items():
        activation = quantiser.spec(module, layer)[0].activation
        hang(module, ExpertsHandle(made[layer], activation, None))
        drop_weights(module)
    select_ktk(model, modules.values())
