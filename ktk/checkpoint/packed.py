"""Packed directories: one ``ktk-experts-LLLLL.safetensors`` per MoE layer, and config.json that
names them.

Such a file holds one U8 tensor (num_experts, expert_bytes) called ``experts``; its header is padded
with spaces so that the data begins at a multiple of 4096 and any expert can be read with O_DIRECT.
``__metadata__["ktk"]`` is JSON of layout_version, layer and the MoESpec. The bytes of a file depend
on nothing but these and the experts. Files appear under their final names complete or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from ktk.checkpoint.safetensors import SafetensorsFile, read_json_object, strict_json
from ktk.errors import CheckpointError
from ktk.experts.formats import PANELS
from ktk.experts.layout import EXPERT_ALIGN, LAYOUT_VERSION
from ktk.experts.rotation import NO_ROTATION, Rotation
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, order_of
from ktk.machine.cpu import num_physical_cores
from ktk.machine.memory import aligned_buffer
from ktk.paths import user_path

QUANT_METHOD = "ktk"
STATE_FILE = "ktk-convert.json"
# Of a MoESpec, what quantization_config always says; see ``coding_of``.
CODING = ("weight_format", "group_size", "activation_group")
TEMPORARY_PREFIX = ".ktk-tmp-"
TENSOR = "experts"
_OLDEST, _SINCE_FP8 = 2, 3  # layout versions read: of any format, of fp8
_NOT_FINITE: dict[str, np.unsignedinteger[Any]] = {
    "f32": np.uint32(0x7F800000),
    "f16": np.uint16(0x7C00),
    "bf16": np.uint16(0x7F80),
    "e8m0": np.uint8(0xFF),
    "e4m3": np.uint8(0x7F),
}
_LAYER_FILE = re.compile(r"ktk-experts-(\d{5})\.safetensors")


@dataclass(frozen=True)
class PackedConfig:
    """What config.json and the layer files of a packed directory say.

    specs : layer index -> MoESpec. family, source_dtype : what the experts were converted from.
    """

    directory: Path
    specs: dict[int, MoESpec]
    family: str
    source_dtype: str
    layout_version: int
    config: dict[str, Any]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.specs)


def layer_path(directory: str | os.PathLike[str], layer: int) -> Path:
    """Where layer ``layer`` of a packed directory lies."""
    return user_path(directory) / f"ktk-experts-{layer:05d}.safetensors"


def list_layers(directory: str | os.PathLike[str]) -> tuple[int, ...]:
    """The layers whose files are in ``directory``, ascending; their contents are not looked at."""
    found = (_LAYER_FILE.fullmatch(entry) for entry in _listdir(user_path(directory)))
    return tuple(sorted(int(match[1]) for match in found if match))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes ``path`` when the block ends without an exception: fsync, then
    rename.

    Until then it has a temporary name in the same directory; on an exception it is removed.
    """
    temporary = path.with_name(f"{_temporary_stem(path)}.{os.getpid()}")
    try:
        with open(temporary, "w+b", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def leftovers(path: Path) -> list[Path]:
    """Temporary files that ``replacing`` makes of ``path``, of this process and of others."""
    return list(path.parent.glob(_temporary_stem(path) + ".*"))


def _temporary_stem(path: Path) -> str:
    """A hash instead of the name: a long name plus a prefix may be too long."""
    return TEMPORARY_PREFIX + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]


def sync_directory(path: Path) -> None:
    """Make renames in ``path`` survive a power cut, where the OS can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a directory
            os.fsync(fd)
    finally:
        os.close(fd)


def write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """Write every byte; an unbuffered file may take fewer per call."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[file.write(view) :]


def layer_header(spec: MoESpec, layer: int) -> bytes:
    """The first bytes of a layer file, up to its data: a multiple of 4096."""
    said = {"layer": layer, "layout_version": LAYOUT_VERSION, "spec": spec.to_json()}
    shape = [spec.num_experts, spec.layout.expert_bytes]
    header = {
        "__metadata__": {"ktk": _compact(said)},
        TENSOR: {"dtype": "U8", "shape": shape, "data_offsets": [0, shape[0] * shape[1]]},
    }
    text = _compact(header).encode()
    length = -(-(8 + len(text)) // EXPERT_ALIGN) * EXPERT_ALIGN - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def write_layer(
    directory: str | os.PathLike[str], spec: MoESpec, layer: int, spans: Iterable[np.ndarray]
) -> Path:
    """Write one layer's file into ``directory`` and return its path.

    spans : the experts in order, each uint8 (expert_bytes,); one is held at a time. Raises
    ValueError if they are too few, too many or of another size, OSError if the disk is full; no
    file is left then.
    """
    path = layer_path(directory, layer)
    size, count = spec.layout.expert_bytes, 0
    with replacing(path) as file:
        write_all(file, layer_header(spec, layer))
        for span in spans:
            if span.dtype != np.uint8 or span.shape != (size,) or count == spec.num_experts:
                raise ValueError(
                    f"expert {count}: {span.dtype} {span.shape}: must be uint8 ({size},), "
                    f"for experts 0 to {spec.num_experts - 1}"
                )
            write_all(file, np.ascontiguousarray(span).data)
            count += 1
        if count != spec.num_experts:
            raise ValueError(f"{count} experts given for layer {layer}: must be {spec.num_experts}")
    return path


def read_spec(directory: str | os.PathLike[str], layer: int) -> MoESpec:
    """The MoESpec of one layer file; its header is checked, its data not read."""
    file = SafetensorsFile(layer_path(directory, layer))
    try:
        return _spec(file, layer)
    finally:
        file.close()


def read_layer(
    directory: str | os.PathLike[str],
    layer: int,
    num_threads: int | None = None,
    experts: Sequence[int] | None = None,
) -> StoredExperts:
    """Read one layer's experts into huge-page-advised memory.

    num_threads : experts read and checked at a time, default the physical cores, eight at most.
    experts : those to read, the others are then not stored; None: all.
    Raises CheckpointError if the file is missing, malformed, of another layout version, or holds a
    scale or bias that is NaN or infinite.
    """
    file = SafetensorsFile(layer_path(directory, layer))
    try:
        spec = _spec(file, layer)
        size = spec.layout.expert_bytes
        names = range(spec.num_experts) if experts is None else experts
        spans = aligned_buffer(len(names) * size).reshape(len(names), size)

        def read(at: int) -> None:
            expert = names[at]
            file.read_into(TENSOR, spans[at].data, expert * size)
            begin = file.tensors[TENSOR].begin + expert * size
            check_finite(spec, spans[at], f"{file.path}: layer {layer} expert {expert}", begin)

        # Beyond eight readers no disk gets faster.
        with ThreadPoolExecutor(num_threads or min(num_physical_cores(), 8)) as pool:
            list(pool.map(read, range(len(names))))
    finally:
        file.close()
    order = None if experts is None else order_of(spec.num_experts, experts)
    return StoredExperts.of_panels(spec, spans, order)


def read_config(directory: str | os.PathLike[str]) -> PackedConfig:
    """What a packed directory holds; every layer file's header is checked.

    Raises CheckpointError.
    """
    directory = user_path(directory)
    names = _listdir(directory)
    path = directory / "config.json"
    if "config.json" not in names:
        if STATE_FILE in names:
            raise CheckpointError(
                f"{directory}: its conversion did not finish; run ktk convert again with --resume"
            )
        raise CheckpointError(f"{path}: missing; give a directory that ktk convert wrote")
    config = read_json_object(path)
    said = config.get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{path}: quantization_config.quant_method is not {QUANT_METHOD!r}: not a packed "
            "directory; run ktk convert on it first"
        )
    _check_version(said.get("layout_version"), path)
    layers = said.get("layers")
    if not isinstance(layers, list) or not layers or not all(_is_index(i) for i in layers):
        raise CheckpointError(
            f"{path}: quantization_config.layers must list layer indices of 0 to 99999"
        )
    specs = {layer: read_spec(directory, layer) for layer in sorted(set(layers))}
    _check_codings(directory, specs, said)
    return PackedConfig(
        directory=directory,
        specs=specs,
        family=str(said.get("family", "")),
        source_dtype=str(said.get("source_dtype", "")),
        layout_version=LAYOUT_VERSION,
        config=config,
    )


def coding_of(*specs: MoESpec) -> dict[str, Any]:
    """What quantization_config says of how layers are coded: None where they differ; a rotation of
    none is not said.
    """
    found = {name: {getattr(spec, name) for spec in specs} for name in CODING}
    coding = {name: values.pop() if len(values) == 1 else None for name, values in found.items()}
    turns = {spec.turns for spec in specs}
    if turns == {NO_ROTATION}:
        return coding
    return {**coding, "rotation": list(*turns) if len(turns) == 1 else None}


def _check_codings(directory: Path, specs: dict[int, MoESpec], said: dict[str, Any]) -> None:
    """CheckpointError unless each layer is coded as quantization_config says, null: as it likes.

    Where that has no rotation, all layers have the first one's: converters of before wrote none.
    """
    path = directory / "config.json"
    stated = {name: said[name] for name in CODING if said.get(name) is not None}
    if "rotation" not in said:
        stated["rotation"] = next(iter(specs.values())).turns
    elif said["rotation"] is not None:
        try:
            stated["rotation"] = Rotation.of(said["rotation"])
        except ValueError as error:
            raise CheckpointError(f"{path}: quantization_config: {error}") from None
    for name, wanted in stated.items():
        for layer, spec in specs.items():
            if wanted != (found := getattr(spec, name)):
                raise CheckpointError(
                    f"{layer_path(directory, layer)}: {name}={_shown(found)}, {path} says "
                    f"{_shown(wanted)}; the directory mixes two conversions: convert again"
                )


def _shown(value: object) -> str:
    return repr(list(value) if isinstance(value, Rotation) else value)


def _spec(file: SafetensorsFile, layer: int) -> MoESpec:
    """The spec a layer file declares, checked against its one tensor."""
    path = file.path
    if "ktk" not in file.metadata or set(file.tensors) != {TENSOR}:
        raise CheckpointError(
            f"{path}: must hold one tensor {TENSOR!r} and ktk metadata; not a layer file"
        )
    try:
        said = strict_json(file.metadata["ktk"].encode("utf-8", "surrogatepass"))
        if not isinstance(said, dict) or not isinstance(said.get("spec"), dict):
            raise ValueError("must be an object with layout_version, layer and spec")
    except ValueError as error:
        raise CheckpointError(f"{path}: ktk metadata: {error}") from None
    _check_version(said.get("layout_version"), path)
    if said.get("layer") != layer:
        raise CheckpointError(
            f"{path}: holds layer {said.get('layer')!r}: must be {layer}; was it renamed?"
        )
    fields = said["spec"]
    for key, kind in (
        ("group_size", int),
        ("activation_group", int),
        ("has_gate", bool),
        ("has_bias", bool),
    ):
        if key in fields and type(fields[key]) is not kind:
            raise CheckpointError(
                f"{path}: ktk metadata: {key}={fields[key]!r}: must be {kind.__name__}"
            )
    try:
        spec = MoESpec.from_json(fields)
        if not spec.is_packed:
            raise ValueError(
                f"weight_format={spec.weight_format!r}: must be one of {', '.join(PANELS)}"
            )
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: ktk metadata: {error}") from None
    if said["layout_version"] < _SINCE_FP8 and spec.format.codes.dtype in ("e4m3", "e5m2"):
        _refuse_version(said["layout_version"], path)
    info, wanted = file.tensors[TENSOR], (spec.num_experts, spec.layout.expert_bytes)
    if info.dtype != "U8" or info.shape != wanted:
        raise CheckpointError(
            f"{path}: tensor {TENSOR!r} (bytes {info.begin} to {info.end}) is {info.dtype} "
            f"{info.shape}: its spec needs U8 {wanted}"
        )
    return spec


def _check_version(version: object, path: Path) -> None:
    if type(version) is not int or not _OLDEST <= version <= LAYOUT_VERSION:
        _refuse_version(version, path)


def _refuse_version(version: object, path: Path) -> NoReturn:
    raise CheckpointError(
        f"{path}: layout version {version!r}: this ktk reads {LAYOUT_VERSION}, and "
        f"{_OLDEST} but for fp8; convert the checkpoint again"
    )


def check_finite(spec: MoESpec, span: np.ndarray, what: str, begin: int) -> None:
    """CheckpointError if a scale or bias of an expert's bytes is NaN or infinite.

    span : uint8 (expert_bytes,). what : names the expert. begin : where it is in its file.
    """
    fault = _not_finite(spec, span)
    if fault:
        raise CheckpointError(
            f"{what}: {fault} NaN or infinite (tensor {TENSOR!r}, bytes {begin} to "
            f"{begin + len(span)}); convert this layer again"
        )


def open_layer(directory: str | os.PathLike[str], layer: int) -> tuple[SafetensorsFile, MoESpec]:
    """A layer's open file, to read experts from later, and what its checked header declares.

    Its one tensor ``TENSOR`` has the experts one behind the other. Raises CheckpointError.
    """
    file = SafetensorsFile(layer_path(directory, layer))
    try:
        return file, _spec(file, layer)
    except BaseException:
        file.close()
        raise


def _not_finite(spec: MoESpec, span: np.ndarray) -> str | None:
    """Which scales or biases of one expert are not finite, or None."""
    layout = spec.layout
    for name in layout.projections:
        matrix = layout.matrix(name)
        if matrix.scale_bytes:
            panels = layout.panels(span, name)
            # Exponent bits all set mean NaN or infinity, of e4m3 all bits but the sign.
            bits = _NOT_FINITE[matrix.scale_dtype]
            if ((matrix.scales(panels).view(bits.dtype) & bits) == bits).any():
                return f"{name} projection: a scale is"
            is_tensors = matrix.format.has_tensor_scale
            if is_tensors and not np.isfinite(matrix.tensor_scales(panels)).all():
                return f"{name} projection: a scale is"
        bias = layout.bias(span, name)
        if bias is not None and not np.isfinite(bias.view(np.float32)).all():
            return f"{name} bias: a value is"
    return None


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value <= 99999


def _listdir(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror}") from None


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
