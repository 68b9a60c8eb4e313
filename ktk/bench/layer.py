"""Layers to measure: ktk's methods, of packed weights and of GGUF blocks, and torch's bf16 loop
over experts as the baseline everyone has.

The experts of a layer are one or two over and over, each time in memory of their own: packing them
is quick, and reading them costs what it costs in a model.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from ktk import backends
from ktk.backends.native import kernel_isa
from ktk.bench.blocks import (
    error_bound,
    has_quantiser,
    in_turns,
    quantised,
    random_blocks,
    row_bytes,
)
from ktk.bench.roofline import peak_of, peak_of_blocks, peaks
from ktk.bench.shapes import Routing, Shape
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats import GGUF
from ktk.experts.formats.parse import USAGE, Method
from ktk.experts.spec import MoESpec
from ktk.experts.stored import ExpertWeights, StoredExperts, StoredMatrix
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer
from ktk.ops.moe import MoE
from ktk.placement.blocks import repack
from ktk.quantise.pack import pack_experts
from ktk.reference.moe import ExactExperts, oracle_forward

TORCH = "torch"
BLOCKS = "LLAMAFILE"  # the backend over GGUF blocks
# Calls of one method in one round: as many as fit CALL_SECONDS, but MIN_CALLS to MAX_CALLS.
CALL_SECONDS = 0.1
MIN_CALLS, MAX_CALLS = 2, 20
# A call longer than this needs no other before it to be warm, and stands for a round alone.
WARM_UP_BELOW = 0.25
CHECKED_TOKENS = 2
SMALL_PAGE = 4096  # bytes
# torch rounds to bf16 (2**-9) at four places of a layer.
TORCH_TOLERANCE = 0.02
# The mean error of GGUF blocks over a few tokens alone, relative to error_bound: 1.1 measured.
FEW_TOKENS_ERROR = 1.5


def parse_method(text: str) -> Method:
    """What ``ktk.backends.parse_method`` reads, if it says what runs; or ``torch``.

    ValueError says what is allowed.
    """
    if text.lower() == TORCH:
        return Method(TORCH, TORCH)
    method = backends.parse_method(text)
    if method.format is None or method.by != "ktk":
        raise ValueError(
            f"method {text!r}: {USAGE}, or torch; e.g. INT4:128, AVX2:INT4:128 or {BLOCKS}:Q4_K"
        )
    return method


def random_expert(shape: Shape, seed: int = 0) -> ExpertWeights:
    """Normal weights, float32."""
    rng = np.random.default_rng(seed)
    sizes = [(shape.intermediate_size, shape.hidden_size)] * 2
    sizes.append((shape.hidden_size, shape.intermediate_size))
    return ExpertWeights(
        *(rng.standard_normal(size, np.float32) * np.float32(0.02) for size in sizes)
    )


def hidden_states(shape: Shape, num_tokens: int, seed: int = 1) -> np.ndarray:
    """float32 (num_tokens, hidden_size)."""
    return np.random.default_rng(seed).standard_normal((num_tokens, shape.hidden_size), np.float32)


class Caller:
    """One layer at one number of tokens: calls it with another routing each time and takes the
    time.
    """

    def __init__(self, layer: Layer, hidden: np.ndarray, pool: list[Routing]) -> None:
        self.layer = layer
        self.arguments = [layer.prepare(hidden, routing) for routing in pool]
        self.touched = [float(routing.touched) for routing in pool]
        self.next = 0
        self.last = 0.0

    def __call__(self) -> tuple[float, float]:
        """Seconds, and the experts it touched."""
        i = self.next % len(self.arguments)
        self.next += 1
        begin = time.perf_counter()
        self.layer.call(*self.arguments[i])
        self.last = time.perf_counter() - begin
        return self.last, self.touched[i]

    def round(self) -> tuple[list[float], list[float]]:
        """Seconds and experts touched of each call of a round; one before them, if short,
        only warms up.
        """
        self.layer.settle()
        if self.last < WARM_UP_BELOW:
            self()
        many = min(max(int(CALL_SECONDS / self.last), MIN_CALLS), MAX_CALLS)
        calls = [self() for _ in range(1 if self.last >= WARM_UP_BELOW else many)]
        return [seconds for seconds, _ in calls], [touched for _, touched in calls]


class Layer(ABC):
    """One layer, ready to be called.

    method : as asked for. kernel : what really runs. peak : the ceiling of its arithmetic.
    expert_bytes : codes and scales of an expert. layer_bytes : memory of all experts. weights :
        that memory, where it is ours.
    """

    method: str
    backend: str
    kernel: str
    peak: str
    expert_bytes: int
    layer_bytes: int
    bits_per_weight: float
    weights: tuple[np.ndarray, ...] = ()

    def settle(self) -> None:
        """Touch every page: the first access after the seconds that other layers' rounds take
        costs a virtual machine more.
        """
        for array in self.weights:
            array.reshape(-1)[::SMALL_PAGE].max()

    @abstractmethod
    def prepare(self, hidden: np.ndarray, routing: Routing) -> tuple[Any, ...]:
        """The arguments of ``call``, made outside the measured time."""

    @abstractmethod
    def call(self, *arguments: Any) -> Any:
        """One forward call."""

    def caller(self, hidden: np.ndarray, pool: list[Routing]) -> Caller:
        """What calls it in rounds.

        hidden : float32 (tokens, hidden_size). pool : the routings to use in turn.
        """
        return Caller(self, hidden, pool)

    @abstractmethod
    def check(self, hidden: np.ndarray, routing: Routing) -> None:
        """Compare a call's first two tokens with the reference; RuntimeError if they differ."""


class MoELayer(Layer):
    """A layer that ktk.MoE runs."""

    moe: MoE

    def prepare(self, hidden: np.ndarray, routing: Routing) -> tuple[Any, ...]:
        return hidden, routing.ids, routing.weights

    def call(self, *arguments: Any) -> Any:
        return self.moe(*arguments)


class KtkLayer(MoELayer):
    """Packed weights. Raises BackendError, ValueError, EngineError as ktk.MoE does."""

    def __init__(self, shape: Shape, method: Method, num_threads: int | None) -> None:
        spec = spec_of(shape, method)
        backends.select(method.backend, spec)  # refuse before the long part
        # Two different experts take turns, so that a check sees which one was run.
        self.two = pack_experts(
            dataclasses.replace(spec, num_experts=2), lambda e: random_expert(shape, e)
        )
        data = aligned_buffer(spec.num_experts * spec.layout.expert_bytes)
        data = data.reshape(spec.num_experts, -1)
        for e in range(2):
            data[e::2] = self.two.data[e]
        self.weights = (data,)
        self.moe = MoE(
            StoredExperts.of_panels(spec, data), method=method.backend, num_threads=num_threads
        )
        self.method, self.backend, self.kernel = method.text, self.moe.backend, self.moe.kernel
        self.peak = peak_of(self.kernel, spec.weight_format)
        self.expert_bytes = expert_bytes(spec)
        self.layer_bytes = data.nbytes
        self.bits_per_weight = self.expert_bytes * 8 / spec.num_weights

    def check(self, hidden: np.ndarray, routing: Routing) -> None:
        """Bit for bit; the tokens of a large batch too must be those of the reference."""
        got = self.call(*self.prepare(hidden, routing))[:CHECKED_TOKENS]
        ids = routing.ids[:CHECKED_TOKENS] % 2
        model = ExactExperts(self.two)
        expected = model.forward(hidden[:CHECKED_TOKENS], ids, routing.weights[:CHECKED_TOKENS])
        if not np.array_equal(expected, got):
            worst = float(np.abs(expected - got).max())
            raise RuntimeError(
                f"{self.method} ({self.kernel}) differs from the reference by up to {worst:g} at "
                f"{len(hidden)} tokens: "
                "it is not measured; please report it with the output of `ktk doctor`"
            )


class BlocksLayer(MoELayer):
    """GGUF blocks, in memory like a mapped file's with huge pages. Raises as ``KtkLayer``."""

    def __init__(self, shape: Shape, method: Method, num_threads: int | None) -> None:
        assert method.block_type is not None
        self.kind = method.block_type
        self.expert_bytes = block_bytes(shape, self.kind)
        spec = spec_of(shape, method)
        backends.select(method.backend, spec)  # refuse before the long part
        self.two = two_experts(shape, self.kind)  # take turns, as KtkLayer's
        two = self.two
        if method.is_repacked:
            two = repack(two, num_threads or cpu.default_threads())
        gate, up, down = (in_turns(m, spec.num_experts) for m in two.matrices.values())
        experts = StoredExperts(spec, gate, up, down)
        self.weights = tuple(matrix.data for matrix in experts.matrices.values())
        self.moe = MoE(experts, method=method.backend, num_threads=num_threads, repack=False)
        self.method, self.backend = method.text, self.moe.backend
        self.kernel = self.moe.kernel + (" repacked" if method.is_repacked else "")
        self.peak = peak_of_blocks(kernel_isa("BF16") or "", self.kind)
        self.layer_bytes = sum(matrix.num_bytes for matrix in experts.matrices.values())
        self.bits_per_weight = self.expert_bytes * 8 / spec.num_weights
        self.outputs: dict[bytes, np.ndarray] = {}

    def check(self, hidden: np.ndarray, routing: Routing) -> None:
        """Against float64 within what activations lose;
        and tokens of a batch bit for bit as they are alone.
        """
        got = self.call(*self.prepare(hidden, routing))
        few = slice(min(len(hidden), CHECKED_TOKENS))
        outputs = np.stack([self.oracle(x) for x in hidden[few]])  # (tokens, 2, hidden_size)
        ids, weights = routing.ids[few] % 2, routing.weights[few, :, None]
        expected = (np.take_along_axis(outputs, ids[:, :, None], axis=1) * weights).sum(axis=1)
        error = float(np.abs(expected - got[few]).mean() / np.abs(expected).mean())
        group = self.moe.spec.activation_group
        assert group is not None  # filled in by the spec
        tolerance = FEW_TOKENS_ERROR * error_bound(self.kind, group)
        wrong = f"differs from the reference by {error:.2g}" if not error <= tolerance else ""
        for token in sorted({0, len(hidden) // 2, len(hidden) - 1}):
            one = slice(token, token + 1)
            alone = Routing(routing.ids[one], routing.weights[one], routing.ids.shape[1])
            if not np.array_equal(self.call(*self.prepare(hidden[one], alone)), got[one]):
                wrong = wrong or f"gives token {token} other bits alone than in a batch"
        if wrong:
            raise RuntimeError(
                f"{self.method} ({self.kernel}) {wrong} at {len(hidden)} tokens: "
                "it is not measured; please report it with the output of `ktk doctor`"
            )

    def oracle(self, x: np.ndarray) -> np.ndarray:
        """float64 (2, hidden_size): both experts' outputs for one token; found once,
        decoding large ones takes seconds.
        """
        key = x.tobytes()
        if key not in self.outputs:
            one, ids = np.ones((1, 1), np.float32), np.zeros((1, 1), np.int64)
            spec = dataclasses.replace(self.two.spec, num_experts=1)
            with np.errstate(over="ignore"):  # random bits give large gates
                both = [
                    oracle_forward([expert_weights(self.two, e)], spec, x[None], ids, one)
                    for e in range(2)
                ]
            self.outputs[key] = np.concatenate(both)
        return self.outputs[key]


def two_experts(shape: Shape, kind: str) -> StoredExperts:
    """Two different experts in blocks of one type: normal weights,
    or random bits where ktk does not quantise to the type.
    """
    spec = MoESpec(2, shape.hidden_size, shape.intermediate_size, GGUF.name)
    if not has_quantiser(kind):
        return random_blocks(spec, (kind,) * 3)
    found: list[list[np.ndarray]] = []
    for e in range(2):
        weights = random_expert(shape, e)
        assert weights.gate is not None
        found.append([quantised(kind, w) for w in (weights.gate, weights.up, weights.down)])
    gate, up, down = (np.stack(pair) for pair in zip(*found, strict=True))
    return StoredExperts(
        spec,
        StoredMatrix.of_rows(kind, shape.hidden_size, gate),
        StoredMatrix.of_rows(kind, shape.hidden_size, up),
        StoredMatrix.of_rows(kind, shape.intermediate_size, down),
    )


class TorchLayer(Layer):
    """The loop over experts of transformers, bf16, on torch's threads."""

    def __init__(self, shape: Shape, num_threads: int | None) -> None:
        import torch

        torch.set_num_threads(num_threads or cpu.num_physical_cores())
        self.torch: Any = torch
        self.shape = shape
        weights = random_expert(shape)
        assert weights.gate is not None
        one = torch.from_numpy(np.concatenate([weights.gate, weights.up])).bfloat16()
        self.gate_up = one.repeat(shape.num_experts, 1, 1)  # (experts, 2 * intermediate, hidden)
        self.down = torch.from_numpy(weights.down).bfloat16().repeat(shape.num_experts, 1, 1)
        self.method, self.backend, self.kernel = TORCH, TORCH, f"torch {torch.__version__} bf16"
        self.peak = torch_peak()
        self.expert_bytes = 2 * shape.num_weights
        self.layer_bytes = shape.num_experts * self.expert_bytes
        self.bits_per_weight = 16.0

    def prepare(self, hidden: np.ndarray, routing: Routing) -> tuple[Any, ...]:
        t = self.torch
        return (
            t.from_numpy(hidden).bfloat16(),
            t.from_numpy(routing.ids),
            t.from_numpy(routing.weights).bfloat16(),
        )

    def call(self, *arguments: Any) -> Any:
        t, (x, ids, weights) = self.torch, arguments
        with t.inference_mode():
            out = t.zeros_like(x)
            hit = t.nn.functional.one_hot(ids, self.shape.num_experts).permute(2, 1, 0)
            for e in hit.sum(dim=(1, 2)).nonzero().flatten().tolist():
                slot, token = t.where(hit[e])
                gate, up = t.nn.functional.linear(x[token], self.gate_up[e]).chunk(2, dim=-1)
                y = t.nn.functional.linear(t.nn.functional.silu(gate) * up, self.down[e])
                out.index_add_(0, token, y * weights[token, slot, None])
        return out

    def check(self, hidden: np.ndarray, routing: Routing) -> None:
        got = self.call(*self.prepare(hidden, routing))[:CHECKED_TOKENS].float().numpy()
        expert = ExpertWeights(
            self.gate_up[0, : self.shape.intermediate_size].float().numpy(),
            self.gate_up[0, self.shape.intermediate_size :].float().numpy(),
            self.down[0].float().numpy(),
        )
        few = hidden[:CHECKED_TOKENS]
        spec = MoESpec(1, self.shape.hidden_size, self.shape.intermediate_size)
        one = np.ones((len(few), 1), np.float32)  # all experts are the same one, weights sum to 1
        expected = oracle_forward([expert], spec, few, np.zeros((len(few), 1), np.int64), one)
        error = float(np.abs(expected - got).mean() / np.abs(expected).mean())
        if not error < TORCH_TOLERANCE:
            raise RuntimeError(
                f"torch's loop differs from the reference by {error:.1%}: it is not measured"
            )


def spec_of(shape: Shape, method: Method) -> MoESpec:
    """ValueError if the format does not take the group size."""
    assert method.weight_format is not None
    return MoESpec(
        shape.num_experts,
        shape.hidden_size,
        shape.intermediate_size,
        method.weight_format,
        method.group_size,
    )


def expert_bytes(spec: MoESpec) -> int:
    """Codes and scales of one expert, in bytes; the span's padding is not read."""
    return spec.layout.down_end


def block_bytes(shape: Shape, kind: str) -> int:
    """Blocks of one expert, in bytes. ValueError if rows are not whole blocks."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    try:
        return 2 * intermediate * row_bytes(kind, hidden) + hidden * row_bytes(kind, intermediate)
    except ValueError as error:
        raise ValueError(f"{shape.name}: {error}") from None


def torch_peak() -> str:
    """The widest bf16 arithmetic this CPU has. BackendError if the extension is not built."""
    here = {peak.name for peak in peaks() if not peak.missing}
    return next(n for n in ("amx bf16", "avx512 bf16", "avx512 fp32", "avx2 fp32") if n in here)


def layer_bytes(shape: Shape, method: Method) -> int:
    """Memory that a layer will take, in bytes. ValueError as ``spec_of``."""
    if method.weight_format is None:
        return 2 * shape.num_weights * shape.num_experts
    if method.block_type is not None:
        return block_bytes(shape, method.block_type) * shape.num_experts
    return spec_of(shape, method).layout.expert_bytes * shape.num_experts


def check_memory(shape: Shape, methods: list[Method], more: int) -> None:
    """MemoryError unless all methods' layers, ``more`` bytes and one float expert fit into what
    is free.
    """
    sizes = {m.text: layer_bytes(shape, m) for m in methods}
    needed = sum(sizes.values()) + more + 3 * 4 * shape.num_weights
    available = cpu.memory()[1]
    if available and needed > available:
        each = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in sizes.items())
        raise MemoryError(
            f"{shape}: needs {needed / 2**30:.1f} GiB at once ({each}), {available / 2**30:.1f} "
            "GiB are free: use fewer methods a run or fewer --experts"
        )


def build(shape: Shape, method: Method, num_threads: int | None) -> Layer:
    """The layer of a method. Raises as ``KtkLayer``; ModuleNotFoundError without torch."""
    if method.weight_format is None:
        return TorchLayer(shape, num_threads)
    if method.block_type is not None:
        return BlocksLayer(shape, method, num_threads)
    return KtkLayer(shape, method, num_threads)


def has_torch() -> bool:
    """Whether torch is imported: ktk then runs on torch's threads."""
    return "torch" in sys.modules
