"""NUMA placement: which node holds a page, binding memory to a node, the node of a CPU.

Linux on x86-64, by raw system calls: libnuma is rarely installed, and three calls do not need it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np

# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/linux/mempolicy.h
_SYS_MBIND, _SYS_MOVE_PAGES = 237, 279
_MPOL_PREFERRED, _MPOL_MF_MOVE = 1, 2
_MAX_NODES = 1024  # the kernel's own limit, CONFIG_NODES_SHIFT=10


def why_not() -> str | None:
    """None if memory can be bound and asked about here, else the reason."""
    machine = os.uname().machine if hasattr(os, "uname") else "unknown"
    if sys.platform != "linux" or machine != "x86_64":
        return f"NUMA calls are for linux on x86_64, this is {sys.platform} on {machine}"
    return None


@cache
def _syscall() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


def _call(what: str, number: int, *arguments: int | ctypes.c_void_p) -> None:
    """One system call. ValueError on other systems, OSError saying ``what`` failed."""
    reason = why_not()
    if reason is not None:
        raise ValueError(reason)
    # As long: ctypes would cut an int to 32 bits.
    words = [a if isinstance(a, ctypes.c_void_p) else ctypes.c_long(a) for a in arguments]
    if _syscall()(ctypes.c_long(number), *words) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def page_nodes(address: int, num_bytes: int) -> np.ndarray:
    """Where the 4 KiB pages from ``address`` to ``address + num_bytes`` are.

    Returns int32 (num_pages,): the NUMA node, or a negative errno for a page that is not there:
    -ENOENT if it was never touched (-EFAULT says Linux 6.1), -EFAULT if it was only read or is not
    mapped. Faults no page.
    Raises ValueError on other systems or for a negative size, OSError if the kernel refuses
    (containers may: EPERM).
    Source: move_pages(2) with nodes = NULL.
    """
    if num_bytes < 0:
        raise ValueError(f"num_bytes={num_bytes}: must not be negative")
    page = mmap.PAGESIZE
    first, end = address // page * page, address + num_bytes
    pages = np.arange(first, end if num_bytes else first, page, dtype=np.uint64)  # (num_pages,)
    status = np.empty(len(pages), np.int32)
    _call(
        f"asking for the NUMA nodes of {num_bytes} bytes",
        _SYS_MOVE_PAGES,
        0,  # this process
        len(pages),
        ctypes.c_void_p(pages.ctypes.data),
        ctypes.c_void_p(None),
        ctypes.c_void_p(status.ctypes.data),
        0,
    )
    return status


def bind(address: int, num_bytes: int, node: int) -> None:
    """Let the pages from ``address`` on come from ``node``, others only if it is full, and move
    those that are elsewhere.

    address : multiple of the page size. num_bytes : above 0; the last page is bound whole.
    Bounds that are multiples of 2 MiB leave huge pages whole. Each bound range is a mapping of its
    own to the kernel, of which a process may have 65530 (vm.max_map_count, ENOMEM above).
    Raises ValueError for arguments out of range or on other systems, OSError if the kernel refuses:
    EINVAL for a node that is not there, EPERM where a container forbids it. Source: mbind(2),
    MPOL_PREFERRED and MPOL_MF_MOVE.
    """
    if address % mmap.PAGESIZE:
        raise ValueError(f"address={address:#x}: must be a multiple of {mmap.PAGESIZE}")
    if num_bytes <= 0:
        raise ValueError(f"num_bytes={num_bytes}: must be above 0")
    if not 0 <= node < _MAX_NODES:
        raise ValueError(f"node={node}: must be from 0 to {_MAX_NODES - 1}")
    mask = np.zeros(_MAX_NODES // 64, np.uint64)
    mask[node // 64] = np.uint64(1) << np.uint64(node % 64)
    _call(
        f"binding {num_bytes} bytes to NUMA node {node}",
        _SYS_MBIND,
        ctypes.c_void_p(address),
        num_bytes,
        _MPOL_PREFERRED,
        ctypes.c_void_p(mask.ctypes.data),
        _MAX_NODES + 1,  # the kernel takes one bit fewer than it is told
        _MPOL_MF_MOVE,
    )


def node_of_cpu(cpu: int, root: Path | str = "/") -> int:
    """The NUMA node of a logical CPU; 0 where the OS names none.

    ValueError for a CPU that is not there.
    """
    folder = Path(root) / f"sys/devices/system/cpu/cpu{cpu}"
    if not folder.is_dir():
        raise ValueError(f"cpu={cpu}: this machine has no such CPU")
    nodes = (re.fullmatch(r"node(\d+)", entry.name) for entry in folder.iterdir())
    return next((int(match[1]) for match in nodes if match), 0)
