"""CPU features and topology: against /proc/cpuinfo here, and against made-up machines."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ktk import backends
from ktk._cy import native_module
from ktk._cy.isa import ISA_ROWS
from ktk.cli import doctor
from ktk.machine import cpu


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.skipif(native_module() is None, reason="the compiled extension is not built")
def test_probe_agrees_with_the_kernels_own_list() -> None:
    probed = set(native_module().probe_features(False)[0])
    listed, source = cpu._from_cpuinfo(Path("/"))
    assert source == "/proc/cpuinfo"
    assert {f for f in probed if not f.startswith("amx")} == listed
    assert probed <= set(cpu.FEATURES)


@pytest.mark.skipif(native_module() is None, reason="the compiled extension is not built")
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (
            errno.ENOSPC,
            "the kernel refused tile permission: an alternate signal stack is too small",
        ),
        (errno.EPERM, "the kernel refused tile permission: Operation not permitted"),
    ],
)
def test_refused_tiles_are_named_as_refused(monkeypatch, number: int, words: str) -> None:
    """Not as a feature that the CPU lacks."""
    monkeypatch.delenv("KTK_TILE", raising=False)
    everything = [f for f in cpu.FEATURES if not f.startswith("amx")]
    monkeypatch.setattr(native_module(), "probe_features", lambda asks: (everything, number))
    cpu._probe.cache_clear()
    try:
        assert words in (cpu.why_not("amx", cpu.detect()) or "")
        assert words in (backends.backends()["AMXINT4"].why_not() or "")
        assert words in doctor.diagnosis()["cpu"]["refused_tiles"]
        assert cpu.why_not("avx512bf16", cpu.detect()) is None
        monkeypatch.setenv("KTK_DISABLE_CPU_FEATURES", "avx512vnni")
        assert (cpu.why_not("amx", cpu.detect()) or "").startswith("CPU lacks avx512vnni")
    finally:
        cpu._probe.cache_clear()


@pytest.mark.skipif(native_module() is None, reason="the compiled extension is not built")
def test_nobody_asks_for_tiles_that_are_to_be_emulated(monkeypatch) -> None:
    """The kernel takes permission back from no process,
    and with it the instructions trap no more.
    """
    asked: list[bool] = []
    monkeypatch.setattr(
        native_module(), "probe_features", lambda asks: (asked.append(asks) or [*cpu.FEATURES], 0)
    )
    monkeypatch.setattr(cpu, "emulate_tiles", lambda: None)
    cpu._probe.cache_clear()
    try:
        monkeypatch.setenv("KTK_TILE", "emulated")
        cpu.detect()
        monkeypatch.delenv("KTK_TILE")
        monkeypatch.setattr(cpu, "tiles_are_emulated", lambda: True)
        cpu.detect()
        assert asked == [False]
        monkeypatch.setattr(cpu, "tiles_are_emulated", lambda: False)
        cpu.detect()
        assert asked == [False, True]
    finally:
        cpu._probe.cache_clear()


def test_every_isa_row_is_a_level() -> None:
    assert [row.name for row in ISA_ROWS] == list(cpu.ISA_LEVELS)
    native = native_module()
    if native is not None:
        assert list(native.isa_rows()) == [row.name for row in ISA_ROWS]


def test_levels_build_on_each_other() -> None:
    for name, below in cpu._pairs():
        assert set(below) < set(cpu.ISA_LEVELS[name])


ALL = frozenset(cpu.FEATURES)


@pytest.mark.parametrize(
    ("disabled", "gone", "left"),
    [
        (("avx512_vnni",), {"avx512vnni"}, {"avx512f", "amx_tile"}),
        (("avx512f",), {"avx512f", "avx512vnni", "avx512bw"}, {"avx2"}),
        (("avx512",), {"avx512f", "avx512vl", "avx512vnni"}, {"avx2", "fma"}),
        (("amx",), {"amx_tile", "amx_int8", "amx_bf16"}, {"avx512vnni"}),
        (("avx2",), {"avx2", "avx512f", "avx512vnni", "avx_vnni"}, {"fma"}),
        (("avx512-bf16", "avxvnni"), {"avx512_bf16", "avx_vnni"}, {"avx512f"}),
    ],
)
def test_disabling_takes_what_depends_on_it_along(
    disabled: tuple[str, ...], gone: set[str], left: set[str]
) -> None:
    found = cpu._without(ALL, "test", disabled)
    assert not found.names & gone
    assert left <= found.names
    assert gone <= found.disabled


def test_unknown_features_list_the_known(monkeypatch) -> None:
    monkeypatch.setenv("KTK_DISABLE_CPU_FEATURES", "avx3")
    with pytest.raises(ValueError, match=r"'avx3'.*avx512vnni.*levels avx2"):
        cpu.detect()


def test_disabled_features_take_effect_at_once(monkeypatch) -> None:
    monkeypatch.setenv("KTK_DISABLE_CPU_FEATURES", " AVX2 ,")
    assert "avx2" not in cpu.detect()
    assert cpu.missing("avx2", cpu.detect())[0] == "avx2"


def test_smt_siblings_and_quota_bound_the_cores(tmp_path: Path) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {topology.format(i): f"{i % 4},{i % 4 + 4}\n" for i in range(8)}
    root = tree(tmp_path, files)
    assert cpu.num_physical_cores(root, list(range(8))) == 4
    assert cpu.num_physical_cores(root, [0, 4]) == 1
    assert cpu.num_physical_cores(root, [1, 2]) == 2
    tree(tmp_path, {"sys/fs/cgroup/cpu.max": "250000 100000\n"})
    assert cpu.cpu_quota(root) == 2.5
    assert cpu.num_physical_cores(root, list(range(8))) == 2
    tree(tmp_path, {"sys/fs/cgroup/cpu.max": "10000 100000\n"})
    assert cpu.num_physical_cores(root, list(range(8))) == 1


def test_quota_of_a_nested_or_old_cgroup(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        },
    )
    assert cpu.cpu_quota(root) == 3
    old = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert cpu.cpu_quota(tree(tmp_path / "v1", old)) == 1.5
    assert cpu.cpu_quota(tmp_path / "none") is None


def test_two_numa_nodes_are_read(tmp_path: Path) -> None:
    base = "sys/devices/system/node"
    root = tree(
        tmp_path,
        {
            f"{base}/online": "0,2\n",
            f"{base}/node0/cpulist": "0-1,4\n",
            f"{base}/node0/meminfo": "Node 0 MemTotal:       1024 kB\n",
            f"{base}/node2/cpulist": "\n",
            f"{base}/node2/meminfo": "Node 2 MemTotal:       2048 kB\n",
        },
    )
    nodes = cpu.numa_nodes(root)
    assert nodes == [cpu.NumaNode(0, (0, 1, 4), 1 << 20), cpu.NumaNode(2, (), 2 << 20)]
    assert [n.id for n in cpu.numa_nodes(tmp_path / "none")] == [0]


def test_memory_is_capped_by_the_cgroup(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": "MemTotal: 4096 kB\nMemAvailable: 3072 kB\n"})
    assert cpu.memory(root) == (4 << 20, 3 << 20)
    tree(
        tmp_path,
        {"sys/fs/cgroup/memory.max": f"{2 << 20}", "sys/fs/cgroup/memory.current": f"{1 << 20}"},
    )
    assert cpu.memory(root) == (2 << 20, 1 << 20)
    assert cpu.memory(tmp_path / "none") == (0, 0)


def test_huge_page_mode_is_the_bracketed_word(tmp_path: Path) -> None:
    base = "sys/kernel/mm/transparent_hugepage"
    root = tree(tmp_path, {f"{base}/enabled": "always [madvise] never\n"})
    assert cpu.huge_pages(root) == {"enabled": "madvise", "defrag": "", "reserved_2MiB": ""}
