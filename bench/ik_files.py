"""Files of ik_llama.cpp, made here by its own program and read by ktk: every type of
ktk/experts/formats/ik.py, and an interleaved one.

    python bench/ik_files.py LIBGGML.so LLAMA_QUANTIZE

Both are that program's (of ik-llama-cpp-python 0.1.5: ik_llama_cpp/lib and ik_llama_cpp/bin). A
model of one layer, 4 experts of 256 x 256 in F32, is quantised to each type. ktk's weights must be
those that the program's library dequantises, bit for bit, and a token's output near that of its
products in float64.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import ktk
from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.errors import CheckpointError
from ktk.experts.formats.ik import ROWS, Format
from ktk.experts.stored import ExpertWeights
from ktk.reference.moe import oracle_forward

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "vendor" / "llamafile")]
from make_ik_vectors import Library  # noqa: E402

from make.gguf_files import write_gguf  # noqa: E402

SIZE, EXPERTS, HEADS = 256, 4, 4
PARTS = ("gate", "up", "down")


def write_floats(path: Path) -> Path:
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_t(5, shape) * 0.03).astype(np.float32)

    ones, head = np.ones(SIZE, np.float32), SIZE // HEADS
    layer = {
        **{f"{name}_norm.weight": ones for name in ("attn", "ffn")},
        **{f"attn_{name}.weight": random(SIZE, SIZE) for name in ("q", "k", "v", "output")},
        **{f"attn_{name}_norm.weight": np.ones(head, np.float32) for name in "qk"},
        "ffn_gate_inp.weight": random(EXPERTS, SIZE),
        **{f"ffn_{part}_exps.weight": random(EXPERTS, SIZE, SIZE) for part in PARTS},
    }
    tensors = {
        "token_embd.weight": random(64, SIZE),
        "output.weight": random(64, SIZE),
        "output_norm.weight": ones,
        **{f"blk.0.{name}": value for name, value in layer.items()},
    }
    sizes: dict[str, int | float] = {
        "expert_count": EXPERTS,
        "expert_used_count": 2,
        "embedding_length": SIZE,
        "expert_feed_forward_length": SIZE,
        "feed_forward_length": SIZE,
        "block_count": 1,
        "context_length": 512,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": head,
    }
    return write_gguf(path, "qwen3moe", tensors, {f"qwen3moe.{k}": v for k, v in sizes.items()})


def dequantised(library: Library, fmt: Format, checkpoint: GgufCheckpoint, name: str) -> np.ndarray:
    """A tensor by the program's library, float32 (experts, rows, columns)."""
    rows = checkpoint.blocks(name).reshape(-1, fmt.row_bytes(SIZE))
    return np.stack([library.weights(fmt, row.copy()) for row in rows]).reshape(-1, SIZE, SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("quantize")
    arguments = parser.parse_args()
    library = Library(arguments.library)
    x = np.random.default_rng(1).standard_normal((8, SIZE)).astype(np.float32)
    ids = np.arange(16).reshape(8, 2) % EXPERTS
    weights = np.full((8, 2), 0.5, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        floats = write_floats(Path(folder) / "f32.gguf")

        def quantised(name: str) -> Path:
            path = Path(folder) / f"{name}.gguf"
            command = [arguments.quantize, "--pure", "--ignore-imatrix-rules"]
            command += [str(floats), str(path), name, "2"]
            subprocess.run(command, check=True, capture_output=True)
            return path

        for fmt in ROWS:
            path = quantised(fmt.name)
            checkpoint = GgufCheckpoint.open(path)
            parts = []
            for part in PARTS:
                name = f"blk.0.ffn_{part}_exps.weight"
                assert checkpoint.info(name).type == fmt.name
                want = dequantised(library, fmt, checkpoint, name)
                np.testing.assert_array_equal(checkpoint.read(name), want)
                parts.append(want)
            moe = ktk.load_gguf(path)[0]
            experts = [ExpertWeights(*(part[e] for part in parts)) for e in range(EXPERTS)]
            exact = oracle_forward(experts, moe.spec, x, ids, weights)
            error = np.abs(moe(x, ids, weights) - exact).mean() / np.abs(exact).mean()
            assert error < 0.05, error
            print(
                f"{fmt.name}: {path.stat().st_size} bytes, equal weights, error {error:.4f}, {moe}"
            )
        try:
            _ = ktk.load_gguf(quantised("IQ4_K_R4"))[0]
        except CheckpointError as refusal:
            print(str(refusal).replace(folder, "."))
        else:
            raise AssertionError("IQ4_K_R4 was read")


if __name__ == "__main__":
    main()
