"""Hugging Face directory -> packed directory (GGUF: convert_to_gguf, convert_from_gguf), expert by expert, interruptible at any moment.

Order of writing: the state file, one file per MoE layer, shards of the other tensors, their index, the small
files, config.json. Each appears under its final name complete (temporary name, fsync, rename), so a file
that is there is finished and a directory with config.json is a finished one. Nothing written depends on
time, threads or how often the work was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ktk.checkpoint import is_gguf
from ktk.checkpoint.packed import (
    QUANT_METHOD,
    STATE_FILE,
    TEMPORARY_PREFIX,
    layer_path,
    read_layer,
    read_spec,
    replacing,
    write_all,
    write_layer,
)
from ktk.checkpoint.safetensors import (
    Checkpoint,
    SafetensorsFile,
    open_regular,
    read_into,
    read_json_object,
)
from ktk.errors import CheckpointError
from ktk.experts.formats import written_types
from ktk.experts.layout import LAYOUT_VERSION
from ktk.experts.spec import MoESpec
from ktk.experts.stored import BlockExperts, CodedExpert, ExpertWeights, Packed
from ktk.machine.memory import aligned_buffer
from ktk.models import SOURCE_DTYPES, Config, Experts, find_experts
from ktk.models.config import NESTED_KEYS
from ktk.models.plain import PlainTensor, plain_tensors
from ktk.ops.moe import MoE
from ktk.paths import user_path
from ktk.quantise.feedback import Encode, LayerCalibration, LayerInputs, lay_expert, packed_encoder
from ktk.quantise.pack import pack_expert

QUANT_METHODS = ("int4", "int8", "bf16")
GGUF_METHODS = tuple(row.name.lower() for row in written_types())
WHOLE_TYPES = tuple(row.name.lower() for row in written_types() if row.search or row.block == 1)
SHARD_BYTES = 4 << 30  # of the tensors that are not experts'
CHUNK_BYTES = 8 << 20
MAX_SIDE_FILE = 256 << 20
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".msgpack", ".h5", ".npz",
    ".tflite", ".zip", ".tar", ".gz",
)  # fmt: skip
SIDE_DIRECTORIES = ("additional_chat_templates",)


@dataclass(frozen=True)
class Progress:
    """How far a conversion is, in bytes of the input. what : the part in work, for people.

    reused_bytes : of done_bytes, those an earlier run had done.
    """

    done_bytes: int
    total_bytes: int
    reused_bytes: int
    what: str


@dataclass(frozen=True)
class Summary:
    """What a conversion did. input_bytes, expert_bytes (written), other_bytes in bytes; seconds of this run.

    reused_layers : layers an earlier run had finished. mb_per_second : input bytes of this run's own work.
    notes : what a reader of the output should know, a sentence each.
    """

    output: str
    family: str
    source_dtype: str
    weight_format: str
    group_size: int
    activation_group: int
    num_layers: int
    num_experts: int
    reused_layers: int
    input_bytes: int
    expert_bytes: int
    other_bytes: int
    bits_per_weight: float
    seconds: float
    mb_per_second: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def convert(
    input_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quant_method: str = "int4",
    input_type: str | None = None,
    group_size: int | None = None,
    activation_group: int | None = None,
    threads: int | None = None,
    resume: bool = False,
    whole: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    calibration: Calibration | None = None,
) -> Summary:
    """Convert a checkpoint's experts to ``quant_method``: a packed directory that loads alone, or a GGUF file.

    input_path : a Hugging Face directory, a .safetensors file, or a GGUF model (a file, a part of a split one, a
    directory), whose packed directory holds the experts only.
    quant_method : int4, int8 or bf16 for a directory; one of GGUF_METHODS for an ``output`` that ends in .gguf.
    whole : a GGUF file holds the experts only, unless this names the type of all other weights: then it is a model that
    GGUF programs load, of the architectures of ``ktk.models.whole``. input_type : None reads it from the checkpoint; a name of SOURCE_DTYPES
    must agree with it. group_size, activation_group : see MoESpec. threads : experts packed at a time,
    default the physical cores. resume : go on where an interrupted run of the same job stopped; a GGUF file is
    written in one go. calibration : rounds with error feedback on the inputs that a text gives the experts, for int4, int8 and
    the GGUF methods; a ``ktk.integration.transformers.calibration.Calibration``.

    Memory: one expert's input and output per thread, whatever the model's size.
    Raises CheckpointError for a bad input, ValueError for arguments that do not fit, FileExistsError if
    ``output`` is not empty (a GGUF file: exists), OSError if the disk is full; what is finished stays for ``resume``.
    """
    input_path, output = user_path(input_path), user_path(output)
    _check_method(quant_method, output, whole)
    if input_type is not None and input_type not in SOURCE_DTYPES:
        raise ValueError(
            f"input_type={input_type!r}: must be one of {', '.join(SOURCE_DTYPES)}, or left out"
        )
    if threads is None:
        from ktk.machine.cpu import num_physical_cores

        threads = num_physical_cores()
    if type(threads) is not int or threads < 1:
        raise ValueError(f"threads={threads!r}: must be a positive int")
    if calibration is not None and (
        quant_method in ("bf16", "f16", "f32") or is_gguf(Path(input_path))
    ):
        exact = quant_method in ("bf16", "f16", "f32")
        what = f"{quant_method} rounds nothing away" if exact else f"{input_path} is GGUF"
        raise ValueError(
            f"calibration: {what}; it needs a Hugging Face directory of float weights, and int4, int8 or a GGUF type of "
            "blocks; otherwise leave it out"
        )
    if Path(output).name.lower().endswith(".gguf"):
        from ktk.convert.to_gguf import convert_to_gguf

        for name, value in (("group_size", group_size), ("activation_group", activation_group)):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r}: {quant_method} has groups of its own, leave it out"
                )
        if is_gguf(Path(input_path)):
            raise ValueError(
                f"input {input_path}: GGUF to GGUF adds one error to another; convert the original weights"
            )
        if resume:
            raise ValueError("resume: a GGUF file is written in one go; run again without --resume")
        return convert_to_gguf(
            input_path, output, quant_method=quant_method, input_type=input_type, whole_type=whole, threads=threads,
            progress=progress, calibration=calibration,
        )  # fmt: skip
    if is_gguf(Path(input_path)):
        from ktk.convert.from_gguf import convert_from_gguf

        return convert_from_gguf(
            input_path, output, quant_method=quant_method, input_type=input_type, group_size=group_size,
            activation_group=activation_group, threads=threads, resume=resume, progress=progress,
        )  # fmt: skip
    with Checkpoint.open(input_path) as checkpoint:
        destination = check_places(checkpoint.directory, Path(output))
        experts = experts_to_convert(checkpoint, input_type)
        specs = {
            layer: MoESpec(
                **experts.spec_fields(layer),
                weight_format=quant_method,
                group_size=experts.int4_group
                if group_size is None and quant_method == "int4"
                else group_size,
                activation_group=activation_group,
            )
            for layer in experts.layers
        }
        return run_job(
            lambda: _DirectoryJob(checkpoint, experts, specs, destination, threads, progress, calibration), destination,
            resume,
        )  # fmt: skip


def experts_to_convert(checkpoint: Checkpoint, input_type: str | None) -> Experts:
    """CheckpointError for a packed directory, ValueError if the experts are not of ``input_type``."""
    said = checkpoint.config.get("quantization_config")
    if isinstance(said, dict) and said.get("quant_method") == QUANT_METHOD:
        raise CheckpointError(
            f"{checkpoint.path}: is a packed directory already; convert its original"
        )
    experts = find_experts(checkpoint)
    if input_type is not None and input_type != experts.source_dtype:
        raise ValueError(
            f"input_type={input_type!r}: the experts of {checkpoint.path} are {experts.source_dtype}; leave it out"
        )
    return experts


def run_job(make: Callable[[], Job], output: Path, resume: bool) -> Summary:
    """Do what a conversion into a packed directory has to do, alone in its directory."""
    started = time.monotonic()
    made = [path for path in (output, *output.parents) if not path.exists()]
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        try:
            try:
                job = make()
                job.start(resume)
            except BaseException:
                for path in made:
                    with contextlib.suppress(OSError):  # holds something by now
                        path.rmdir()
                raise
            job.run()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    f"{output}: the disk is full ({error.strerror}); make room and run again with --resume",
                ) from error
            raise
    return job.summary(time.monotonic() - started)


def _check_method(quant_method: str, output: Path, whole: str | None) -> None:
    """ValueError unless the method is known and the output is named for it."""
    if quant_method not in (*QUANT_METHODS, *GGUF_METHODS):
        raise ValueError(
            f"quant_method={quant_method!r}: must be one of {', '.join(QUANT_METHODS)}, "
            f"or for a GGUF file {', '.join(GGUF_METHODS)}"
        )
    if whole is not None and whole not in WHOLE_TYPES:
        raise ValueError(f"whole={whole!r}: must be one of {', '.join(WHOLE_TYPES)}")
    is_file = output.name.lower().endswith(".gguf")
    if is_file and quant_method not in GGUF_METHODS:
        raise ValueError(
            f"output {output}: {quant_method} writes a directory; give one, or one of {', '.join(GGUF_METHODS)}"
        )
    if not is_file and quant_method not in QUANT_METHODS:
        raise ValueError(
            f"output {output}: {quant_method} writes a GGUF file; give a name that ends in .gguf"
        )
    if whole is not None and not is_file:
        raise ValueError(
            f"whole={whole!r}: output {output} is a directory, which holds whole models anyway; leave it out"
        )


class ExpertSource(Protocol):
    """What a conversion reads experts from."""

    family: str
    source_dtype: str

    def read_stored(self, layer: int, expert: int) -> ExpertWeights | CodedExpert:
        """One expert, decoded, or as codes that may be kept; called from several threads."""


class Calibration(Protocol):
    """A calibration text and what runs the model on it."""

    def provenance(self) -> dict[str, Any]:
        """JSON-able: what the output tells of it."""

    def run(
        self, source: Path, experts: Experts, on_layer: Callable[[int, LayerInputs], np.ndarray]
    ) -> None:
        """Call ``on_layer`` with the inputs of each layer's experts, in order; it returns their output, float32."""


class Job(ABC):
    """One conversion into a packed directory: what there is to write, and the writing of it.

    layer_bytes : of the input, by layer. shards : the tensors that are not experts'.
    """

    shards: Sequence[list[PlainTensor]] = ()
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        where: Path,
        experts: ExpertSource,
        specs: dict[int, MoESpec],
        layer_bytes: dict[int, int],
        output: Path,
        threads: int,
        progress: Callable[[Progress], None] | None,
        calibration: Calibration | None = None,
    ) -> None:
        self.where, self.experts, self.specs = where, experts, specs
        self.provenance = None if calibration is None else calibration.provenance()
        self.layer_bytes = layer_bytes
        self.output, self.threads, self.progress = output, threads, progress
        self.total_bytes = sum(layer_bytes.values())
        self.done_bytes = self.reused_bytes = self.reused_layers = 0
        self.state = _state(self.fingerprint(), next(iter(specs.values())), self.provenance)

    @abstractmethod
    def fingerprint(self) -> list[dict[str, Any]]:
        """Names, sizes and modification times of everything that is read."""

    @abstractmethod
    def source_config(self) -> dict[str, Any]:
        """What config.json shall say beside our quantization_config."""

    def write_shard(self, index: int) -> None:
        """Write one of ``shards``; a source that has any does."""
        raise NotImplementedError

    @abstractmethod
    def write_side_files(self) -> None:
        """Write what is no tensor, but config.json."""

    def start(self, resume: bool) -> None:
        """Take possession of the output directory: check or write its state, remove temporary files."""
        present = set(os.listdir(self.output))
        leftover = {name for name in present if name.startswith(TEMPORARY_PREFIX)}
        if present - leftover and not resume:
            raise FileExistsError(
                f"{self.output}: exists and is not empty; give another output, empty it, or go on with --resume"
            )
        state_path = self.output / STATE_FILE
        if present - leftover:
            if STATE_FILE not in present:
                raise FileExistsError(
                    f"{self.output}: was not begun by ktk convert ({STATE_FILE} is missing): nothing to resume"
                )
            _check_state(read_json_object(state_path), self.state, state_path)
        for folder in (self.output, *(self.output / name for name in SIDE_DIRECTORIES)):
            for path in folder.glob(TEMPORARY_PREFIX + "*"):
                path.unlink()
        if STATE_FILE not in present:
            _write_json(state_path, self.state)

    def run(self) -> None:
        todo = {layer: spec for layer, spec in self.specs.items() if not self._has_layer(layer)}
        self.reused_layers = len(self.specs) - len(todo)
        self.reused_bytes = self.done_bytes = sum(
            b for layer, b in self.layer_bytes.items() if layer not in todo
        )
        shards = [i for i in range(len(self.shards)) if not self._has_shard(i)]
        if todo or shards:  # config.json says "finished"
            with contextlib.suppress(FileNotFoundError):
                (self.output / "config.json").unlink()
        self._check_room(todo, shards)
        self.write_layers(todo)
        for index, tensors in enumerate(self.shards):
            if index in shards:
                self.write_shard(index)
            else:
                size = sum(t.nbytes for t in tensors)
                self.reused_bytes += size
                self.done_bytes += size
        self.write_side_files()
        changed = changed_source(self.state["source"], self.fingerprint())
        if changed:
            raise CheckpointError(
                f"{self.where}: {changed} while it was converted; convert it again"
            )
        _write_json(self.output / "config.json", self._config())
        self._report("done", 0)

    def write_layers(self, todo: dict[int, MoESpec]) -> None:
        with _Packer(self.experts, todo, self.threads, str(self.where)) as packer:
            for layer, spec in todo.items():
                write_layer(self.output, spec, layer, self._counted(packer.spans(layer), layer))

    def _report(self, what: str, more: int) -> None:
        self.done_bytes += more
        if self.progress is not None:
            self.progress(Progress(self.done_bytes, self.total_bytes, self.reused_bytes, what))

    def _counted(self, spans: Iterator[np.ndarray], layer: int) -> Iterator[np.ndarray]:
        """The spans, each reported once it is written."""
        count, size = self.specs[layer].num_experts, self.layer_bytes[layer]
        for expert, span in enumerate(spans):
            yield span
            self._report(f"layer {layer}", size * (expert + 1) // count - size * expert // count)

    def _has_layer(self, layer: int) -> bool:
        try:
            is_link = layer_path(self.output, layer).is_symlink()
            return not is_link and read_spec(self.output, layer) == self.specs[layer]
        except CheckpointError:
            return False

    def _check_room(self, todo: dict[int, MoESpec], shards: list[int]) -> None:
        needed = sum(s.num_experts * s.layout.expert_bytes for s in todo.values())
        needed += sum(t.nbytes for index in shards for t in self.shards[index])
        free = shutil.disk_usage(self.output).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free",
            )

    def _shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def _has_shard(self, index: int) -> bool:
        if (self.output / self._shard_name(index)).is_symlink():
            return False
        try:
            file = SafetensorsFile(self.output / self._shard_name(index))
        except CheckpointError:
            return False
        file.close()
        have = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
        return have == {t.name: (t.dtype, t.shape) for t in self.shards[index]}

    def _config(self) -> dict[str, Any]:
        config = self.source_config()
        spec = next(iter(self.specs.values()))
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "weight_format": spec.weight_format,
            "group_size": spec.group_size,
            "activation_group": spec.activation_group,
            "layout_version": LAYOUT_VERSION,
            "layers": list(self.specs),
            "family": self.experts.family,
            "source_dtype": self.experts.source_dtype,
        }
        if self.provenance is not None:
            config["quantization_config"]["calibration"] = self.provenance
        return config

    def summary(self, seconds: float) -> Summary:
        spec = next(iter(self.specs.values()))
        expert_bytes = sum(s.num_experts * s.layout.expert_bytes for s in self.specs.values())
        weights = sum(s.num_experts * s.num_weights for s in self.specs.values())
        return Summary(
            output=str(self.output),
            family=self.experts.family,
            source_dtype=self.experts.source_dtype,
            weight_format=spec.weight_format,
            group_size=spec.group_size or 0,
            activation_group=spec.activation_group or 0,
            num_layers=len(self.specs),
            num_experts=max(s.num_experts for s in self.specs.values()),
            reused_layers=self.reused_layers,
            input_bytes=self.total_bytes,
            expert_bytes=expert_bytes,
            other_bytes=sum(t.nbytes for shard in self.shards for t in shard),
            bits_per_weight=expert_bytes * 8 / weights,
            seconds=seconds,
            notes=self.notes,
            mb_per_second=(self.done_bytes - self.reused_bytes) / 1e6 / max(seconds, 1e-9),
        )


class _DirectoryJob(Job):
    """From a Hugging Face directory, or a .safetensors file: everything but the experts comes along."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: Experts,
        specs: dict[int, MoESpec],
        output: Path,
        threads: int,
        progress: Callable[[Progress], None] | None,
        calibration: Calibration | None,
    ) -> None:
        self.checkpoint, self.source = checkpoint, checkpoint.directory
        self.tensors, self.calibration = experts, calibration
        expert_names = {layer: experts.tensor_names(layer) for layer in specs}
        layer_bytes = {
            layer: sum(checkpoint.tensors[name].nbytes for name in names)
            for layer, names in expert_names.items()
        }
        super().__init__(checkpoint.path, experts, specs, layer_bytes, output, threads, progress, calibration)  # fmt: skip
        taken = set().union(*expert_names.values())
        config = Config.of(checkpoint)
        self.shards = _plan_shards(plain_tensors(checkpoint, taken, config))
        self.total_bytes += sum(t.nbytes for s in self.shards for t in s)

    def fingerprint(self) -> list[dict[str, Any]]:
        return fingerprint(self.checkpoint)

    def write_layers(self, todo: dict[int, MoESpec]) -> None:
        if self.calibration is None:
            super().write_layers(todo)
        elif todo:
            last = max(todo)

            def on_layer(layer: int, inputs: LayerInputs) -> np.ndarray:
                spec = self.specs[layer]
                if layer in todo:
                    spans = self._calibrated_spans(layer, LayerCalibration(spec, inputs))
                    write_layer(self.output, spec, layer, self._counted(spans, layer))
                if layer >= last:
                    raise _Done
                return layer_output(read_layer(self.output, layer), inputs)

            with contextlib.suppress(_Done):
                self.calibration.run(self.source, self.tensors, on_layer)

    def _calibrated_spans(self, layer: int, calibration: LayerCalibration) -> Iterator[np.ndarray]:
        spec, encode = self.specs[layer], packed_encoder(self.specs[layer])
        out = aligned_buffer(spec.layout.expert_bytes)
        for weights, stored in calibrated_experts(
            self.tensors, layer, calibration, encode, self.threads, str(self.where)
        ):
            lay_expert(spec, weights, stored, out)
            yield out

    def source_config(self) -> dict[str, Any]:
        """The source's config.json without its own quantization_config."""
        config = {k: v for k, v in self.checkpoint.config.items() if k != "quantization_config"}
        for key in NESTED_KEYS:
            if isinstance(config.get(key), dict):
                config[key] = {k: v for k, v in config[key].items() if k != "quantization_config"}
        return config

    def write_shard(self, index: int) -> None:
        name = self._shard_name(index)
        with replacing(self.output / name) as file:
            write_all(file, _shard_header(self.shards[index]))
            for tensor in self.shards[index]:
                for piece in tensor.pieces(self.checkpoint, CHUNK_BYTES):
                    write_all(file, piece)
                    self._report(name, len(piece))

    def _write_index(self) -> None:
        placed = {t.name: self._shard_name(i) for i, shard in enumerate(self.shards) for t in shard}
        size = sum(t.nbytes for shard in self.shards for t in shard)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        _write_json(self.output / "model.safetensors.index.json", index)

    def write_side_files(self) -> None:
        self._write_index()
        for relative in _side_files(self.source):
            target = self.output / relative
            target.parent.mkdir(exist_ok=True)
            fd, size = open_regular(self.source / relative)
            try:
                with replacing(target) as file:
                    for offset in range(0, size, CHUNK_BYTES):
                        piece = bytearray(min(CHUNK_BYTES, size - offset))
                        read_into(fd, memoryview(piece), offset, str(self.source / relative))
                        write_all(file, memoryview(piece))
            finally:
                os.close(fd)


class _Done(Exception):
    """The last layer is calibrated: the rest of the model need not run."""


def layer_output(packed: Packed | BlockExperts, inputs: LayerInputs) -> np.ndarray:
    """What a layer's experts, as they were written, make of the inputs: float32 (tokens, hidden_size)."""
    output: np.ndarray = MoE(packed)(inputs.hidden, inputs.topk_ids, inputs.topk_weights)
    return output


def calibrated_experts(
    experts: Experts,
    layer: int,
    calibration: LayerCalibration,
    encode: Encode,
    threads: int,
    where: str,
) -> Iterator[tuple[ExpertWeights, dict[str, np.ndarray]]]:
    """(weights, bytes of each projection) of a layer's experts in order; one expert a thread is in work, and two wait."""

    def work(expert: int) -> tuple[ExpertWeights, dict[str, np.ndarray]]:
        try:
            weights = experts.read(layer, expert)
            return weights, calibration.expert(expert, weights, encode)
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{where}: layer {layer} expert {expert}: {error}") from error

    pool = ThreadPoolExecutor(threads, thread_name_prefix="ktk-calibrate")
    pending: deque[Future[tuple[ExpertWeights, dict[str, np.ndarray]]]] = deque()
    try:
        for expert in range(calibration.spec.num_experts):
            pending.append(pool.submit(work, expert))
            if len(pending) > threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Packer:
    """Threads that read and pack experts a little ahead of the writer, across layers, in order.

    At most twice as many spans exist as there are threads, and two: the writer's disk may be slow.
    """

    def __init__(
        self, experts: ExpertSource, specs: dict[int, MoESpec], threads: int, where: str
    ) -> None:
        self._experts, self._specs, self._where = experts, specs, where
        self._jobs = iter(
            [(layer, e) for layer, spec in specs.items() for e in range(spec.num_experts)]
        )
        self._window = 2 * threads + 2
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ktk-convert")
        self._pending: deque[Future[np.ndarray]] = deque()
        self._free: deque[np.ndarray] = deque()

    def __enter__(self) -> _Packer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def spans(self, layer: int) -> Iterator[np.ndarray]:
        """One layer's experts in order, each valid until the next is asked for; layers in their order."""
        for _ in range(self._specs[layer].num_experts):
            while len(self._pending) < self._window and (job := next(self._jobs, None)):
                self._pending.append(self._pool.submit(self._pack, *job))
            span = self._pending.popleft().result()
            yield span
            self._free.append(span)

    def _pack(self, layer: int, expert: int) -> np.ndarray:
        spec = self._specs[layer]
        try:
            out = self._free.popleft()
        except IndexError:
            out = np.empty(0, np.uint8)
        if len(out) != spec.layout.expert_bytes:
            out = aligned_buffer(spec.layout.expert_bytes)
        try:
            pack_expert(spec, self._experts.read_stored(layer, expert), out)
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self._where}: layer {layer} expert {expert}: {error}"
            ) from error
        return out


def _plan_shards(tensors: list[PlainTensor]) -> list[list[PlainTensor]]:
    """Tensors in order, cut into shards of at most SHARD_BYTES; a bigger tensor has its own."""
    shards: list[list[PlainTensor]] = []
    size = SHARD_BYTES + 1
    for tensor in tensors:
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    # Widest items first, as the official writer orders them: every tensor is then aligned to its dtype.
    return [sorted(shard, key=lambda t: -t.itemsize) for shard in shards]


def _shard_header(tensors: list[PlainTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    length = -(-len(text) // 8) * 8
    return length.to_bytes(8, "little") + text.ljust(length)


def check_places(source: Path, output: Path) -> Path:
    """The output directory; ValueError if it lies in the input."""
    inside, outside = output.resolve(), source.resolve()
    if inside == outside or outside in inside.parents:
        raise ValueError(
            f"output {output} lies in the input {source}: give a directory outside of it"
        )
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: exists and is not a directory")
    return output


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; it ends with the process, however that ends."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{directory}: another conversion is writing there; wait for it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(fd)


def _side_files(source: Path) -> list[Path]:
    """The small files that belong to a model, relative to its directory: tokenizer, templates, code, licence."""
    found = []
    for folder in (source, *(source / name for name in SIDE_DIRECTORIES)):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = path.name
            if name.startswith((".", "ktk-")) or name.endswith((*WEIGHT_SUFFIXES, ".index.json")):
                continue
            if name == "config.json" or path.is_dir():
                continue
            if path.is_symlink() and not path.exists():
                raise CheckpointError(
                    f"{path}: symbolic link to a missing file; download the checkpoint again"
                )
            if path.is_file() and path.stat().st_size <= MAX_SIDE_FILE:
                found.append(path.relative_to(source))
    return found


def fingerprint(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Names, sizes and modification times of everything that is read."""
    source = checkpoint.directory
    names = {file.path.relative_to(source) for file in checkpoint.files} | set(_side_files(source))
    names |= {
        Path("config.json"),
        *(p.relative_to(source) for p in source.glob("*.safetensors.index.json")),
    }
    entries = []
    for name in sorted(names):
        try:
            info = (source / name).stat()
        except OSError as error:
            raise CheckpointError(f"{source / name}: {error.strerror}") from None
        entries.append({"file": str(name), "bytes": info.st_size, "mtime_ns": info.st_mtime_ns})
    return entries


def _state(
    source: list[dict[str, Any]], spec: MoESpec, provenance: dict[str, Any] | None
) -> dict[str, Any]:
    from ktk import __version__

    return {
        "ktk_version": __version__,
        "layout_version": LAYOUT_VERSION,
        "quant_method": spec.weight_format,
        "group_size": spec.group_size,
        "activation_group": spec.activation_group,
        "calibration": provenance,
        "source": source,
    }


def _check_state(have: dict[str, Any], want: dict[str, Any], path: Path) -> None:
    """ValueError unless the job begun in the output is this one."""
    for key, value in want.items():
        if key != "source" and have.get(key) != value:
            raise ValueError(
                f"{path}: was begun with {key}={have.get(key)!r}, now {value!r}: "
                "resume with the same options, or give another output"
            )
    changed = changed_source(have.get("source"), want["source"])
    if changed:
        raise ValueError(f"{path}: {changed} since the conversion began: give another output")


def changed_source(before: Any, now: list[dict[str, Any]]) -> str | None:
    """What differs between two fingerprints, or None."""
    if before == now:
        return None
    try:
        old = {entry["file"]: entry for entry in before}
    except (TypeError, KeyError):
        return "the list of source files was damaged"
    new = {entry["file"]: entry for entry in now}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            fault = (
                "changed"
                if name in old and name in new
                else "was added"
                if name in new
                else "was removed"
            )
            return f"source file {name} {fault}"
    return "the list of source files changed"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=True) + "\n"
    with replacing(path) as file:
        write_all(file, text.encode("utf-8", "surrogatepass"))
