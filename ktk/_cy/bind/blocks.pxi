# Formats of GGUF blocks: their table, their order for the kernels, what they hold.


def blocks_isa_rows():
    """Names of the ISAs that the kernels over GGUF blocks are compiled for, slowest first, tuple of str."""
    cdef int i = 0
    names = []
    while lf_kernels_row(i) != NULL:
        names.append(lf_kernels_row(i).name.decode())
        i += 1
    return tuple(names)


def block_formats():
    """{ggml type's name: (index, weights of a block, bytes of a block, weights that share a scale or 0: floats)}."""
    cdef const lf_format *f
    found = {}
    for i in range(lf_num_formats):
        f = &lf_formats[i]
        found[f.name.decode()] = (i, f.block_weights, f.block_bytes, f.fine)
    return found


cdef int _blocks_isa(str isa) except -1:
    names = blocks_isa_rows()
    if isa not in names:
        raise ValueError(f"isa={isa!r}: this build has {', '.join(names)}")
    return names.index(isa)


def repack_blocks(rows, int format, int in_features, str isa, out):
    """One expert's rows, uint8 (out_features, row bytes), out_features a multiple of 16, to the same bytes in the order
    the kernels read. out : uint8 of as many bytes, 64-byte aligned."""
    cdef const lf_kernels *kernels = lf_kernels_row(_blocks_isa(isa))
    cdef lf_matrix w
    w.format, w.is_repacked, w.in_features, w.activation_group = format, 0, in_features, 32
    cdef int64_t p, num_panels = rows.shape[0] // 16, panel_bytes = lf_panel_bytes(&w)
    cdef const uint8_t *first = <const uint8_t *>_address(rows)
    cdef uint8_t *to = <uint8_t *>_address(out)
    with nogil:
        for p in range(num_panels):
            kernels.repack(&w, first + p * panel_bytes, to + p * panel_bytes)


def unpack_blocks(rows, int format, int in_features, str isa, bint is_repacked):
    """What 16 rows, uint8 (16, row bytes), hold: float32 codes (in_features, 16), scales and minima (groups, 16).

    Value = code * scale + minimum; of float formats codes are the values, and the rest is None.
    """
    cdef const lf_kernels *kernels = lf_kernels_row(_blocks_isa(isa))
    cdef lf_matrix w
    w.format, w.is_repacked, w.in_features, w.activation_group = format, is_repacked, in_features, 32
    cdef int64_t groups = in_features // lf_formats[format].fine if lf_formats[format].fine else 1
    codes = np.zeros((in_features, 16), np.float32)
    scales, minima = np.zeros((groups, 16), np.float32), np.zeros((groups, 16), np.float32)
    work = np.zeros(lf_work_bytes(&w, 1) + 64, np.uint8)
    cdef uint8_t *at = <uint8_t *>_address(work)
    at += -<uintptr_t>at & 63
    kernels.unpack(&w, <const uint8_t *>_address(rows), <float *>_address(codes), <float *>_address(scales),
                   <float *>_address(minima), at)
    return (codes, scales, minima) if lf_formats[format].fine else (codes, None, None)
