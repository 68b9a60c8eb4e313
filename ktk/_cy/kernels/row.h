/* What the files of one ISA row give each other: rows.c, attend.c and quantise.c define it, gemm.c
 * and products_f32.c put it into the row's table. */
#ifndef KTK_ROW_H
#define KTK_ROW_H

#include "ktk_kernels.h"
#include "vec.h"

void CAT(ktk_quantise_, KTK_ISA)(const float *, int, int, int, int, int, uint8_t *, float *,
                                 int32_t *);
void CAT(ktk_rotate_, KTK_ISA)(float *, int64_t, int, int, uint32_t);
void CAT(ktk_activate_, KTK_ISA)(const ktk_activation *, const float *, const float *, int, int,
                                 const float *, const float *, float *);
void CAT(ktk_rotate_back_, KTK_ISA)(float *, int64_t, int, int, uint32_t);
void CAT(ktk_activate_back_, KTK_ISA)(const ktk_activation *, const float *, const float *,
                                      const float *, int, float *, float *, float *);
void CAT(ktk_drop_, KTK_ISA)(const ktk_dropout *, uint32_t, int, int, float *);
void CAT(ktk_load_, KTK_ISA)(int, const void *, int64_t, float *);
void CAT(ktk_store_, KTK_ISA)(int, const float *, int64_t, void *);
void CAT(ktk_combine_, KTK_ISA)(const float *, int64_t, const int32_t *, const float *, int, int,
                                float *);
void CAT(ktk_add_, KTK_ISA)(float *, const float *, int64_t);
void CAT(ktk_attend_, KTK_ISA)(const ktk_attend *, float *);
int CAT(ktk_pack_panel_, KTK_ISA)(const ktk_matrix *, int, const void *const *, int, const float *,
                                  int, int, float *, uint8_t *);

#endif
