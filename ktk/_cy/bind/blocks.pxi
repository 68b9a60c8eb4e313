# The table of formats, and blocks of GGUF files: their order for the kernels, what they hold.


def formats():
    """Names of the formats that kernels read, packed ones and ggml types, tuple of str."""
    return tuple(_FORMATS)


def block_formats():
    """{ggml type's name: (weights of a block, bytes of a block,
    weights that share a scale or 0: floats, bytes of a row before its blocks)}.
    """
    found = {}
    for name, i in _FORMATS.items():
        f = &ktk_formats[<int>i]
        if f.block_weights:
            found[name] = (f.block_weights, f.block_bytes, f.fine, f.row_head)
    return found


def repack_blocks(rows, layout, str isa, out):
    """One expert's rows, uint8 (out_features, row bytes), out_features a multiple of 16, to the
    same bytes in the order the kernels read. layout : MatrixLayout. out : uint8 of as many bytes,
    64-byte aligned.
    """
    cdef const ktk_kernels *kernels = _kernels(isa)
    cdef ktk_matrix w
    _fill_matrix(&w, layout, False)
    cdef int64_t p
    cdef const uint8_t *first = <const uint8_t *>_address(rows)
    cdef uint8_t *to = <uint8_t *>_address(out)
    with nogil:
        for p in range(w.num_panels):
            kernels.repack(&w, first + p * w.panel_bytes, to + p * w.panel_bytes)


def unpack_blocks(rows, layout, str isa, bint is_repacked):
    """What 16 rows, uint8 (16, row bytes), hold: float32 codes (padded_in, 16), scales and minima
    (groups, 16).

    Value = code * scale + minimum; of float formats codes are the values, and the rest is None.
    """
    cdef const ktk_kernels *kernels = _kernels(isa)
    cdef ktk_matrix w
    _fill_matrix(&w, layout, is_repacked)
    cdef int fine = ktk_formats[w.format].fine
    cdef int64_t groups = w.padded_in // fine if fine else 1
    codes = np.zeros((w.padded_in, 16), np.float32)
    scales, minima = np.zeros((groups, 16), np.float32), np.zeros((groups, 16), np.float32)
    work = np.zeros(64 * w.padded_in + 64, np.uint8)
    cdef uint8_t *at = <uint8_t *>_address(work)
    at += -<uintptr_t>at & 63
    kernels.unpack(&w, <const uint8_t *>_address(rows), <float *>_address(codes),
                   <float *>_address(scales),
                   <float *>_address(minima), at)
    return (codes, scales, minima) if fine else (codes, None, None)
