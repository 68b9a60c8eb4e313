# What this build has and what this CPU runs.


cdef const ktk_kernels *_kernels(str isa) except NULL:
    cdef int i = 0
    while ktk_kernels_row(i) != NULL:
        if ktk_kernels_row(i).name.decode() == isa:
            return ktk_kernels_row(i)
        i += 1
    raise ValueError(f"isa={isa!r}: this build has {', '.join(isa_rows())}")


def isa_rows():
    """Names of the ISA levels this build holds, slowest first, tuple of str."""
    cdef int i = 0
    names = []
    while ktk_kernels_row(i) != NULL:
        names.append(ktk_kernels_row(i).name.decode())
        i += 1
    return tuple(names)


def kernel_isa(str isa, str format):
    """The level that the kernel which level ``isa`` has for a format, str, was compiled for."""
    return _kernels(isa).gemm[_FORMATS[format]].isa.decode()


def probe_features(asks_for_tiles=True):
    """(CPU features that this CPU and OS support, list of str; errno of refused tiles, or 0);
    see ktk_probe.h.
    """
    cdef int refused
    cdef uint64_t found = ktk_probe_features(bool(asks_for_tiles), &refused)
    bits = range(ktk_probe_num_features())
    names = [ktk_probe_feature_name(i).decode() for i in bits if found >> i & 1]
    return names, refused
