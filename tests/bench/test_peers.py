"""bench/peers.py: other engines are started, asked, checked and, where they cannot run, left out
with the reason.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ktk._cy import measure_module
from ktk.bench.layer import hidden_states, torch_peak
from ktk.bench.roofline import peak_of
from ktk.bench.run import Case, Result, Round
from ktk.bench.shapes import SHAPES, Shape
from make import ROOT

pytestmark = pytest.mark.skipif(
    measure_module() is None, reason="the compiled extension is not built"
)
TINY = Shape("tiny", 64, 96, 5, 2)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("peers")


# --- llama.cpp's program -----------------------------------------------------------------------

PROGRAM = """#!{python}
import json, sys
at = sys.argv.index
kind, buffer = sys.argv[at("--type") + 1], sys.argv[at("--buf") + 1]
if buffer == "repack":
    sys.exit("no such buffer") if kind == "bad" else sys.exit(6)
print("chatter")
tokens = int(sys.argv[at("--tokens") + 1])
print(json.dumps({{"tokens": tokens, "ms_median": 2.0, "experts_touched": 8.0, "bpw": 4.5}}))
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_another_engines_program_is_read(peers: Any, program: str) -> None:
    shape = SHAPES["qwen3-30b-a3b"]
    engine = peers.LlamaCpp(program, shape, "q4_0", "cpu", 2)
    assert engine.expert_bytes == shape.num_weights * 4.5 / 8
    seconds, touched = engine.caller(hidden_states(TINY, 3), []).round()
    assert (seconds, touched) == ([0.002], [8.0])
    with pytest.raises(RuntimeError, match="llama.cpp q4_0 repack: the type has no such buffer"):
        peers.LlamaCpp(program, shape, "q4_0", "repack", 2)
    with pytest.raises(RuntimeError, match="ended with 1: no such buffer"):
        peers.LlamaCpp(program, shape, "bad", "repack", 2)
    with pytest.raises(RuntimeError, match="its program knows qwen3-30b-a3b"):
        peers.LlamaCpp(program, TINY, "q4_0", "cpu", 2)


def test_blocks_are_compared_with_the_better_buffer_of_the_same_type(
    peers: Any, program: str
) -> None:
    given = argparse.Namespace(kt_python=None, vllm_python=None, llama_bench=program, threads=2)
    kinds = [peers.ggml_name(name) for name in ("Q4_K", "IQ4_XS")]
    found, left_out = peers.admit(peers.wanted(given, SHAPES["qwen3-30b-a3b"], kinds, 1), [1])
    assert [e.method for e in found] == ["llama.cpp q4_K cpu", "llama.cpp iq4_xs cpu"]
    assert [why.split(":")[0] for why in left_out] == [
        "llama.cpp q4_K repack",
        "llama.cpp iq4_xs repack",
    ]
    seconds = {
        "LLAMAFILE:Q4_K": 1.0,
        "llamafile:q4_K:repack": 2.0,
        "LLAMAFILE:F16": 1.0,
        "INT8": 1.0,
        "llama.cpp q4_K repack": 3.0,
        "llama.cpp q4_K cpu": 5.0,
        "llama.cpp q8_0 cpu": 0.1,
    }
    cases = [
        Case(TINY, name, "", "", 1, 4, [Round([s], [1.0], (1.0, 1.0), (1.0, 1.0))])
        for name, s in seconds.items()
    ]
    rows = peers.block_ratios(Result(TINY, [], cases, {}))
    assert [(r["method"], r["buffer"], r["ratio"]) for r in rows] == [
        ("LLAMAFILE:Q4_K", "repack", 3.0),
        ("llamafile:q4_K:repack", "repack", 1.5),
    ]


# --- engines in a Python of their own ----------------------------------------------------------

# An engine without torch: its method says what it does.
ENGINE = """
import json, os, signal, sys
given = dict(a[2:].split("=") for a in sys.argv[1:])
method, unit = given["method"], "int8"
if method == "unable":
    print(json.dumps({"why_not": "it has no such kernel"}))
    sys.exit()
if method == "exits":
    sys.exit("no module named so")
if method == "crashes":
    os.kill(os.getpid(), signal.SIGILL)
sizes = "x".join(given[n] for n in ("hidden", "intermediate", "experts", "top-k", "max-tokens"))
if method == "bf16":
    unit = "bf16"
named = {"version": "1.2", "kernel": sizes, "bytes_per_weight": 0.5, "arithmetic": unit}
print(json.dumps(named), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "measure" in asked:
        answer = {"seconds": [0.5 * asked["measure"]], "touched": [3]}
    else:
        answer = {"error": 0.01, "tolerance": 0.02, "worst": 0.1, "worst_tolerance": 0.2}
        if method == "wrong in batches" and asked["check"] > 4:
            answer["error"] = 0.5
        if method == "one wrong column":
            answer["worst"] = 0.9
        if method == "not a number":
            answer["error"] = float("nan")
        if method == "crashes in batches" and asked["check"] > 4:
            os.kill(os.getpid(), signal.SIGILL)
        if method == "unable in batches" and asked["check"] > 4:
            answer = {"why_not": "at most 4 tokens"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def start(peers: Any, tmp_path: Path) -> Callable[[str], Any]:
    """Starts the engine above with a method."""
    script = tmp_path / "drive_engine.py"
    script.write_text(ENGINE)

    def started(method: str) -> Any:
        return peers.DrivenRival(
            "engine", sys.executable, TINY, method, threads=2, max_tokens=7, script=script
        )

    return started


def test_an_engine_in_its_own_python_says_what_it_is_and_is_asked_for_times(
    start: Callable[[str], Any],
) -> None:
    engine = start("right")
    try:
        assert (engine.method, engine.backend) == ("engine right 2t", "engine")
        assert engine.kernel == "engine 1.2 64x96x5x2x7"
        assert engine.expert_bytes == 3 * 64 * 96 / 2
        assert engine.layer_bytes == 5 * engine.expert_bytes
        assert engine.peak == peak_of("", "int8")
        for tokens in (3, 1):
            round_ = engine.caller(hidden_states(TINY, tokens), []).round()
            assert round_ == ([0.5 * tokens], [3])
    finally:
        engine.close()
    assert engine.process.poll() is not None
    other = start("bf16")
    other.close()
    assert other.peak == torch_peak()


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("unable", "engine unable 2t: it has no such kernel"),
        ("exits", r"engine exits 2t ended with 1: no module named so \(.*drive_engine\.py"),
        ("crashes", "engine crashes 2t ended with Illegal instruction: it said nothing"),
        ("unable in batches", "engine unable in batches 2t: at most 4 tokens"),
        ("crashes in batches", "engine crashes in batches 2t ended with Illegal instruction"),
        (
            "wrong in batches",
            "its mean error at 5 tokens is 0.5 of the mean output, more than 0.02",
        ),
        ("one wrong column", "its largest error at 1 tokens is 0.9 of"),
        ("not a number", "its mean error at 1 tokens is nan of"),
    ],
)
def test_an_engine_that_cannot_run_or_is_wrong_is_left_out_with_the_reason(
    peers: Any, start: Callable[[str], Any], method: str, why: str
) -> None:
    started = []

    def begin(name: str) -> Any:
        started.append(start(name))
        return started[-1]

    starts = [functools.partial(begin, name) for name in ("right", method, "bf16")]
    found, left_out = peers.admit(starts, [1, 5])
    assert [e.method for e in found] == ["engine right 2t", "engine bf16 2t"]
    assert len(left_out) == 1
    for engine in started:
        assert (engine.process.poll() is None) == (engine in found)
        engine.close()
    assert re.search(why, left_out[0]), left_out[0]


def test_no_engine_goes_on_where_another_cannot_be_started(
    peers: Any, start: Callable[[str], Any]
) -> None:
    engine = start("right")
    missing = lambda: peers.DrivenRival(  # noqa: E731
        "vllm", "/nowhere/python", TINY, "bf16", threads=1, max_tokens=4
    )
    with pytest.raises(OSError, match="/nowhere/python"):
        peers.admit([lambda: engine, missing], [1])
    assert engine.process.poll() is not None


def test_each_engine_is_asked_for_with_its_methods(
    peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def driven(engine: str, python: str, shape: Shape, method: str, **given: int) -> None:
        asked.append((engine, python, method, given["threads"], given["max_tokens"]))

    monkeypatch.setattr(peers, "DrivenRival", driven)
    given = argparse.Namespace(
        kt_python="K",
        kt_methods="AMXINT4",
        vllm_python="V",
        sglang_methods="int8,int4:128",
        vllm_methods="bf16",
        llama_bench=None,
        threads=4,
    )
    for begin in peers.wanted(given, TINY, [], 64):
        begin()
    assert asked == [
        ("kt-kernel", "K", "AMXINT4", 4, 64),
        ("kt-kernel", "K", "AMXINT4", 3, 64),
        ("sglang", "V", "int8", 4, 64),
        ("sglang", "V", "int4:128", 4, 64),
        ("vllm", "V", "bf16", 4, 64),
    ]
