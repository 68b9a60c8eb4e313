"""What this CPU, this OS and this process may use: features, ISA levels, cores, NUMA nodes, memory.

Features come from cpuid, xcr0 and the AMX tile permission where the extension is built, else from
/proc/cpuinfo, else from py-cpuinfo (slow, so last), plus emulated tiles (KTK_TILE), minus
KTK_DISABLE_CPU_FEATURES. Nothing is read on import.
Functions take ``root`` so that tests can show them another machine.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ktk import env
from ktk._cy import emulate_tiles, native_module, tiles_are_emulated

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
# Lowest first; each level includes those before it. Names are those of ktk/_cy/isa.py.
ISA_LEVELS: dict[str, tuple[str, ...]] = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512vnni": (*_AVX512, "avx512vnni"),
    "avx512bf16": (*_AVX512, "avx512vnni", "avx512_bf16"),
    "amx": (*_AVX512, "avx512vnni", "avx512_bf16", "amx_tile", "amx_int8"),
    "amxbf16": (*_AVX512, "avx512vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
}
FEATURES = (*ISA_LEVELS["amxbf16"], "avx_vnni", "avx512vbmi")
_TILES = frozenset(name for name in FEATURES if name.startswith("amx_"))
# What stops working when a feature is switched off.
_NEEDS = {
    **{name: ("avx512f", "avx2") for name in FEATURES if name.startswith("avx512")},
    **dict.fromkeys(_TILES, ("amx_tile",)),
    "avx_vnni": ("avx2",),
}


@dataclass(frozen=True)
class CpuFeatures:
    """names : features of FEATURES this process may use. source : who said so. disabled : by the
        environment.

    emulated : those of ``names`` that no silicon carries out (KTK_TILE). refused_tiles : why the
    kernel kept the CPU's tiles from this process, or "".
    """

    names: frozenset[str]
    source: str
    disabled: frozenset[str] = frozenset()
    emulated: frozenset[str] = frozenset()
    refused_tiles: str = ""

    def __contains__(self, name: str) -> bool:
        return name in self.names


@dataclass(frozen=True)
class NumaNode:
    """One NUMA node: its id, its CPUs and its memory in bytes (0 if unknown)."""

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int


def _canonical(name: str) -> str:
    """The feature a name means, underscores or not: avx512_vnni, amx-tile, avx512bf16 ..."""
    key = re.sub("[_-]", "", name.lower())
    return next((f for f in FEATURES if f.replace("_", "") == key), name)


@cache
def _probe(asks_for_tiles: bool) -> tuple[frozenset[str], str, str]:
    """(features, who said so, why the kernel refused tiles)."""
    native = native_module()
    if native is None:
        return *_from_cpuinfo(Path("/")), ""
    names, refused = native.probe_features(asks_for_tiles)
    return frozenset(names), "cpuid", _refusal(refused) if refused else ""


def _refusal(number: int) -> str:
    """The errno of a refused request for tiles in words."""
    why = os.strerror(number)
    if number == errno.ENOSPC:
        why = (
            "an alternate signal stack is too small for them: make it larger (at least "
            "getauxval(AT_MINSIGSTKSZ)), or call ktk.machine.cpu.detect() before sigaltstack"
        )
    return f"the kernel refused tile permission: {why}"


def _from_cpuinfo(root: Path) -> tuple[frozenset[str], str]:
    if os.uname().machine not in ("x86_64", "amd64") if hasattr(os, "uname") else False:
        return frozenset(), "not x86-64"
    try:
        text = (root / "proc/cpuinfo").read_text()
        flags = next(
            line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")
        )
        source = "/proc/cpuinfo"
    except (OSError, StopIteration):
        import cpuinfo

        flags, source = cpuinfo.get_cpu_info().get("flags", []), "py-cpuinfo"
    # Neither knows whether this process may use AMX tiles: the extension would have to ask for
    # them.
    names = {_canonical(flag) for flag in flags} & set(FEATURES)
    return frozenset(n for n in names if not n.startswith("amx")), source


def detect() -> CpuFeatures:
    """Features this process may use. ValueError if KTK_DISABLE_CPU_FEATURES names an unknown one,
    or for KTK_TILE where tiles cannot be emulated.
    """
    emulates = env.tiles_are_emulated()
    names, source, refused = _probe(not emulates and not tiles_are_emulated())
    emulated = _emulate_tiles(names) if emulates else frozenset()
    return _without(names | emulated, source, env.disabled_cpu_features(), emulated, refused)


def _emulate_tiles(names: frozenset[str]) -> frozenset[str]:
    """Install the emulator; the features it gives a CPU that has ``names``."""
    if lacking := [name for name in ISA_LEVELS["avx512bf16"] if name not in names]:
        raise ValueError(f"KTK_TILE=emulated: the AMX kernels also need {', '.join(lacking)}")
    emulate_tiles()
    return _TILES


@cache
def _without(
    names: frozenset[str],
    source: str,
    disabled: tuple[str, ...],
    emulated: frozenset[str] = frozenset(),
    refused: str = "",
) -> CpuFeatures:
    off: set[str] = set()
    for name in map(str.lower, disabled):
        feature = _canonical(name)
        if feature in FEATURES:
            off.add(feature)
        elif (
            name in ISA_LEVELS
        ):  # the level and those above it: what the level adds to the one below
            below = next((v for k, v in _pairs() if k == name), ())
            off |= set(ISA_LEVELS[name]) - set(below)
        else:
            raise ValueError(
                f"KTK_DISABLE_CPU_FEATURES names {name!r}: known are the features "
                f"{', '.join(FEATURES)} and the levels {', '.join(ISA_LEVELS)}"
            )
    off |= {name for name, needs in _NEEDS.items() if off & set(needs)}
    return CpuFeatures(names - off, source, frozenset(off & names), emulated - off, refused)


def _pairs() -> list[tuple[str, tuple[str, ...]]]:
    """Each level with the features of the level below it."""
    names = list(ISA_LEVELS)
    return [(name, ISA_LEVELS[names[i - 1]] if i else ()) for i, name in enumerate(names)]


def missing(level: str, features: CpuFeatures) -> list[str]:
    """What ``features`` lacks for an ISA level, in the level's order; empty = it runs."""
    return [name for name in ISA_LEVELS[level] if name not in features]


def best_isa(levels: Collection[str] = tuple(ISA_LEVELS)) -> str | None:
    """The fastest of some ISA levels that this CPU runs and this build has kernels for, or None."""
    native, features = native_module(), detect()
    built = native.isa_rows() if native else ()
    runs = [row for row in built if row in levels and not missing(row, features)]
    return runs[-1] if runs else None


def why_not(level: str, features: CpuFeatures) -> str | None:
    """Why an ISA level does not run with ``features``; None = it does."""
    lacking = missing(level, features)
    if features.refused_tiles and _TILES.issuperset(lacking) and lacking:
        return features.refused_tiles
    return f"CPU lacks {', '.join(lacking)}" if lacking else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cpu_list(text: str) -> list[int]:
    """ "0-3,8" -> [0, 1, 2, 3, 8]."""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def allowed_cpus() -> list[int]:
    """CPUs in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cgroup_folders(root: Path, controllers: tuple[str, ...]) -> list[Path]:
    """This process's cgroup folders, own first, up to the root:
    the v2 tree and the named v1 trees.
    """
    base = root / "sys/fs/cgroup"
    paths = {line.rpartition(":")[2] for line in _read(root / "proc/self/cgroup").splitlines()} or {
        "/"
    }
    folders = []
    for own in (Path(p.lstrip("/")) for p in sorted(paths)):
        for tree in (base, *(base / name for name in controllers)):
            folders += [tree / part for part in (own, *own.parents)]
    return folders


def cpu_quota(root: Path | str = "/") -> float | None:
    """CPUs' worth of time the cgroups allow (cpu.max, v1 cfs quota), the tightest;
    None = no limit.
    """
    found: list[float] = []
    for folder in _cgroup_folders(Path(root), ("cpu", "cpu,cpuacct")):
        v2 = _read(folder / "cpu.max").split()
        v1 = [_read(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        for pair in (v2, v1):
            if len(pair) == 2 and all(text.isdecimal() and int(text) for text in pair):
                found.append(int(pair[0]) / int(pair[1]))
    return min(found, default=None)


def cores_of(cpus: tuple[int, ...], root: Path | str = "/") -> list[tuple[int, ...]]:
    """The physical cores among ``cpus`` that this process may use,
    each with its allowed SMT siblings.
    """
    allowed = set(allowed_cpus())
    cores: dict[tuple[int, ...], tuple[int, ...]] = {}
    for cpu in sorted(allowed & set(cpus)):
        siblings = _siblings(cpu, Path(root))
        cores[siblings] = tuple(c for c in siblings if c in allowed)
    return list(cores.values())


def _siblings(cpu: int, root: Path) -> tuple[int, ...]:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    text = _read(topology / "thread_siblings_list") or _read(topology / "core_cpus_list")
    return tuple(_cpu_list(text)) if text else (cpu,)


def num_physical_cores(root: Path | str = "/", allowed: list[int] | None = None) -> int:
    """Physical cores this process may use: affinity, SMT siblings counted once, cgroup quota;
    at least 1.
    """
    cpus = allowed_cpus() if allowed is None else allowed
    cores = {_siblings(cpu, Path(root)) for cpu in cpus}
    quota = cpu_quota(root)
    limit = len(cores) if quota is None else min(len(cores), max(1, int(quota)))
    return max(1, limit)


def default_threads() -> int:
    """KTK_NUM_THREADS, else the physical cores this process may use."""
    return env.num_threads() or num_physical_cores()


def numa_nodes(root: Path | str = "/") -> list[NumaNode]:
    """Online NUMA nodes; one node 0 with every allowed CPU where the OS tells none."""
    base = Path(root) / "sys/devices/system/node"
    nodes = []
    for node in _cpu_list(_read(base / "online")):
        total = re.search(r"MemTotal:\s+(\d+) kB", _read(base / f"node{node}/meminfo"))
        cpus = tuple(_cpu_list(_read(base / f"node{node}/cpulist")))
        nodes.append(NumaNode(node, cpus, int(total[1]) * 1024 if total else 0))
    return nodes or [NumaNode(0, tuple(allowed_cpus()), 0)]


def memory(root: Path | str = "/") -> tuple[int, int]:
    """(total, available) bytes, capped by the cgroups' limits; zeros if unknown."""
    text = _read(Path(root) / "proc/meminfo")
    sizes = {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total, available = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    for folder in _cgroup_folders(Path(root), ("memory",)):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            cap, use = _read(folder / limit), _read(folder / used)
            if cap.isdecimal() and int(cap) < total:
                total = int(cap)
            if cap.isdecimal() and use.isdecimal():
                cache = re.search(
                    r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE
                )
                held = int(use) - (int(cache[1]) if cache else 0)
                available = min(available, max(0, int(cap) - held))
    return total, available


def memory_stall(root: Path | str = "/") -> float:
    """Per cent of the last ten seconds that something waited for memory, as the kernel counts it
    (PSI): in this process's own cgroup, or, where cgroups do not tell (v1), in the whole system. 0
    if unknown.
    """
    base = Path(root)
    files = [folder / "memory.pressure" for folder in _cgroup_folders(base, ("unified",))]
    for file in (*files, base / "proc/pressure/memory"):
        if found := re.search(r"^some avg10=([\d.]+)", _read(file), re.MULTILINE):
            return float(found[1])
    return 0.0


def huge_pages(root: Path | str = "/") -> dict[str, str]:
    """Transparent huge pages: mode and defrag as the kernel names them ("" if unknown);
    reserved pages.
    """
    base = Path(root) / "sys/kernel/mm"
    chosen = {
        name: re.search(r"\[([^\]]+)\]", _read(base / "transparent_hugepage" / name))
        for name in ("enabled", "defrag")
    }
    modes = {name: match[1] if match else "" for name, match in chosen.items()}
    modes["reserved_2MiB"] = _read(base / "hugepages/hugepages-2048kB/nr_hugepages")
    return modes


def brand(root: Path | str = "/") -> str:
    """The CPU's name; py-cpuinfo (slow) where /proc/cpuinfo has none."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path(root) / "proc/cpuinfo"), re.MULTILINE)
    if match:
        return match[1].strip()
    try:
        import cpuinfo

        return str(cpuinfo.get_cpu_info().get("brand_raw", sys.platform))
    except Exception:  # a name to show is not worth a failure
        return sys.platform
