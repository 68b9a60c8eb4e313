# Formats of GGUF blocks: their table, their order for the kernels, what they hold.


def formats():
    """Names of the formats that kernels read, tuple of str."""
    return tuple(_FORMATS)


def block_formats():
    """{ggml type's name: (index, weights of a block, bytes of a block, weights that share a scale or 0: floats)}."""
    found = {}
    for name, i in _FORMATS.items():
        f = &ktk_formats[<int>i]
        if f.block_weights:
            found[name] = (i, f.block_weights, f.block_bytes, f.fine)
    return found


def repack_blocks(rows, int format, int in_features, str isa, out):
    """One expert's rows, uint8 (out_features, row bytes), out_features a multiple of 16, to the same bytes in the order
    the kernels read. out : uint8 of as many bytes, 64-byte aligned."""
    cdef const ktk_kernels *kernels = _kernels(isa)
    cdef ktk_matrix w
    _fill_blocks(&w, format, in_features, rows.shape[0] // 16, 32, False)
    cdef int64_t p, num_panels = w.num_panels, panel_bytes = w.panel_bytes
    cdef const uint8_t *first = <const uint8_t *>_address(rows)
    cdef uint8_t *to = <uint8_t *>_address(out)
    with nogil:
        for p in range(num_panels):
            kernels.repack(&w, first + p * panel_bytes, to + p * panel_bytes)


def unpack_blocks(rows, int format, int in_features, str isa, bint is_repacked):
    """What 16 rows, uint8 (16, row bytes), hold: float32 codes (in_features, 16), scales and minima (groups, 16).

    Value = code * scale + minimum; of float formats codes are the values, and the rest is None.
    """
    cdef const ktk_kernels *kernels = _kernels(isa)
    cdef ktk_matrix w
    _fill_blocks(&w, format, in_features, 1, 32, is_repacked)
    cdef int fine = ktk_formats[format].fine
    cdef int64_t groups = in_features // fine if fine else 1
    codes = np.zeros((in_features, 16), np.float32)
    scales, minima = np.zeros((groups, 16), np.float32), np.zeros((groups, 16), np.float32)
    work = np.zeros(64 * in_features + 64, np.uint8)
    cdef uint8_t *at = <uint8_t *>_address(work)
    at += -<uintptr_t>at & 63
    kernels.unpack(&w, <const uint8_t *>_address(rows), <float *>_address(codes), <float *>_address(scales),
                   <float *>_address(minima), at)
    return (codes, scales, minima) if fine else (codes, None, None)
