"""Error and speed of ktk's quantisers of ggml blocks beside ggml's own, on the same tensors.

    python bench/quantisers.py --ggml FOLDER [--gguf MODEL.gguf] [--json]

--gguf : a model whose matrices, decoded, are the "model" tensor; its values lie on its own format's
grid, so only the shape of their distribution is real. Errors are root mean square, relative to the
tensor's. One thread; best of --rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from rich.console import Console
from rich.table import Table

from ktk.quantise.blocks import BLOCK_TYPES, quantise_rows
from ktk.quantise.ggml_library import GgmlLibrary

SHAPE = (1024, 2048)
F = np.float32


def tensors(model: Path | None, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    yield "Gaussian", rng.standard_normal(SHAPE).astype(F) * F(0.02)
    yield "Laplace", rng.laplace(size=SHAPE).astype(F) * F(0.02)
    yield "Student t(4)", rng.standard_t(4, size=SHAPE).astype(F) * F(0.02)
    yield "uniform", rng.uniform(-1, 1, SHAPE).astype(F) * F(0.02)
    w = rng.standard_normal(SHAPE).astype(F) * F(0.02)
    w[:, ::97] *= 20
    w[::50] *= 30
    yield "outliers", w
    if model is not None:
        parts, need = [], SHAPE[0] * SHAPE[1]
        for t in gguf.GGUFReader(model).tensors:
            if len(t.shape) == 2 and t.name.startswith("blk.") and ".ffn_" in t.name and need > 0:
                parts.append(gguf.dequantize(t.data, t.tensor_type).ravel()[:need])
                need -= len(parts[-1])
        flat = np.concatenate(parts).astype(F)
        yield "model", flat[: len(flat) // SHAPE[1] * SHAPE[1]].reshape(-1, SHAPE[1])


def error(w: np.ndarray, blocks: np.ndarray, name: str) -> float:
    decoded = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
    return float(
        np.sqrt(np.mean((decoded.astype(np.float64) - w) ** 2) / np.mean(w.astype(np.float64) ** 2))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ggml", type=Path, required=True, help="folder of llama.cpp's libggml-base.so"
    )
    parser.add_argument("--gguf", type=Path, help="a model to take weights from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    library = GgmlLibrary(arguments.ggml)
    quantisers = {"ktk": quantise_rows, "ggml": lambda w, name: library.quantise(name, w)}
    found = []
    for label, w in tensors(arguments.gguf, arguments.seed):
        for name in BLOCK_TYPES:
            row: dict[str, object] = {"type": name, "tensor": label}
            quantise_rows(w[:1], name)  # compiles
            seconds = dict.fromkeys(quantisers, np.inf)
            for _ in range(arguments.rounds):
                for who, quantise in quantisers.items():
                    started = time.perf_counter()
                    blocks = quantise(w, name)
                    seconds[who] = min(seconds[who], time.perf_counter() - started)
                    row[f"{who}_error"] = error(w, blocks, name)
            row |= {f"{who}_m_weights_per_s": w.size / s / 1e6 for who, s in seconds.items()}
            row["ratio"] = row["ktk_error"] / row["ggml_error"]  # type: ignore[operator]
            found.append(row)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    table = Table("type", "tensor", "ktk error", "ggml error", "ratio", "ktk M/s", "ggml M/s")
    for row in sorted(found, key=lambda r: list(BLOCK_TYPES).index(str(r["type"]))):
        figures = [f"{row[k]:.5f}" for k in ("ktk_error", "ggml_error")] + [f"{row['ratio']:.4f}"]
        rates = [f"{row[f'{who}_m_weights_per_s']:.0f}" for who in quantisers]
        table.add_row(str(row["type"]), str(row["tensor"]), *figures, *rates)
    Console().print(table)


if __name__ == "__main__":
    main()
