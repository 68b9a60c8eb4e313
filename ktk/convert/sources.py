"""What a conversion reads: a Hugging Face directory of any coding, or a GGUF model. One interface.

A packed directory is no source: its weights are rounded already, and rounding them again adds one
error to another.
"""

from __future__ import annotations

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ktk.checkpoint import is_gguf
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.checkpoint.packed import QUANT_METHOD
from ktk.checkpoint.safetensors import Checkpoint
from ktk.errors import CheckpointError
from ktk.experts.dequantise import expert_weights
from ktk.experts.stored import CodedExpert, ExpertWeights, StoredExperts
from ktk.models import Config, Experts, find_experts
from ktk.models.config import NESTED_KEYS
from ktk.models.find import find_gguf_experts
from ktk.models.plain import PlainTensor, plain_tensors
from ktk.quantise.feedback import LayerInputs

CHUNK_BYTES = 8 << 20
MAX_SIDE_FILE = 256 << 20
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".msgpack"),
    *(".h5", ".npz", ".tflite", ".zip", ".tar", ".gz"),
)
SIDE_DIRECTORIES = ("additional_chat_templates",)
EXPERTS_ONLY = (
    "holds the experts only, for ktk.MoE.load and KTMoEWrapper(weight_path=): "
    "not a model that loads alone"
)
WEIGHS_INPUT = (
    "routing weights multiply the experts' input in this architecture: "
    "multiply rows before, give topk_weights of 1"
)
OUTPUT_SCALES = "the experts' output scales are part of the down projections"
# config.json's name -> the metadata's, after the architecture
GGUF_CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "n_shared_experts": "expert_shared_count",
}

OnLayer = Callable[[int, LayerInputs], np.ndarray]


class Calibration(Protocol):
    """A calibration text and what runs the model on it."""

    def provenance(self) -> dict[str, Any]:
        """JSON-able: what the output tells of it."""

    def run(self, source: Path, experts: Experts, on_layer: OnLayer) -> None:
        """Call ``on_layer`` with the inputs of each layer's experts, in order.

        It returns their output, float32 (tokens, hidden_size).
        """

    def sensitivities(self, source: Path, experts: Experts, on_layer: OnLayer) -> dict[int, float]:
        """By layer, the KL divergence a token, in nats, of the model with noise in the output of
        its experts, by the noise's mean square as a share of the residual's behind the layer.
        """


class Source(ABC):
    """The experts of one checkpoint, and whatever else of it an output may want.

    path : as the caller named it, for messages. place : what no output directory may lie in.
    layers : indices of the MoE layers, ascending. notes : what a reader of the output should know.
    """

    path: Path
    place: Path
    family: str
    source_dtype: str
    layers: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def panel_format(self) -> tuple[str, int] | None:
        """The format of panels, and the group size, that keep the source's own codes, or None."""
        return None

    @abstractmethod
    def spec_fields(self, layer: int) -> dict[str, Any]:
        """The shapes and the activation of one layer: what a MoESpec says but its formats."""

    @abstractmethod
    def layer_bytes(self, layer: int) -> int:
        """Bytes that one layer's experts take here."""

    @abstractmethod
    def read(self, layer: int, expert: int) -> ExpertWeights | CodedExpert:
        """One expert, decoded, or as codes that may be kept; called from several threads."""

    @abstractmethod
    def fingerprint(self) -> list[dict[str, Any]]:
        """Names, sizes and modification times of everything that is read."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What the output's config.json says beside its quantization_config."""

    def layer_inputs(self, calibration: Calibration, on_layer: OnLayer) -> None:
        """Run the model on a calibration's text; ``on_layer`` as in ``Calibration.run``."""
        raise ValueError(f"calibration: {self.path} is no model that runs")

    def layer_sensitivities(self, calibration: Calibration, on_layer: OnLayer) -> dict[int, float]:
        """As ``Calibration.sensitivities``."""
        raise ValueError(f"calibration: {self.path} is no model that runs")

    def plain_tensors(self) -> list[PlainTensor] | None:
        """The tensors that are not experts', in the files' order; None if they stay behind."""
        return None

    def pieces(self, tensor: PlainTensor) -> Iterator[memoryview]:
        """The bytes of one of them; each piece is valid until the next is asked for."""
        raise NotImplementedError

    def side_files(self) -> list[Path]:
        """The small files that belong to the model, relative to ``place``."""
        return []


@contextlib.contextmanager
def open_source(path: Path, input_type: str | None) -> Iterator[Source]:
    """What lies at ``path``, open for the block.

    Raises CheckpointError if it is none or a packed directory, ValueError if its experts are not of
    ``input_type``.
    """
    if is_gguf(path):
        if input_type is not None:
            raise ValueError(f"input_type={input_type!r}: a GGUF file says its types; leave it out")
        yield GgufSource(GgufCheckpoint.open(path))
        return
    with Checkpoint.open(path) as checkpoint:
        source = HuggingFaceSource(checkpoint)
        if input_type is not None and input_type != source.source_dtype:
            raise ValueError(
                f"input_type={input_type!r}: the experts of {checkpoint.path} are "
                f"{source.source_dtype}; leave it out"
            )
        yield source


class HuggingFaceSource(Source):
    """A Hugging Face directory, or a .safetensors file of one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        said = checkpoint.config.get("quantization_config")
        if isinstance(said, dict) and said.get("quant_method") == QUANT_METHOD:
            raise CheckpointError(
                f"{checkpoint.path}: is a packed directory already; convert its original"
            )
        self.checkpoint, self.experts = checkpoint, find_experts(checkpoint)
        self.path, self.place = checkpoint.path, checkpoint.directory
        self.family, self.source_dtype = self.experts.family, self.experts.source_dtype
        self.layers = self.experts.layers
        self.model_config = Config.of(checkpoint)

    @property
    def panel_format(self) -> tuple[str, int] | None:
        return self.experts.panel_format

    @property
    def expert_tensors(self) -> set[str]:
        """Names of the tensors that the experts of all layers are made of."""
        return set().union(*map(self.experts.tensor_names, self.layers))

    def spec_fields(self, layer: int) -> dict[str, Any]:
        return self.experts.spec_fields(layer)

    def layer_bytes(self, layer: int) -> int:
        names = self.experts.tensor_names(layer)
        return sum(self.checkpoint.tensors[name].nbytes for name in names)

    def read(self, layer: int, expert: int) -> ExpertWeights | CodedExpert:
        return self.experts.read_stored(layer, expert)

    def layer_inputs(self, calibration: Calibration, on_layer: OnLayer) -> None:
        calibration.run(self.place, self.experts, on_layer)

    def layer_sensitivities(self, calibration: Calibration, on_layer: OnLayer) -> dict[int, float]:
        return calibration.sensitivities(self.place, self.experts, on_layer)

    def plain_tensors(self) -> list[PlainTensor]:
        return plain_tensors(self.checkpoint, self.expert_tensors, self.model_config)

    def pieces(self, tensor: PlainTensor) -> Iterator[memoryview]:
        return tensor.pieces(self.checkpoint, CHUNK_BYTES)

    def config(self) -> dict[str, Any]:
        """Its config.json without its own quantization_config."""
        config = {k: v for k, v in self.checkpoint.config.items() if k != "quantization_config"}
        for key in NESTED_KEYS:
            if isinstance(config.get(key), dict):
                config[key] = {k: v for k, v in config[key].items() if k != "quantization_config"}
        return config

    def side_files(self) -> list[Path]:
        """Tokenizer, templates, code, licence."""
        found = []
        for folder in (self.place, *(self.place / name for name in SIDE_DIRECTORIES)):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                name = path.name
                if name.startswith((".", "ktk-")) or name == "config.json" or path.is_dir():
                    continue
                if name.endswith((*WEIGHT_SUFFIXES, ".index.json")):
                    continue
                if path.is_symlink() and not path.exists():
                    raise CheckpointError(
                        f"{path}: symbolic link to a missing file; download the checkpoint again"
                    )
                if path.is_file() and path.stat().st_size <= MAX_SIDE_FILE:
                    found.append(path.relative_to(self.place))
        return found

    def fingerprint(self) -> list[dict[str, Any]]:
        names = {file.path.relative_to(self.place) for file in self.checkpoint.files}
        names |= {Path("config.json"), *self.side_files()}
        names |= {p.relative_to(self.place) for p in self.place.glob("*.safetensors.index.json")}
        return _stamps((str(name), self.place / name) for name in sorted(names))


class GgufSource(Source):
    """A GGUF model: its experts, decoded to float32.

    What GGUF files call the other tensors, and how they lie, differs by architecture: they stay.
    """

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        self.checkpoint, self.experts = checkpoint, find_gguf_experts(checkpoint)
        self.path = self.place = checkpoint.path
        self.family, self.layers = self.experts.architecture, self.experts.layers
        self._lock = threading.Lock()
        self._in_work: dict[int, tuple[StoredExperts, np.ndarray | None]] = {}
        self.source_dtype = f"gguf {self._layer(self.layers[0])[0].types}"
        self.notes = (EXPERTS_ONLY,)
        if self.experts.routing.weighs_input:
            self.notes += (WEIGHS_INPUT,)
        if any(self.experts.output_scale(layer) is not None for layer in self.layers):
            self.notes += (OUTPUT_SCALES,)

    def spec_fields(self, layer: int) -> dict[str, Any]:
        spec = self.experts.spec(layer)
        return {
            "num_experts": spec.num_experts,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "has_gate": spec.has_gate,
            "has_bias": spec.has_bias,
            "activation": spec.activation,
        }

    def layer_bytes(self, layer: int) -> int:
        names = self.experts.tensor_names(layer)
        return sum(self.checkpoint.info(name).num_bytes for name in names)

    def read(self, layer: int, expert: int) -> ExpertWeights:
        blocks, scales = self._layer(layer)
        weights = expert_weights(blocks, expert)
        if scales is None:
            return weights
        bias = weights.down_bias
        return weights._replace(
            down=weights.down * scales[expert],
            down_bias=None if bias is None else bias * scales[expert],
        )

    def _layer(self, layer: int) -> tuple[StoredExperts, np.ndarray | None]:
        """A layer's blocks and output scales.

        The two layers in work are kept: some have to be copied together.
        """
        with self._lock:
            if layer not in self._in_work:
                if len(self._in_work) == 2:
                    del self._in_work[min(self._in_work)]
                scales = self.experts.output_scale(layer)
                self._in_work[layer] = self.experts.experts(layer), scales
            return self._in_work[layer]

    def config(self) -> dict[str, Any]:
        """What the metadata tells, in config.json's names; model_type is GGUF's architecture."""
        experts, routing = self.experts, self.experts.routing
        metadata, spec = self.checkpoint.metadata, experts.spec(self.layers[0])
        config: dict[str, Any] = {"model_type": experts.architecture}
        for key, name in GGUF_CONFIG_KEYS.items():
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

    def fingerprint(self) -> list[dict[str, Any]]:
        return _stamps((path.name, path) for path in self.checkpoint.files)


def _stamps(files: Iterable[tuple[str, str | os.PathLike[str]]]) -> list[dict[str, Any]]:
    """(name, path) to name, size and modification time."""
    entries = []
    for name, path in files:
        try:
            info = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        entries.append({"file": name, "bytes": info.st_size, "mtime_ns": info.st_mtime_ns})
    return entries
