# Quantising into panels.


def pack_matrix(w, layout, str isa, ladder, int refits, panels):
    """Quantise float32 or bf16-bit rows (out, in) into panels, uint8 (num_panels, panel_bytes) with
    any row stride.

    ValueError if a weight is NaN or inf.
    """
    cdef ktk_matrix m
    _fill_matrix(&m, layout, False)
    cdef const ktk_kernels *kernels = _kernels(isa)
    w = np.ascontiguousarray(w)
    cdef int is_bf16 = w.dtype == np.uint16
    cdef int64_t num_rows = w.shape[0], row_bytes = w.strides[0]
    cdef int in_features = w.shape[1]
    cdef const uint8_t *first = <const uint8_t *>_address(w)
    cdef uint8_t *panel = <uint8_t *>_address(panels)
    cdef int64_t panel_stride = panels.strides[0]
    cdef const float *steps = <const float *>_address(ladder)
    cdef int num_steps = ladder.shape[0]
    cdef const void *rows[16]
    cdef int64_t p, n, row
    cdef int status = 0
    cdef float *work = <float *>malloc(<size_t>m.padded_in * 16 * 4 * 2)
    if work == NULL:
        raise MemoryError("no memory to quantise a panel")
    cdef unsigned callers
    with nogil:
        callers = ktk_float_mode_enter()
        for p in range(m.num_panels):
            for n in range(16):
                row = p * 16 + n
                rows[n] = <const void *>(first + row * row_bytes) if row < num_rows else NULL
            status = kernels.pack_panel(&m, in_features, rows, is_bf16, steps, num_steps, refits,
                                        work,
                                        panel + p * panel_stride)
            if status:
                break
        ktk_float_mode_leave(callers)
        free(work)
    if status:
        raise ValueError("weights hold NaN or inf: mend the checkpoint")
