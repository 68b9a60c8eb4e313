"""What rounding activations costs, per GGUF format: ktk and llama.cpp on the same blocks against
float64.

    python bench/block_error.py [--ggml DIR] [--types Q4_K,BF16] [--json]

One layer: hidden 2048, intermediate 768, 8 experts, top-4, 64 tokens. The oracle is float64
arithmetic on the weights that the gguf package decodes, so an error is what activations lose: mean
|y - oracle| / mean |oracle|.

Weights are Gaussian, quantised by ktk, or by ggml where ktk has no quantiser (two experts that take
turns: IQ types take seconds a million), or without --ggml random bits. --ggml : where
libggml-base.so and libggml-cpu.so of llama.cpp are; its projections then run too, by ggml_mul_mat
on its CPU backend, and its activation function in float32.

Ends with an error if ktk's output is further off than ktk.bench.blocks.error_bound, or llama.cpp's
than twice the larger one.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from rich.console import Console
from rich.table import Table

from ktk import MoE
from ktk.bench.blocks import (
    error_bound,
    has_quantiser,
    in_turns,
    quantised,
    random_blocks,
    row_bytes,
)
from ktk.bench.layer import hidden_states, random_expert
from ktk.bench.shapes import Routing, Shape, routings
from ktk.cli.bench import split
from ktk.experts.dequantise import expert_weights
from ktk.experts.formats import GGUF
from ktk.experts.spec import MoESpec
from ktk.experts.stored import StoredExperts, StoredMatrix
from ktk.machine import cpu
from ktk.placement.blocks import kernel_types
from ktk.quantise.ggml_library import GgmlLibrary
from ktk.reference.moe import oracle_forward

SHAPE = Shape("layer", 2048, 768, 8, 4)
NUM_TOKENS = 64
ACTIVATION_GROUPS = (64, 128)
DISTINCT = 2  # experts
LLAMA_BOUNDS = {"F16": 1e-3}  # it rounds activations to half precision; others: twice ktk's bound
Quantise = Callable[[str, np.ndarray], np.ndarray]


class Ggml(GgmlLibrary):
    """ggml's quantisers and its CPU backend."""

    class InitParams(ctypes.Structure):
        _fields_ = (
            ("mem_size", ctypes.c_size_t),
            ("mem_buffer", ctypes.c_void_p),
            ("no_alloc", ctypes.c_bool),
        )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        pointer, size, c_int, c_int64 = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int64,
        )
        self.base, self.cpu = (
            ctypes.CDLL(str((folder / name).resolve()), mode=ctypes.RTLD_GLOBAL)
            for name in ("libggml-base.so", "libggml-cpu.so")
        )
        for library, name, result, *arguments in (
            (self.base, "ggml_init", pointer, self.InitParams),
            (self.base, "ggml_free", None, pointer),
            (self.base, "ggml_new_tensor_2d", pointer, pointer, c_int, c_int64, c_int64),
            (self.base, "ggml_get_data", pointer, pointer),
            (self.base, "ggml_mul_mat", pointer, pointer, pointer, pointer),
            (self.base, "ggml_new_graph", pointer, pointer),
            (self.base, "ggml_build_forward_expand", None, pointer, pointer),
            (self.base, "ggml_graph_overhead", size),
            (self.cpu, "ggml_cpu_init", None),
            (self.cpu, "ggml_graph_compute_with_ctx", c_int, pointer, pointer, c_int),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.cpu.ggml_cpu_init()

    def multiply(self, kind: str, blocks: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Blocks of (rows, in_features) times float32 (tokens, in_features): float32 (tokens,
        rows).
        """
        base, num_rows, (num_tokens, columns) = self.base, len(blocks), x.shape
        work = 8 * x.nbytes + (1 << 20)  # quantised activations, tensors' headers
        size = blocks.nbytes + x.nbytes + 4 * num_tokens * num_rows + work
        params = self.InitParams(size + base.ggml_graph_overhead(), None, False)
        context = base.ggml_init(params)
        try:
            number = int(gguf.GGMLQuantizationType[kind])
            w = base.ggml_new_tensor_2d(context, number, columns, num_rows)
            ctypes.memmove(base.ggml_get_data(w), blocks.ctypes.data, blocks.nbytes)
            given = base.ggml_new_tensor_2d(context, 0, columns, num_tokens)
            ctypes.memmove(base.ggml_get_data(given), x.ctypes.data, x.nbytes)
            y = base.ggml_mul_mat(context, w, given)
            graph = base.ggml_new_graph(context)
            base.ggml_build_forward_expand(graph, y)
            status = self.cpu.ggml_graph_compute_with_ctx(context, graph, cpu.default_threads())
            if status:
                raise RuntimeError(f"ggml ended with status {status} on {kind}")
            out = np.empty((num_tokens, num_rows), np.float32)
            ctypes.memmove(out.ctypes.data, base.ggml_get_data(y), out.nbytes)
        finally:
            base.ggml_free(context)
        return out

    def forward(self, experts: StoredExperts, hidden: np.ndarray, routing: Routing) -> np.ndarray:
        """float32 (tokens, hidden_size)."""
        out = np.zeros_like(hidden)

        def projection(name: str, expert: int, x: np.ndarray) -> np.ndarray:
            matrix = experts.matrices[name]
            blocks = np.ascontiguousarray(matrix.data[expert])
            return self.multiply(matrix.format.name, blocks, np.ascontiguousarray(x))

        for e in range(experts.spec.num_experts):
            token, slot = np.nonzero(routing.ids == e)
            x = hidden[token]
            gate, up = projection("gate", e, x), projection("up", e, x)
            with np.errstate(over="ignore"):
                h = gate / (1 + np.exp(-gate)) * up  # (rows, intermediate_size)
            out[token] += routing.weights[token, slot, None] * projection("down", e, h)
        return out


def layer_of(kind: str, quantise: Quantise | None) -> StoredExperts:
    """SHAPE's experts; random bits where nothing quantises."""
    spec = MoESpec(DISTINCT, SHAPE.hidden_size, SHAPE.intermediate_size, GGUF.name)
    if quantise is None:
        few = random_blocks(spec, (kind,) * 3)
    else:
        with ThreadPoolExecutor(cpu.default_threads()) as pool:
            weights = [random_expert(SHAPE, e) for e in range(DISTINCT)]
            columns = zip(*((w.gate, w.up, w.down) for w in weights), strict=True)
            jobs = [[pool.submit(quantise, kind, w) for w in column] for column in columns]
            gate, up, down = (np.stack([job.result() for job in column]) for column in jobs)
        hidden, intermediate = SHAPE.hidden_size, SHAPE.intermediate_size
        few = StoredExperts(
            spec,
            StoredMatrix.of_rows(kind, hidden, gate),
            StoredMatrix.of_rows(kind, hidden, up),
            StoredMatrix.of_rows(kind, intermediate, down),
        )
    gate, up, down = (in_turns(m, SHAPE.num_experts) for m in few.matrices.values())
    return StoredExperts(dataclasses.replace(spec, num_experts=SHAPE.num_experts), gate, up, down)


def errors_of(kind: str, ggml: Ggml | None, seed: int) -> dict[str, Any]:
    """The row of one format."""
    quantise: Quantise | None = quantised if has_quantiser(kind) else ggml and ggml.quantise
    experts = layer_of(kind, quantise)
    hidden = hidden_states(SHAPE, NUM_TOKENS, seed)
    routing = routings(SHAPE, NUM_TOKENS, 1, seed)[0]
    decoded = [expert_weights(experts, e) for e in range(DISTINCT)]
    with np.errstate(over="ignore"):
        oracle = oracle_forward(
            [decoded[e % DISTINCT] for e in range(SHAPE.num_experts)],
            experts.spec,
            hidden,
            routing.ids,
            routing.weights,
        )

    def error(y: np.ndarray) -> float:
        return float(np.abs(y - oracle).mean() / np.abs(oracle).mean())

    weights = "random bits" if quantise is None else "ktk" if has_quantiser(kind) else "ggml"
    row: dict[str, Any] = {"type": kind, "weights": weights}
    for group in ACTIVATION_GROUPS:
        spec = dataclasses.replace(experts.spec, activation_group=group)
        moe = MoE(dataclasses.replace(experts, spec=spec), method="LLAMAFILE", repack=False)
        row[f"ktk_{group}"] = error(moe(hidden, routing.ids, routing.weights))
    if ggml is not None:
        row["llama"] = error(ggml.forward(experts, hidden, routing))
    return row


def bounds_of(kind: str) -> dict[str, float]:
    """What each error of a row must be within."""
    found = {f"ktk_{group}": error_bound(kind, group) for group in ACTIVATION_GROUPS}
    return found | {"llama": LLAMA_BOUNDS.get(kind, 2 * max(found.values()))}


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("type", "weights by")
    columns = [name for name in bounds_of("F32") if name in rows[0]]
    for name in columns:
        table.add_column(name.replace("_", ", group "), justify="right")
        table.add_column("bound", justify="right")
    for row in rows:
        bounds = bounds_of(row["type"])
        cells = [f"{value:.2g}" for name in columns for value in (row[name], bounds[name])]
        table.add_row(row["type"], row["weights"], *cells)
    Console(highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ggml", type=Path, help="the folder of llama.cpp's libraries")
    parser.add_argument("--types", default=",".join(kernel_types()))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    kinds = split([a.types.upper()])
    for kind in kinds:
        row_bytes(kind, SHAPE.hidden_size)  # refuses unknown ones
    ggml = Ggml(a.ggml) if a.ggml else None
    rows = [errors_of(kind, ggml, a.seed) for kind in kinds]
    if a.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(rows)
    wrong = [
        f"{row['type']} {name}: {row[name]:.2g}, bound {bound:.2g}"
        for row in rows
        for name, bound in bounds_of(row["type"]).items()
        if name in row and not row[name] <= bound
    ]
    if wrong:
        raise RuntimeError("; ".join(wrong))


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        sys.exit(f"block_error: {error}")
