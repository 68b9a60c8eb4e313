/* The grids of the IQ formats, once for every ISA. */
#define LF_DEFINE_GRIDS
#include "grids.h"
