"""``ktk eval``: every variant of a model beside the float model, on windows of text."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ktk.convert.importance import ImportanceFile
from ktk.evaluate.distance import Distance, StoredLogits, distance
from ktk.evaluate.quantiser import PaddedMoE, Quantiser, quantise_model
from ktk.evaluate.variants import Variant
from ktk.experts.formats import PANELS
from ktk.experts.spec import MoESpec
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.experts import (
    find_experts,
    handle_of,
)
from ktk.integration.transformers.loading import (
    PackedModule,
    load_model,
    packed_modules,
    use_ktk,
)
from ktk.integration.transformers.multimodal import auto_class
from ktk.machine import cpu
from ktk.paths import user_path
from ktk.quantise.ggml_library import GgmlLibrary
from ktk.train.attach import attach_adapter


@dataclass(frozen=True)
class Row:
    """A variant's figures.

    bits_per_weight : of the format, padding not counted. activation_group : 0: activations stay
        float. rotation : its width; 0: none.
    """

    label: str
    kernel: str
    bits_per_weight: float
    activation_group: int
    distance: Distance
    seconds: float
    rotation: int = 0

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {**{k: v for k, v in fields.items() if k != "distance"}, **fields["distance"]}


def load_float(source: Path) -> Any:
    """The unquantised model in float32. Raises ValueError if it is quantised."""
    from transformers import AutoConfig

    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: must be a Hugging Face directory with a config.json")
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{source}: is quantised; the reference must be the float model it was made of"
        )
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    available = cpu.memory()[1]
    if available and 2 * size > available:
        raise ValueError(
            f"{source}: the float32 reference needs about {2 * size / 1e9:.1f} GB, "
            f"{available / 1e9:.1f} GB are free"
        )
    return auto_class(config).from_pretrained(source, dtype=torch.float32).eval()


def evaluate(
    source: Path, windows: list[list[int]], variants: Sequence[Variant], **more: Any
) -> Iterator[Row]:
    """The reference's row, then one for each variant as it is done, on one text:
    see ``evaluate_texts``.
    """
    for (row,) in evaluate_texts(source, [windows], variants, **more):
        yield row


def evaluate_texts(
    source: Path,
    texts: Sequence[list[list[int]]],
    variants: Sequence[Variant],
    *,
    ggml: GgmlLibrary | None = None,
    calibration_ids: torch.Tensor | None = None,
    importance: ImportanceFile | None = None,
    method: str = "auto",
    activation_group: int | None = None,
    rotation: int | None = None,
    adapter: Path | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Row]]:
    """The reference's rows, one for each text's windows, then those of each variant as it is done;
    everything but the experts in float32.

    importance : what llama.cpp's variants that are calibrated are rounded by, instead of
    calibration_ids. activation_group, rotation : as in MoESpec, of the packed formats among them.
    adapter : a directory that ``ktk train`` wrote, beside the weights of all of them, the
    reference's too. Raises ValueError before any work for what one of these has not.
    """
    from transformers import AutoConfig

    for v in variants:
        if v.by == "ktk" and v.format in PANELS:
            MoESpec(1, 1, 1, v.format, v.group_size, activation_group, rotation=rotation)
    source = user_path(source)
    step("reference")
    model = load_float(source)
    if adapter is not None:
        use_ktk(model, "fp32")  # exact: adapters run beside packed experts
        _attach(model, adapter)
    with contextlib.ExitStack() as stack:
        references = [StoredLogits(model, windows) for windows in texts]
        for logits in references:
            stack.callback(logits.close)
        bits = 8 * AutoConfig.from_pretrained(source).dtype.itemsize
        kernel = f"torch {hf.experts_implementation(model.config)}"
        rows = []
        for windows, logits in zip(texts, references, strict=True):
            started = perf_counter()
            with_itself = distance(model, windows, logits)
            rows.append(Row("float", kernel, bits, 0, with_itself, perf_counter() - started))
        yield rows
        del model
        for variant in variants:
            step(variant.label)
            started = perf_counter()
            if variant.by in ("ktk", "ggml"):
                model = load_float(source)
                by_file = importance if variant.by == "ggml" and variant.is_calibrated else None
                quantiser = Quantiser(variant, ggml, method, activation_group, rotation, by_file)
                ids = calibration_ids if variant.is_calibrated and by_file is None else None
                if variant.is_calibrated and ids is None and by_file is None:
                    raise ValueError(f"{variant.label}: needs a calibration text")
                quantise_model(model, quantiser, ids)
            elif Path(variant.by).is_dir() and (Path(variant.by) / "config.json").is_file():
                model = load_model(variant.by, method=method, dtype=torch.float32)
            else:
                model = load_model(source, gguf=variant.by, dtype=torch.float32)
            if adapter is not None:
                _attach(model, adapter)
            seconds = perf_counter() - started
            yield [
                _row(model, variant.label, distance(model, windows, logits), seconds)
                for windows, logits in zip(texts, references, strict=True)
            ]
            del model


def _attach(model: Any, adapter: Path) -> None:
    """Raises as ``attach_adapter``, ValueError for experts whose rows were filled up."""
    for name, module in find_experts(model):
        handle = handle_of(module)
        if handle is not None and isinstance(handle.moe, PaddedMoE):
            raise ValueError(
                f"{name}: this format fills rows up to whole blocks, which takes no adapter: leave "
                "it out"
            )
    attach_adapter(model, adapter)


def _row(model: Any, label: str, found: Distance, seconds: float) -> Row:
    modules: list[PackedModule] = packed_modules(model)
    weights = sum(8 * m.bytes / m.bits_per_weight for m in modules)
    bits = sum(8 * m.bytes for m in modules) / weights
    first = next(handle.moe.spec for _, m in find_experts(model) if (handle := handle_of(m)))
    kernels = " + ".join(sorted({m.kernel for m in modules}))
    group, width = first.activation_group or 0, first.turns.width
    return Row(label, kernels, bits, group, found, seconds, width)
