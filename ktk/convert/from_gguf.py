"""GGUF model -> packed directory of its experts, with ``ktk.convert``'s resuming, locking and checks.

Weights are decoded to float32 and packed anew, so the error of the packed format comes on top of the file's. Only experts
are written: what GGUF files call the other tensors, and how they lie, differs by architecture. ``ktk.MoE.load`` and
``KTMoEWrapper(weight_path=)`` need no more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.convert.run import Job, Progress, Summary, check_places, run_job
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.experts.spec import MoESpec
from ktk.experts.stored import BlockExperts, ExpertWeights
from ktk.models.gguf import GgufExperts, find_gguf_experts

EXPERTS_ONLY = "holds the experts only, for ktk.MoE.load and KTMoEWrapper(weight_path=): not a model that loads alone"
WEIGHS_INPUT = "routing weights multiply the experts' input in this architecture: multiply rows before, give topk_weights of 1"
OUTPUT_SCALES = "the experts' output scales are part of the down projections"
# config.json's name -> the metadata's, after the architecture
CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "n_shared_experts": "expert_shared_count",
}


def convert_from_gguf(
    input_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quant_method: str,
    input_type: str | None,
    group_size: int | None,
    activation_group: int | None,
    threads: int,
    resume: bool,
    progress: Callable[[Progress], None] | None,
) -> Summary:
    """``ktk.convert.convert`` for a GGUF input; see there."""
    if input_type is not None:
        raise ValueError(f"input_type={input_type!r}: a GGUF file says its types; leave it out")
    checkpoint = GgufCheckpoint.open(input_path)
    source = _Source(find_gguf_experts(checkpoint))
    specs = {
        layer: MoESpec(
            num_experts=spec.num_experts,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            weight_format=quant_method,
            group_size=group_size,
            activation_group=activation_group,
            has_gate=spec.has_gate,
            has_bias=spec.has_bias,
            activation=spec.activation,
        )
        for layer, spec in source.specs.items()
    }
    destination = check_places(checkpoint.path, Path(output))
    return run_job(
        lambda: _GgufJob(checkpoint, source, specs, destination, threads, progress), destination, resume
    )  # fmt: skip


class _Source:
    """Decoded experts of a GGUF model; safe to read from several threads."""

    def __init__(self, experts: GgufExperts) -> None:
        self.experts = experts
        self.family = experts.architecture
        self.specs = {layer: experts.spec(layer) for layer in experts.layers}
        self._lock = threading.Lock()
        self._layers: dict[int, tuple[BlockExperts, np.ndarray | None]] = {}
        self.source_dtype = f"gguf {self._of(experts.layers[0])[0].types}"

    def read_stored(self, layer: int, expert: int) -> ExpertWeights:
        blocks, scales = self._of(layer)
        weights = expert_weights(blocks, expert)
        if scales is None:
            return weights
        bias = weights.down_bias
        return weights._replace(
            down=weights.down * scales[expert],
            down_bias=None if bias is None else bias * scales[expert],
        )

    def _of(self, layer: int) -> tuple[BlockExperts, np.ndarray | None]:
        """A layer's blocks and output scales. The two layers in work are kept: some have to be copied together."""
        with self._lock:
            if layer not in self._layers:
                if len(self._layers) == 2:
                    del self._layers[min(self._layers)]
                self._layers[layer] = self.experts.experts(layer), self.experts.output_scale(layer)
            return self._layers[layer]

    def notes(self) -> tuple[str, ...]:
        found = [EXPERTS_ONLY]
        if self.experts.routing.weighs_input:
            found.append(WEIGHS_INPUT)
        if any(self.experts.output_scale(layer) is not None for layer in self.specs):
            found.append(OUTPUT_SCALES)
        return tuple(found)


class _GgufJob(Job):
    def __init__(
        self,
        checkpoint: GgufCheckpoint,
        source: _Source,
        specs: dict[int, MoESpec],
        output: Path,
        threads: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.checkpoint, self.source = checkpoint, source
        self.notes = source.notes()
        layer_bytes = {
            layer: sum(
                checkpoint.info(name).num_bytes for name in source.experts.tensor_names(layer)
            )
            for layer in specs
        }
        super().__init__(checkpoint.path, source, specs, layer_bytes, output, threads, progress)
        self._fields = self._config_fields()  # now, not after hours: bad metadata raises

    def fingerprint(self) -> list[dict[str, Any]]:
        entries = []
        for path in self.checkpoint.files:
            try:
                info = path.stat()
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror}") from None
            entries.append({"file": path.name, "bytes": info.st_size, "mtime_ns": info.st_mtime_ns})
        return entries

    def source_config(self) -> dict[str, Any]:
        return dict(self._fields)

    def _config_fields(self) -> dict[str, Any]:
        """What the metadata tells, in config.json's names; model_type is GGUF's architecture."""
        experts, spec = self.source.experts, next(iter(self.specs.values()))
        metadata, routing = self.checkpoint.metadata, experts.routing
        config: dict[str, Any] = {"model_type": experts.architecture}
        for key, name in CONFIG_KEYS.items():
            value = metadata.get(f"{experts.architecture}.{name}")
            if type(value) is int:
                config[key] = value
        if experts.num_layers is not None:
            config["num_hidden_layers"] = experts.num_layers
        config["num_experts"] = spec.num_experts
        config["moe_intermediate_size"] = spec.intermediate_size
        if f"{experts.architecture}.expert_used_count" in metadata:
            config["num_experts_per_tok"] = experts.num_experts_per_tok
        said = {
            "norm_topk_prob": routing.expert_weights_norm,
            "routed_scaling_factor": routing.expert_weights_scale,
            "scoring_func": routing.expert_gating_func,
            "n_group": routing.expert_group_count,
            "topk_group": routing.expert_group_used_count,
        }
        return config | {key: value for key, value in said.items() if value is not None}

    def write_side_files(self) -> None:
        """There are none."""
