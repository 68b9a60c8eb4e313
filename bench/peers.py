"""Other engines beside ktk: one MoE layer, in the same rounds, the machine's ceilings between them.

    python bench/peers.py --shape qwen3-30b-a3b --kt-python KT_VENV/bin/python --llama-bench
    ./ggml_moe_bench

kt-kernel runs in the Python it is installed in (bench/peers_kt_kernel.py). llama.cpp runs through a
program that builds one layer as llama.cpp does, on ggml's CPU backend, and prints a JSON line per
number of tokens; it is called as

    PROGRAM --shape a|b|c --type q4_K|q8_0|mxfp4|bf16|... --buf repack|cpu --thp --tokens T
    --threads N --min-time SECONDS

(types as ggml names them; a, b, c: qwen3-30b-a3b, deepseek-v3, mixtral-8x7b), exits with 6 where a
type has no such buffer, and must print tokens, ms_median, experts_touched and bpw. Engines that are
not given are left out.

Rates are ratios of medians over rounds: what another engine takes, divided by what ktk takes; above
1 ktk is faster.

    python bench/peers.py --llama-bench ./ggml_moe_bench --block-types Q4_K,Q4_K:repack,Q6_K,BF16

compares LLAMAFILE with llama.cpp on blocks of the same type, with the better of its two buffers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ktk.bench.layer import BLOCKS, Caller, Layer, Method, parse_method, torch_peak
from ktk.bench.roofline import Roofline, peak_of
from ktk.bench.run import Result, build_layers, measure, report
from ktk.bench.shapes import SHAPES, Routing, Shape
from ktk.cli.bench import StepProgress, number, split
from ktk.machine import cpu

HERE = Path(__file__).parent
SECONDS = 0.15  # of calls in a round
LLAMA_SHAPES = {"qwen3-30b-a3b": "a", "deepseek-v3": "b", "mixtral-8x7b": "c"}
NO_SUCH_BUFFER = 6
BUFFERS = ("repack", "cpu")
METHODS, LLAMA_TYPES = "INT4:32,INT4:128,INT8", "q4_0,q4_K,q8_0"


class Rival(Layer):
    """An engine that takes its own times; it is checked by its own driver."""

    def __init__(self, shape: Shape, method: str, kernel: str, bytes_per_weight: float) -> None:
        self.method, self.backend, self.kernel = method, method.split(" ")[0], kernel
        self.expert_bytes = round(bytes_per_weight * shape.num_weights)
        self.layer_bytes = self.expert_bytes * shape.num_experts
        self.bits_per_weight = 8 * bytes_per_weight
        self.peak = torch_peak() if bytes_per_weight >= 2 else peak_of("", "int8")

    def times(self, num_tokens: int) -> tuple[list[float], list[float]]:
        """Seconds and experts touched of a round's calls."""
        raise NotImplementedError

    def close(self) -> None:
        """End what runs."""

    def caller(self, hidden: np.ndarray, pool: list[Routing]) -> Caller:
        return RivalCaller(self, len(hidden))

    def prepare(self, hidden: np.ndarray, routing: Routing) -> tuple[Any, ...]:
        return ()

    def call(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def check(self, hidden: np.ndarray, routing: Routing) -> None:
        """Its driver has."""


class RivalCaller(Caller):
    def __init__(self, rival: Rival, num_tokens: int) -> None:
        self.rival = rival
        self.num_tokens = num_tokens

    def round(self) -> tuple[list[float], list[float]]:
        return self.rival.times(self.num_tokens)


class KtKernel(Rival):
    """A process that waits, asleep, between its turns."""

    def __init__(
        self, python: str, shape: Shape, method: str, threads: int, max_tokens: int
    ) -> None:
        sizes = {
            "method": method,
            "hidden": shape.hidden_size,
            "intermediate": shape.intermediate_size,
            "experts": shape.num_experts,
            "top-k": shape.top_k,
            "threads": threads,
            "max-tokens": max_tokens,
        }
        arguments = [f"--{name}={value}" for name, value in sizes.items()]
        self.process = subprocess.Popen(
            [python, str(HERE / "peers_kt_kernel.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        is_ = self._answer()
        if not is_["is_right"]:
            self.close()
            raise RuntimeError(f"kt-kernel {method}: its output is {is_['error']:.1%} off")
        self.version = is_["version"]
        name = f"kt-kernel {method} {threads}t"
        kernel = f"kt-kernel {self.version} {is_['kernel']}"
        super().__init__(shape, name, kernel, is_["bytes_per_weight"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.communicate()
            command = " ".join(map(str, self.process.args))  # type: ignore[arg-type]
            raise RuntimeError(
                f"kt-kernel ended with {self.process.returncode}; see what it says: {command}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def times(self, num_tokens: int) -> tuple[list[float], list[float]]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"tokens": num_tokens, "seconds": SECONDS}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["touched"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class LlamaCpp(Rival):
    """A program started for every turn; its set-up is not timed."""

    def __init__(self, program: str, shape: Shape, kind: str, buffer: str, threads: int) -> None:
        self.command = [
            program,
            "--shape",
            LLAMA_SHAPES[shape.name],
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
        bits = self._run(1)["bpw"]
        super().__init__(shape, f"llama.cpp {kind} {buffer}", f"ggml {kind} {buffer}", bits / 8)

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
            raise LookupError(done.stderr.strip())
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


def ggml_name(block_type: str) -> str:
    """What ggml calls a GGUF type: Q4_K is its q4_K, MXFP4 its mxfp4."""
    return block_type.lower().replace("_k", "_K")


def rivals(
    a: argparse.Namespace, shape: Shape, kinds: list[str], threads: int, max_tokens: int
) -> list[Rival]:
    """Those that were given, llama.cpp with types ``kinds``;
    a line on stderr for each that has to be left out.
    """
    found: list[Rival] = []
    if a.kt_python:
        # With as many threads as cores one of its threads, which only waits, takes a core from
        # another.
        for method in split([a.kt_methods]):
            for count in dict.fromkeys((threads, max(threads - 1, 1))):
                found.append(KtKernel(a.kt_python, shape, method, count, max_tokens))
    if a.llama_bench and shape.name not in LLAMA_SHAPES:
        print(f"llama.cpp left out: its program knows {', '.join(LLAMA_SHAPES)}", file=sys.stderr)
    elif a.llama_bench:
        for kind in kinds:
            for buffer in BUFFERS:
                try:
                    found.append(LlamaCpp(a.llama_bench, shape, kind, buffer, threads))
                except LookupError as error:
                    print(f"llama.cpp {kind} {buffer} left out: {error}", file=sys.stderr)
    return found


@contextlib.contextmanager
def priority() -> Iterator[None]:
    """As llama.cpp's program takes for itself where it may: other work on the machine then disturbs
    all alike, little.

    The second file ranks whole sessions; the first number only ranks within one.
    """
    session = Path("/proc/self/autogroup")
    try:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
            session.write_text("-20")
        yield
    finally:
        with contextlib.suppress(OSError):
            session.write_text("0")


def print_ratios(result: Result, methods: list[Method]) -> None:
    """One row per engine and number of tokens: its time, and that time over each ktk method's."""
    ours = [m.text for m in methods]
    table = Table("tokens", "method", title=str(result.shape))
    for heading in ("ms", "GB/s", "GOP/s", *(f"/ {name}" for name in ours)):
        table.add_column(heading, justify="right")
    milliseconds = {(c.num_tokens, c.method): c.seconds * 1e3 for c in result.cases}
    last = 0
    for case in result.cases:
        c = case.to_json()
        if last and last != case.num_tokens:
            table.add_section()
        ratios = [f"{c['median_ms'] / milliseconds[case.num_tokens, name]:.2f}" for name in ours]
        rates = (f"{c['median_ms']:.4g}", f"{c['gb_per_s']:.1f}", f"{c['gop_per_s']:.0f}")
        table.add_row(
            str(case.num_tokens) if last != case.num_tokens else "", case.method, *rates, *ratios
        )
        last = case.num_tokens
    console = Console(highlight=False)
    console.print(table)
    for name, c in result.ceilings.items():
        console.print(
            f"ceiling {name}: {c['median']:.1f} {c['unit']} ({c['min']:.1f} - {c['max']:.1f})"
        )


def block_ratios(result: Result) -> list[dict[str, Any]]:
    """Per LLAMAFILE method and number of tokens: llama.cpp's time on the same type,
    in its better buffer, over ktk's.
    """
    cases = {(case.num_tokens, case.method): case for case in result.cases}
    found = []
    for (tokens, text), case in cases.items():
        if not text.upper().startswith(f"{BLOCKS}:"):
            continue
        method = parse_method(text)
        assert method.block_type is not None
        kind = ggml_name(method.block_type)
        theirs = {
            buffer: cases[tokens, f"llama.cpp {kind} {buffer}"].seconds * 1e3
            for buffer in BUFFERS
            if (tokens, f"llama.cpp {kind} {buffer}") in cases
        }
        if theirs:
            better = min(theirs, key=lambda buffer: theirs[buffer])
            ours = case.seconds * 1e3
            row = {"tokens": tokens, "method": text, "ms": ours, "buffer": better}
            found.append(row | {"llama_ms": theirs[better], "ratio": theirs[better] / ours})
    return found


def print_block_ratios(rows: list[dict[str, Any]]) -> None:
    """One row per method, one column per number of tokens."""
    by_method: dict[str, dict[int, str]] = {}
    for r in rows:
        cell = f"{r['ratio']:.2f} ({r['ms']:.3g}, {r['buffer']} {r['llama_ms']:.3g})"
        by_method.setdefault(r["method"], {})[r["tokens"]] = cell
    tokens = list(dict.fromkeys(r["tokens"] for r in rows))
    table = Table("tokens", title="llama.cpp's better buffer / ktk (ms, ms)")
    for count in tokens:
        table.add_column(str(count), justify="right")
    for method, cells in by_method.items():
        table.add_row(method, *(cells.get(count, "") for count in tokens))
    Console(highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument(
        "--method", help=f"ktk's, as for ktk bench; {METHODS} without --block-types"
    )
    parser.add_argument("--threads", type=int, default=cpu.num_physical_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--kt-python", help="the Python that kt-kernel is installed in")
    parser.add_argument("--kt-methods", default="AMXINT4,AMXINT8,RAWINT4")
    parser.add_argument("--llama-bench", help="the program above")
    parser.add_argument("--llama-types", help=f"llama.cpp's; {LLAMA_TYPES} without --block-types")
    parser.add_argument(
        "--block-types",
        default="",
        help="run by both: Q4_K, or Q4_K:repack for ktk's repacked blocks",
    )
    a = parser.parse_args()
    if a.block_types and not (a.llama_bench and a.shape in LLAMA_SHAPES):
        known = ", ".join(LLAMA_SHAPES)
        raise ValueError(f"--block-types needs --llama-bench and a shape it knows: {known}")
    shape = SHAPES[a.shape]
    methods = [
        parse_method(text) for text in split([a.method or ("" if a.block_types else METHODS)])
    ]
    blocks = [parse_method(f"{BLOCKS}:{text}") for text in split([a.block_types])]
    kinds = split([a.llama_types or ("" if a.block_types else LLAMA_TYPES)])
    kinds += [ggml_name(m.block_type) for m in blocks if m.block_type]
    tokens = [number(text, "--tokens") for text in split([a.tokens])]
    roofline = Roofline(a.threads)
    others: list[Rival] = []
    with priority(), StepProgress() as progress:
        try:
            progress(0, 1, "starting the other engines")
            others += rivals(a, shape, list(dict.fromkeys(kinds)), a.threads, max(tokens))
            layers = build_layers(
                shape,
                list(dict.fromkeys([*methods, *blocks])),
                num_threads=a.threads,
                more_bytes=roofline.buffer_bytes
                + max((2 * o.layer_bytes for o in others), default=0),
                progress=progress,
            )
            result = measure(
                shape,
                [*layers, *others],
                tokens,
                rounds=a.rounds,
                roofline=roofline,
                progress=progress,
            )
        finally:
            for other in others:
                other.close()
    ratios = block_ratios(result)
    if a.json:
        found = report([result], a.threads, a.rounds) | {"block_ratios": ratios}
        a.json.write_text(json.dumps(found, indent=2) + "\n")
    print_ratios(result, methods)
    if ratios:
        print_block_ratios(ratios)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, ValueError, MemoryError, OSError) as error:
        sys.exit(f"peers: {error}")
