"""The ceilings `ktk bench` measures by: numbers of this machine, taken on CPUs it may use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktk._cy import measure_module
from ktk.bench import roofline as bench_roofline
from ktk.bench.roofline import READ, Roofline, cpus_for, l3_bytes, peak_of, peaks
from ktk.errors import BackendError
from ktk.experts.formats import PANELS
from ktk.machine import cpu

needs_extension = pytest.mark.skipif(
    measure_module() is None, reason="the compiled extension is not built"
)


@needs_extension
def test_every_ceiling_of_this_cpu_is_a_positive_number() -> None:
    roofline = Roofline(2, buffer_bytes=8 << 20)
    for _ in range(2):
        found = roofline.sample(roofline.names, seconds=0.001)
        assert list(found) == roofline.names
        assert all(math.isfinite(v) and v > 1e6 for v in found.values()), found
    reported = roofline.report()
    for name, values in roofline.samples.items():
        assert len(values) == 2
        assert reported[name]["min"] <= reported[name]["median"] <= reported[name]["max"]
        assert reported[name]["unit"] == ("GB/s" if name == READ else "GOP/s")


@needs_extension
def test_a_peak_of_two_threads_is_near_that_of_one_or_twice_it() -> None:
    if cpu.num_physical_cores() < 2:
        pytest.skip("one core")
    name = peaks()[0].name
    one = max(Roofline(1).sample([name], 0.005)[name] for _ in range(20))
    two = max(Roofline(2).sample([name], 0.005)[name] for _ in range(20))
    assert 0.5 * one < two < 4 * one


@needs_extension
def test_a_ceiling_this_cpu_lacks_is_refused_not_run() -> None:
    roofline = Roofline(1)
    for peak in roofline.peaks.values():
        if peak.missing:
            with pytest.raises(BackendError, match=peak.missing[0]):
                roofline.sample([peak.name], 0.001)
    with pytest.raises(ValueError, match="must be one of read"):
        roofline.sample(["avx9 int8"], 0.001)


@needs_extension
def test_switched_off_features_take_their_ceilings_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTK_DISABLE_CPU_FEATURES", "avx512")
    names = Roofline(1).names
    assert READ in names
    assert not [n for n in names if n.startswith("avx512")]


@needs_extension
def test_the_extension_refuses_what_would_read_outside() -> None:
    native: Any = measure_module()
    small = np.ones(1 << 20, np.uint8)
    isa, name = native.patterns()[0]
    with pytest.raises(ValueError, match="1 MiB a thread"):
        native.read(isa, name, small, 0, [-1, -1], 0.001)
    with pytest.raises(ValueError, match="cpus is empty"):
        native.read(isa, name, small, 0, [], 0.001)
    with pytest.raises(ValueError, match="this build has"):
        native.peak("avx9", "int8", [-1], 0.001)


def test_without_the_extension_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_roofline, "measure_module", lambda: None)
    with pytest.raises(BackendError, match="reinstall with a C compiler"):
        Roofline(1)


@pytest.mark.parametrize(
    ("kernel", "weight_format", "peak"),
    [
        ("avx512vnni int4 g32", "int4", "avx512vnni int8"),
        ("avx512vnni int8", "int8", "avx512vnni int8"),
        ("avx512 int4 g128", "int4", "avx512 int4"),
        ("avx512 int8", "int8", "avx512 int8"),
        ("avx2 int4", "int4", "avx2 int4"),
        ("avx2 nl4 g16", "nl4", "avx2 int4"),
        ("avx512vnni nl2 g16", "nl2", "avx512vnni int8"),
        ("amx nl3 g16", "nl3", "amx int8"),
        ("avx2 fp8", "fp8", "avx2 fp32"),
        ("avx2 bf16", "bf16", "avx2 fp32"),
        ("avx512vnni bf16", "bf16", "avx512 fp32"),
        ("amx int4 g128", "int4", "amx int8"),
        ("amxbf16 bf16", "bf16", "amx bf16"),
        ("amxbf16 int8", "int8", "amx int8"),
    ],
)
def test_a_kernel_is_held_against_its_own_instructions(
    kernel: str, weight_format: str, peak: str
) -> None:
    assert peak_of(kernel, weight_format) == peak


@needs_extension
def test_every_peak_a_kernel_of_this_build_asks_for_exists() -> None:
    native = pytest.importorskip("ktk._cy.native")
    known = {p.name for p in peaks()}
    for isa in native.isa_rows():
        assert {peak_of(f"{isa} x", f) for f in PANELS} <= known


def test_threads_take_each_core_once_before_any_twice(tmp_path: Path) -> None:
    allowed = cpu.allowed_cpus()
    for number in allowed:  # CPUs 2n and 2n + 1 share a core
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number & ~1}-{number | 1}\n")
    found = cpus_for(len(allowed), tmp_path)
    assert sorted(found) == allowed
    num_cores = len({n >> 1 for n in allowed})
    assert len({n >> 1 for n in found[:num_cores]}) == num_cores
    assert len(cpus_for(3 * len(allowed), tmp_path)) == 3 * len(allowed)


def test_caches_are_counted_once_however_many_cpus_share_them(tmp_path: Path) -> None:
    assert l3_bytes(tmp_path) == 0
    for number in cpu.allowed_cpus():
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/cache/index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text("32768K\n")
        (folder / "shared_cpu_list").write_text("0-127\n")
    assert l3_bytes(tmp_path) == 32 << 20
