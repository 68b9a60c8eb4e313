"""Mutated GGUF files: each must be read, or refused with a CheckpointError.

PYTHONPATH=tests python -m make.fuzz_gguf --inputs 100000 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from ktk.checkpoint.gguf import GgufCheckpoint
from ktk.errors import CheckpointError
from ktk.models.find import find_gguf_experts
from make.gguf_files import (
    ARRAY,
    STRING,
    U8,
    key,
    quantised,
    random_blocks,
    raw_file,
    sizes,
    stacked,
    tensor,
    write_gguf,
)

MEMORY = 2 << 30  # bytes of address space more than at the start; a lie of 2^40 does not fit
SECONDS = 5  # for one input
READ_LIMIT = 1 << 16  # weights of a tensor that is dequantised
INTERESTING = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    31,
    32,
    33,
    39,
    64,
    255,
    256,
    65535,
    65536,
    1 << 20,
    1 << 24,
)
LARGE = (
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**60,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 32,
    2**64 - 1,
)


class Escaped(Exception):
    """Something else than a CheckpointError came out, or an input took too long."""


def seeds(directory: Path) -> list[bytes]:
    """Small real files of each style."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    words = {"tokenizer.ggml.tokens": ["a", "bc", "é"], "tokenizer.ggml.scores": [0.5, 1.5]}
    singles = {
        f"blk.0.ffn_{part}.{expert}.weight": quantised(rng, Type.Q4_0, 32, 32)
        for expert in range(3)
        for part in ("gate", "up", "down")
    }
    biased: dict[str, Any] = stacked(rng, (0,), kind=Type.MXFP4)
    for part, width in (("gate", 32), ("up", 32), ("down", 64)):
        biased[f"blk.0.ffn_{part}_exps.bias"] = rng.standard_normal((4, width), np.float32)
    every = {f"t.{kind.name}": random_blocks(rng, kind, 2, 256) for kind in Type}
    models: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("qwen3moe", dict(stacked(rng, (0, 1))), {**sizes("qwen3moe"), **words}),
        ("qwen3next", dict(stacked(rng, (1,), ("gate_up", "down"))), sizes("qwen3next")),
        ("llama", singles, {"llama.expert_count": 3, "llama.expert_used_count": 2}),
        ("gpt-oss", biased, sizes("gpt-oss", expert_gating_func=3, expert_weights_scale=1.5)),
        ("deepseek4", dict(stacked(rng, (0,))), sizes("deepseek4", swiglu_clamp_exp=[1.0, 0.0])),
        ("llama", every, words),
    ]
    files = []
    for i, (architecture, tensors, metadata) in enumerate(models):
        path = write_gguf(directory / f"{i}.gguf", architecture, tensors, metadata)
        files.append(path.read_bytes())
    nested = key("n", ARRAY, (ARRAY, [(STRING, ["a"]), (U8, [1, 2])]))
    for version in (1, 2):
        keys = [key("general.architecture", STRING, "llama", version)] + [nested] * (version == 2)
        infos = [
            tensor(f"blk.0.ffn_{part}_exps.weight", [4, 4, 2], 0, 128 * i, version)
            for i, part in enumerate(("gate", "up", "down"))
        ]
        path = raw_file(directory / "raw.gguf", keys, infos, bytes(384), version=version)
        files.append(path.read_bytes())
    return files


def mutated(rng: np.random.Generator, files: list[bytes]) -> bytes:
    """A file with one to six changes, most of them in its header."""
    data = bytearray(files[rng.integers(len(files))])
    for _ in range(min(int(rng.geometric(0.6)), 6)):
        size = max(len(data), 1)
        reach = size if rng.random() < 0.1 else min(size, 2500)
        at = int(rng.integers(reach))
        way = rng.integers(9)
        if way == 0:
            data[at : at + 1] = bytes([int(rng.integers(256))])
        elif way == 1 and at < len(data):
            data[at] ^= 1 << int(rng.integers(8))
        elif way == 2:
            data[at : at + 4] = struct.pack("<I", int(rng.choice(INTERESTING)))
        elif way == 3:
            data[at : at + 8] = struct.pack("<Q", int(rng.choice(INTERESTING)))
        elif way == 4:
            data[at : at + 8] = struct.pack("<Q", LARGE[rng.integers(len(LARGE))])
        elif way == 5:
            del data[at : at + int(rng.integers(1, 40))]
        elif way == 6:
            data[at:at] = data[at : at + int(rng.integers(1, 40))]
        elif way == 7:
            del data[int(rng.integers(size)) :]
        else:
            other = files[rng.integers(len(files))]
            start = int(rng.integers(len(other)))
            piece = other[start : start + int(rng.integers(1, 60))]
            data[at : at + len(piece)] = piece
    return bytes(data)


def use(path: Path) -> None:
    """Everything a caller would do with a file; CheckpointError is the only way out."""
    checkpoint = GgufCheckpoint.open(path)
    errors: list[CheckpointError] = []
    for name in checkpoint.metadata:
        with _kept(errors):
            _ = checkpoint.metadata[name]
    for name, info in checkpoint.tensors.items():
        with _kept(errors):
            if int(np.prod(info.shape, dtype=object)) <= READ_LIMIT:
                checkpoint.read(name)
            checkpoint.blocks(name)
    experts = find_gguf_experts(checkpoint)
    with _kept(errors):
        _ = experts.num_experts_per_tok
    for layer in experts.layers:
        with _kept(errors):
            experts.experts(layer)
            experts.output_scale(layer)
            experts.prefetch(layer)
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _kept(errors: list[CheckpointError]) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        errors.append(error)


def run(directory: Path, inputs: int, seed: int, limit_memory: bool = True) -> Counter[str]:
    """Try ``inputs`` files; counts of "read" and "refused".

    Raises Escaped, leaving the file as escaped.gguf.
    """
    files = seeds(directory / "seeds")
    rng = np.random.default_rng(seed)
    path = directory / "input.gguf"
    counts: Counter[str] = Counter()
    before = resource.getrlimit(resource.RLIMIT_AS)
    if limit_memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    try:
        for i in range(inputs):
            path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
            path.write_bytes(mutated(rng, files))
            signal.alarm(SECONDS)
            try:
                use(path)
                counts["read"] += 1
            except CheckpointError as error:
                counts["refused"] += 1
                counts["with the file's name"] += path.name in str(error)
            except BaseException as error:
                path.replace(directory / "escaped.gguf")
                raise Escaped(
                    f"input {i} of seed {seed}: {type(error).__name__}: {error}"
                ) from error
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    warnings.simplefilter("error")
    logging.getLogger("ktk").setLevel(logging.ERROR)  # unknown architectures by the thousand
    with tempfile.TemporaryDirectory() as directory:
        begin = time.perf_counter()
        try:
            counts = run(Path(directory), given.inputs, given.seed)
        except Escaped as error:
            kept = Path("escaped.gguf")
            kept.write_bytes((Path(directory) / kept).read_bytes())
            sys.exit(f"{error}; the input is {kept}")
        seconds = time.perf_counter() - begin
    listed = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    print(f"{given.inputs} inputs, seed {given.seed}: {listed}, 0 other; {seconds:.0f} s")
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


if __name__ == "__main__":
    main()
