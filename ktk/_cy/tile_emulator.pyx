# cython: language_level=3, embedsignature=True
"""Tile instructions where the CPU has none, or this process no leave,
for tests (KTK_TILE=emulated); see emulator/tile_emulator.c.
"""

import os

from libc.stdint cimport uint64_t


KINDS = tuple(ktk_tile_kind_name(i).decode() for i in range(KTK_TILE_NUM_KINDS))
FAULTS = tuple(ktk_tile_fault_name(i).decode() for i in range(1, KTK_TILE_NUM_FAULTS))


def install():
    """Handle SIGILL of tile instructions from now on, once per process.

    OSError, or ValueError if this process uses the CPU's own.
    """
    cdef int status = ktk_tile_install()
    if status < 0:
        raise ValueError("KTK_TILE=emulated: this process was already given the CPU's own tiles; "
                         "set KTK_TILE before it starts")
    if status:
        raise OSError(status, os.strerror(status))


def counts():
    """Instructions carried out since the last reset, by all threads: dict of str to int."""
    return {name: ktk_tile_count(i) for i, name in enumerate(KINDS)}


def reset_counts():
    """Count from 0 again."""
    ktk_tile_reset_counts()


def record_faults(on):
    """True: a fault skips its instruction and waits for take_fault.

    False: it ends the process, as on silicon.
    """
    ktk_tile_record_faults(bool(on))


def take_fault():
    """The name of the calling thread's last recorded fault, one of FAULTS, or None;
    then forgotten.
    """
    cdef int fault = ktk_tile_take_fault()
    return ktk_tile_fault_name(fault).decode() if fault else None
