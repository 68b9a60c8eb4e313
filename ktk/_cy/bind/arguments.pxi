# Python's arguments as C takes them: addresses of arrays, numbers of enums, structs of what
# describes a layer.

from cpython.buffer cimport PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

# name to index in the table
_FORMATS = {ktk_formats[i].name.decode(): i for i in range(KTK_NUM_FORMATS)}
_ACTIVATIONS = {"sigmoid_glu": KTK_SIGMOID_GLU, "gelu_tanh": KTK_GELU_TANH, "relu2": KTK_RELU2}
# By NumPy's dtype.char; bf16 comes as uint16.
_DTYPES = {"f": KTK_DTYPE_F32, "e": KTK_DTYPE_F16, "H": KTK_DTYPE_BF16}
_CACHED_DTYPES = {**_DTYPES, "b": KTK_DTYPE_I8}  # of keys and values


cdef void *_address(array) except? NULL:
    """Where a contiguous array's data begins (its __array_interface__ takes a microsecond to
    build).
    """
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_STRIDED_RO)
    cdef void *at = view.buf
    PyBuffer_Release(&view)
    return at


cdef const float *_floats(array) except? NULL:
    if array is None:
        return NULL
    return <const float *>_address(array)


cdef void _fill_matrix(ktk_matrix *m, layout, bint is_repacked) except *:
    """layout : ktk.experts.layout.MatrixLayout, of panels or of blocks."""
    m.format = _FORMATS[layout.format.name]
    m.padded_in = layout.padded_in
    m.num_panels = layout.num_panels
    m.group_size = layout.group_size
    m.activation_group = layout.activation_group
    m.scales_are_bf16 = layout.scales_are_bf16
    m.multiplier_group = layout.multiplier_group
    m.is_repacked = is_repacked
    m.rotation, m.rotation_seed = layout.rotation
    m.code_offset = layout.scale_bytes
    m.panel_bytes = layout.panel_bytes


cdef void _fill_activation(ktk_activation *a, act, bint has_gate) except *:
    a.kind = _ACTIVATIONS[act.kind]
    a.has_gate = has_gate
    a.alpha = act.alpha
    a.gate_min = act.gate_min
    a.gate_max = act.gate_max
    a.up_min = act.up_min
    a.up_max = act.up_max
    a.up_offset = act.up_offset


# Order is the C enum `ktk_projection`.
_PROJECTIONS = ("gate", "up", "down")


cdef const ktk_lora *_fill_lora(ktk_lora *to, lora) except? NULL:
    """lora : ktk.experts.lora.ExpertLora, whose arrays the caller holds; NULL without adapters."""
    if lora is None or not lora.pairs:
        return NULL
    to.rank = lora.rank
    to.scaling = lora.scaling
    to.dropout.seed = lora.seed
    to.dropout.threshold = int(lora.dropout * (1 << 32))
    to.dropout.scale = 1 / (1 - lora.dropout)
    for i, name in enumerate(_PROJECTIONS):
        to.of[i].a = to.of[i].b = NULL
        if name in lora.pairs:
            a, b = lora.pairs[name]
            to.dtype = _DTYPES[a.dtype.char]
            to.of[i].a = <const void *>_address(a)
            to.of[i].b = <const void *>_address(b)
    return to
