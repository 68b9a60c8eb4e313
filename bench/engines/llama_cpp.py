"""llama.cpp: a program that builds one layer as llama.cpp does, on ggml's CPU backend, and prints a
JSON line per number of tokens. It is called as

    PROGRAM --shape a|b|c --type q4_K|q8_0|mxfp4|bf16|... --buf repack|cpu --thp --tokens T
    --threads N --min-time SECONDS

(types as ggml names them; a, b, c: qwen3-30b-a3b, deepseek-v3, mixtral-8x7b), exits with 6 where a
type has no such buffer, and must print tokens, ms_median, experts_touched and bpw. Its output
is not seen here: that program has to check it.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from engines.rival import SECONDS, Rival
from ktk.bench.shapes import Shape

SHAPES = {"qwen3-30b-a3b": "a", "deepseek-v3": "b", "mixtral-8x7b": "c"}
BUFFERS = ("repack", "cpu")
NO_SUCH_BUFFER = 6


def ggml_name(block_type: str) -> str:
    """What ggml calls a GGUF type: Q4_K is its q4_K, MXFP4 its mxfp4."""
    return block_type.lower().replace("_k", "_K")


class LlamaCpp(Rival):
    """A program started for every turn; its set-up is not timed. kind : a ggml type."""

    def __init__(self, program: str, shape: Shape, kind: str, buffer: str, threads: int) -> None:
        if shape.name not in SHAPES:
            raise RuntimeError(f"llama.cpp: its program knows {', '.join(SHAPES)}")
        self.command = [
            program,
            "--shape",
            SHAPES[shape.name],
            "--type",
            kind,
            "--buf",
            buffer,
            "--thp",
            "--threads",
            str(threads),
            "--min-time",
            str(SECONDS),
        ]
        self.name = f"llama.cpp {kind} {buffer}"
        bits = self._run(1)["bpw"]
        arithmetic = "bf16" if bits >= 16 else "int8"
        super().__init__(shape, self.name, f"ggml {kind} {buffer}", bits / 8, arithmetic)

    def _run(self, num_tokens: int) -> dict[str, Any]:
        done = subprocess.run(
            [*self.command, "--tokens", str(num_tokens)],
            capture_output=True,
            text=True,
            check=False,
            # it gives its session's priority back, and must not give back ours
            start_new_session=True,
        )
        if done.returncode == NO_SUCH_BUFFER:
            said = done.stderr.strip() or "the type has no such buffer"
            raise RuntimeError(f"{self.name}: {said}")
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise RuntimeError(
                f"{' '.join(self.command)} ended with {done.returncode}: {done.stderr[-500:]}"
            )
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def times(self, num_tokens: int) -> tuple[list[float], list[float]]:
        found = self._run(num_tokens)
        return [found["ms_median"] / 1e3], [found["experts_touched"]]
