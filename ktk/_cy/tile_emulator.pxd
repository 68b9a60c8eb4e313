# The emulator of tile_emulator.h, declared once.

from libc.stdint cimport uint64_t


cdef extern from "tile_emulator.h" nogil:
    enum:
        KTK_TILE_NUM_KINDS
        KTK_TILE_NUM_FAULTS
    int ktk_tile_install()
    uint64_t ktk_tile_count(int kind)
    void ktk_tile_reset_counts()
    const char *ktk_tile_kind_name(int kind)
    void ktk_tile_record_faults(int on)
    int ktk_tile_take_fault()
    const char *ktk_tile_fault_name(int fault)
