"""Hugging Face directory -> one GGUF file of its experts, expert by expert.

The header comes first and tells where every tensor will lie, so each expert's rows go to their places as soon as they are
quantised and no more than one expert a thread is in memory. The file appears under its name complete or not at all.

Only experts are written, unless the whole model is asked for: its other tensors need rearrangements by architecture and a
tokenizer beside them (``convert_whole``) before GGUF programs load the file as a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktk import log
from ktk.checkpoint.packed import TEMPORARY_PREFIX, replacing, write_all
from ktk.checkpoint.safetensors import Checkpoint
from ktk.convert.run import (
    Calibration,
    Progress,
    Summary,
    calibrated_experts,
    changed_source,
    experts_to_convert,
    fingerprint,
    layer_output,
)
from ktk.convert.whole import FALLBACK, FLOAT_BYTES, RestOfModel, RestTensor, encode_rows, row_bytes
from ktk.errors import CheckpointError
from ktk.experts.formats import BLOCKS, GGUF
from ktk.experts.spec import MoESpec
from ktk.experts.stored import BlockExperts, BlockMatrix, ExpertWeights
from ktk.models import Config, Experts
from ktk.models.config import INTERMEDIATE_KEYS, NUM_LAYERS_KEYS
from ktk.quantise.feedback import LayerCalibration, LayerInputs, calibrated_rows, rows_alike

ALIGNMENT = 32  # of tensors, the GGUF format's default
# config.json's model_type -> general.architecture
ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_vl_moe": "qwen3vlmoe",
    "qwen3_5_moe": "qwen35moe",
    "deepseek": "deepseek",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "kimi_k2": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "phimoe": "phimoe",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "bailing_moe": "bailingmoe",
    "bailing_moe_v2": "bailingmoe2",
    "exaone_moe": "exaone-moe",
    "jamba": "jamba",
    "lfm2_moe": "lfm2moe",
    "nemotron_h": "nemotron_h_moe",
}
# Block types that are written.
LAYOUTS = {row.name: row for row in BLOCKS.values() if row.grid is not None}
EXPERTS_ONLY = "holds the experts only: the other tensors and the tokenizer stay with the Hugging Face directory"


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file. type : a name of LAYOUTS or FLOAT_BYTES. expert_bytes : of one expert."""

    name: str
    projection: str
    type: str
    shape: tuple[int, ...]
    expert_bytes: int
    offset: int = 0  # from the beginning of the file

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.expert_bytes


def convert_to_gguf(
    input_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quant_method: str,
    input_type: str | None = None,
    whole_type: str | None = None,
    threads: int,
    progress: Callable[[Progress], None] | None = None,
    calibration: Calibration | None = None,
) -> Summary:
    """``ktk.convert.convert`` for an output that ends in .gguf; see there."""
    started = time.monotonic()
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output}: exists; give another output, or remove it")
    with Checkpoint.open(input_path) as checkpoint:
        experts = experts_to_convert(checkpoint, input_type)
        source = fingerprint(checkpoint)
        job = _Job(checkpoint, experts, quant_method, whole_type, threads, progress)
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        try:
            with replacing(output) as file:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                job.check_room(output.parent)
                write_all(file, job.header)
                if calibration is None:
                    job.write_experts(file.fileno())
                else:
                    job.write_calibrated(file.fileno(), checkpoint.directory, calibration)
                job.write_rest(file.fileno())
                changed = changed_source(source, fingerprint(checkpoint))
                if changed:
                    raise CheckpointError(
                        f"{checkpoint.path}: {changed} while it was converted; convert it again"
                    )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    f"{output}: the disk is full ({error.strerror}); make room and run again",
                ) from error
            raise
        job.report("done", 0)
        return job.summary(output, time.monotonic() - started)


def _remove_leftovers(output: Path) -> None:
    """Temporary files of killed runs for the same output; FileExistsError if one is locked by a live run."""
    short = hashlib.sha256(os.fsencode(output.name)).hexdigest()[:16]
    for path in output.parent.glob(f"{TEMPORARY_PREFIX}{short}.*"):
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(
                    f"{output}: another conversion is writing it; wait for it"
                ) from None
            except OSError:  # a file system without locks
                continue
            path.unlink()


class _Job:
    """One conversion: the header, and where each expert's rows go."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: Experts,
        quant_method: str,
        whole_type: str | None,
        threads: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.experts, self.threads, self.progress = experts, threads, progress
        self.path = checkpoint.path
        self.type = quant_method.upper()
        self.notes = [EXPERTS_ONLY] if whole_type is None else []
        self.specs = {
            layer: MoESpec(**experts.spec_fields(layer), weight_format="bf16")
            for layer in experts.layers
        }
        self.layer_bytes = {
            layer: sum(checkpoint.tensors[name].nbytes for name in experts.tensor_names(layer))
            for layer in self.specs
        }
        self.rest: RestOfModel | None = None
        if whole_type is not None:
            used = {name for layer in experts.layers for name in experts.tensor_names(layer)}
            self.rest = RestOfModel(checkpoint, used, whole_type.upper())
        rest = self.rest.tensors if self.rest else []
        sources = {t.source: checkpoint.tensors[t.source].nbytes for t in rest}
        self.total_bytes = sum(self.layer_bytes.values()) + sum(sources.values())
        self.done_bytes = 0
        tensors = {layer: self._plan(layer, spec) for layer, spec in self.specs.items()}
        config = Config.of(checkpoint)
        self.header = self._header(config, checkpoint.directory, tensors)
        self.tensors: dict[int, list[_Tensor]] = {}
        end = len(self.header)
        for layer, plans in tensors.items():
            self.tensors[layer] = []
            for plan in plans:
                self.tensors[layer].append(_Tensor(**{**vars(plan), "offset": end}))
                end += -(-plan.num_bytes // ALIGNMENT) * ALIGNMENT
        self.rest_tensors: list[RestTensor] = []
        for tensor in rest:
            self.rest_tensors.append(dataclasses.replace(tensor, offset=end))
            end += -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT
        self.file_bytes = end

    def _plan(self, layer: int, spec: MoESpec) -> list[_Tensor]:
        """One layer's tensors in the file's order."""
        count, hidden, intermediate = spec.num_experts, spec.hidden_size, spec.intermediate_size
        plans = []
        for projection in ("gate", "up", "down") if spec.has_gate else ("up", "down"):
            outs, ins = (hidden, intermediate) if projection == "down" else (intermediate, hidden)
            name = f"blk.{layer}.ffn_{projection}_exps"
            kind = self.type
            if kind in LAYOUTS and ins % LAYOUTS[kind].block and ins % LAYOUTS[FALLBACK].block == 0:
                kind = FALLBACK
                note = f"{projection}: {FALLBACK}, as its rows of {ins} weights are not whole {self.type} blocks"
                if note not in self.notes:
                    self.notes.append(note)
                    log.logger.info(note)
            try:
                size = row_bytes(kind, ins)
            except ValueError as error:
                raise ValueError(f"{name}.weight: {error}") from None
            plans.append(
                _Tensor(f"{name}.weight", projection, kind, (count, outs, ins), outs * size)
            )
            if spec.has_bias:
                plans.append(
                    _Tensor(f"{name}.bias", f"{projection}_bias", "F32", (count, outs), outs * 4)
                )
        return plans

    def _header(self, config: Config, source: Path, tensors: dict[int, list[_Tensor]]) -> bytes:
        """Everything before the first tensor's data."""
        import gguf

        architecture = self._architecture(config)
        with tempfile.TemporaryDirectory(prefix="ktk-") as folder:
            path = Path(folder) / "header"
            writer = gguf.GGUFWriter(path, architecture)
            writer.add_type("model")
            writer.add_name(source.resolve().name)
            writer.add_file_type(int(gguf.LlamaFileType[BLOCKS[self.type].file_type]))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            metadata = _metadata(config, self.experts, self.specs)
            keys = {f"{architecture}.{key}": value for key, value in metadata.items()}
            if self.rest is not None:
                more = self.rest.metadata()
                keys.update({f"{architecture}.{key}": value for key, value in more.items()})
                keys.update(self.rest.tokenizer())
            add: dict[type, Callable[[str, Any], None]] = {
                bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32, str: writer.add_string,
                list: writer.add_array,
            }  # fmt: skip
            for key, value in keys.items():
                add[type(value)](key, value)
            activation = next(iter(self.specs.values())).activation
            writer.add_string("ktk.activation", json.dumps(activation.to_json(), sort_keys=True))
            experts = [tensor for plans in tensors.values() for tensor in plans]
            for t in [*experts, *(self.rest.tensors if self.rest else ())]:
                number = gguf.GGMLQuantizationType[t.type]
                writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.num_bytes, number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            header = path.read_bytes()
        return header.ljust(-(-len(header) // ALIGNMENT) * ALIGNMENT, b"\0")

    def _architecture(self, config: Config) -> str:
        """general.architecture; a model_type that GGUF has no name for stands as it is."""
        types = [part.get("model_type") for part in reversed(config.parts)]  # outermost first
        named = [t for t in types if isinstance(t, str) and t]
        for model_type in named:
            if model_type in ARCHITECTURES:
                return ARCHITECTURES[model_type]
        own = named[0] if named else self.experts.family
        self.notes.append(f"general.architecture is {own!r}, the model_type: ktk knows no other")
        return own

    def check_room(self, directory: Path) -> None:
        free = shutil.disk_usage(directory).free
        if self.file_bytes > free:
            raise OSError(
                errno.ENOSPC,
                f"{self.file_bytes / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free",
            )

    def write_experts(self, fd: int) -> None:
        """Quantise every expert and write its rows where they belong; at most twice as many in work as threads."""
        os.ftruncate(fd, self.file_bytes)
        jobs = iter([(layer, e) for layer, s in self.specs.items() for e in range(s.num_experts)])
        pending: deque[tuple[int, int, Future[None]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="ktk-convert")
        try:
            while True:
                while len(pending) < 2 * self.threads and (job := next(jobs, None)):
                    pending.append((*job, pool.submit(self._write, fd, *job)))
                if not pending:
                    return
                layer, expert, future = pending.popleft()
                future.result()
                self._report_expert(layer, expert)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def write_calibrated(self, fd: int, source: Path, calibration: Calibration) -> None:
        """The same, each layer rounded for what the layers written before it make of the calibration text."""
        os.ftruncate(fd, self.file_bytes)

        def on_layer(layer: int, inputs: LayerInputs) -> np.ndarray:
            spec = dataclasses.replace(
                self.specs[layer], weight_format=GGUF.name, activation_group=None
            )
            types = {t.projection: t.type for t in self.tensors[layer]}
            made: list[dict[str, np.ndarray]] = []
            for expert, (weights, stored) in enumerate(
                calibrated_experts(
                    self.experts,
                    layer,
                    LayerCalibration(spec, inputs),
                    lambda name, w, factor: calibrated_rows(w, types[name], factor),
                    self.threads,
                    str(self.path),
                )
            ):
                for tensor in self.tensors[layer]:
                    if tensor.type == "F32":
                        stored[tensor.projection] = _encode(tensor, weights)
                    _write_at(fd, stored[tensor.projection], tensor.offset + expert * tensor.expert_bytes)  # fmt: skip
                made.append(stored)
                self._report_expert(layer, expert)
            matrices = {
                name: BlockMatrix(types[name], spec.hidden_size if name != "down" else spec.intermediate_size,
                                  np.stack([e[name] for e in made]))
                for name in ("gate", "up", "down") if name in types
            }  # fmt: skip
            biases = {
                name: np.stack([e[name] for e in made]) for name in types if name.endswith("_bias")
            }
            blocks = BlockExperts(spec, matrices.get("gate"), matrices["up"], matrices["down"], **biases)  # fmt: skip
            return layer_output(blocks, inputs)

        calibration.run(source, self.experts, on_layer)
        self.notes.append("calibrated: " + json.dumps(calibration.provenance()))

    def _write(self, fd: int, layer: int, expert: int) -> None:
        try:
            weights = self.experts.read(layer, expert)
            for tensor in self.tensors[layer]:
                at = tensor.offset + expert * tensor.expert_bytes
                _write_at(fd, _encode(tensor, weights), at)
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}: layer {layer} expert {expert}: {error}") from error

    def write_rest(self, fd: int) -> None:
        """Quantise what is no expert's, some rows at a time."""
        if self.rest is None:
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="ktk-convert") as pool:
            jobs = [
                (tensor, [pool.submit(self._write_rest, fd, tensor, rows) for rows in parts])
                for tensor in self.rest_tensors
                if (parts := self.rest.parts(tensor))
            ]
            try:
                for tensor, futures in jobs:
                    for future in futures:
                        future.result()
                    self.report("other tensors", self.rest.source_bytes(tensor))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _write_rest(self, fd: int, tensor: RestTensor, rows: tuple[int, int] | None) -> None:
        assert self.rest is not None
        at = tensor.offset
        if rows is not None:
            at += rows[0] * row_bytes(tensor.type, tensor.shape[-1])
        _write_at(fd, self.rest.encoded(tensor, rows), at)

    def _report_expert(self, layer: int, expert: int) -> None:
        count, size = self.specs[layer].num_experts, self.layer_bytes[layer]
        more = size * (expert + 1) // count - size * expert // count
        self.report(f"layer {layer}", more)

    def report(self, what: str, more: int) -> None:
        self.done_bytes += more
        if self.progress is not None:
            self.progress(Progress(self.done_bytes, self.total_bytes, 0, what))

    def summary(self, output: Path, seconds: float) -> Summary:
        weights = sum(s.num_experts * s.num_weights for s in self.specs.values())
        written = [t for plans in self.tensors.values() for t in plans]
        expert_bytes = sum(t.num_bytes for t in written)
        types = {t.type for t in written if not t.projection.endswith("_bias")}
        return Summary(
            output=str(output),
            family=self.experts.family,
            source_dtype=self.experts.source_dtype,
            weight_format="+".join(sorted(types, key=[self.type, FALLBACK, *FLOAT_BYTES].index)),
            group_size=0,
            activation_group=0,
            num_layers=len(self.specs),
            num_experts=max(s.num_experts for s in self.specs.values()),
            reused_layers=0,
            input_bytes=self.total_bytes,
            expert_bytes=expert_bytes,
            other_bytes=sum(t.num_bytes for t in self.rest_tensors),
            bits_per_weight=expert_bytes * 8 / weights,
            seconds=seconds,
            mb_per_second=self.done_bytes / 1e6 / max(seconds, 1e-9),
            notes=tuple(self.notes),
        )


def _write_at(fd: int, data: np.ndarray, at: int) -> None:
    span = np.ascontiguousarray(data).data.cast("B")
    while len(span):
        written = os.pwrite(fd, span, at)
        span, at = span[written:], at + written


def _encode(tensor: _Tensor, weights: ExpertWeights) -> np.ndarray:
    """One expert's part of a tensor, C-contiguous."""
    values = getattr(weights, tensor.projection)
    if tensor.projection.endswith("_bias"):
        if not np.isfinite(values).all():
            raise ValueError(f"{tensor.projection} holds NaN or inf")
        return np.ascontiguousarray(values, "<f4")
    try:
        return (
            rows_alike(values, tensor.type)
            if tensor.type in LAYOUTS
            else encode_rows(values, tensor.type)
        )
    except ValueError as error:
        raise ValueError(f"{tensor.projection}: {error}") from None


def _metadata(config: Config, experts: Experts, specs: dict[int, MoESpec]) -> dict[str, Any]:
    """What GGUF programs want to know about the experts, by key after the architecture; as far as the config says it."""
    spec = next(iter(specs.values()))
    counted = {
        "block_count": config.size(NUM_LAYERS_KEYS) or max(specs) + 1,
        "embedding_length": config.size(("hidden_size",)) or spec.hidden_size,
        "feed_forward_length": config.size(
            ("intermediate_size", *INTERMEDIATE_KEYS), experts.layers[0]
        ),
        "expert_count": spec.num_experts,
        "expert_feed_forward_length": spec.intermediate_size,
        "expert_shared_count": _count(config, "n_shared_experts"),
        "expert_group_count": _count(config, "n_group"),
        "expert_group_used_count": _count(config, "topk_group"),
        "leading_dense_block_count": _count(config, "first_k_dense_replace"),
    }
    values: dict[str, Any] = {key: value for key, value in counted.items() if value is not None}
    if values["embedding_length"] != spec.hidden_size:
        values["moe_latent_size"] = spec.hidden_size
    with contextlib.suppress(CheckpointError):  # the experts' weights do not depend on it
        values["expert_used_count"] = experts.num_experts_per_tok
    norm = config.get(("norm_topk_prob",))[1]
    if isinstance(norm, bool):
        values["expert_weights_norm"] = norm
    if config.get(("routed_scaling_factor",))[0]:
        values["expert_weights_scale"] = config.number("routed_scaling_factor", 1.0)
    gating = {"softmax": 1, "sigmoid": 2}.get(str(config.get(("scoring_func", "score_func"))[1]))
    if gating is not None:
        values["expert_gating_func"] = gating
    return values


def _count(config: Config, key: str) -> int | None:
    """A count that may be 0; None where the config has no such int."""
    value = config.get((key,))[1]
    return value if type(value) is int and 0 <= value < 1 << 31 else None
