"""How far a model with quantised experts is from itself unquantised: perplexity, KL divergence,
top-1 agreement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from ktk import backends
from ktk.experts.dequantise import dequantise
from ktk.experts.formats import BLOCKS, GGUF, PANELS, activation_group_of
from ktk.experts.formats.floats import to_f32
from ktk.experts.layout import round_up
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights, StoredExperts, StoredMatrix
from ktk.integration.transformers import names as hf
from ktk.integration.transformers.calibration import run_layers
from ktk.integration.transformers.experts import (
    ExpertsHandle,
    drop_weights,
    find_experts,
    handle_of,
    hang,
    select_ktk,
)
from ktk.integration.transformers.loading import PackedModule, load_model, packed_modules
from ktk.integration.transformers.multimodal import auto_class
from ktk.integration.transformers.packing import float_expert, module_spec
from ktk.integration.transformers.sources import layer_of
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.ops.moe import MoE
from ktk.paths import user_path
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
from ktk.quantise.pack import pack_expert

F = np.float32
OWN_TYPES = tuple(row.name for row in BLOCKS.values() if row.grid is not None)
_ROWS = 64  # positions whose float64 distributions are in memory at once


@torch.no_grad()
def window_logits(model: Any, window: list[int]) -> torch.Tensor:
    """float32 (tokens, vocabulary)."""
    logits: torch.Tensor = model(torch.tensor([window]), use_cache=False).logits[0]
    return logits.float()


@dataclass(frozen=True)
class Distance:
    """Of a model's next-token distributions from the reference's.

    kl, kl_p99 : Kullback-Leibler divergence per token in nats, the mean and the 99th percentile.
    top1 : share of tokens, 0..1, where both have the same likeliest one. perplexity : of the text;
        NaN where windows have one token only.
    """

    kl: float
    kl_p99: float
    top1: float
    perplexity: float
    num_tokens: int


def distance(model: Any, windows: list[list[int]], reference: Sequence[torch.Tensor]) -> Distance:
    """Compare with the reference's logits, float32 (tokens, vocabulary) for each window."""
    divergences: list[torch.Tensor] = []
    same, loss, predicted = 0, 0.0, 0
    for window, logits in zip(windows, reference, strict=True):
        got = window_logits(model, window)
        after = torch.tensor(window[1:])
        for start in range(0, len(window), _ROWS):
            rows = slice(start, start + _ROWS)
            p = torch.log_softmax(logits[rows].double(), dim=-1)  # (rows, vocabulary)
            q = torch.log_softmax(got[rows].double(), dim=-1)
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            targets = after[rows]
            loss -= float(q[: len(targets)].gather(1, targets[:, None]).sum())
            predicted += len(targets)
            q.sub_(p).mul_(p.exp())
            divergences.append(-q.sum(-1))
    kl = torch.cat(divergences)
    return Distance(
        kl=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1=same / len(kl),
        perplexity=math.exp(loss / predicted) if predicted else math.nan,
        num_tokens=len(kl),
    )


class StoredLogits(Sequence[torch.Tensor]):
    """The reference's logits in a temporary file, deleted by ``close``:
    memory holds one window at a time.
    """

    def __init__(self, model: Any, windows: list[list[int]]) -> None:
        self._lengths = [len(window) for window in windows]
        self._folder = tempfile.TemporaryDirectory(prefix="ktk-eval-")
        self._path = Path(self._folder.name) / "logits"
        with open(self._path, "wb") as file:
            for window in windows:
                logits = window_logits(model, window)
                self.vocabulary = logits.shape[1]
                logits.numpy().tofile(file)

    def close(self) -> None:
        self._folder.cleanup()

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        rows = self._lengths[index]  # IndexError ends an iteration
        offset = 4 * self.vocabulary * sum(self._lengths[:index])
        values = np.fromfile(self._path, F, rows * self.vocabulary, offset=offset)
        return torch.from_numpy(values.reshape(rows, self.vocabulary))


@dataclass(frozen=True)
class Variant:
    """One way to code the experts.

    format : a name of PANELS or of a GGUF type. group_size : of packed formats, None: the default.
    by : "ktk", "ggml" (llama.cpp's quantiser, GGUF types only), or a path, of a converted directory
        or a GGUF file.
    is_calibrated : with error feedback (ktk) or an importance matrix (ggml), from a calibration
        text.
    """

    format: str
    group_size: int | None = None
    by: str = "ktk"
    is_calibrated: bool = False

    @property
    def label(self) -> str:
        if self.by not in ("ktk", "ggml"):
            return self.by
        group = (
            ""
            if self.group_size is None
            else f" g{self.group_size}"
            if self.group_size
            else " channel"
        )
        who = {"ktk": "", "ggml": ", llama.cpp"}[self.by]
        how = {"ktk": ", calibrated", "ggml": ", imatrix"}[self.by] if self.is_calibrated else ""
        return f"{self.format}{group}{who}{how}"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``int4:64``, ``int8``, ``Q4_K``, ``Q4_K:ggml``, or the path of a converted directory or
        GGUF file.

        Raises ValueError that lists what there is.
        """
        if text.startswith("~"):
            text = str(user_path(text))
        if Path(text).exists():
            return cls(text, by=text)
        method = backends.parse_method(text)
        fmt = method.format
        if fmt is None or method.is_repacked:
            raise ValueError(f"format {text!r}: must name a format, or be a path")
        if fmt.is_packed:
            group = method.group_size
            if group is None and fmt.is_integer:
                group = fmt.default_group
            return cls(fmt.name, group)
        if method.by == "ktk" and fmt.grid is None:
            raise ValueError(
                f"format {text!r}: ktk quantises to {', '.join(OWN_TYPES)}; llama.cpp to the "
                f"rest, as {fmt.name}:ggml"
            )
        return cls(fmt.name, by=method.by)

    def calibrated(self) -> Variant | None:
        """The same calibrated, if it can be."""
        is_packed = self.format in PANELS
        if self.by == "ktk" and (not is_packed or PANELS[self.format].is_integer):
            return dataclasses.replace(self, is_calibrated=True)
        is_rounded = self.by == "ggml" and self.format not in ("F32", "F16", "BF16")
        return dataclasses.replace(self, is_calibrated=True) if is_rounded else None


def all_variants(has_ggml: bool) -> list[Variant]:
    """Every packed integer format and group, every GGUF type ktk writes,
    and with llama.cpp's library every type it writes.
    """
    packed = [Variant(f.name, g) for f in PANELS.values() if f.is_integer for g in f.group_sizes]
    own = [Variant(name) for name in OWN_TYPES]
    floats = ("F32", "F16", "BF16")
    theirs = [Variant(name, by="ggml") for name in BLOCKS if name not in floats]
    return packed + own + (theirs if has_ggml else [])


@dataclass(frozen=True)
class Row:
    """A variant's figures.

    bits_per_weight : of the format, padding not counted. activation_group : 0: activations stay
        float.
    """

    label: str
    kernel: str
    bits_per_weight: float
    activation_group: int
    distance: Distance
    seconds: float

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {**{k: v for k, v in fields.items() if k != "distance"}, **fields["distance"]}


class _PaddedMoE:
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
        self, variant: Variant, ggml: GgmlLibrary | None, method: str, activation_group: int | None
    ) -> None:
        self.variant, self._ggml, self._method, self._activation_group = (
            variant,
            ggml,
            method,
            activation_group,
        )
        if variant.by == "ggml" and ggml is None:
            raise ValueError(f"{variant.label}: llama.cpp's quantisers need --ggml FOLDER")
        self.is_packed = variant.format in PANELS
        self._block = 1 if self.is_packed else BLOCKS[variant.format].block

    def spec(self, module: Any) -> tuple[MoESpec, MoESpec]:
        """The module's own spec, and the one its experts are coded with: padded to whole blocks."""
        v = self.variant
        if self.is_packed:
            spec, activation = module_spec(module, v.format, v.group_size, self._activation_group)
        else:
            spec, activation = module_spec(module, None, None, None)
            fmt = BLOCKS[v.format]
            group = activation_group_of(fmt.bits_per_weight)
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
        sizes = (round_up(size, self._block) for size in (spec.hidden_size, spec.intermediate_size))
        hidden, intermediate = sizes
        return spec, dataclasses.replace(spec, hidden_size=hidden, intermediate_size=intermediate)

    def encode(self, name: str, w: np.ndarray, factor: Factor) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of a GGUF type and their values; as ``ktk.quantise.feedback.Encode``."""
        if self.variant.by == "ktk":
            return calibrated(w, BLOCKS[self.variant.format], factor)
        assert self._ggml is not None
        # the diagonal of (I + U) D (I + U)^T: the mean squares an importance matrix holds
        importance = factor.weight + np.square(factor.upper) @ factor.weight
        blocks = self._ggml.quantise(self.variant.format, to_f32(w), importance)
        return blocks, dequantise(
            StoredMatrix.of_rows(self.variant.format, w.shape[1], blocks[None]), 0
        )

    def moe(self, module: Any, inputs: LayerInputs | None) -> Any:
        """The layer's experts, ready to run.

        inputs : those of the calibration text, if the variant is calibrated.
        """
        own, spec = self.spec(module)
        calibration = None
        if inputs is not None:
            more = spec.hidden_size - own.hidden_size
            hidden = np.pad(inputs.hidden, ((0, 0), (0, more)))
            calibration = LayerCalibration(spec, dataclasses.replace(inputs, hidden=hidden))
        with ThreadPoolExecutor(cpu.default_threads()) as pool:
            made = list(
                pool.map(
                    lambda e: self._expert(module, e, spec, calibration), range(spec.num_experts)
                )
            )
        moe = MoE(
            self._assemble(spec, made), method=self._method if self.is_packed else "LLAMAFILE"
        )
        return moe if spec == own else _PaddedMoE(moe, own.hidden_size)

    def _expert(
        self, module: Any, expert: int, spec: MoESpec, calibration: LayerCalibration | None
    ) -> tuple[ExpertWeights, dict[str, np.ndarray]]:
        weights = _padded(float_expert(module, expert), spec)
        v = self.variant
        if calibration is not None:
            encode: Encode = packed_encoder(spec) if self.is_packed else self.encode
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
        return weights, {n: rows_alike(w, v.format) for n, w in named.items()}

    def _assemble(
        self, spec: MoESpec, made: list[tuple[ExpertWeights, dict[str, np.ndarray]]]
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
                self.variant.format, in_features, np.stack([stored[name] for _, stored in made])
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
        made[layer] = quantiser.moe(modules[layer], inputs)
        out = made[layer].forward(*(torch.from_numpy(x) for x in dataclasses.astuple(inputs)))
        return np.asarray(out)

    if calibration_ids is None:
        made.update({layer: quantiser.moe(module, None) for layer, module in modules.items()})
    else:
        run_layers(model, calibration_ids, on_layer)
    for layer, module in modules.items():
        activation = quantiser.spec(module)[0].activation
        hang(module, ExpertsHandle(made[layer], activation, None))
        drop_weights(module)
    select_ktk(model, modules.values())


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
    source: Path,
    windows: list[list[int]],
    variants: Sequence[Variant],
    *,
    ggml: GgmlLibrary | None = None,
    calibration_ids: torch.Tensor | None = None,
    method: str = "auto",
    activation_group: int | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """The reference's row, then one for each variant as it is done;
    everything but the experts in float32.
    """
    from transformers import AutoConfig

    source = user_path(source)
    step("reference")
    model = load_float(source)
    started = perf_counter()
    with contextlib.closing(StoredLogits(model, windows)) as reference:
        bits = 8 * AutoConfig.from_pretrained(source).dtype.itemsize
        with_itself = distance(model, windows, reference)
        yield Row(
            "float",
            f"torch {hf.experts_implementation(model.config)}",
            bits,
            0,
            with_itself,
            perf_counter() - started,
        )
        del model
        for variant in variants:
            step(variant.label)
            started = perf_counter()
            if variant.by in ("ktk", "ggml"):
                model = load_float(source)
                quantiser = Quantiser(variant, ggml, method, activation_group)
                ids = calibration_ids if variant.is_calibrated else None
                if variant.is_calibrated and ids is None:
                    raise ValueError(f"{variant.label}: needs a calibration text")
                quantise_model(model, quantiser, ids)
            elif Path(variant.by).is_dir() and (Path(variant.by) / "config.json").is_file():
                model = load_model(variant.by, method=method, dtype=torch.float32)
            else:
                model = load_model(source, gguf=variant.by, dtype=torch.float32)
            seconds = perf_counter() - started
            yield _row(model, variant.label, distance(model, windows, reference), seconds)
            del model


def _row(model: Any, label: str, found: Distance, seconds: float) -> Row:
    modules: list[PackedModule] = packed_modules(model)
    weights = sum(8 * m.bytes / m.bits_per_weight for m in modules)
    bits = sum(8 * m.bytes for m in modules) / weights
    first = next(handle.moe.spec for _, m in find_experts(model) if (handle := handle_of(m)))
    kernels = " + ".join(sorted({m.kernel for m in modules}))
    return Row(label, kernels, bits, first.activation_group or 0, found, seconds)
