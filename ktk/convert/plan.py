"""What will be written from what: every refusal, before anything is written."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktk.checkpoint import is_gguf
from ktk.convert.importance import ImportanceFile, layer_importance
from ktk.convert.recipe import Coding, Recipe, experts_name, one_coding, projections_of
from ktk.convert.sinks.base import Sink
from ktk.convert.sinks.gguf import GgufSink
from ktk.convert.sinks.gguf_whole import WholeGgufSink
from ktk.convert.sinks.packed import PackedSink
from ktk.convert.sources import Calibration, HuggingFaceSource, Source
from ktk.experts.formats import BLOCKS, GGUF, PANELS, written_types
from ktk.experts.rotation import Rotation
from ktk.experts.spec import MoESpec
from ktk.machine.cpu import num_physical_cores
from ktk.models import SOURCE_DTYPES
from ktk.models.experts import own_group
from ktk.quantise.importance import LayerImportance

QUANT_METHODS = tuple(name for name in PANELS if name != "fp32")
GGUF_METHODS = tuple(row.name.lower() for row in written_types())
WHOLE_TYPES = tuple(row.name.lower() for row in written_types() if row.search or row.block == 1)


@dataclass(frozen=True)
class Request:
    """What ``convert`` was asked for; ValueError / FileExistsError for what cannot be done."""

    input_path: Path
    output: Path
    quant_method: str | None
    input_type: str | None = None
    group_size: int | None = None
    activation_group: int | None = None
    rotation: Rotation | int | None = None
    threads: int | None = None
    resume: bool = False
    whole: str | None = None
    calibration: Calibration | None = None
    recipe: Recipe | None = None
    importance: ImportanceFile | None = None

    @property
    def writes_gguf(self) -> bool:
        return self.output.name.lower().endswith(".gguf")

    def __post_init__(self) -> None:
        self._check_method()
        if self.input_type is not None and self.input_type not in SOURCE_DTYPES:
            raise ValueError(
                f"input_type={self.input_type!r}: must be one of {', '.join(SOURCE_DTYPES)}, "
                "or left out"
            )
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ValueError(f"threads={self.threads!r}: must be a positive int")
        rows = BLOCKS if self.writes_gguf else PANELS
        name = self.quant_method or ""
        row = rows.get(name.upper() if self.writes_gguf else name)
        is_exact = row is not None and not row.is_integer and self.recipe is None
        if self.importance is not None and (is_exact or self.calibration is not None):
            other = "a calibration text says more" if self.calibration is not None else None
            raise ValueError(
                f"imatrix: {other or f'{self.quant_method} rounds nothing away'}; leave it out"
            )
        if self.calibration is not None and (is_exact or is_gguf(self.input_path)):
            exact = f"{self.quant_method} rounds nothing away"
            raise ValueError(
                f"calibration: {exact if is_exact else f'{self.input_path} is GGUF'}; it needs a "
                "Hugging Face directory, and nl4, int4, int8 or a GGUF type of blocks; otherwise "
                "leave it out, or take an imatrix"
            )
        if self.writes_gguf:
            self._check_gguf()

    def _check_method(self) -> None:
        """The method is known and the output is named for it."""
        method, output, whole = self.quant_method, self.output, self.whole
        if method is not None and method not in (*QUANT_METHODS, *GGUF_METHODS):
            raise ValueError(
                f"quant_method={method!r}: must be one of {', '.join(QUANT_METHODS)}, "
                f"or for a GGUF file {', '.join(GGUF_METHODS)}"
            )
        if whole is not None and whole not in WHOLE_TYPES:
            raise ValueError(f"whole={whole!r}: must be one of {', '.join(WHOLE_TYPES)}")
        named = [] if method is None else [(method, "")]
        if self.recipe is not None:
            where = f" ({self.recipe.path})"
            named += [(coding.format.name.lower(), where) for _, coding in self.recipe.rules]
        for method, where in named:
            if self.writes_gguf and method not in GGUF_METHODS:
                raise ValueError(
                    f"output {output}: {method}{where} writes a directory; give one, "
                    f"or one of {', '.join(GGUF_METHODS)}"
                )
            if not self.writes_gguf and method not in QUANT_METHODS:
                raise ValueError(
                    f"output {output}: {method}{where} writes a GGUF file; "
                    "give a name that ends in .gguf"
                )
        if whole is not None and not self.writes_gguf:
            raise ValueError(
                f"whole={whole!r}: output {output} is a directory, which holds whole models "
                "anyway; leave it out"
            )

    def coding(self, layer: int, projection: str, kept: tuple[str, int] | None = None) -> Coding:
        """Of a layer's gate, up or down: the recipe's, else quant_method's.

        kept : ``Source.panel_format``, whose group counts where nobody names one. ValueError if
        nobody names a format.
        """
        name = experts_name(layer, projection)
        found = None if self.recipe is None else self.recipe.coding(name)
        if found is None:
            if self.quant_method is None:
                assert self.recipe is not None
                raise ValueError(
                    f"{self.recipe.path}: no pattern is in {name}: add one, or give a quant_method "
                    "for the rest"
                )
            rows = BLOCKS if self.writes_gguf else PANELS
            key = self.quant_method.upper() if self.writes_gguf else self.quant_method
            found = Coding(rows[key], self.group_size)
        if found.group_size is None:
            return Coding(found.format, own_group(found.format.name, kept))
        return found

    def _check_gguf(self) -> None:
        """What a GGUF file as output does not take."""
        own = "has groups of its own"
        for name, why in (
            ("group_size", own),
            ("activation_group", own),
            ("rotation", "is not rotated"),
        ):
            value = getattr(self, name)
            if value is not None:
                raise ValueError(f"{name}={value!r}: {self.quant_method} {why}, leave it out")
        if self.resume:
            raise ValueError("resume: a GGUF file is written in one go; run again without --resume")
        if self.output.exists() or self.output.is_symlink():
            raise FileExistsError(f"{self.output}: exists; give another output, or remove it")


@dataclass(frozen=True)
class Plan:
    """A conversion that can begin.

    importance : by layer, of an importance matrix; else empty. layer_bytes : bytes of the source by
    layer. fingerprint : the source's as it was planned.
    """

    source: Source
    sink: Sink
    calibration: Calibration | None
    importance: dict[int, LayerImportance]
    threads: int
    layer_bytes: dict[int, int]
    fingerprint: list[dict[str, Any]]

    @property
    def input_bytes(self) -> int:
        """Everything that is read."""
        return sum(self.layer_bytes.values()) + self.sink.other_input_bytes

    def check_room(self) -> None:
        """OSError unless what is missing of the sink, which is open, fits on its disk."""
        needed, free = self.sink.missing_bytes, shutil.disk_usage(self.sink.folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free",
            )

    @contextlib.contextmanager
    def naming_full_disk(self) -> Iterator[None]:
        """An OSError of a full disk, wherever it came up, says which output and what to do."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            again = "run again with --resume" if self.sink.can_resume else "run again"
            raise OSError(
                error.errno,
                f"{self.sink.output}: the disk is full ({error.strerror}); make room and {again}",
            ) from error


def make_plan(request: Request, source: Source) -> Plan:
    """The plan of a request for a source that is open.

    Raises CheckpointError, ValueError, FileExistsError for what cannot be converted so.
    """
    if request.recipe is not None and request.whole is None:
        request.recipe.check_used(_experts_names(source))
    calibration = request.calibration
    said = calibration or request.importance
    provenance = None if said is None else said.provenance()
    fingerprint = source.fingerprint()
    sink: Sink
    if request.writes_gguf:
        sink = _gguf_sink(request, source, provenance)
    else:
        specs = {layer: _packed_spec(request, source, layer) for layer in source.layers}
        recipe = None if request.recipe is None else str(request.recipe)
        sink = PackedSink(source, request.output, specs, fingerprint, provenance, recipe)
    importance = {}
    if request.importance is not None:
        path, imatrix = request.importance.path, request.importance.read()
        importance = {
            layer: layer_importance(imatrix, path, layer, spec)
            for layer, spec in sink.specs.items()
        }
    return Plan(
        source,
        sink,
        calibration,
        importance,
        request.threads or num_physical_cores(),
        {layer: source.layer_bytes(layer) for layer in source.layers},
        fingerprint,
    )


def _experts_names(source: Source) -> Iterator[str]:
    for layer in source.layers:
        has_gate = source.spec_fields(layer).get("has_gate", True)
        yield from (experts_name(layer, name) for name in projections_of(has_gate))


def _packed_spec(request: Request, source: Source, layer: int) -> MoESpec:
    """Of one layer; ValueError where a recipe gives its matrices several formats."""
    fields = source.spec_fields(layer)
    projections = projections_of(fields.get("has_gate", True))
    coding = one_coding(
        layer, {name: request.coding(layer, name, source.panel_format) for name in projections}
    )
    return MoESpec(
        **fields,
        weight_format=coding.format.name,
        group_size=coding.group_size,
        activation_group=request.activation_group,
        rotation=request.rotation,
    )


def _gguf_sink(request: Request, source: Source, provenance: dict[str, Any] | None) -> Sink:
    if not isinstance(source, HuggingFaceSource):
        raise ValueError(
            f"input {source.path}: GGUF to GGUF adds one error to another; "
            "convert the original weights"
        )
    specs = {
        layer: MoESpec(**source.spec_fields(layer), weight_format=GGUF.name)
        for layer in source.layers
    }

    def type_of(layer: int, projection: str) -> str:
        return request.coding(layer, projection).format.name

    if request.whole is None:
        return GgufSink(source, request.output, specs, type_of, provenance)
    return WholeGgufSink(
        source, request.output, specs, type_of, provenance, request.whole.upper(), request.recipe
    )
