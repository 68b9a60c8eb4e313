"""A checkpoint's experts into a packed directory or a GGUF file, expert by expert.

source x rounding x sink: a source hands out experts, which are rounded to the nearest or for what a
text makes of them (calibration), and the sink writes them. What any of them is, ``plan`` decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktk.convert.importance import ImportanceFile
from ktk.convert.plan import Plan, Request, make_plan
from ktk.convert.recipe import Recipe
from ktk.convert.resume import check_unchanged
from ktk.convert.sinks.base import Pieces
from ktk.convert.sources import Calibration, Source, open_source
from ktk.convert.window import in_order
from ktk.errors import CheckpointError
from ktk.experts.formats.parse import parse
from ktk.experts.rotation import Rotation
from ktk.experts.stored import CodedExpert
from ktk.ops.moe import MoE
from ktk.paths import user_path
from ktk.quantise.feedback import LayerCalibration, LayerInputs
from ktk.quantise.importance import LayerImportance


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
    """What a conversion did.

    input_bytes, expert_bytes, other_bytes : read, and written of both kinds. seconds : of this run.
    reused_layers : layers an earlier run had finished. mb_per_second : input bytes of this run's
    own work. notes : what a reader of the output should know, a sentence each. rotation : width and
    seed, or None. weight_format : several joined by +; group_size, activation_group : None where
    layers differ.
    """

    output: str
    family: str
    source_dtype: str
    weight_format: str
    group_size: int | None
    activation_group: int | None
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
    rotation: list[int] | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


DEFAULT = "nl4"  # of sources that no format keeps as they are


def convert(
    input_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quant_method: str | None = None,
    input_type: str | None = None,
    group_size: int | None = None,
    activation_group: int | None = None,
    rotation: Rotation | int | None = None,
    threads: int | None = None,
    resume: bool = False,
    whole: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    calibration: Calibration | None = None,
    recipe: Recipe | None = None,
    imatrix: str | os.PathLike[str] | None = None,
) -> Summary:
    """Convert a checkpoint's experts to ``quant_method``.

    input_path : a Hugging Face directory, a .safetensors file, or a GGUF model (a file, a part of a
    split one, a directory), whose packed directory holds the experts only.
    output : a directory, new or empty, that loads alone; or a new .gguf file.
    quant_method : nl4, nl3, nl2, int4 (or int4:64, a group size), int8, fp8 or bf16 for a
    directory; one of GGUF_METHODS for an ``output`` that ends in .gguf. None: what keeps
    the source's codes as they are, if nothing calibrates, else nl4, or int4 with a group_size.
    recipe : of each matrix; quant_method is that of matrices without a rule. Those of one layer may
    differ in a GGUF file alone. whole : a GGUF file holds the experts only, unless this names the
    type of all other weights: then it is a model that GGUF programs load, of the architectures of
    ``ktk.models.whole``; the recipe's patterns count for those weights, too. input_type : None
    reads it from the checkpoint; a name of SOURCE_DTYPES must agree with it. group_size (of
    quant_method), activation_group, rotation : see MoESpec.
    threads : experts packed at a time, default the physical cores. resume : go on where an
    interrupted run of the same job stopped; a GGUF file is written in one go. calibration : rounds
    with error feedback on the inputs that a text gives the experts, for int4, int8 and the GGUF
    methods of blocks; a ``ktk.integration.transformers.calibration.Calibration``. imatrix : instead
    of it an importance matrix of llama.cpp's, for any source.

    Memory: a few experts for each thread, whatever the model's size.
    Raises CheckpointError for a bad input, ValueError for arguments that do not fit,
    FileExistsError if ``output`` is not empty (a GGUF file: exists), OSError if the disk is full;
    what is finished stays for ``resume``.
    """
    started = time.monotonic()
    if quant_method is not None:
        quant_method, group_size = _method(quant_method, group_size)
    request = Request(
        user_path(input_path),
        user_path(output),
        quant_method,
        input_type,
        group_size,
        activation_group,
        rotation,
        threads,
        resume,
        whole,
        calibration,
        recipe,
        None if imatrix is None else ImportanceFile(user_path(imatrix)),
    )
    with open_source(request.input_path, input_type) as source:
        if quant_method is None and recipe is None:
            request = dataclasses.replace(request, quant_method=_default(request, source))
        plan = make_plan(request, source)
        sink = plan.sink
        with plan.naming_full_disk(), sink.open(resume):
            plan.check_room()
            sink.begin()
            meter = _Meter(plan, progress)
            _write_layers(plan, meter)
            sink.write_others(plan.threads, meter.report)
            check_unchanged(source.path, plan.fingerprint, source.fingerprint())
            sink.finish()
            meter.report("done", 0)
        return _summary(plan, meter, time.monotonic() - started)


def _default(request: Request, source: Source) -> str:
    """The method where nobody names one."""
    rounds = request.calibration is not None or request.importance is not None
    if source.panel_format is not None and not rounds:
        return source.panel_format[0]
    return DEFAULT if request.group_size is None else "int4"  # whose groups people choose


def _method(quant_method: str, group_size: int | None) -> tuple[str, int | None]:
    """The method as plans know it, and the group size: ``Q4_K`` is q4_k, ``int4:64`` names both."""
    try:
        asked = parse(quant_method, {})
    except ValueError:
        if ":" in quant_method:
            raise
        return quant_method, group_size  # the plan says which there are
    if asked.format is None or asked.by != "ktk" or asked.is_repacked:
        raise ValueError(f"quant_method={quant_method!r}: must name a format alone")
    if None not in (asked.group_size, group_size) and asked.group_size != group_size:
        raise ValueError(f"group_size={group_size!r}: quant_method={quant_method!r} has another")
    name = asked.format.name.lower()
    return name, asked.group_size if group_size is None else group_size


def _write_layers(plan: Plan, meter: _Meter) -> None:
    """Round and write the experts of the layers that are missing, in order."""
    sink, missing = plan.sink, plan.sink.missing
    if not missing:
        return
    if plan.calibration is not None:
        _write_calibrated(plan, plan.calibration, meter)
        return
    jobs = ((layer, expert) for layer in missing for expert in range(_num_experts(plan, layer)))
    with contextlib.closing(
        in_order(lambda job: _round(plan, *job, plan.importance.get(job[0])), jobs, plan.threads)
    ) as experts:  # across layers: threads do not wait at a layer's end
        for layer in missing:
            own = itertools.islice(experts, _num_experts(plan, layer))
            sink.write_layer(layer, meter.counted(layer, own))


def _write_calibrated(plan: Plan, calibration: Calibration, meter: _Meter) -> None:
    """The same, each layer rounded for what the layers written before it make of a text."""
    sink = plan.sink

    def on_layer(layer: int, inputs: LayerInputs) -> np.ndarray:
        if layer in sink.missing:
            rounding = LayerCalibration(sink.specs[layer], inputs)
            jobs = range(_num_experts(plan, layer))
            with contextlib.closing(
                in_order(lambda expert: _round(plan, layer, expert, rounding), jobs, plan.threads)
            ) as experts:
                sink.write_layer(layer, meter.counted(layer, experts))
        if layer >= max(sink.missing):
            raise _Done
        output: np.ndarray = MoE(sink.read_layer(layer))(
            inputs.hidden, inputs.topk_ids, inputs.topk_weights
        )
        return output

    with contextlib.suppress(_Done):
        plan.source.layer_inputs(calibration, on_layer)


class _Done(Exception):
    """The last layer is calibrated: the rest of the model need not run."""


def _round(
    plan: Plan, layer: int, expert: int, rounding: LayerCalibration | LayerImportance | None
) -> Pieces:
    """One expert as the sink holds it, to the nearest or calibrated. Raises CheckpointError."""
    sink = plan.sink
    try:
        weights = plan.source.read(layer, expert)
        if rounding is None:
            return sink.encode(layer, weights)
        if isinstance(weights, CodedExpert):
            weights = weights.dequantised()
        rounded = rounding.expert(expert, weights, sink.encoder(layer))
        return sink.encode_rounded(layer, weights, rounded)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{plan.source.path}: layer {layer} expert {expert}: {error}"
        ) from error


class _Meter:
    """Counts the bytes of the input that are done, and tells of it."""

    def __init__(self, plan: Plan, progress: Callable[[Progress], None] | None) -> None:
        self.plan, self.progress = plan, progress
        todo = sum(plan.layer_bytes[layer] for layer in plan.sink.missing)
        done_layers = sum(plan.layer_bytes.values()) - todo
        self.reused_bytes = self.done_bytes = done_layers + plan.sink.reused_others

    def report(self, what: str, more: int) -> None:
        """``more`` bytes are done; what : in work."""
        self.done_bytes += more
        if self.progress is not None:
            total = self.plan.input_bytes
            self.progress(Progress(self.done_bytes, total, self.reused_bytes, what))

    def counted(self, layer: int, experts: Iterator[Pieces]) -> Iterator[Pieces]:
        """A layer's experts, each reported once it is written."""
        count, size = _num_experts(self.plan, layer), self.plan.layer_bytes[layer]
        for expert, pieces in enumerate(experts):
            yield pieces
            self.report(f"layer {layer}", size * (expert + 1) // count - size * expert // count)


def _num_experts(plan: Plan, layer: int) -> int:
    return plan.sink.specs[layer].num_experts


def _summary(plan: Plan, meter: _Meter, seconds: float) -> Summary:
    source, sink = plan.source, plan.sink
    specs = sink.specs.values()
    weights = sum(spec.num_experts * spec.num_weights for spec in specs)
    return Summary(
        output=str(sink.output),
        family=source.family,
        source_dtype=source.source_dtype,
        **sink.coding,
        num_layers=len(specs),
        num_experts=max(spec.num_experts for spec in specs),
        reused_layers=len(specs) - len(sink.missing),
        input_bytes=plan.input_bytes,
        expert_bytes=sink.expert_bytes,
        other_bytes=sink.other_bytes,
        bits_per_weight=sink.expert_bytes * 8 / weights,
        seconds=seconds,
        mb_per_second=(meter.done_bytes - meter.reused_bytes) / 1e6 / max(seconds, 1e-9),
        notes=sink.notes,
    )
