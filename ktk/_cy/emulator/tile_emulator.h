/* Runs AMX tile instructions on a CPU without them, or in a process that never asked for them: each
 * raises SIGILL, and the handler installed here decodes and computes it. For tests; Linux on x86-64
 * only. Its oracle is ktk/reference/tiles.py. */
#ifndef KTK_TILE_EMULATOR_H
#define KTK_TILE_EMULATOR_H

#include <stdint.h>

#define KTK_TILE_KINDS(X)                                                                          \
    X(LDTILECFG, "ldtilecfg")                                                                      \
    X(STTILECFG, "sttilecfg")                                                                      \
    X(TILERELEASE, "tilerelease")                                                                  \
    X(TILEZERO, "tilezero")                                                                        \
    X(TILELOADD, "tileloadd")                                                                      \
    X(TILELOADDT1, "tileloaddt1")                                                                  \
    X(TILESTORED, "tilestored")                                                                    \
    X(TDPBSSD, "tdpbssd")                                                                          \
    X(TDPBSUD, "tdpbsud")                                                                          \
    X(TDPBUSD, "tdpbusd")                                                                          \
    X(TDPBUUD, "tdpbuud")                                                                          \
    X(TDPBF16PS, "tdpbf16ps")

/* Every rule of the manual, and a few it does not have: no kernel here means to start in the middle
 * of a tile, to use a tile without a shape, or to store rows over each other. */
#define KTK_TILE_FAULTS(X)                                                                         \
    X(ENCODING, "encoding",                                                                        \
      "VEX.W, VEX.L, VEX.vvvv or ModRM.reg is not what the instruction allows")                    \
    X(PREFIX, "prefix", "a segment or address-size prefix, which is not emulated")                 \
    X(TILE_NUMBER, "tile_number", "a tile above tmm7")                                             \
    X(NO_SIB, "address_without_sib",                                                               \
      "tile loads and stores take base + index * stride, so need a SIB byte")                      \
    X(UNREADABLE, "unreadable_memory", "a row cannot be read")                                     \
    X(UNWRITABLE, "unwritable_memory", "a row cannot be written")                                  \
    X(ROWS_OVERLAP, "store_rows_overlap", "the stride of a store is smaller than a row")           \
    X(PALETTE, "config_palette", "the palette is neither 0 nor 1")                                 \
    X(START_ROW, "config_start_row", "start_row is not 0")                                         \
    X(RESERVED, "config_reserved", "a reserved byte of the configuration is not 0")                \
    X(ROWS, "config_rows", "a tile of more than 16 rows")                                          \
    X(COLSB, "config_colsb", "a tile with rows of more than 64 bytes")                             \
    X(HALF_A_TILE, "config_half_a_tile",                                                           \
      "a tile with rows but no columns, or the other way round")                                   \
    X(UNCONFIGURED, "tiles_unconfigured", "no ldtilecfg, or a tilerelease since")                  \
    X(NO_SHAPE, "tile_without_shape", "the configuration gives this tile no rows")                 \
    X(SAME_TILE, "dot_same_tile", "two operands are the same tile")                                \
    X(DWORDS, "tile_dwords", "a row of a tile that is moved or multiplied is not whole dwords")    \
    X(DOT_ROWS, "dot_rows", "the result and the first source differ in rows")                      \
    X(DOT_K, "dot_k", "dwords in a row of the first source and rows of the second differ")         \
    X(DOT_COLUMNS, "dot_columns", "the result and the second source differ in columns")            \
    X(NO_MEMORY, "no_memory", "no memory for this thread's tiles")

#define KTK_TILE_ENUM_KIND(id, name) KTK_TILE_##id,
enum ktk_tile_kind { KTK_TILE_KINDS(KTK_TILE_ENUM_KIND) KTK_TILE_NUM_KINDS };
#undef KTK_TILE_ENUM_KIND
#define KTK_TILE_ENUM_FAULT(id, name, text) KTK_TILE_FAULT_##id,
enum ktk_tile_fault { KTK_TILE_NO_FAULT, KTK_TILE_FAULTS(KTK_TILE_ENUM_FAULT) KTK_TILE_NUM_FAULTS };
#undef KTK_TILE_ENUM_FAULT

/* Once per process; again is harmless. 0, an errno, or -1 if this process has permission to use the
 * CPU's own tiles. */
int ktk_tile_install(void);
/* Instructions carried out since the last reset, by all threads. */
uint64_t ktk_tile_count(int kind);
void ktk_tile_reset_counts(void);
const char *ktk_tile_kind_name(int kind);
/* By default a fault prints its name and goes on to the SIGILL handler that was there before. While
 * recorded, it skips the instruction and is kept for its thread until taken. */
void ktk_tile_record_faults(int on);
int ktk_tile_take_fault(void);
const char *ktk_tile_fault_name(int fault);

#endif
