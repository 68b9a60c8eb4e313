/* The table of formats. */
#include "ktk_kernels.h"

#define PANEL_ROW(ENUM, NAME, ZERO_POINT, IS_FLOAT, SUMS_OF)                                       \
    {NAME, IS_FLOAT, ZERO_POINT, SUMS_OF, 0, 0, 0, 0},
#define FLOAT_ROW(NAME, TEXT, TYPE, BYTES, PER_DWORD) {TEXT, 1, -1, 16, 1, BYTES, 0, 0},
#define INTEGER_ROW(NAME, TEXT, TYPE, WEIGHTS, BYTES, RUN, DWORDS, HEAD, HEAD_BYTES, FINE, ZERO,   \
                    HAS_MIN, MOST, ROW_HEAD)                                                       \
    {TEXT, 0, -1, 16, WEIGHTS, BYTES, FINE, ROW_HEAD},
const ktk_format_row ktk_formats[KTK_NUM_FORMATS] = {
    KTK_PANEL_FORMATS(PANEL_ROW) LF_FLOAT_FORMATS(FLOAT_ROW) LF_INTEGER_FORMATS(INTEGER_ROW)};
